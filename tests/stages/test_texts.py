"""Texts as they lie around, through the stages; the commands of docs/texts.md run as they stand."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shlex
import shutil
from pathlib import Path

import numpy
import pytest

from compactlm_nemo.config.load import CONF
from tests.support import commands
from tests.support.tiny_run import command, metrics

PAGE = (CONF.parent / "docs" / "texts.md").read_text()
BLOCKS = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) if "/models/llama" in block]
"""Those of the bundled teacher are dry runs of tests/test_recipes.py."""
FILES = ("web.jsonl", "test.jsonl", "body.jsonl", "more.jsonl.gz")


@pytest.fixture(scope="module")
def files(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands name; `shards` and `more` hold the texts of `web`, halved."""
    folder = tmp_path_factory.mktemp("texts")
    shutil.copytree(inputs / "teacher", folder / "llama")
    lines = (inputs / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "web.jsonl").write_text("".join(lines))
    shutil.copyfile(inputs / "test.jsonl", folder / "test.jsonl")
    (folder / "shards").mkdir()
    (folder / "shards/0.jsonl").write_text("".join(lines[:20]))
    (folder / "shards/1.json").write_text('{"text": ""}\n' + "".join(lines[20:30]) + '{"text": null}\n')
    (folder / "more.jsonl.gz").write_bytes(gzip.compress("".join(lines[30:]).encode()))
    (folder / "body.jsonl").write_text("".join(lines).replace('"text"', '"content"'))
    return folder


def manifest(folder: Path) -> dict:
    return json.loads((folder / "tokens/manifest.json").read_text())


@pytest.mark.proves("stages", "tokenize", [".jsonl, .jsonl.gz, folders, lists"], "read")
@pytest.mark.parametrize("block", BLOCKS)
def test_a_command_of_the_page_runs(block: str, files: Path, tmp_path: Path) -> None:
    assert len(BLOCKS) == 3
    text = block.replace("\\\n", " ").replace("/models/llama", f"{files}/llama").replace("runs/", f"{tmp_path}/runs/")
    for name in FILES:
        text = text.replace(name, str(files / name))
    for line in text.replace("[shards", f"[{files}/shards").splitlines():
        program, *words = shlex.split(line)
        if program == "torchrun":
            words = ["-m", "torch.distributed.run", "--standalone", *words]
        done = commands.run([*words, "data.sequence_length=16"])
        assert done.returncode == 0, done.stderr[-2000:]
    [run] = (tmp_path / "runs").iterdir()
    web = (run / "tokens/train.web.bin").read_bytes()
    assert manifest(run)["results"]["documents"]["train.web"] == {"all": 60}
    assert manifest(run)["results"]["tokens"]["train.web"] == 60 * 41
    assert numpy.frombuffer(web, dtype=numpy.uint16).reshape(60, 41)[:, -1].tolist() == [0] * 60
    if run.name == "texts":
        assert (run / "tokens/train.shards.bin").read_bytes() == web == (run / "tokens/train.body.bin").read_bytes()
        assert manifest(run)["results"]["documents"]["train.shards"] == {"all": 60, "empty, skipped": 2}
        assert len([name for name in manifest(run)["inputs"] if name.startswith("data.train.shards:")]) == 3
    assert not (run / "progress/tokenize").exists()


def _packed(lines: list[str], path: Path) -> None:
    """Write the documents in the format that the path's suffix names."""
    arrow = pytest.importorskip("pyarrow")
    text = "".join(lines)
    if path.suffix == ".zst":
        path.write_bytes(arrow.Codec("zstd").compress(text.encode(), asbytes=True))
    elif path.suffix == ".parquet":
        from pyarrow import parquet

        parquet.write_table(arrow.table({"text": [json.loads(line)["text"] for line in lines]}), path)
    elif path.suffix == ".txt":  # a document by itself
        path.write_text(json.loads(lines[0])["text"])
    else:
        path.write_bytes({".bz2": bz2.compress, ".xz": lzma.compress}[path.suffix](text.encode()))


@pytest.mark.proves("stages", "tokenize", "{suffix}", "read")
@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.bz2", ".jsonl.xz", ".parquet", ".txt"])
def test_the_tokens_are_the_same_whatever_a_text_is_packed_in(suffix: str, files: Path, tmp_path: Path) -> None:
    lines = (files / "web.jsonl").read_text().splitlines(keepends=True)[: 1 if suffix == ".txt" else None]
    (tmp_path / "plain.jsonl").write_text("".join(lines))
    _packed(lines, tmp_path / f"a{suffix}")
    words = [
        f"run.dir={tmp_path}/run", f"model.source={files}/llama", "data.sequence_length=16",
        f"data.train.plain={tmp_path}/plain.jsonl", f"data.train.packed={tmp_path}/a{suffix}",
        f"data.heldout.a={files}/test.jsonl",
    ]  # fmt: skip
    for stage in ("import_model", "tokenize"):
        done = commands.run(["-m", f"recipes.{stage}", *words])
        assert done.returncode == 0, done.stderr[-2000:]
    plain, packed = (tmp_path / "run" / "tokens" / f"train.{name}.bin" for name in ("plain", "packed"))
    assert plain.read_bytes() == packed.read_bytes() and plain.stat().st_size == 2 * 41 * len(lines)


@pytest.mark.proves("stages", ["score", "distill", "evaluate"], "Megatron .bin and .idx", "read")
@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_megatron_files_are_read_as_the_texts_that_they_were_made_of(suffix: str, files: Path, tmp_path: Path) -> None:
    words = [word for word in command(files, tmp_path / "texts") if not word.startswith(("data.", "model.source"))]
    words += [f"model.source={files}/llama", "data.sequence_length=16"]
    texts = [f"data.train.a={files}/web.jsonl", f"data.heldout.a={files}/test.jsonl"]
    made = commands.run([*words, *texts])
    assert made.returncode == 0, made.stderr[-2000:]
    tokens = tmp_path / "texts" / "tokens"
    megatron = [f"data.{kind}.a={tokens}/{kind}.a{suffix}" for kind in ("train", "heldout")]
    done = commands.run([*words, *megatron, f"run.dir={tmp_path}/megatron"])
    assert done.returncode == 0, done.stderr[-2000:]
    runs = [tmp_path / "texts", tmp_path / "megatron"]
    assert metrics(runs[0]) == metrics(runs[1])
    rows = [json.loads((run / "evaluate" / "results.json").read_text()) for run in runs]
    assert [row["loss_a"] for row in rows[0]] == [row["loss_a"] for row in rows[1]]


def test_import_and_export_do_not_ask_for_texts(files: Path, tmp_path: Path) -> None:
    words = [f"run.dir={tmp_path}/run", f"model.source={files}/llama"]
    done = commands.run(["-m", "recipes.import_model", *words])
    assert done.returncode == 0, done.stderr[-2000:]
    done = commands.run(["-m", "recipes.export", *words])
    assert done.returncode == 2 and "data." not in done.stderr and "distill" in done.stderr, done.stderr
    done = commands.run(["-m", "recipes.score", *words])
    assert done.returncode == 2 and "data.train is empty" in done.stderr, done.stderr
