"""Questions and continuations in a whole run: what is measured of which model, what voids it, what is refused first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.runner import run_stages
from tests.data.test_questions import bbq, written
from tests.support import commands
from tests.support.tiny_run import command

QUESTIONS = [
    {"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i} w{i + 3}"], "answer": i % 2} for i in range(6)
]


def asked(folder: Path) -> list[str]:
    """Settings that ask for questions and continuations."""
    return [
        f"evaluate.choices.own={folder / 'choices.jsonl'}", f"evaluate.bias.age={folder / 'bias.jsonl'}",
        "evaluate.continuations.prompts=3", "evaluate.continuations.tokens=48",
        "evaluate.continuations.prompt_tokens=8", "evaluate.resamples=100",
    ]  # fmt: skip


def test_a_run_measures_questions_and_continuations(inputs: Path, tmp_path: Path) -> None:
    choices = written(tmp_path / "choices.jsonl", *QUESTIONS)
    written(tmp_path / "bias.jsonl", bbq(), bbq(question_index="2", context_condition="disambig", label=0))
    words = command(inputs, tmp_path / "run", *asked(tmp_path))
    done = commands.run(words)
    assert done.returncode == 0, done.stderr
    quality = json.loads((tmp_path / "run" / "evaluate" / "quality.json").read_text())
    units = {metric["metric"]: (metric["units"], metric["num_units"]) for metric in quality["metrics"]}
    assert units.items() >= {
        "choices/own": ("questions", 6), "choices_norm/own": ("questions", 6), "ece/own": ("questions", 6),
        "brier/own": ("questions", 6), "bias_ambiguous/age": ("templates", 1),
        "accuracy_disambiguated/age": ("templates", 1), "distinct_2/continuations": ("continuations", 3),
        "distinct_4/continuations": ("continuations", 3), "loops/continuations": ("continuations", 3),
    }.items()  # fmt: skip
    by_name = {metric["metric"]: metric for metric in quality["metrics"]}
    assert set(by_name["brier/own"]["models"]) == {"teacher", "pruned", "distilled"}
    assert set(by_name["brier/own"]["against_teacher"]) == {"pruned", "distilled"}
    assert {"choices/own", "bias/age", "continuations"} <= quality["details"].keys()
    examples = quality["details"]["continuations"]["examples"]
    assert len(examples) == 3 and set(examples[0]) == {"prompt", "teacher", "pruned", "distilled"}

    # Another name of the file is no other result; another content is.
    again = commands.run(words)
    assert "evaluate: done before, skipped" in again.stdout
    choices.rename(tmp_path / "moved.jsonl")
    moved = [word.replace(str(choices), f"{tmp_path}/moved.jsonl") for word in words]
    assert "evaluate: done before, skipped" in commands.run(moved).stdout
    written(tmp_path / "moved.jsonl", *QUESTIONS, QUESTIONS[0])
    other = commands.run(moved)
    assert "evaluate: done before, skipped" not in other.stdout + other.stderr


def test_what_cannot_be_asked_is_told_before_anything_starts(inputs: Path, tmp_path: Path) -> None:
    written(tmp_path / "choices.jsonl", *QUESTIONS, {"question": "w1", "choices": ["w2"], "answer": 0})
    _, _, *words = command(inputs, tmp_path / "run", *asked(tmp_path), "evaluate.continuations.tokens=4096")
    with pytest.raises(ConfigError) as error:
        run_stages(compose(words))
    told = str(error.value)
    assert "3 problems" in told
    assert f"evaluate.choices.own={tmp_path}/choices.jsonl: {tmp_path}/choices.jsonl:7 needs `choices`" in told
    assert f"evaluate.bias.age={tmp_path}/bias.jsonl: the file does not exist" in told
    assert "prompt_tokens=8 and tokens=4096 are more than the model's 2048 positions" in told
    assert not (tmp_path / "run" / "teacher").exists()
