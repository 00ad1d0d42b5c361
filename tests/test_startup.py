"""A question or a mistake is answered before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compactlm_nemo.config.load import CONF

ROOT = CONF.parent
HEAVY = {"torch", "megatron", "transformers", "wandb", "matplotlib", "scipy", "datasets", "lm_eval"}
PROBE = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
code = 0
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as error:
    code = error.code or 0
print(json.dumps({"code": code, "modules": sorted({name.split(".")[0] for name in sys.modules})}), file=sys.stderr)
"""


def _start(words: list[str]) -> tuple[int, set[str], str]:
    """Exit code, top-level modules at the end, and all that was printed."""
    command = [sys.executable, "-c", PROBE, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    *messages, last = done.stderr.splitlines()
    found = json.loads(last)
    return found["code"], set(found["modules"]), done.stdout + "\n".join(messages)


PLAN = ["experiment=llama31_8b_to_4b_width", "model.source=absent", "dry_run=true"]


@pytest.mark.parametrize(
    ("words", "code", "answer"),
    [
        (["recipes.compress", "--help"], 0, "settings (key = default)"),
        (["recipes.rank", "--help"], 0, "rank.candidates"),
        (["recipes.compare_scores", "--help"], 0, "compare_scores a="),
        (["recipes.submit", "--help"], 0, "recipes.submit RECIPE"),
        (["recipes.submit", "compress", "nodes=2", "run.dir=x", "model.source=absent"], 2, "model.source=absent does"),
        (["recipes.status", "run.dir=absent"], 2, "run.dir=absent holds no run"),
        (["recipes.dashboard", "dry_run=true"], 0, "| Losses |"),
        (["recipes.distill", "distill.stepz=3"], 2, "distill.stepz"),
        (["recipes.score", "run.dir=x", "model.source=y", "score.samples=0"], 2, "score.samples=0 must be > 0"),
        (["recipes.compress", *PLAN, "parallel.tp=3", "distill.micro_batch=7"], 2, "parallel.tp=3"),
        (["recipes.rounds", *PLAN, "parallel.pp=50"], 2, "cannot split 32 layers"),
        (["recipes.compress", "run.dir=x", "model.source=absent"], 2, "model.source=absent does not exist"),
    ],
)  # fmt: skip
def test_nothing_heavy_is_imported(words: list[str], code: int, answer: str) -> None:
    found, modules, printed = _start(words)
    assert found == code, printed
    assert answer in printed
    assert not modules & HEAVY


def test_the_probe_sees_what_is_imported() -> None:
    """The test above is worth nothing if it does not."""
    _, modules, _ = _start(["recipes.compress", *PLAN])
    assert "transformers" in modules


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_folder_is_checked_without_them_too(family: str, tmp_path: Path) -> None:
    from tests.support.tiny_models import save_tiny

    save_tiny(family, tmp_path / "model")
    settings = [f"run.dir={tmp_path}/run", f"model.source={tmp_path}/model", "parallel.pp=50", "distill.micro_batch=3"]
    code, modules, printed = _start(["recipes.compress", *settings])
    assert code == 2 and "parallel.pp=50" in printed and "distill.micro_batch=3" in printed
    assert not modules & HEAVY
