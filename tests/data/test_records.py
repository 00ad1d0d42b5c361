"""Documents where they lie: kinds of files, folders, globs, lists, the Hub, and what is wrong with them in one line."""

import bz2
import gzip
import json
import lzma
import shutil
import sys

import pytest

from compactlm_nemo.data import records
from compactlm_nemo.data.records import missing_sources, read_pieces, sources_of
from compactlm_nemo.errors import DataError

TEXTS = ["one", "two \u00e9", "three\nlines", "four"]
LINES = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(TEXTS)).encode()


def read_records(path, key="text"):
    for piece in read_pieces(sources_of(path), key):
        yield from ((piece.where(record.number), record) for record in piece.records)


def texts(path, key="text"):
    return [record.fields[key] for _, record in read_records(path, key)]


def zstd(content: bytes) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    return arrow.Codec("zstd").compress(content, asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".other"])
def test_lines_are_read_from_every_kind_of_packed_file(tmp_path, kind, packed):
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](LINES))
    assert texts(str(path)) == TEXTS
    assert [where for where, _ in read_records(str(path))] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


def test_two_packed_files_that_were_concatenated_are_read_to_the_end(tmp_path):
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(PACK[suffix](LINES) + PACK[suffix](LINES))
        assert texts(str(tmp_path / f"a.jsonl{suffix}")) == TEXTS * 2


def test_a_table_is_read_row_by_row(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    many = TEXTS * 200
    parquet.write_table(arrow.table({"body": many, "n": list(range(800))}), tmp_path / "a.parquet", row_group_size=300)
    told = []
    rows = [r for p in read_pieces([str(tmp_path / "a.parquet")], advance=told.append) for r in p.records]
    assert [row.fields for row in rows] == [{"body": text, "n": n} for n, text in enumerate(many)]
    assert sum(told) == (tmp_path / "a.parquet").stat().st_size


def test_a_plain_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_text("second\n\nwith a blank line\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    assert texts(str(tmp_path), "content") == ["first", "second\n\nwith a blank line\n"]


def test_folders_globs_and_lists_have_an_order_of_their_own(tmp_path):
    for name in ("s/02.jsonl", "s/01.jsonl.gz", "s/deep/00.json", "s/.hidden/a.jsonl", "s/README.md", "t.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        content = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts(str(tmp_path / "s")) == ["s/01.jsonl.gz", "s/02.jsonl", "s/deep/00.json"]
    assert texts(str(tmp_path / "s/0*")) == ["s/01.jsonl.gz", "s/02.jsonl"]
    assert texts(str(tmp_path / "**/*.json")) == ["s/deep/00.json"]
    assert texts([str(tmp_path / "t.jsonl"), str(tmp_path / "s/deep")]) == ["t.jsonl", "s/deep/00.json"]
    gone = [str(tmp_path / name) for name in ("none.jsonl", "none*.jsonl", "s/.hidden/empty")]
    (tmp_path / "s/.hidden/empty").mkdir()
    assert missing_sources([str(tmp_path / "t.jsonl"), *gone, "hf://org/name"]) == gone
    assert sources_of("hf://org/name") == ["hf://org/name"]


def test_pieces_depend_on_the_files_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "PIECE_RECORDS", 3)
    for name, count in (("a", 7), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name}{i}"}}\n' for i in range(count)))
    sources = sources_of(str(tmp_path))
    whole = {piece.place: [r.fields["text"] for r in piece.records] for piece in read_pieces(sources)}
    assert whole == {(0, 0): ["a0", "a1", "a2"], (0, 1): ["a3", "a4", "a5"], (0, 2): ["a6"], (1, 0): ["b0", "b1"]}
    some = read_pieces(sources, is_wanted=lambda place: place in {(0, 1), (1, 0)})
    assert [(p.place, [r.number for r in p.records]) for p in some] == [((0, 1), [4, 5, 6]), ((1, 0), [1, 2])]
    assert [p.place for p in read_pieces(sources, is_read=lambda number: number == 1)] == [(1, 0)]
    monkeypatch.setattr(records, "PIECE_BYTES", 20)
    assert [len(piece.records) for piece in read_pieces(sources)] == [2, 2, 2, 1, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "one"}\n{"text": \n', r"a.jsonl:2 is no JSON"),
        (b'\n{"text": "\xff"}\n', r"a.jsonl:2 is no JSON"),
        (b'[{"text": "one"}]\n', r"a.jsonl:1 is no JSON object; write an object a line, as `jq -c '\.\[\]'` does"),
        (b"3\n", r"a.jsonl:1 is no JSON object"),
        (b"[" * 10**5, r"a.jsonl:1 is no JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts(str(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_packed_file_that_is_cut_or_damaged_is_one_line(tmp_path, suffix):
    content = PACK[suffix](LINES * 1000)
    for damaged in (content[: len(content) // 2], b"no such magic number"):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="a.jsonl") as caught:
            texts(str(path))
        assert "\n" not in str(caught.value)


def test_a_file_that_unpacks_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONGEST_BYTES", 2**16)
    for suffix in (".jsonl", ".txt"):
        path = tmp_path / f"bomb{suffix}.gz"
        path.write_bytes(gzip.compress(b'{"text": "' + b"0" * 2**27))
        told = []
        with pytest.raises(DataError, match=r"more than 0.0625 MiB; ") as caught:
            list(read_pieces([str(path)], advance=told.append))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "' + b"0" * 2**17 + b'"}\n')
    with pytest.raises(DataError, match=r"lines.jsonl:2 is a line of more than"):
        texts(str(path))


@pytest.mark.parametrize("name, library", [("a.jsonl.zst", "pyarrow"), ("a.parquet", "pyarrow"), ("", "datasets")])
def test_a_library_that_is_missing_is_named_with_the_way_to_it(tmp_path, monkeypatch, name, library):
    path = str(tmp_path / name) if name else "hf://org/name"
    if name:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"needs {library}, which is not installed; pip install .*\[texts\]"):
        texts(path)


def test_a_data_set_of_the_hub_is_read_by_name_without_a_network(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    (tmp_path / "org/name/train.jsonl").write_bytes(LINES)
    (tmp_path / "org/name/test.jsonl").write_bytes(LINES.splitlines()[0])
    assert texts("hf://org/name") == TEXTS
    assert texts("hf://org/name:test") == TEXTS[:1]
    assert [where for where, _ in read_records("hf://org/name:test")] == ["hf://org/name:test:1"]
    with pytest.raises(DataError, match=r"hf://org/name:none cannot be loaded") as caught:
        texts("hf://org/name:none")
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "org")
    with pytest.raises(DataError, match=r"hf://org/name cannot be loaded"):
        texts("hf://org/name")
