"""The whole road on a tiny random model: run, rerun, kill and go on; the exported folder is the trained student."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from compactlm_nemo.config.load import CONF
from tests.support import commands
from tests.support.tiny_run import command, metrics
from tests.support.wandb_files import config_of, finished_records, history_rows

ROOT = CONF.parent


def _extras(inputs: Path) -> list[str]:
    """What only the finished run has, because it takes long: tasks, W&B in a file, and timed layers."""
    tasks = ["evaluate.tasks=[own_choice]", f"evaluate.task_folder={inputs}/tasks"]
    return [*tasks, "wandb.mode=offline", "search.latency_ms=1e9", "search.context=32"]


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    # From a shell, imports included: their warnings must not reach the user.
    words, env = command(inputs, run, *_extras(inputs)), {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Hugging Face folder" in result.stdout
    assert "warn" not in result.stderr.lower(), result.stderr
    return run


def test_a_second_run_does_nothing_and_says_so(inputs: Path, finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    result = commands.run(command(inputs, finished, *_extras(inputs)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done before, skipped") == 9
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}


def test_layers_are_timed_for_a_latency_budget(finished: Path) -> None:
    table = json.loads((finished / "search" / "latency.json").read_text())
    ms = {part: table[part][0]["ms"] for part in ("attention", "mlp", "head")}
    [candidate] = json.loads((finished / "search" / "candidates.json").read_text())
    assert candidate["latency_ms"] == pytest.approx(2 * (ms["attention"] + ms["mlp"]) + ms["head"])
    assert table == json.loads((finished / "progress" / "search" / "latency.json").read_text())
    assert table["metadata"]["context"] == 32 and table["metadata"]["device"]


def test_the_exported_folder_is_the_trained_student(finished: Path) -> None:
    folder = finished / "export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((finished / "student/manifest.json").read_text())["results"]["params"]
    )
    assert AutoTokenizer.from_pretrained(folder)("w1 w2")["input_ids"] == [3, 4]


def test_wandb_has_every_metric_of_every_step_and_the_configuration(finished: Path) -> None:
    records = finished_records(finished / "progress" / "distill", num_runs=1)
    (run,) = [record.run for record in records if record.HasField("run")]
    config = config_of(run)
    assert config["distill.steps"] == 6 and config["search.ffn"] == [32]
    history = history_rows(records)
    lines = [json.loads(line) for line in (finished / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == len(lines) == 6
    for logged, line in zip(history, lines, strict=True):
        assert {key: logged[key] for key in line} == line
    assert {
        "train/loss", "train/kd_forward_kl", "train/lm_loss_nats", "train/teacher_lm_loss_nats", "train/grad_norm",
        "train/lr", "train/tokens", "train/batch", "train/skipped_steps", "train/rewinds", "perf/tokens_per_second",
        "perf/tflops_per_device", "perf/step_seconds", "perf/peak_memory_bytes", "perf/checkpoint_seconds",
        "perf/checkpoint_share", "step",
    } == lines[0].keys()  # fmt: skip


def test_train_and_heldout_texts_of_one_name_stay_apart(inputs: Path, finished: Path) -> None:
    counts = json.loads((finished / "tokens" / "manifest.json").read_text())["results"]["tokens"]
    assert counts == {"train.a": 60 * 41, "heldout.a": 10 * 41}
    tokenizer = AutoTokenizer.from_pretrained(inputs / "teacher")
    for part, file in (("train", "train.jsonl"), ("heldout", "test.jsonl")):
        want: list[int] = []
        for line in (inputs / file).read_text().splitlines():
            want += [*tokenizer(json.loads(line)["text"])["input_ids"], 0]
        stored = numpy.fromfile(finished / "tokens" / f"{part}.a.bin", dtype=numpy.uint16)
        assert stored.tolist() == want


def test_a_document_in_both_parts_is_refused(inputs: Path, tmp_path: Path) -> None:
    lines = (inputs / "test.jsonl").read_text().splitlines()[3:4] + (inputs / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    run = tmp_path / "run"
    result = commands.run(command(inputs, run, f"data.train.a={tmp_path}/train.jsonl"))
    assert result.returncode == 2
    assert "train.jsonl:1 and" in result.stderr and "test.jsonl:4" in result.stderr, result.stderr


def test_tasks_of_all_three_models_are_in_the_results(finished: Path) -> None:
    rows = json.loads((finished / "evaluate" / "results.json").read_text())
    assert [row["task_own_choice/acc"] in (0.0, 1.0) for row in rows] == [True] * 3
    assert "own_choice/acc" in (finished / "report" / "report.md").read_text()
    assert not (finished / "evaluate" / "as_hf").exists()


def test_losses_in_the_results_are_what_transformers_computes(inputs: Path, finished: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs / "teacher")
    stream: list[int] = []
    for line in (inputs / "test.jsonl").read_text().splitlines():
        stream += [*tokenizer(json.loads(line)["text"])["input_ids"], 0]
    windows = torch.tensor([stream[i * 16 : i * 16 + 17] for i in range(4)])
    rows = {row["model"]: row for row in json.loads((finished / "evaluate" / "results.json").read_text())}
    for label, folder in (("teacher", inputs / "teacher"), ("distilled", finished / "export" / "hf")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(windows[:, :-1]).logits.double()
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        assert rows[label]["loss_a"] == pytest.approx(float(want), rel=1e-5)


def test_metrics_are_by_document_with_intervals(inputs: Path, finished: Path) -> None:
    """Four windows of 16 targets, of documents of 41 tokens: the second begins in the third window."""
    quality = json.loads((finished / "evaluate" / "quality.json").read_text())
    rows = {row["model"]: row for row in json.loads((finished / "evaluate" / "results.json").read_text())}
    assert (quality["resamples"], quality["seed"]) == (1000, 1234)
    metrics = {metric["metric"]: metric for metric in quality["metrics"]}
    assert list(metrics) == ["loss/a", "top1_agreement/a", "kl/a"]  # two documents are too few for slices
    for label in ("teacher", "pruned", "distilled"):
        found = metrics["loss/a"]["models"][label]
        assert found["value"] == pytest.approx(rows[label]["loss_a"], rel=1e-12)
        assert found["low"] <= found["value"] <= found["high"]
    assert metrics["loss/a"]["num_units"] == quality["details"]["heldout"]["a"]["documents"] == 2
    assert (
        set(metrics["kl/a"]["models"]) == {"pruned", "distilled"} and metrics["kl/a"]["models"]["pruned"]["value"] > 0
    )
    assert [each["tokens"] for each in quality["details"]["heldout"]["a"]["by_position"]] == [8] * 8
    assert "| loss/a | 2 documents |" in (finished / "report" / "report.md").read_text()


def test_two_by_two_ranks_give_the_run_of_one(inputs: Path, finished: Path, tmp_path: Path) -> None:
    result = commands.run(command(inputs, tmp_path / "run", "parallel.tp=2", "parallel.pp=2"), ranks=4)
    assert result.returncode == 0, result.stderr
    one, four = (load_file(run / "score" / "scores.safetensors") for run in (finished, tmp_path / "run"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-5, atol=1e-7)
    for a, b in zip(metrics(finished), metrics(tmp_path / "run"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


SIGNS = (
    "teacher", "tokens", "score", "search", "student", "progress/distill/checkpoints/latest.json", "distill",
    "evaluate", "export", "report",
)  # fmt: skip


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_to_the_same_result(inputs: Path, finished: Path, tmp_path: Path, how: int) -> None:
    """Killed once in every stage folder's lifetime: as soon as each appears, and in the middle of training."""
    run = tmp_path / "run"
    for sign in SIGNS:
        process = commands.start(command(inputs, run), tmp_path / "out", tmp_path / "err")
        while not (run / sign).exists() and process.is_alive():
            time.sleep(0.01)
        os.kill(process.pid, how)
        process.join(120)
    result = commands.run(command(inputs, run))
    assert result.returncode == 0, result.stderr
    assert metrics(run) == metrics(finished)
    for name, value in load_file(finished / "export/hf/model.safetensors").items():
        assert torch.equal(load_file(run / "export/hf/model.safetensors")[name], value)


def test_a_folder_of_another_run_is_refused(inputs: Path, finished: Path) -> None:
    result = commands.run(command(inputs, finished, "score.samples=9", recipe="score"))
    assert result.returncode == 2
    assert "score.samples=8" in result.stderr and "Traceback" not in result.stderr


def test_a_missing_stage_is_named(inputs: Path, tmp_path: Path) -> None:
    result = commands.run(command(inputs, tmp_path / "run", recipe="prune"))
    assert result.returncode == 2
    assert "recipes.search" in result.stderr and not (tmp_path / "run").exists()
    assert "run recipes.import_model, recipes.tokenize, recipes.score, recipes.search first" in result.stderr


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_before_anything_is_written(
    inputs: Path, tmp_path: Path
) -> None:
    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    config = LlamaConfig.from_pretrained(inputs / "teacher", vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    result = commands.run(command(inputs, tmp_path / "run", f"model.source={tmp_path}/teacher"))
    assert result.returncode == 2 and "cache.k=64" in result.stderr  # a rule of settings comes first
    result = commands.run(command(inputs, tmp_path / "run", f"model.source={tmp_path}/teacher", "cache.k=50"))
    assert result.returncode == 2
    assert "vocab_size=50" in result.stderr and "tokenizer's 92" in result.stderr
    assert not (tmp_path / "run").exists()


def _truncate_weights(teacher: Path) -> None:
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _another_vocabulary(teacher: Path) -> None:
    builder = IndexedDatasetBuilder(str(teacher / "ids.bin"), dtype=numpy.int32)
    builder.add_document(torch.full((400,), 93), [400])
    builder.finalize(str(teacher / "ids.idx"))


@pytest.mark.parametrize(
    ("spoil", "override", "words"),
    [
        (_truncate_weights, "", "model.safetensors is damaged"),
        (_another_vocabulary, "data.train.a={teacher}/ids", "holds token 93"),
        (lambda teacher: None, "parallel.tp=4", "parallel.tp=4 must divide the query groups 2"),
        (lambda teacher: None, "parallel.tp=2", "processes started"),
        (lambda teacher: (teacher / "model.safetensors").unlink(), "", "no *.safetensors"),
    ],
)  # fmt: skip
def test_bad_input_ends_before_anything_is_built(
    inputs: Path, tmp_path: Path, spoil: Callable[[Path], None], override: str, words: str
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(inputs / "teacher", teacher)
    spoil(teacher)
    overrides = [f"model.source={teacher}", *([override.format(teacher=teacher)] if override else [])]
    result = commands.run(command(inputs, tmp_path / "run", *overrides))
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert all(line.startswith(("error: ", "- ")) for line in result.stderr.splitlines())
    assert not (tmp_path / "run").exists()


def _state_before(finished: Path, copy: Path, *stages: str) -> Path:
    """A copy of the finished run without some of its stage folders."""
    shutil.copytree(finished, copy)
    for stage in stages:
        shutil.rmtree(copy / stage)
    return copy


LATE = ("distill", "evaluate", "export", "report")


def test_training_of_another_student_is_not_continued(inputs: Path, finished: Path, tmp_path: Path) -> None:
    run = _state_before(finished, tmp_path / "run", "search", "student", *LATE)
    result = commands.run(command(inputs, run, *_extras(inputs), "search.ffn=[48]"))
    assert result.returncode == 2
    assert f"{run}/progress/distill holds unfinished work with another student" in result.stderr


def test_memory_settings_may_change_when_training_goes_on(inputs: Path, finished: Path, tmp_path: Path) -> None:
    run = _state_before(finished, tmp_path / "run", *LATE)
    result = commands.run(command(inputs, run, "distill.micro_batch=1", "distill.loss_memory_mib=1", recipe="distill"))
    assert result.returncode == 0, result.stderr
    assert metrics(run) == metrics(finished)


@pytest.mark.parametrize(("part", "file"), [("train", "train.jsonl"), ("heldout", "test.jsonl")])
def test_a_changed_text_is_noticed(inputs: Path, finished: Path, tmp_path: Path, part: str, file: str) -> None:
    changed = tmp_path / file  # the name stays the same
    changed.write_text((inputs / file).read_text().replace("w1 ", "w2 "))
    result = commands.run(command(inputs, finished, *_extras(inputs), f"data.{part}.a={changed}"))
    assert result.returncode == 2
    assert f"input data.{part}.a" in result.stderr
