"""Pruning in rounds on the tiny model: sizes on the way, and what each round starts from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compactlm_nemo.artifacts import read_manifest
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.hf import count_params
from compactlm_nemo.workflow.rounds import size_between
from tests.search.test_search import NEMOTRON_15B
from tests.stages.test_import_hub import run_recipe
from tests.stages.test_trim_vocabulary import FEW, trimming, write_texts, write_tokens
from tests.support import commands
from tests.support.hub import hub
from tests.support.tiny_run import command, make_inputs
from tests.support.wandb_files import config_of, finished_records, history_rows


def test_sizes_on_the_way_by_hand():
    target = NEMOTRON_15B.with_shape(layers=29, hidden=4096, ffn=16384, heads=32, groups=8)
    half = size_between(NEMOTRON_15B, target, 0.5)
    assert half == NEMOTRON_15B.with_shape(layers=30, hidden=5120, ffn=20480, heads=40)
    third = size_between(NEMOTRON_15B, NEMOTRON_15B.with_shape(ffn=9216, heads=16, groups=4), 1 / 3, tp=4)
    assert (third.ffn_hidden_size % 4, third.num_query_groups, third.num_heads) == (0, 8, 40)
    assert abs(third.ffn_hidden_size - (24576 - (24576 - 9216) / 3)) <= 2
    assert size_between(NEMOTRON_15B, target, 1.0) == target


@pytest.mark.parametrize("steps", [0, 2])
def test_each_round_goes_on_from_the_one_before(tmp_path: Path, steps: int) -> None:
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    words = command(inputs, run, "rounds.count=2", f"rounds.steps={steps}", recipe="rounds")
    result = commands.run(words)
    assert result.returncode == 0, result.stderr
    first, last = (Dims.load(folder / "student" / "model.json") for folder in (run / "round_1", run))
    assert (first.num_layers, first.hidden_size, first.ffn_hidden_size, first.num_heads) == (3, 28, 48, 4)
    assert (last.num_layers, last.hidden_size, last.ffn_hidden_size, last.num_heads) == (2, 24, 32, 2)
    assert Dims.load(run / "teacher" / "model.json").hidden_size == 28
    middle = run / "round_1" / "export" / "hf"
    assert count_params(middle) == read_manifest(run / "round_1" / "student")["results"]["params"]
    assert (run / "round_1" / "distill").exists() == bool(steps)
    model = AutoModelForCausalLM.from_pretrained(run / "export" / "hf")
    assert bool(torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all())
    again = commands.run(words)
    assert again.returncode == 0 and " ...\n" not in again.stdout, again.stdout


def test_trainings_of_rounds_are_in_the_group_of_their_run_and_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As W&B's own files say, of the round and of the run that ends them."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "big"
    words = command(inputs, run, "rounds.count=2", "rounds.steps=2", "wandb.mode=offline", recipe="rounds")
    result = commands.run(words)
    assert result.returncode == 0, result.stderr
    found = {}
    for record in finished_records(run, num_runs=2):
        if record.HasField("run"):
            parent = config_of(record.run)["wandb.parent"]
            found[record.run.display_name] = (record.run.run_group, record.run.job_type, parent)
    assert found == {"big-round-1": ("big", "round", "big"), "big": ("big", "distill", None)}
    assert len(history_rows(finished_records(run / "round_1", num_runs=1))) == 2


def test_one_target_is_needed(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    result = commands.run(command(inputs, tmp_path / "run", "search.layers=[2,3]", recipe="rounds"))
    assert result.returncode == 2 and "recipes.rounds needs one target, search allows 2" in result.stderr


def test_the_first_round_keeps_what_describes_the_teacher_and_all_trim_the_vocabulary(tmp_path: Path) -> None:
    """A bare `torch_dist` folder with its small files elsewhere, and texts of few words."""
    inputs, run = make_inputs(tmp_path / "inputs"), tmp_path / "run"
    for name, seed, count in (("train", 1, 60), ("test", 2, 10)):
        write_texts(inputs / f"{name}.jsonl", seed, count)
    imported = commands.run(command(inputs, tmp_path / "first", recipe="import_model"))
    assert imported.returncode == 0, imported.stderr
    shutil.copytree(tmp_path / "first" / "teacher", tmp_path / "bare", ignore=shutil.ignore_patterns("*.json", "hf"))
    words = command(inputs, run, "rounds.count=2", "cache.k=8", trimming(inputs), recipe="rounds")
    source = {"model.source": f"model.source={tmp_path}/bare"}
    words = [source.get(word.partition("=")[0], word) for word in words]
    result = commands.run([*words, f"model.hf_assets={inputs}/teacher"])
    assert result.returncode == 0, result.stderr
    kept = {**AutoTokenizer.from_pretrained(run / "export" / "hf").get_vocab()}
    assert set(FEW) <= set(kept) and len(kept) < 93 / 2
    tables = [Dims.load(folder / "teacher" / "model.json").vocab_size for folder in (run / "round_1", run)]
    assert tables == [len(kept)] * 2
    tokens = [(folder / "tokens" / "heldout.a.bin").read_bytes() for folder in (run / "round_1", run)]
    assert tokens[0] == tokens[1]


def test_tokens_of_the_whole_vocabulary_are_refused_in_rounds_that_trim_it(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    write_tokens(inputs / "megatron", [[2, 3, 0]])
    words = ["dry_run=true", "rounds.count=2", trimming(inputs), f"data.heldout.b={inputs}/megatron"]
    result = commands.run(command(inputs, tmp_path / "run", *words, recipe="rounds"))
    assert result.returncode == 2 and f"data.heldout.b={inputs}/megatron has ids of the whole" in result.stderr


def test_rounds_begin_with_a_repository_of_the_hub(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    with hub() as server:
        server.publish({path.name: path.read_bytes() for path in (inputs / "teacher").iterdir()})
        for _ in range(2):
            result = run_recipe(inputs, tmp_path, server, "rounds.count=2", recipe="rounds")
            assert result.returncode == 0, result.stderr
    assert " ...\n" not in result.stdout  # the second finds all finished
