"""Candidates trained a little and ranked, on the tiny model; what the search promises is what the cut does."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import RankConfig
from compactlm_nemo.data.windows import Corpus, validation_windows
from compactlm_nemo.models.checkpoint import CheckpointSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import export_hf
from compactlm_nemo.report.orders import orders
from tests.data.test_questions import written
from tests.stages.test_evaluate_questions import QUESTIONS
from tests.support import commands
from tests.support.tiny_run import command
from tests.support.wandb_files import config_of, finished_records

SEARCH = [
    "search.ffn=[24,48]", "search.layers=[2,3]", "search.heads=[2]", "search.hidden=[24]", "search.top=2",
    "score.second_moments=true", "prune.reconstruct=least_squares", "prune.hidden=rotate", "prune.by_error=[mlp,heads]",
    "prune.samples=4", "rank.candidates=3", "rank.steps=4",
]  # fmt: skip


def run_recipe(inputs: Path, run: Path, recipe: str, *overrides: str) -> str:
    result = commands.run(command(inputs, run, *SEARCH, *overrides, recipe=recipe))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def ranked(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "ranked"
    run_recipe(inputs, run, "compress")
    return run


def ranking_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "rank" / "ranking.json").read_text())


def loss_of(inputs: Path, run: Path, stage: Path, tmp_path: Path) -> float:
    """Loss of a stage's model on the validation windows, by transformers on its exported weights."""
    dims = Dims.load(stage / "model.json")
    export_hf(run / "teacher" / "hf", tmp_path / "hf", dims, CheckpointSource(stage, dims), torch.float32)
    windows = validation_windows([Corpus(run / "tokens" / "train.a", 1.0)], 8, 4, 16, 1234)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        logits = model(windows[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_the_best_of_the_ranking_is_what_is_pruned(inputs: Path, ranked: Path, tmp_path: Path) -> None:
    ranking, found = ranking_of(ranked), json.loads((ranked / "search" / "candidates.json").read_text())
    assert len(found) == 4 and sorted(entry["candidate"] for entry in ranking) == [0, 1, 2]
    assert [entry["loss"] for entry in ranking] == sorted(entry["loss"] for entry in ranking)
    best = ranking[0]
    trained = ranked / "rank" / str(best["candidate"]) / "distill"
    assert best["loss"] == pytest.approx(loss_of(inputs, ranked, trained, tmp_path), abs=1e-5)
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 4
    assert read_manifest(ranked / "student")["results"]["shape"] == best
    assert Dims.load(ranked / "student" / "model.json").ffn_hidden_size == best["ffn"]


def test_zero_shot_losses_of_the_search_are_those_of_the_cut(inputs: Path, ranked: Path, tmp_path: Path) -> None:
    found = json.loads((ranked / "search" / "candidates.json").read_text())
    measured = [entry.get("zero_shot_loss") for entry in found]
    assert measured[0] <= measured[1] and measured[2:] == [None, None]
    predicted = [entry["predicted_loss"] for entry in found]
    assert sorted(predicted[:2]) + predicted[2:] == sorted(predicted)
    for index, entry in enumerate(found[:2]):
        stage = ranked / "rank" / str(index) / "student"
        assert entry["zero_shot_loss"] == pytest.approx(loss_of(inputs, ranked, stage, tmp_path), abs=1e-5)
        assert read_manifest(stage)["results"]["loss_after"] == pytest.approx(entry["zero_shot_loss"], abs=1e-6)


def test_one_task_a_candidate_gives_the_same_ranking(inputs: Path, ranked: Path, tmp_path: Path) -> None:
    run = tmp_path / "array"
    run_recipe(inputs, run, "rank", "rank.candidates=1")  # only for what all candidates share
    for index in (2, 1):
        run_recipe(inputs, run, "rank", f"rank.only={index}", "wandb.mode=offline")
        assert (run / "rank" / str(index) / "distill" / "manifest.json").exists()
        records = finished_records(run / "rank" / str(index), num_runs=1)
        [sent] = [record.run for record in records if record.HasField("run")]
        words = (sent.display_name, sent.run_group, sent.job_type, config_of(sent)["wandb.parent"])
        assert words == (f"array-rank-{index}", "array", "rank", "array")
    assert len(ranking_of(run)) == 1, "a single candidate ranks nothing"
    out = run_recipe(inputs, run, "rank")
    assert out.count("distill: done before, skipped") == 3
    assert (run / "rank" / "ranking.json").read_bytes() == (ranked / "rank" / "ranking.json").read_bytes()


def test_halving_drops_the_worse_half_on_the_way(inputs: Path, ranked: Path, tmp_path: Path) -> None:
    run = tmp_path / "halved"
    run_recipe(inputs, run, "rank", "rank.halving=1", "rank.candidates=4")
    ranking = ranking_of(run)
    assert len(ranking) == 2

    def losses(index: int) -> list[float]:
        folder = run / "rank" / str(index)
        parts = ("distill", "progress/distill")  # trained to the end, or stopped
        paths = [folder / part / "metrics.jsonl" for part in parts]
        path = next(path for path in paths if path.is_file())
        return [json.loads(line)["train/loss"] for line in path.read_text().splitlines()]

    steps = {index: len(losses(index)) for index in range(4)}
    assert sorted(steps.values()) == [2, 2, 4, 4]
    survivors = {index for index, count in steps.items() if count == 4}
    assert survivors == {entry["candidate"] for entry in ranking}
    assert survivors == set(sorted(range(4), key=lambda index: losses(index)[1])[:2])
    # A survivor that was stopped on the way is the one that never stopped.
    whole = {entry["candidate"]: entry["loss"] for entry in ranking_of(ranked)}
    for entry in ranking:
        if entry["candidate"] in whole:
            assert entry["loss"] == whole[entry["candidate"]]


def test_a_task_decides_with_the_loss(inputs: Path, ranked: Path, tmp_path: Path) -> None:
    """Two candidates that are trained already are ordered anew: by what the evaluation measured of each."""
    shutil.copytree(ranked, tmp_path / "run", symlinks=True)
    questions = written(tmp_path / "own.jsonl", *QUESTIONS)
    words = [f"evaluate.choices.own={questions}", "evaluate.resamples=100", "rank.by.own=2"]
    out = run_recipe(inputs, tmp_path / "run", "rank", "rank.by.loss=0.5", *words)
    assert out.count("distill: done before, skipped") == 3
    losses = {entry["candidate"]: entry["loss"] for entry in ranking_of(ranked)}
    ranking = ranking_of(tmp_path / "run")
    for entry in ranking:
        folder = tmp_path / "run" / "rank" / str(entry["candidate"])
        metrics = json.loads((folder / "evaluate" / "quality.json").read_text())["metrics"]
        models = next(each["models"] for each in metrics if each["metric"] == "choices/own")
        assert entry["tasks"] == {"own": {name: models[name]["value"] for name in ("pruned", "distilled")}}
        assert entry["loss"] == losses[entry["candidate"]]
        assert entry["loss_before"] == read_manifest(folder / "student")["results"]["loss_after"]
        assert entry["score"] == pytest.approx(0.5 * entry["loss"] - 2 * models["distilled"]["value"], abs=1e-12)
    assert [entry["score"] for entry in ranking] == sorted(entry["score"] for entry in ranking)


def test_orders_before_and_after_by_hand() -> None:
    """Four candidates: training turns the order by loss round, and leaves that by accuracy."""
    shape = {"layers": 1, "hidden": 2, "ffn": 3, "heads": 4}
    entries = [
        shape | {"candidate": i, "loss_before": 4.0 - i, "loss": 1.0 + i, "score": float(i)}
        | {"tasks": {"own": {"pruned": 0.5 - i / 10, "distilled": 0.9 - i / 10}}}
        for i in range(4)
    ]  # fmt: skip
    text = "\n".join(orders(entries))
    assert "| 0 | 1 layers, hidden 2, MLP 3, heads 4 | 4.0000 | 1.0000 | 0.5000 | 0.9000 | 0.0000 |" in text
    assert re.findall(r"\| (\S.*?) \| +(-?1\.00) \|", text) == [
        ("loss, before and after", "-1.00"), ("own, before and after", "1.00"),
        ("loss and own, before", "-1.00"), ("loss and own, after", "1.00"),
    ]  # fmt: skip
    assert orders([{key: value for key, value in entries[0].items() if key != "tasks"}]) == [] == orders([])


def test_rounds_of_halving() -> None:
    assert RankConfig(steps=400).rounds() == [400]
    assert RankConfig(steps=400, halving=2).rounds() == [100, 200, 400]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rank.only=3", "rank.candidates=3"], r"rank.only=3 must be in \[0, rank.candidates=3\)"),
        (["rank.halving=3", "rank.steps=4"], "rank.halving=3 must be >= 0 and leave a step"),
        (["rank.by.loss=0"], "rank.by has loss: 0.0, which must be a number > 0"),
        (["rank.by.own=1", "rank.halving=1", "rank.candidates=2"], "rank.halving drops candidates by their loss"),
        (["distill.stop_after=11", "distill.steps=10"], "distill.stop_after=11 must be in"),
    ],
)
def test_settings_that_make_no_sense(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message):
        compose(["run.dir=a", "model.source=b", *overrides])


def test_a_task_that_nothing_measures_is_refused(inputs: Path, tmp_path: Path) -> None:
    done = commands.run(command(inputs, tmp_path / "run", "rank.candidates=2", "rank.by.nope=1", recipe="rank"))
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert "rank.by has nope, which is none of ['loss']; add it to evaluate.choices or evaluate.tasks" in done.stderr
