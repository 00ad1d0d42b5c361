"""A teacher stored by recipes.cache_teacher gives the training of a live one, under any layout, and after a kill."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from compactlm_nemo.config.load import compose
from compactlm_nemo.data.windows import Windows
from compactlm_nemo.distill.stored_targets import StoredTargets, TopKRecord, decode_top_k
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.stages.context import Run
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.preflight import check
from compactlm_nemo.workflow.stage_table import STAGES
from tests.support import commands
from tests.support.tiny_models import document_bounds
from tests.support.tiny_run import WORDS, command, metrics

VOCAB = len(WORDS) + 3


LENGTH, SAMPLES = 16, 24


STORED = "distill.teacher=stored"


HIDDEN = [STORED, "cache.kind=hidden", "cache.shard_samples=7"]


TOP_K = [STORED, "cache.k=10", "cache.shard_samples=5"]


@pytest.fixture(scope="module")
def pruned(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its pruned student."""
    run = tmp_path_factory.mktemp("runs") / "pruned"
    for recipe in ("import_model", "tokenize", "score", "search", "prune"):
        done = commands.run(command(inputs, run, recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def trained(
    inputs: Path, run: Path, *overrides: str, recipes: tuple[str, ...], ranks: int = 1
) -> list[dict[str, float]]:
    """Metrics of the training that these recipes end with."""
    for recipe in recipes:
        done = commands.run(command(inputs, run, *overrides, recipe=recipe), ranks=ranks)
        assert done.returncode == 0, done.stderr
    return metrics(run)


@pytest.fixture(scope="module")
def live(inputs: Path, pruned: Path) -> list[dict[str, float]]:
    return trained(inputs, shutil.copytree(pruned, pruned.parent / "live"), recipes=("distill",))


@pytest.fixture(scope="module")
def top_k(inputs: Path, pruned: Path) -> Path:
    """A run with stored top-k targets and the student trained on them."""
    run = shutil.copytree(pruned, pruned.parent / "top_k")
    trained(inputs, run, *TOP_K, recipes=("cache_teacher", "distill"))
    return run


def test_stored_hidden_states_give_the_training_of_a_live_teacher(inputs, pruned, live, tmp_path):
    run = shutil.copytree(pruned, tmp_path / "run")
    stored = trained(inputs, run, *HIDDEN, "distill.loss.jsd=0.5", recipes=("cache_teacher", "distill"))
    both = trained(inputs, shutil.copytree(pruned, tmp_path / "live"), "distill.loss.jsd=0.5", recipes=("distill",))
    for a, b in zip(both, stored, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert both != live


def test_all_of_the_vocabulary_stored_gives_the_loss_of_a_live_teacher(inputs, pruned, live, tmp_path):
    run = shutil.copytree(pruned, tmp_path / "run")
    stored = trained(inputs, run, STORED, f"cache.k={VOCAB}", recipes=("cache_teacher", "distill"))
    # A probability below 0.16 is off by its root times a number in [-0.025, 0.025]. Such roundings add up to
    # 0.05 / sqrt(12) * sqrt(E_p log^2 p/q), the root about sqrt(2 KL); six times that, and 0.05**2 / 24 for each.
    kl = live[0]["train/loss"]
    allowed = 6 * 0.05 / math.sqrt(12) * math.sqrt(2 * kl) + VOCAB * 0.05**2 / 24
    assert abs(stored[0]["train/loss"] - kl) < allowed
    for name in ("train/lm_loss_nats", "train/teacher_lm_loss_nats"):
        assert stored[0][name] == pytest.approx(live[0][name], abs=1 / 64)  # the teacher's is kept to 1/32 nat


def records(folder: Path) -> list[TopKRecord]:
    """What is stored of every sample."""
    store = StoredTargets(folder)
    return [decode_top_k(store.record(sample), LENGTH, 10) for sample in range(SAMPLES)]


def test_every_layout_stores_the_same_and_trains_the_same(inputs, pruned, top_k, tmp_path):
    four = shutil.copytree(pruned, tmp_path / "four")
    # The vocabulary of 93 is padded so little that either rank holds words.
    layout = ["parallel.tp=2", "parallel.sequence_parallel=true", "model.vocab_multiple=8"]
    found = trained(inputs, four, *TOP_K, *layout, recipes=("cache_teacher", "distill"), ranks=4)
    for one, other in zip(records(top_k / "targets"), records(four / "targets"), strict=True):
        assert one.ids_TK.equal(other.ids_TK)
        # Rounding may fall on either side of a step, but seldom does: 0.05 sqrt(p) wide, for rest and loss 1/32 nat.
        assert ((one.probs_TK - other.probs_TK).abs() <= 0.1 * other.probs_TK.sqrt() + 1e-5).all()
        torch.testing.assert_close(one.rest_T, other.rest_T, rtol=1 / 31, atol=1e-5)
        torch.testing.assert_close(one.ce_T, other.ce_T, rtol=0, atol=1 / 31)
        for a, b in zip(one[1:], other[1:], strict=True):
            assert (a - b).abs().median() < 1e-5
    wanted = metrics(top_k)
    for line, want in zip(found, wanted, strict=True):
        assert line == pytest.approx(want, rel=2e-3)
    other = shutil.copytree(top_k, tmp_path / "other")
    shutil.rmtree(other / "distill")
    shutil.rmtree(other / "progress" / "distill")
    layout = ["parallel.pp=2", "parallel.cp=2"]
    found = trained(inputs, other, *TOP_K, *layout, recipes=("distill",), ranks=4)
    for line, want in zip(found, wanted, strict=True):
        assert line == pytest.approx(want, rel=1e-4)


def test_a_teacher_with_a_layout_of_its_own_gives_the_same_training(inputs, pruned, tmp_path):
    measured = ["distill.eval_every=3", "distill.eval_tokens=48"]  # with the KL to the teacher
    same = trained(inputs, shutil.copytree(pruned, tmp_path / "same"), *measured, recipes=("distill",))
    own = shutil.copytree(pruned, tmp_path / "own")
    other = trained(inputs, own, *measured, "distill.teacher_tp=2", recipes=("distill",), ranks=2)
    assert same[2]["eval/a_kl_nats"] > 0
    for a, b in zip(same, other, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_hidden_states_of_a_live_teacher_train_the_same_on_every_stage(inputs, pruned, tmp_path):
    settings = ["distill.hidden.layers=[[-3,-2]]", "distill.hidden.embedding=true", "distill.eval_every=3"]
    one = trained(inputs, shutil.copytree(pruned, tmp_path / "one"), *settings, recipes=("distill",))
    staged = shutil.copytree(pruned, tmp_path / "two")
    two = trained(inputs, staged, *settings, "parallel.pp=2", recipes=("distill",), ranks=2)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    for before, now in zip(one[:-1], one[1:], strict=True):
        hidden = before["train/hidden_layers_1_0"] + before["train/hidden_embedding"]
        assert now["train/hidden_alpha"] == pytest.approx(before["train/kd_forward_kl"] / hidden)
    # The projection starts at the channels that were kept, so the embeddings differ only where channels were cut.
    teacher = load_file(inputs / "teacher" / "model.safetensors")["model.embed_tokens.weight"]
    assert one[0]["train/hidden_embedding"] < float(teacher.square().mean()) / 2


def test_documents_of_a_sample_are_masked_in_every_stage(inputs, pruned, tmp_path):
    """The teacher's loss on the first batch is that of transformers on each document by itself."""
    run, masked = tmp_path / "run", "data.mask_documents=true"
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        done = commands.run(command(inputs, run, masked, recipe=recipe))
        assert done.returncode == 0, done.stderr
    scores = [load_file(folder / "score" / "scores.safetensors")["l2_mean.hidden"] for folder in (run, pruned)]
    assert not torch.allclose(*scores, rtol=1e-3)
    config = compose(command(inputs, run, masked)[2:])
    windows = Windows(Run(config, mesh=None, stage=STAGES["distill"]).train_corpora(), LENGTH, config.run.seed)
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher", dtype=torch.float32).double()
    losses = []
    for sample in (windows.sample(i) for i in range(4)):
        for a, b in document_bounds(sample[:LENGTH], 0):  # 0 ends a text
            logits = teacher(sample[None, a:b]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, sample[a + 1 : b + 1], reduction="none"))
    assert len(losses) > 4  # some sample has two documents
    assert metrics(run)[0]["train/teacher_lm_loss_nats"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def test_a_killed_cache_goes_on_to_the_same_bytes(inputs, pruned, top_k, tmp_path):
    run = shutil.copytree(pruned, tmp_path / "run")
    many = 150  # so many that the kill comes before the end
    words = command(inputs, run, *TOP_K, "cache.shard_samples=1", f"cache.samples={many}", recipe="cache_teacher")
    process = commands.start(words, tmp_path / "out", tmp_path / "err")
    while process.is_alive() and not (run / "progress" / "cache_teacher" / "shard_00003.safetensors").exists():
        time.sleep(0.002)
    process.kill()
    process.join()
    found = sorted((run / "progress" / "cache_teacher").glob("shard_*.safetensors"))
    assert 4 <= len(found) < many and not (run / "targets" / "manifest.json").exists()
    written = {path.name: path.stat().st_mtime_ns for path in found}
    done = commands.run(words)
    assert done.returncode == 0, done.stderr
    assert {name: (run / "targets" / name).stat().st_mtime_ns for name in written} == written
    whole, killed = StoredTargets(top_k / "targets"), StoredTargets(run / "targets")
    decoded = [[decode_top_k(store.record(i), LENGTH, 10) for i in range(SAMPLES)] for store in (whole, killed)]
    for one, other in zip(*decoded, strict=True):
        assert one.ids_TK.equal(other.ids_TK)
    results = json.loads((run / "targets" / "manifest.json").read_text())["results"]
    assert results["samples"] == many and results["bytes"] == killed.num_bytes()
    assert results["bytes_per_token"] == killed.num_bytes() / (many * LENGTH)
    assert not (run / "progress" / "cache_teacher").exists()


PLAIN = ["distill.teacher=none", "distill.loss.forward_kl=0", "distill.loss.cross_entropy=1"]


def test_training_without_a_teacher_is_that_of_its_cross_entropy(inputs, pruned, tmp_path):
    alone = trained(inputs, shutil.copytree(pruned, tmp_path / "alone"), *PLAIN, recipes=("distill",))
    beside = trained(inputs, shutil.copytree(pruned, tmp_path / "beside"), *PLAIN[1:], recipes=("distill",))
    for a, b in zip(alone, beside, strict=True):
        assert b.pop("train/teacher_lm_loss_nats") > 0
        assert a == pytest.approx(b, rel=1e-6) and a["train/loss"] == a["train/lm_loss_nats"]
    layout = ["parallel.pp=2"]
    two = trained(inputs, shutil.copytree(pruned, tmp_path / "two"), *PLAIN, *layout, recipes=("distill",), ranks=2)
    for a, b in zip(alone, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_a_missing_cache_is_named(inputs, pruned, tmp_path):
    done = commands.run(command(inputs, shutil.copytree(pruned, tmp_path / "run"), STORED, recipe="distill"))
    assert done.returncode == 2
    assert "no finished stage cache_teacher" in done.stderr and "recipes.cache_teacher" in done.stderr


def refused(words: list[str], *problems: str) -> None:
    """A command line is refused with all of these problems at once."""
    with pytest.raises(ConfigError) as caught:
        check(compose(words[2:]))
    for problem in problems:
        assert problem in str(caught.value)


def test_what_a_stored_teacher_cannot_do_is_said_before_the_start(inputs, tmp_path):
    with pytest.raises(ConfigError, match=r"distill.loss.forward_kl needs a teacher; set distill.teacher=live"):
        check(compose(command(inputs, tmp_path / "run", "distill.teacher=none")[2:]))
    refused(
        command(inputs, tmp_path / "run", "distill.teacher_tp=3", "parallel.cp=2", "distill.teacher_pp=5", STORED),
        "distill.teacher_tp=3 and distill.teacher_pp=5 are of a live teacher",
        "distill.teacher_tp=3 and distill.teacher_pp=5 need parallel.cp=1 and parallel.ep=1, not 2 and 1",
        "distill.teacher_tp=3 must divide the teacher's heads 4",
        "distill.teacher_pp=5: ",
    )
    config = compose(command(inputs, tmp_path / "run", "distill.teacher_tp=2")[2:])
    assert "distill.teacher_tp x distill.teacher_pp = 2 ranks must divide the 3" in launch_problems(config, 3)
    bad = [
        STORED, "distill.temperature=2", "distill.loss.jsd=1", "distill.loss.mse=1", "cache.samples=23",
        f"cache.k={VOCAB + 1}",
    ]  # fmt: skip
    refused(
        command(inputs, tmp_path / "run", *bad),
        "distill.temperature=2.0 needs cache.kind=hidden",
        "distill.loss.jsd needs cache.kind=hidden",
        "distill.loss.mse needs cache.kind=hidden",
        "cache.samples=23 is less than the 24 samples",
        f"cache.k={VOCAB + 1} must be <= the vocabulary of {VOCAB}",
    )
