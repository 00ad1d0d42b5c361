"""The card of an export tells what the model is; what comes from outside is data in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compactlm_nemo.report.model_card import escaped, teacher_name, teacher_words
from tests.support import commands
from tests.support.tiny_run import command, make_inputs

CARD = """---
license: llama3.1
license_name: "a: b\\n# c"
language: [en, de]
base_model: evil/other
extra: {a: 1}
---
# Another model
"""


def test_the_model_card_names_teacher_cut_data_tokens_losses_and_licence(tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path / "inputs")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (inputs / "teacher" / name).write_text(name)
    (inputs / "teacher" / "README.md").write_text(CARD)
    done = commands.run(command(inputs, tmp_path / "run", "distill.steps=2"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "run" / "export" / "hf" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["language"], head["library_name"]) == ("llama3.1", ["en", "de"], "transformers")
    assert "base_model" not in head and "extra" not in head and "Another model" not in text
    rows: list[dict[str, Any]] = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    for words_of_card in (
        "Teacher: teacher.", "Weights: float32", "| layers | 4 | 2 |", "| parameters | 40,128 | 10,032 |",
        "- tokens: 128", "- a: train.jsonl, weight 1", "names the licence a: b \\# c",
        "beside this file: LICENSE, NOTICE.txt, USE\\_POLICY.md",
        *[f"| {row['model']} | {row['tokens_trained']} | {row['loss_a']:.4f} |" for row in rows],
    ):  # fmt: skip
        assert words_of_card in text, (words_of_card, text)
    assert str(inputs) not in text


def test_values_from_outside_are_data_in_a_card(tmp_path: Path) -> None:
    assert escaped("a\n# b <script> [x](y) `c` |d|") == r"a \# b &lt;script&gt; \[x\]\(y\) \`c\` \|d\|"
    for text in (
        "---\n- a\n---",
        "---\n[\n---",
        "no head",
        "---\nlicense: {a: 1}\n---",
        "---\nlicense: !!python/x y\n---",
    ):
        (tmp_path / "README.md").write_text(text)
        assert teacher_words(tmp_path) == {}
    assert teacher_name("/c/hub/models--meta-llama--Llama-3.1-8B/snapshots/abc") == "meta-llama/Llama-3.1-8B"
    assert teacher_name("/runs/first/export/hf") == "first" and teacher_name("/models/llama/") == "llama"


@pytest.mark.parametrize(
    "head",
    {
        "runs a command": "license: !!python/object/apply:os.system ['touch ran']",
        "doubles without end": "\n".join(
            ["a0: &a0 [x]", *(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]" for i in range(60)), "language: *a60"]
        ),
        "contains itself": "language: &a [*a]",
        "nests without end": "license: " + "[" * 30000,
        "is long": "license: " + "x" * 10**6,
        "has names beside": f"license: {'x' * 201}\nlanguage: {['de'] * 101}\nlicense_link: ''",
        "is no text": "license: \0\n",
    }.values(),
    ids=lambda head: head[:20],
)
def test_a_card_that_means_harm_gives_no_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n# A model\n")
    assert teacher_words(tmp_path) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
