"""A run with a trimmed vocabulary: the teacher over the kept tokens, from the import to what others load.

Shapes: B sequences, S tokens of each, V entries of the whole vocabulary, K kept ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from compactlm_nemo.artifacts import read_manifest
from tests.support import commands
from tests.support.tiny_models import VOCAB, save_tiny
from tests.support.tiny_run import WORDS, command, metrics

FEW = WORDS[10:70:2]
"""Words of the texts; the tokenizer has three times as many."""


def write_texts(path: Path, seed: int, count: int, words: list[str] = FEW) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        drawn = torch.randint(0, len(words), (40,), generator=generator).tolist()
        texts.append(" ".join(words[i] for i in drawn))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.fixture(scope="module")
def few(inputs: Path) -> Path:
    """The inputs with texts of few words, and Megatron's files of the held-out one."""
    texts = write_texts(inputs / "train.jsonl", 1, 60)
    assert {word for text in texts for word in text.split()} == set(FEW)
    texts = write_texts(inputs / "test.jsonl", 2, 10)
    vocabulary = Tokenizer.from_file(str(inputs / "teacher" / "tokenizer.json")).get_vocab()
    write_tokens(inputs / "megatron", [[*(vocabulary[word] for word in text.split()), 0] for text in texts])
    return inputs


def write_tokens(prefix: Path, documents: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for ids in documents:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def trimming(inputs: Path) -> str:
    return f"model.vocab_texts=[{inputs}/train.jsonl,{inputs}/test.jsonl]"


def whole_run(inputs: Path) -> list[str]:
    """Held-out texts also as Megatron's files, which have the ids of the whole vocabulary."""
    return [trimming(inputs), "cache.k=8", "distill.teacher=stored", f"data.heldout.b={inputs}/megatron.bin"]


def run(words: list[str]) -> Any:
    done = commands.run(words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def finished(few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, and the teacher's export beside it."""
    folder = tmp_path_factory.mktemp("run")
    run(command(few, folder, *whole_run(few)))
    return folder


def kept(teacher: Path) -> list[int]:
    return json.loads((teacher / "vocabulary.json").read_text())["ids"]


def test_every_part_of_a_run_has_the_kept_tokens_alone(few: Path, finished: Path) -> None:
    whole = Tokenizer.from_file(str(few / "teacher" / "tokenizer.json")).get_vocab()
    # bos_token_id=1 and eos_token_id=0 of config.json are `<unk>` and `<|endoftext|>`.
    assert kept(finished / "teacher") == sorted([0, 1, *(whole[word] for word in FEW)])
    size = len(FEW) + 2
    results = read_manifest(finished / "teacher")["results"]
    assert (results["vocab_size"], results["whole_vocab_size"]) == (size, 93)
    config = json.loads((finished / "export/hf/config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (size, 0, 1)
    student = AutoModelForCausalLM.from_pretrained(finished / "export/hf")
    assert student.get_input_embeddings().weight.shape[0] == size
    tokenizer, before = (
        AutoTokenizer.from_pretrained(finished / "export/hf"),
        AutoTokenizer.from_pretrained(few / "teacher"),
    )
    assert len(tokenizer) == size and tokenizer.eos_token == "<|endoftext|>"
    for line in (few / "test.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        assert tokenizer.tokenize(text) == before.tokenize(text) == text.split()
    tokens = numpy.fromfile(finished / "tokens/heldout.a.bin", dtype=numpy.uint16)
    text = " ".join(json.loads(line)["text"] for line in (few / "test.jsonl").read_text().splitlines())
    assert tokenizer.convert_ids_to_tokens([t for t in tokens.tolist() if t]) == text.split()
    assert max(candidate["params"] for candidate in json.loads((finished / "search/candidates.json").read_text())) == (
        sum(parameter.numel() for parameter in student.parameters())
    )


def test_the_teachers_loss_is_over_the_kept_tokens(few: Path, finished: Path) -> None:
    """Cross-entropy of the untrimmed model's logits at the kept ids, in float64, on the first four windows."""
    teacher = AutoModelForCausalLM.from_pretrained(few / "teacher", dtype=torch.float64)
    whole, ids = Tokenizer.from_file(str(few / "teacher" / "tokenizer.json")), kept(finished / "teacher")
    texts = [json.loads(line)["text"] for line in (few / "test.jsonl").read_text().splitlines()]
    stream = [number for text in texts for number in [*whole.encode(text).ids, 0]]
    losses = []
    for start in range(0, 64, 16):
        window = stream[start : start + 17]
        with torch.no_grad():
            logits_SK = teacher(torch.tensor([window[:-1]])).logits[0][:, ids]
        targets = torch.tensor([ids.index(number) for number in window[1:]])
        losses += (logits_SK.logsumexp(-1) - logits_SK.gather(1, targets[:, None])[:, 0]).tolist()
    rows = json.loads((finished / "evaluate/results.json").read_text())
    assert all(row["loss_b"] == row["loss_a"] for row in rows)
    [measured] = [row["loss_a"] for row in rows if row["model"] == "teacher"]
    assert measured == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_a_run_that_goes_on_ends_the_same(few: Path, finished: Path, tmp_path: Path) -> None:
    words = command(few, tmp_path, *whole_run(few))
    assert "evaluate needs" in commands.run([*words, "distill.stop_after=3"]).stderr
    run(words)
    assert metrics(tmp_path) == metrics(finished)
    names = ("model.safetensors", "config.json", "tokenizer.json")
    assert all((tmp_path / "export/hf" / n).read_bytes() == (finished / "export/hf" / n).read_bytes() for n in names)
    other = [f"model.vocab_texts={few}/train.jsonl", "cache.k=8"]
    done = commands.run(command(few, tmp_path, *other, recipe="import_model"))
    assert done.returncode == 2 and "model.vocab_texts" in done.stderr, done.stderr


def test_megatron_files_get_the_new_ids(few: Path, finished: Path, tmp_path: Path) -> None:
    words = [
        f"run.dir={tmp_path}",
        f"model.source={few}/teacher",
        trimming(few),
        f"data.train.a={few}/train.jsonl",
        "cache.k=8",
    ]
    run(["-m", "recipes.import_model", *words])
    held = f"data.heldout.a={few}/megatron.bin"
    run(["-m", "recipes.tokenize", *words, held, "data.sequence_length=16"])
    mapped = numpy.fromfile(tmp_path / "tokens/heldout.a.bin", dtype=numpy.int32)
    assert mapped.tolist() == numpy.fromfile(finished / "tokens/heldout.a.bin", dtype=numpy.uint16).tolist()
    assert (tmp_path / "tokens/heldout.a.idx").read_bytes() == (few / "megatron.idx").read_bytes()
    write_tokens(few / "other", [[2, 0], [50, 3, 0]])
    shutil.rmtree(tmp_path / "tokens")
    done = commands.run(["-m", "recipes.tokenize", *words, f"data.heldout.a={few}/other", "data.sequence_length=16"])
    assert done.returncode == 2 and "'w0' (2, at place 0), which the trimmed vocabulary has not" in done.stderr


def test_a_text_that_needs_a_removed_token_is_refused(few: Path, tmp_path: Path) -> None:
    lines = (few / "test.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "more.jsonl").write_text("".join(lines[:3]) + json.dumps({"text": "w10 w11 w12 w13"}) + "\n")
    words = [
        f"run.dir={tmp_path}/run", f"model.source={few}/teacher", f"data.train.a={few}/train.jsonl",
        f"data.heldout.a={tmp_path}/more.jsonl", "data.sequence_length=16", "cache.k=8",
    ]  # fmt: skip
    run(["-m", "recipes.import_model", *words, trimming(few)])
    done = commands.run(["-m", "recipes.tokenize", *words, trimming(few)])
    assert done.returncode == 2
    assert f"{tmp_path}/more.jsonl:4 needs the token 'w11', one of 2 that the trimmed vocabulary has not" in done.stderr
    assert "add this text to model.vocab_texts" in done.stderr


def word_tokenizer(folder: Path) -> None:
    """As many words as the tiny models have rows."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "<end>", *(f"w{i}" for i in range(VOCAB - 3))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)


@pytest.mark.parametrize(("case", "ranks"), [("llama", 1), ("llama", 2), ("llama_tied_llama3_rope", 2)])
def test_the_teachers_logits_are_those_of_the_kept_ids(case: str, ranks: int, tmp_path: Path) -> None:
    """Of the table and of an output layer of its own, on one rank and over two that share a padded vocabulary."""
    save_tiny(case, tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").double()
    word_tokenizer(tmp_path / "teacher")
    texts = write_texts(tmp_path / "texts.jsonl", 3, 5, [f"w{i}" for i in range(0, VOCAB - 3, 3)])
    words = [
        f"run.dir={tmp_path}/run", f"model.source={tmp_path}/teacher", f"model.vocab_texts={tmp_path}/*.jsonl",
        f"parallel.tp={ranks}", "model.vocab_multiple=8", "cache.k=8",
    ]  # fmt: skip
    for recipe, more in (("import_model", []), ("export", ["export.of=teacher"])):
        done = commands.run(["-m", f"recipes.{recipe}", *words, *more], ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
    folder, ids = tmp_path / "run/export/hf", kept(tmp_path / "run/teacher")
    assert 30 < len(ids) < 60
    exported, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    before = AutoTokenizer.from_pretrained(tmp_path / "teacher")
    for text in texts:
        old, new = before(text)["input_ids"], tokenizer(text)["input_ids"]
        assert [ids[number] for number in new] == old
        with torch.no_grad():
            want_SK = model(torch.tensor([old])).logits[0][:, ids]
            torch.testing.assert_close(exported(torch.tensor([new])).logits[0], want_SK, rtol=0, atol=1e-12)
    assert torch.equal(exported.get_output_embeddings().weight, model.get_output_embeddings().weight[ids])


def test_what_cannot_be_trimmed_or_read_is_told_before_anything_starts(few: Path, tmp_path: Path) -> None:
    words = ["-m", "recipes.import_model", f"run.dir={tmp_path}/run", f"model.source={tmp_path}/teacher"]
    shutil.copytree(few / "teacher", tmp_path / "teacher")
    done = commands.run([*words, f"model.vocab_texts={tmp_path}/none.jsonl"])
    assert done.returncode == 2 and f"model.vocab_texts={tmp_path}/none.jsonl does not exist" in done.stderr
    done = commands.run([*words, f"model.vocab_texts={few}/megatron.bin"])
    assert done.returncode == 2 and "is no text" in done.stderr
    (tmp_path / "teacher/tokenizer.json").unlink()
    done = commands.run([*words, trimming(few)])
    assert done.returncode == 2 and "model.vocab_texts needs a tokenizer.json" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_plan_says_what_the_import_will_find_out(few: Path, tmp_path: Path) -> None:
    words = command(few, tmp_path / "run", trimming(few), "dry_run=true", "search.params=30000", "search.band=0.01")
    done = run(words)
    assert "model.vocab_texts: which tokens stay is known when it has read the texts" in done.stdout
    assert "vocab_texts" not in run(command(few, tmp_path / "run", "dry_run=true")).stdout.split("import_model:")[1]
