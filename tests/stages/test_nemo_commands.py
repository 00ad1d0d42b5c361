"""The commands of docs/nemo.md: those of recipes run as they stand, on a tiny checkpoint in the place of the user's."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from compactlm_nemo.config.load import CONF
from compactlm_nemo.models.hf import open_hf
from compactlm_nemo.models.nemo import export_nemo
from tests.support import commands
from tests.support.tiny_run import make_inputs

PAGE = (CONF.parent / "docs" / "nemo.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
PYTHON = "/opt/compactlm/bin/python"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and a checkpoint of NeMo without any other file of the model."""
    folder = make_inputs(tmp_path_factory.mktemp("page"))
    dims, source = open_hf(folder / "teacher")
    export_nemo(folder / "teacher", folder / "checkpoint", dims, source, torch.float32, 0)
    shutil.copyfile(folder / "train.jsonl", folder / "web.jsonl")
    return folder


def _words(block: str, files: Path, run: Path) -> list[str]:
    text = block.replace("\\\n", " ").replace("/checkpoints/llama31_8b", f"{files}/checkpoint")
    for name in ("web.jsonl", "test.jsonl"):
        text = re.sub(rf"(?<=[=\s]){name}", f"{files}/{name}", text)
    python, *words = shlex.split(text.replace("/runs/width", str(run)))
    assert python == PYTHON
    return words


SMALL = [
    "search.hidden=[24]", "search.ffn=[32]", "search.layers=[4]", "search.heads=[4]", "data.sequence_length=16",
    "distill.steps=2", "distill.global_batch=16",
]  # fmt: skip
"""In place of the experiment, whose teacher has other sizes."""


@pytest.mark.parametrize("number", [1, 2])
def test_a_dry_run_of_the_page_plans_with_a_checkpoint_of_nemo(number: int, files: Path, tmp_path: Path) -> None:
    assert len(BLOCKS) == 4
    words = [word for word in _words(BLOCKS[number], files, tmp_path / "run") if not word.startswith("experiment=")]
    done = commands.run([*words, *SMALL])
    assert done.returncode == 0, done.stderr
    assert (PYTHON in done.stdout) is (number == 2), "on a cluster the job runs that Python"


def test_the_export_of_the_page_is_refused_where_python_has_no_nemo(files: Path, tmp_path: Path) -> None:
    words = _words(BLOCKS[3], files, tmp_path / "run")
    assert words[-1] == "export.verify=python"
    done = commands.run(words)
    assert done.returncode == 2 and "export.verify=python" in done.stderr and "nemo" in done.stderr, done.stderr


def test_the_environment_of_the_page_sees_the_packages_around_it(tmp_path: Path) -> None:
    first, second = BLOCKS[0].splitlines()
    assert second == "PIP_CONSTRAINT= /opt/compactlm/bin/pip install --editable ."
    command = shlex.split(first.replace("/opt/compactlm", str(tmp_path / "environment")))
    subprocess.run([*command[:3], "--without-pip", *command[3:]], check=True)
    settings = (tmp_path / "environment" / "pyvenv.cfg").read_text()
    assert "include-system-site-packages = true" in settings
