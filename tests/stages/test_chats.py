"""Runs on chats: losses of every stage are those of the answers, worked out by hand from the lines of the files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from compactlm_nemo.config.load import compose
from compactlm_nemo.data.marks import ids_of
from compactlm_nemo.data.windows import Windows
from compactlm_nemo.stages.context import Run
from compactlm_nemo.workflow.stage_table import STAGES
from tests.support import commands
from tests.support.tiny_run import WORDS, command, metrics

LENGTH, VOCAB = 16, len(WORDS) + 2
ASSISTANT, USER, END_OF_TURN, END = "w1", "w0", "w2", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ 'w1' if m.role == 'assistant' else 'w0' }} {{ m.content }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)
Document = list[tuple[str, bool]]
"""Words, and whether each of them is learnt."""


def chats(seed: int, count: int) -> Iterator[tuple[dict[str, Any], Document]]:
    """Lines of two or four turns, of long questions and short answers, and the documents that they have to become."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[str]:
        return [WORDS[3 + i] for i in torch.randint(0, len(WORDS) - 3, (count,), generator=generator).tolist()]

    for number in range(count):
        messages, document = [], Document()
        for _ in range(1 + number % 2):
            question, answer = words(9 + number % 7), words(2 + number % 4)
            messages += [{"role": "user", "content": " ".join(question)}]
            messages += [{"role": "assistant", "content": " ".join(answer)}]
            document += [(word, False) for word in (USER, *question, END_OF_TURN, ASSISTANT)]
            document += [(word, True) for word in (*answer, END_OF_TURN)]
        yield {"messages": messages}, [*document, (END, False)]
    prompt, completion = words(3), words(2)
    document = [(word, False) for word in prompt] + [(word, True) for word in (*completion, END)]
    yield {"prompt": " ".join(prompt) + " ", "completion": " ".join(completion)}, document


def stream(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Ids, and whether each is learnt, of all documents one after another."""
    number = {END: 0} | {word: 2 + i for i, word in enumerate(WORDS)}
    pairs = [pair for _, document in chats(seed, count) for pair in document]
    return torch.tensor([number[word] for word, _ in pairs]), torch.tensor([learnt for _, learnt in pairs])


TRAIN, HELDOUT = (1, 60), (2, 10)


@pytest.fixture(scope="module")
def settings(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("chats")
    (folder / "template.jinja").write_text(TEMPLATE)
    for name, of in (("train", TRAIN), ("heldout", HELDOUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line, _ in chats(*of)))
    return [
        f"data.train.a={folder}/train.jsonl", f"data.heldout.a={folder}/heldout.jsonl",
        f"data.chat_template={folder}/template.jinja", "score.second_moments=true",
        "prune.reconstruct=least_squares", "search.hidden=[32]",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pruned(inputs: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pruned"
    for recipe in ("import_model", "tokenize", "score", "search", "prune"):
        done = commands.run(command(inputs, run, *settings, recipe=recipe))
        assert done.returncode == 0, done.stderr
    return run


def trained(inputs: Path, run: Path, *settings: str, recipes: tuple[str, ...] = ("distill",), ranks: int = 1) -> Any:
    for recipe in recipes:
        done = commands.run(command(inputs, run, *settings, recipe=recipe), ranks=ranks)
        assert done.returncode == 0, done.stderr
    return metrics(run)


def losses_by_hand(inputs: Path, windows: Tensor, learnt: Tensor) -> Tensor:
    """The teacher's loss of each learnt token, float64; `[n, S + 1]` ids, and whether each is learnt."""
    teacher = AutoModelForCausalLM.from_pretrained(inputs / "teacher", dtype=torch.float32).double()
    with torch.no_grad():
        probabilities = teacher(windows[:, :-1]).logits.softmax(-1)
    chosen = probabilities.gather(-1, windows[:, 1:, None])[..., 0]
    return -chosen[learnt[:, 1:]].log()


def test_the_losses_of_a_step_and_of_an_evaluation_are_those_of_the_answers(inputs, settings, pruned, tmp_path):
    run = shutil.copytree(pruned, tmp_path / "run")
    [first, *_] = trained(inputs, run, *settings, recipes=("distill", "evaluate"))
    config = compose(command(inputs, run, *settings)[2:])
    order = Windows(Run(config, mesh=None, stage=STAGES["distill"]).train_corpora(), LENGTH, config.run.seed)
    tokens, learnt = stream(*TRAIN)
    starts = range(0, len(tokens) - LENGTH, LENGTH)
    batch, flags = [], []
    for ids in (ids_of(order.sample(i)) for i in range(4)):
        [start] = [start for start in starts if tokens[start : start + LENGTH + 1].equal(ids)]
        batch.append(ids)
        flags.append(learnt[start : start + LENGTH + 1])
    losses = losses_by_hand(inputs, torch.stack(batch), torch.stack(flags))
    assert first["train/tokens"] == len(losses) < 4 * LENGTH / 2
    assert first["train/teacher_lm_loss_nats"] == pytest.approx(losses.mean().item(), rel=1e-5)

    tokens, learnt = stream(*HELDOUT)
    held = [slice(a, a + LENGTH + 1) for a in range(0, len(tokens) - LENGTH, LENGTH)]
    held = [window for window in held if learnt[window][1:].any()][:4]  # evaluate.tokens=64
    losses = losses_by_hand(
        inputs, torch.stack([tokens[window] for window in held]), torch.stack([learnt[window] for window in held])
    )
    [teacher, *_] = json.loads((run / "evaluate" / "results.json").read_text())
    assert teacher["tokens_a"] == len(losses)
    assert teacher["loss_a"] == pytest.approx(losses.mean().item(), rel=1e-5)
    manifest = json.loads((run / "tokens" / "manifest.json").read_text())
    learnt = stream(*TRAIN)[1]
    assert manifest["results"]["tokens"]["train.a"] == len(learnt)
    assert manifest["results"]["answers"]["train.a"] == int(learnt.sum())
    assert "train.a.mask" in manifest["outputs"]


def test_a_stored_teacher_stores_the_answers_and_teaches_as_a_live_one(inputs, settings, pruned, tmp_path):
    live = trained(inputs, shutil.copytree(pruned, tmp_path / "live"), *settings)
    both = ("cache_teacher", "distill")
    stored = ["distill.teacher=stored", "cache.kind=hidden"]
    hidden = shutil.copytree(pruned, tmp_path / "hidden")
    for got, want in zip(trained(inputs, hidden, *settings, *stored, recipes=both), live, strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    size = json.loads((hidden / "targets" / "manifest.json").read_text())["results"]["bytes_per_token"]
    learnt = stream(*TRAIN)[1].double().mean().item()
    assert size < 2 * learnt * 32 * 4  # of a sample's hidden states in float32, those of the answers

    words = ["distill.teacher=stored", f"cache.k={VOCAB}"]
    [first, *_] = trained(inputs, shutil.copytree(pruned, tmp_path / "top_k"), *settings, *words, recipes=both)
    # What rounding the probabilities costs: see the test of a whole vocabulary stored in test_cache_teacher.py.
    kl = live[0]["train/loss"]
    allowed = 6 * 0.05 / math.sqrt(12) * math.sqrt(2 * kl) + VOCAB * 0.05**2 / 24
    assert abs(first["train/loss"] - kl) < allowed
    assert first["train/lm_loss_nats"] == pytest.approx(live[0]["train/lm_loss_nats"], rel=1e-5)
    assert first["train/teacher_lm_loss_nats"] == pytest.approx(live[0]["train/teacher_lm_loss_nats"], abs=1 / 64)


@pytest.mark.parametrize(
    ("layout", "ranks"), [("parallel.pp=2", 2), ("parallel.tp=2", 2), ("parallel.cp=2", 2), ("", 2)]
)
def test_a_training_on_chats_is_the_same_in_every_layout(inputs, settings, pruned, tmp_path, layout, ranks):
    one = trained(inputs, shutil.copytree(pruned, tmp_path / "one"), *settings)
    words = [layout] if layout else []
    two = trained(inputs, shutil.copytree(pruned, tmp_path / "two"), *settings, *words, ranks=ranks)
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-4)


def test_loss_on_all_counts_the_questions_too(inputs, settings, pruned, tmp_path):
    path = settings[0].partition("=")[2]
    words = [*settings, f"data.train.a={{path: {path}, loss: all}}"]
    [first, *_] = trained(inputs, shutil.copytree(pruned, tmp_path / "run"), *words)
    assert first["train/tokens"] == 4 * LENGTH


def test_a_template_that_is_not_there_is_told_before_the_start(inputs, tmp_path):
    done = commands.run(command(inputs, tmp_path / "run", "data.chat_template=none.jinja"))
    assert done.returncode == 2 and "data.chat_template=none.jinja does not exist" in done.stderr


def test_a_choice_of_what_counts_in_plain_text_is_refused(inputs, tmp_path):
    words = [f"data.train.a={{path: {inputs}/train.jsonl, loss: answer}}"]
    for recipe in ("import_model", "tokenize"):
        done = commands.run(command(inputs, tmp_path / "run", *words, recipe=recipe))
    assert done.returncode == 2
    assert "data.train.a.loss=answer needs chats or prompts with completions" in done.stderr
