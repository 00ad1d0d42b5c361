"""A model leaves as NeMo 2's checkpoint and comes in as one, and `export.verify` decides whether an export is done."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compactlm_nemo.artifacts import MANIFEST, read_manifest
from tests.support import commands
from tests.support.tiny_run import command, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def imported(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "imported"
    done = commands.run(command(inputs, run, recipe="import_model"))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.proves("stages", "export", "NeMo 2 checkpoint", "written")
@pytest.mark.proves("stages", "import_model", "NeMo 2 checkpoint", "read")
def test_a_teacher_leaves_as_nemos_checkpoint_and_comes_in_as_one(inputs: Path, imported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(imported, tmp_path / "run"))
    done = commands.run(command(inputs, run, "export.of=teacher", "export.format=nemo2", recipe="export"))
    assert done.returncode == 0, done.stderr
    nemo, back = run / "export" / "nemo2", tmp_path / "back"
    assert (nemo / "context" / "io.json").is_file() and (nemo / "weights" / ".metadata").is_file()
    for recipe in ("import_model", "export"):
        settings = (f"model.source={nemo}", "export.of=teacher")
        done = commands.run(command(inputs, back, *settings, recipe=recipe))
        assert done.returncode == 0, done.stderr
    want = load_file(inputs / "teacher" / "model.safetensors")
    got = load_file(back / "export" / "hf" / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    config = json.loads((back / "export" / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"], config["dtype"]) == (93, True, "float32")
    assert (back / "export" / "hf" / "tokenizer.json").read_text() == (
        inputs / "teacher" / "tokenizer.json"
    ).read_text()


def test_an_export_that_the_tool_reads_is_done_and_says_who_read_it(
    inputs: Path, imported: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(imported, tmp_path / "run"))
    settings = ("export.of=teacher", f"export.verify={sys.executable}")
    done = commands.run(command(inputs, run, *settings, recipe="export"))
    assert done.returncode == 0, done.stderr
    assert read_manifest(run / "export")["results"]["verified_by"].startswith("transformers 5.")


def _python(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('echo \'{"tool": "transformers 9", "weights": {}}\' > "$4"', 1, "reads 38 weights of"),
        ('echo "OSError: no such format" >&2; exit 1', 2, "OSError: no such format"),
        ('echo \'{"missing": "no torch"}\' > "$4"', 2, "lacks a package (no torch)"),
        (None, 2, "has no package transformers"),
    ],
)
def test_an_export_that_the_tool_does_not_read_is_one_line_and_not_done(
    inputs: Path, imported: Path, tmp_path: Path, text: str | None, code: int, words: str
) -> None:
    run = Path(shutil.copytree(imported, tmp_path / "run"))
    python = _python(tmp_path / "python", "exit 1" if text is None else f'[ "$1" = -c ] && exit 0\n{text}')
    done = commands.run(command(inputs, run, "export.of=teacher", f"export.verify={python}", recipe="export"))
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == code and len(lines) == 1 and words in lines[0], done.stderr
    assert not (run / "export" / MANIFEST).exists()
    done = commands.run(command(inputs, run, "export.of=teacher", recipe="export"))
    assert done.returncode == 0 and (run / "export" / MANIFEST).exists(), done.stderr


def test_a_format_that_cannot_hold_the_teacher_is_refused_before_the_start(inputs: Path, tmp_path: Path) -> None:
    source = tmp_path / "teacher"
    source.mkdir()
    for path in (inputs / "teacher").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"attention_bias": True}
    (source / "config.json").write_text(json.dumps(config))
    settings = (f"model.source={source}", "export.format=nemo2", "dry_run=true")
    done = commands.run(command(inputs, tmp_path / "run", *settings))
    assert done.returncode == 2, done.stdout
    assert "export.format=nemo2: NeMo 2 exports no llama with biases in attention or MLP; use export.format=hf" in (
        done.stderr
    )
