"""NeMo 2, where `make test-nemo` has put it, and tiny models that it and we write."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from compactlm_nemo.models.build import ParameterSource
from compactlm_nemo.models.checkpoint_metadata import read_metadata
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.nemo_config import CONFIGS, PACKAGE
from tests.support.bridge import make_folder

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "nemo" / "golden.json"


class Case(NamedTuple):
    """A case of `tiny_models`, what NeMo's import needs otherwise in it, and the classes that it is asked for by."""

    case: str
    changes: dict[str, Any]
    model: str
    settings: str


_NEMOS_EXPERTS = {
    "attention_bias": False, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 2,
}  # fmt: skip
"""Of which NeMo's import reads neither number nor choice."""
CASES = {
    "llama": Case("llama", {}, "LlamaModel", "Llama2Config7B"),
    "llama_tied_llama3_rope": Case("llama_tied_llama3_rope", {}, "LlamaModel", "Llama31Config8B"),
    "qwen2": Case("qwen2", {"hidden_size": 64}, "Qwen2Model", "Qwen2Config500M"),  # heads fill the width
    "qwen2_tied": Case("qwen2_tied", {"hidden_size": 64}, "Qwen2Model", "Qwen2Config500M"),
    "qwen3": Case("qwen3", {"head_dim": 128}, "Qwen3Model", "Qwen3Config600M"),  # the head size is NeMo's
    "qwen3_tied": Case("qwen3_tied", {"head_dim": 128}, "Qwen3Model", "Qwen3Config600M"),
    "nemotron": Case("nemotron", {}, "NemotronModel", "Nemotron3Config4B"),
    "mistral_window": Case("mistral_window", {}, "MistralModel", "MistralConfig7B"),
    "mixtral": Case("mixtral", {"sliding_window": None}, "MixtralModel", "MixtralConfig8x7B"),
    "qwen3_moe": Case("qwen3_moe", _NEMOS_EXPERTS, "Qwen3Model", "Qwen3Config30B_A3B"),
}
_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FORGOTTEN: dict[str, dict[str, Any]] = {
    "llama_tied_llama3_rope": {"rope_scaling": {**_ROPE, "original_max_position_embeddings": 8192}},
    "qwen2_tied": {"tied_embeddings": False},  # it writes the matrix twice
    "qwen3": {"max_position_embeddings": 40960},
    "qwen3_tied": {"max_position_embeddings": 40960},
    "qwen3_moe": {"max_position_embeddings": 40960},
    "mistral_window": {"max_position_embeddings": 7},  # its window
}
"""Case -> what NeMo's import does not take from a Hugging Face config, as it then is in the checkpoint."""


def make_source(name: str, folder: Path) -> tuple[Dims, ParameterSource]:
    """Write a case as a Hugging Face folder with a tokenizer."""
    return make_folder(CASES[name].case, CASES[name].changes, folder)


def settings_classes() -> list[str]:
    """Every class of `nemo_config.CONFIGS` with the module that NeMo has it in."""
    modules = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "nemotron")
    return [f"{PACKAGE}.{module}.{kind}" for kind in CONFIGS for module in modules if kind.lower().startswith(module)]


def nemo_python() -> Path:
    """The Python that has NeMo 2; skips the test where there is none."""
    python = Path(os.environ.get("COMPACTLM_NEMO2", ROOT / ".venv-nemo2" / "bin" / "python"))
    if not python.exists():
        pytest.skip(f"needs NeMo 2 in {python}: make test-nemo")
    return python


def nemo_environment() -> dict[str, str]:
    """The environment with the stand-ins for Transformer Engine and for CUDA."""
    stand_ins = os.pathsep.join(str(ROOT / "tests" / tool / "stand_in") for tool in ("bridge", "nemo"))
    return {**os.environ, "PYTHONPATH": stand_ins, "HF_HUB_OFFLINE": "1", "TORCH_COMPILE_DISABLE": "1"}


def run_nemo(jobs: list[list[str]], folder: Path) -> None:
    """Let NeMo do a list of jobs (tests/nemo/tool.py)."""
    python = nemo_python()
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [str(python), str(ROOT / "tests" / "nemo" / "tool.py"), str(folder / "jobs.json")],
        capture_output=True, text=True, timeout=600, env=nemo_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def described(folder: Path) -> dict[str, Any]:
    """The model in an `io.json`: the classes of model, settings and tokenizer, and the settings' plain values.

    Read by the form of Fiddle's JSON alone.
    """
    text = json.loads((folder / "context" / "io.json").read_text())
    objects = text["objects"]

    def items(reference: dict[str, Any]) -> dict[str, Any]:
        return {key.split("'")[1]: value for key, value in objects[reference["key"]]["items"]}

    def made(reference: dict[str, Any]) -> str:
        call = items(objects[reference["key"]]["metadata"])["fn_or_cls"]
        return f"{call['module']}.{call['name']}"

    def plain(value: dict[str, Any]) -> Any:
        if value["type"] == "leaf":
            return value["value"]
        if value["type"] == "pyref":
            return f"{value['module']}.{value['name']}"
        target = objects[value["key"]]
        return [plain(item) for _, item in target["items"]] if target["type"]["name"] == "list" else made(value)

    root = items(text["root"])
    model = items(root["model"])
    return {
        "root": made(text["root"]),
        "trainer": made(root["trainer"]),
        "model": made(root["model"]),
        "settings": made(model["config"]),
        "tokenizer": [made(model["tokenizer"]), plain(items(model["tokenizer"])["pretrained_model_name"])],
        "values": {name: plain(value) for name, value in items(model["config"]).items()},
    }


def written(folder: Path, settings: set[str]) -> dict[str, Any]:
    """What is in a checkpoint: keys with shapes, states with their number, what Megatron-Core says, the model."""
    stored = read_metadata(folder / "weights").state_dict_metadata
    tensors = {k: v for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    objects = stored.keys() - tensors.keys()
    model = described(folder)
    model["values"] = {name: value for name, value in sorted(model["values"].items()) if name in settings}
    return {
        "tensors": {key: [str(tensor.properties.dtype), *tensor.size] for key, tensor in sorted(tensors.items())},
        "states": dict(sorted(Counter(key.split("/")[0] for key in objects).items())),
        "numbers": sorted({key.rpartition("/")[2] for key in objects}),
        "metadata": json.loads((folder / "weights" / "metadata.json").read_text()),
        "described": model,
    }
