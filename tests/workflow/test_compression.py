"""The door for Python: the code of its page runs and makes what the recipes make; what is wrong is raised."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.config.values import overrides_of
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.compression import Compression
from tests.support import commands
from tests.support.tiny_run import command

PAGE = CONF.parent / "docs" / "python.md"
BASE = {"run.dir": "x", "model.source": "y"}
THEIR_SIZES = '{"search.ffn": [9216], "distill.steps": 1000}'
NOTEBOOK = """
import json, sys
import psutil, torch.distributed
SMALL = json.loads({small!r})
{first}
held = run.results("distill")
{second}
assert run.results("distill") == held, "a second call does nothing again"
other = Compression(settings | SMALL | {{"run.dir": "runs/second", "export.of": "student"}})
other.plan()
pruned = other.export()
assert not other.folder("distill").exists()
try:
    Compression({{"run.dir": "x", "distill.stepz": 3}})
except Exception as error:
    refused = type(error).__name__ + ": " + str(error)
print()
print(json.dumps({{
    "layers": len(scores.depth("bi")), "cut": cut, "trained": trained, "folder": str(folder), "pruned": str(pruned),
    "rows": [row["model"] for row in run.evaluate()], "refused": refused,
    "group": torch.distributed.is_initialized(), "children": [p.name() for p in psutil.Process().children()],
}}))
"""


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def _small(inputs: Path, run: Path) -> dict[str, Any]:
    """Return the settings of the tiny run in place of those that the page gives for a large one."""
    given = ("run.dir=", "model.source=", "data.train", "data.heldout")
    words = [word.split("=", 1) for word in command(inputs, run)[2:] if not word.startswith(given)]
    return {key: json.loads(value) for key, value in words}


@pytest.fixture(scope="module")
def notebook(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Run the page's code twice in one process, in a folder where its texts lie; return it and what was printed."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(inputs / "train.jsonl", folder / "web.jsonl")
    shutil.copy(inputs / "test.jsonl", folder / "test.jsonl")
    code, more = _blocks()
    assert len([line for line in code.splitlines() if line]) <= 10
    mine = code.replace("/models/llama", str(inputs / "teacher")).replace(THEIR_SIZES, "SMALL")
    assert mine.count("SMALL") == 1
    text = NOTEBOOK.format(small=json.dumps(_small(inputs, folder)), first=mine + more, second=mine)
    (folder / "notebook.py").write_text(text)
    done = commands.run(["-m", "notebook"], cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_the_code_of_the_page_runs_twice_in_one_process(notebook: tuple[Path, dict]) -> None:
    folder, told = notebook
    assert told["layers"] == 4 and told["cut"]["shape"]["layers"] == 2 and told["trained"]["tokens"] == 6 * 4 * 16
    assert told["rows"] == ["teacher", "pruned", "distilled"]
    assert (folder / told["folder"] / "model.safetensors").is_file()
    assert (folder / told["pruned"] / "model.safetensors").is_file()


def test_no_group_and_no_process_is_left(notebook: tuple[Path, dict]) -> None:
    assert notebook[1]["group"] is False and notebook[1]["children"] == []


def test_a_wrong_setting_is_raised_as_one_line(notebook: tuple[Path, dict]) -> None:
    refused = notebook[1]["refused"]
    assert refused.startswith("ConfigError: ") and "distill.stepz" in refused and "\n" not in refused


def test_the_door_makes_what_the_recipes_make(notebook: tuple[Path, dict], inputs: Path, tmp_path: Path) -> None:
    words = [word for word in command(inputs, tmp_path / "run") if not word.startswith(("data.train", "data.heldout"))]
    for name in ("web.jsonl", "test.jsonl"):  # the same words as on the page, so that fingerprints are comparable
        shutil.copy(notebook[0] / name, tmp_path / name)
    texts = ["data.train.web=web.jsonl", "data.heldout.test=test.jsonl"]
    done = commands.run([*words, *texts], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(CONF.parent)})
    assert done.returncode == 0, done.stderr
    for stage in ("teacher", "tokens", "score", "search", "student", "distill"):
        ours, theirs = (read_manifest(run / stage) for run in (notebook[0] / "runs" / "first", tmp_path / "run"))
        assert ours["fingerprint"] == theirs["fingerprint"] and _untimed(ours) == _untimed(theirs), stage


def test_the_package_is_light_and_the_door_needs_no_torch() -> None:
    probe = (
        "import sys, compactlm_nemo; assert not {'hydra', 'omegaconf', 'torch'} & set(sys.modules);"
        "from compactlm_nemo import Compression; Compression({'run.dir': 'x', 'model.source': 'y'});"
        "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=CONF.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sections_names_and_values_arrive() -> None:
    config = compose(
        overrides_of(
            BASE
            | {
                "distill": {"lr": 1e-4, "loss": {"cross_entropy": 0.5}},
                "data": {"train": {"web": "a b.jsonl", "code": {"path": Path("c'd.jsonl"), "weight": 2}}},
                "search.ffn": (64, 32),
                "score.width": [WidthMetric.taylor],
                "run.time_limit": None,
                "evaluate.tasks": ["arc", "a,b"],
                "parallel.sequence_parallel": False,
            }
        )
    )
    assert config.distill.lr == 1e-4 and config.distill.loss.cross_entropy == 0.5
    assert config.data.train["web"].path == "a b.jsonl"
    assert (config.data.train["code"].path, config.data.train["code"].weight) == ("c'd.jsonl", 2)
    assert config.search.ffn == [64, 32] and config.score.width == [WidthMetric.taylor]
    assert config.evaluate.tasks == ["arc", "a,b"] and config.run.time_limit is None


@settings(deadline=None, max_examples=20)
@example("A²")
@example("it's \\")
@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=30).filter(lambda text: "\\${" not in text))
def test_any_text_arrives_as_it_is(text: str) -> None:
    config = compose(overrides_of(BASE | {"wandb.notes": text, "evaluate.tasks": [text, "b"]}))
    assert (config.wandb.notes, config.evaluate.tasks) == (text, [text, "b"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"distill.lr": -1}, "distill.lr=-1"),
        ({"distill.steps": "many"}, "many"),
        ({"search.ffn": {3}}, "is a set; give text, a number, a list or a mapping"),
        ({3: 4}, "is no setting; give dotted names"),
        ({"experiment": "nothing"}, "nothing"),
        ({"model.source": "gone"}, None),
    ],
)
def test_what_is_wrong_is_a_config_error(wrong: dict, words: str | None) -> None:
    with pytest.raises(ConfigError, match=words or "model.source=gone does not exist"):
        Compression(BASE | wrong).run("score")


def _untimed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The results without what a clock says."""
    return {name: value for name, value in manifest["results"].items() if not name.endswith("_seconds")}
