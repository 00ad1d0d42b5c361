"""The gate's verdicts on a run folder made by hand: each number here is one of the files below."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from compactlm_nemo.artifacts import write_manifest
from compactlm_nemo.config.gate import GateConfig, LimitConfig
from compactlm_nemo.config.load import CONF
from compactlm_nemo.errors import CheckpointError, ConfigError, GateFailed
from compactlm_nemo.report.figures import measured
from compactlm_nemo.report.gate import Verdict, hold, judge, verdicts_of

Numbers = tuple[float, float | None, float | None]


def figure(value: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"value": value, "low": low, "high": high}


def metric(
    name: str, teacher: Numbers | None, distilled: Numbers, drift: Numbers | None, pruned: Numbers | None = None
) -> dict[str, Any]:
    """A metric as `evaluation.metric.summarise` writes it; the pruned model is as the distilled one if not given."""
    models = {"pruned": figure(*(pruned or distilled)), "distilled": figure(*distilled)}
    return {
        "metric": name, "units": "documents", "num_units": 9, "is_better": "lower",
        "models": ({"teacher": figure(*teacher)} if teacher else {}) | models,
        "against_teacher": {"pruned": figure(*drift) | {"p": 0.5}, "distilled": figure(*drift) | {"p": 0.5}}
        if drift else {},
    }  # fmt: skip


QUALITY = [
    metric("loss/wiki", (2.0, 1.9, 2.1), (2.15, 2.0, 2.3), (0.15, 0.1, 0.19), pruned=(4.0, 3.9, 4.1)),
    metric("loss/wiki/short", (2.0, 1.9, 2.1), (2.15, 2.0, 2.3), (0.15, 0.1, 0.2)),
    metric("loss/news", (3.0, 2.9, 3.1), (3.18, 3.0, 3.3), (0.18, 0.15, 0.21)),
    metric("top1_agreement/wiki", None, (0.8, 0.72, 0.88), None),
    metric("choices/science", (0.6, 0.5, 0.7), (0.59, 0.5, 0.7), (-0.01, -0.025, 0.01)),
    metric("ece/science", (0.1, 0.05, 0.2), (0.12, 0.05, 0.2), (0.02, -0.02, 0.06)),
    metric("brier/science", (0.5, 0.4, 0.6), (0.52, 0.4, 0.6), (0.02, -0.02, 0.06)),
    metric("bias_ambiguous/age", (0.02, 0.0, 0.1), (-0.02, -0.1, 0.05), (-0.04, -0.1, 0.02)),
    metric("bias_disambiguated/age", (0.1, 0.0, 0.2), (0.13, 0.0, 0.2), (0.03, -0.1, 0.2)),
    metric("loops/continuations", (0.1, 0.0, 0.2), (0.1, 0.0, 0.2), (0.0, -0.01, 0.015)),
    metric("distinct_2/continuations", (0.9, None, None), (0.8, None, None), (-0.1, None, None)),
]
RESULTS = [
    {"model": model, "params": params, "tokens_trained": 0, "loss_wiki": loss, "task_arc": task,
     "forward_tokens_per_second": speed}
    for model, params, loss, task, speed in (
        ("teacher", 1000, 2.0, 0.5, 100.0), ("pruned", 600, 4.0, 0.2, 150.0), ("distilled", 600, 2.15, 0.45, 150.0)
    )
]  # fmt: skip


def served(tokens_per_second: float, peak: int | None) -> dict[str, Any]:
    spread = {"median": tokens_per_second, "low": 1.0, "high": 999.0}
    return {
        "disk_bytes": 4000, "peak_bytes": peak,
        "batches": [{"batch": batch, "generated_tokens": 3, "tokens_per_second": spread} for batch in (1, 8)],
    }  # fmt: skip


PROFILE = {
    "exported": "distilled",
    "engines": [{"engine": "transformers", "models": {"teacher": served(20.0, None), "student": served(30.0, 5000)}}],
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, as far as the gate reads it."""
    files: dict[str, dict[str, Any]] = {
        "evaluate": {"results.json": RESULTS, "quality.json": {"metrics": QUALITY}},
        "profile": {"profile.json": PROFILE},
    }
    for stage, contents in files.items():
        (tmp_path / stage).mkdir()
        for name, content in contents.items():
            (tmp_path / stage / name).write_text(json.dumps(content))
        write_manifest(tmp_path / stage, {}, {}, {})
    return tmp_path


def verdicts(run: Path, **limit: Any) -> dict[str, Verdict]:
    """Metric -> verdict on one limit."""
    found = judge(GateConfig(limits={"one": limit}).limits, measured(run), run)
    return {verdict.metric: verdict for verdict in found}


def verdict(run: Path, **limit: Any) -> bool:
    (found,) = verdicts(run, **limit).values()
    return found.passed


@pytest.mark.parametrize(
    ("limit", "passed"),
    [
        # 0.15, 0.1 to 0.19, against the teacher: alone the number counts, then the end on the side of the limit.
        ({"at_most": 0.16}, True),
        ({"at_most": 0.15}, True),
        ({"at_most": 0.14}, False),
        ({"at_most": 0.16, "confident": True}, False),
        ({"at_most": 0.19, "confident": True}, True),
        ({"at_least": 0.14}, True),
        ({"at_least": 0.14, "confident": True}, False),
        ({"at_least": 0.1, "confident": True}, True),
        ({"at_least": 0.1, "at_most": 0.19, "confident": True}, True),
        ({"at_least": 0.11, "at_most": 0.19, "confident": True}, False),
        ({"at_least": 0.1, "at_most": 0.18, "confident": True}, False),
    ],
)
def test_the_end_of_the_interval_decides_where_that_is_asked_for(
    run: Path, limit: dict[str, Any], passed: bool
) -> None:
    found = verdicts(run, metric="loss/wiki", compare="against_teacher", **limit)["loss/wiki"]
    assert (found.passed, found.value, found.low, found.high) == (passed, 0.15, 0.1, 0.19)


@pytest.mark.parametrize(
    ("metric", "bound", "passed"),
    [
        ("bias_ambiguous/age", 0.05, True),  # -0.04: a bias that has turned round
        ("bias_ambiguous/age", 0.039, False),
        ("bias_disambiguated/age", 0.03, True),
        ("bias_disambiguated/age", 0.029, False),
    ],
)
def test_a_range_holds_a_bias_on_both_sides(run: Path, metric: str, bound: float, passed: bool) -> None:
    assert verdict(run, metric=metric, compare="against_teacher", at_least=-bound, at_most=bound) == passed


def test_models_values_and_ratios(run: Path) -> None:
    assert verdict(run, metric="loss/wiki", at_most=2.2)
    assert not verdict(run, metric="loss/wiki", model="pruned", at_most=2.2)
    assert verdicts(run, metric="params", compare="ratio", at_most=0.6)["params"].value == 0.6
    assert not verdict(run, metric="params", compare="ratio", at_most=0.59)
    assert verdict(run, metric="forward_speed", compare="ratio", at_least=1.5)
    assert verdicts(run, metric="task/arc", compare="against_teacher", at_least=-0.05)["task/arc"].value == (
        pytest.approx(-0.05, abs=1e-12)
    )


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ({"metric": "speed/transformers/1", "compare": "ratio", "at_least": 1.5}, 1.5),
        ({"metric": "speed/transformers/8", "compare": "against_teacher", "at_least": 10}, 10),
        ({"metric": "disk/transformers", "at_most": 4000}, 4000),
        ({"metric": "memory/transformers", "at_most": 5000}, 5000),
    ],
)
def test_what_the_profile_measured_has_limits_too(run: Path, limit: dict[str, Any], value: float) -> None:
    (found,) = verdicts(run, **limit).values()
    assert (found.passed, found.value) == (True, value)
    end, bound = next((key, limit[key]) for key in ("at_least", "at_most") if key in limit)
    assert not verdict(run, **(limit | {end: bound * (1.01 if end == "at_least" else 0.99)}))


def test_a_pattern_is_a_verdict_for_each_metric_and_slices_have_one_of_their_own(run: Path) -> None:
    found = verdicts(run, metric="loss/*", compare="against_teacher", at_most=0.16)
    assert {name: each.passed for name, each in found.items()} == {"loss/wiki": True, "loss/news": False}
    found = verdicts(run, metric="loss/*/short", compare="against_teacher", at_most=0.14)
    assert {name: each.passed for name, each in found.items()} == {"loss/wiki/short": False}
    assert set(verdicts(run, metric="speed/*/*", at_least=1)) == {"speed/transformers/1", "speed/transformers/8"}


@pytest.mark.parametrize(
    "limit",
    [
        {"metric": "top1_agreement/wiki", "compare": "against_teacher", "at_least": -9},  # the teacher has none
        {"metric": "memory/transformers", "compare": "ratio", "at_most": 9},  # the teacher's is not known
        {"metric": "speed/transformers/1", "model": "pruned", "at_least": 0},  # the distilled one was exported
    ],
)
def test_a_number_that_is_not_there_keeps_no_limit(run: Path, limit: dict[str, Any]) -> None:
    (found,) = verdicts(run, **limit).values()
    assert not found.passed and found.value is None and found.row()["measured"] is None
    with pytest.raises(GateFailed, match="is not there and must be"):
        hold(GateConfig(limits={"one": limit}).limits, run, Console(file=io.StringIO()))


def test_names_that_are_not_there_are_told_with_near_ones(run: Path) -> None:
    limits = {
        "a": {"metric": "los/wiki", "at_most": 1},
        "b": {"metric": "toxicity/*", "at_most": 1},
        "c": {"metric": "speed/transformers/4", "at_least": 1},
        "d": {"metric": "distinct_2/continuations", "at_least": 0.5, "confident": True},
    }
    with pytest.raises(ConfigError) as error:
        verdicts_of(GateConfig(limits=limits).limits, run)
    head, *lines = str(error.value).splitlines()
    assert head == "4 problems:" and len(lines) == 4
    assert f"gate.limits.a.metric=los/wiki is not among what {run} has measured; did you mean loss/wiki" in lines[0]
    assert "gate.limits.b.metric=toxicity/* is not among" in lines[1] and "measure it, or choose a gate" in lines[1]
    assert "did you mean speed/transformers/" in lines[2]
    assert "gate.limits.d.confident=true needs an interval, which distinct_2/continuations of" in lines[3]
    with pytest.raises(ConfigError, match="nothing evaluated, which the gate needs"):
        verdicts_of(GateConfig(limits=limits).limits, run / "nowhere")


def limits_of(name: str) -> dict[str, LimitConfig]:
    return GateConfig(limits=yaml.safe_load((CONF / "gate" / f"{name}.yaml").read_text())["limits"]).limits


def test_the_default_gate_passes_such_a_run(run: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    hold(limits_of("default"), run, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.rstrip().endswith("gate: PASS, 3 of 3 limits hold") and shown.count("PASS") == 4
    found = verdicts_of(limits_of("default"), run)
    assert {each.metric: each.value for each in found} == {
        "loss/wiki": 0.15, "loss/news": 0.18, "params": 0.6,
    }  # fmt: skip


def test_the_gate_for_what_leaves_looks_at_the_ends(run: Path) -> None:
    """Of this run the news alone may be worse than 0.2 with other documents; everything else holds."""
    found = verdicts_of(limits_of("ship"), run)
    assert {each.limit for each in found} == set(limits_of("ship"))
    assert [each.metric for each in found if not each.passed] == ["loss/news"]
    with pytest.raises(GateFailed) as error:
        hold(limits_of("ship"), run, Console(file=io.StringIO()))
    assert str(error.value) == (
        f"FAIL, 1 of 10 limits do not hold for {run}: loss: loss/news, distilled - teacher's is 0.18 and must be at "
        "most 0.2, to the interval's end."
    )


@pytest.mark.parametrize("name", ["quality.json", "results.json"])
def test_damaged_measurements_are_no_pass(run: Path, name: str) -> None:
    (run / "evaluate" / name).write_text("[{}]")
    with pytest.raises(CheckpointError, match=name):
        verdicts_of(limits_of("default"), run)


def test_measurements_of_another_student_are_no_pass(run: Path) -> None:
    (run / "distill").mkdir()
    write_manifest(run / "distill", {"distill.steps": 1}, {}, {})
    write_manifest(run / "evaluate", {}, {"distill": "of an earlier one"}, {})
    with pytest.raises(CheckpointError, match="is of another student"):
        verdicts_of(limits_of("default"), run)
