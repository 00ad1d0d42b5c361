"""`plan.benefit=true` on a small run, read back; what it asks of the settings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.distill import DistillConfig
from compactlm_nemo.config.loss import CROSS_ENTROPY
from compactlm_nemo.config.plan import PlanConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import TeacherSource
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.planning.benefit import BreakEven, FromScratch, Load, Range, Recovered, Serving, serving
from compactlm_nemo.planning.benefit import verdict as decide
from compactlm_nemo.planning.recoveries import SOURCES
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.workflow.benefit import Benefit, check_benefit, served
from tests.support.commands import run
from tests.support.tiny_run import command

ASKED = ("plan.benefit=true", "plan.teacher_tokens=1e12", "plan.served_tokens_day=1e9", "plan.served_answer=100")


def words(inputs: Path, folder: Path, *overrides: str) -> list[str]:
    return command(inputs, folder, "cluster=cpu", "cluster.price_hour=0.1", *overrides, recipe="plan")


def test_the_section_follows_the_table(inputs: Path, tmp_path: Path) -> None:
    done = run(words(inputs, tmp_path / "run", *ASKED))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    found = plan["benefit"]
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("worth it?"))
    assert any(line.startswith("evaluate") for line in lines[:start])
    kinds = ["loss", "extrapolated", "this run", "from scratch", "serving the teacher", "serving the student"]
    assert [line.split(":")[0].removesuffix(" to the same loss") for line in lines[start + 1 : -2] if ":" in line] == [
        kinds[0], *["extrapolated"] * len(found["extrapolated"]), *kinds[2:], "break-even", found["verdict"],
    ]  # fmt: skip
    assert found["run_price"] == pytest.approx(sum(row["price"] for row in plan["stages"]))
    assert found["removed"] == pytest.approx(1 - plan["student_params"] / plan["teacher_params"])
    assert found["sources"] == SOURCES and found["nats"]["low"] < found["nats"]["middle"] < found["nats"]["high"]
    scratch = found["scratch"]
    assert scratch["low"] == {"tokens": None, "flops": None, "price": None}  # of so small a student by the law
    assert "from scratch to the same loss: unreachable tokens (unreachable to unreachable), unreachable" in done.stdout
    assert "70 million to 16 billion and of 5 to 500 billion" in " ".join(found["extrapolated"])
    saved = found["teacher"]["price_million"] - found["student"]["price_million"]
    assert found["break_even"]["tokens"] == pytest.approx(found["run_price"] / saved * 1e6)
    assert found["break_even"]["days"] == pytest.approx(found["break_even"]["tokens"] / 1e9)


@pytest.mark.slow
def test_a_run_from_scratch_has_the_price_of_training_without_a_teacher(inputs: Path, tmp_path: Path) -> None:
    """A teacher of few tokens has a loss that the student reaches by itself."""
    asked = [*ASKED, "plan.teacher_tokens=1e6", "distill.loss.cross_entropy=1"]
    done = run(words(inputs, tmp_path / "run", *asked))
    assert done.returncode == 0, done.stderr
    assert "extrapolated: the sources train by forward KL on logits alone, this run does not" in done.stdout
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    scratch = plan["benefit"]["scratch"]
    assert scratch["low"]["tokens"] > scratch["middle"]["tokens"] > scratch["high"]["tokens"]
    for end in scratch.values():
        assert end["flops"] == pytest.approx(6 * plan["student_params"] * end["tokens"])
        assert end["price"] / end["tokens"] == pytest.approx(scratch["low"]["price"] / scratch["low"]["tokens"])
    (distilling,) = [row["parts"][0] for row in plan["stages"] if row["stage"] == "distill"]
    price = distilling["seconds"] * plan["ranks"] / 3600 * 0.1
    with_teacher = price / (distilling["times"] * distilling["tokens"])
    assert 0.3 * with_teacher < scratch["low"]["price"] / scratch["low"]["tokens"] < 0.95 * with_teacher


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["plan.benefit=true"], "plan.teacher_tokens=null must be given with plan.benefit=true"),
        ([*ASKED, "plan.served_prompt=2000"], "plan.served_prompt=2000 and plan.served_answer=100 must be at most"),
    ],
)
def test_what_cannot_be_told_is_one_line(inputs: Path, tmp_path: Path, overrides: list[str], line: str) -> None:
    done = run(words(inputs, tmp_path / "run", *overrides))
    errors = [each for each in done.stderr.splitlines() if each.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1 and line in errors[0], done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"benefit": True, "teacher_tokens": 1e12}, "plan.served_tokens_day=null must be given with plan.benefit=true"),
        ({"served_batch": 8}, "plan.served_batch=8 is read by plan.benefit=true alone; set that too, or leave it out."),
        ({"teacher_tokens": 1e12}, "plan.teacher_tokens=1000000000000.0 is read by plan.benefit=true alone"),
        ({"served_days": 1.0}, "plan.served_days=1.0 is read by plan.benefit=true alone"),
        ({"benefit": True, "teacher_tokens": 1e12, "served_tokens_day": 0.0}, "plan.served_tokens_day=0.0 must be > 0"),
        ({"benefit": True, "teacher_tokens": 1, "served_tokens_day": 1, "served_prompt": 0}, "plan.served_prompt=0 mu"),
    ],
)
def test_settings_that_go_together(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        PlanConfig(**settings)
    assert str(error.value).startswith(line)


PLANNED = Config(
    cluster=ClusterConfig(device="X", price_hour=1.0),
    plan=PlanConfig(benefit=True, teacher_tokens=1e12, served_tokens_day=1e9, served_prompt=40, served_answer=8),
)


@pytest.mark.parametrize(
    "changed, lines",
    [
        ({"cluster": ClusterConfig(device="X")}, ["cluster.price_hour=0 is not known, and plan.benefit=true compares"]),
        ({"distill": DistillConfig(teacher=TeacherSource.none, loss=CROSS_ENTROPY)}, ["plan.benefit=true knows dist"]),
        ({"distill": DistillConfig(start_from="runs/a")}, ["plan.benefit=true does not know the tokens before distill."
                                                           "start_from=runs/a"]),
        ({"plan": replace(PLANNED.plan, served_batch=10**9)}, ["plan.served_batch=1000000000 of the teacher needs"]),
        ({"cluster": ClusterConfig(device="X"), "plan": replace(PLANNED.plan, served_prompt=60)},
         ["2 problems:", "- cluster.price_hour=0", "- plan.served_prompt=60 and plan.served_answer=8 must be at"]),
    ],
)  # fmt: skip
def test_runs_that_nothing_can_be_told_of(changed: dict[str, Any], lines: list[str]) -> None:
    student = DIMS.with_shape(layers=1)
    check_benefit(PLANNED, DIMS, student)
    with pytest.raises(ConfigError) as error:
        check_benefit(replace(PLANNED, **changed), DIMS, student)
    found = str(error.value).splitlines()
    assert len(found) == len(lines) and all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_models_that_nothing_can_be_told_of() -> None:
    with pytest.raises(ConfigError, match="^plan.benefit=true needs a student with fewer parameters"):
        check_benefit(PLANNED, DIMS, DIMS)
    experts = replace(DIMS, num_experts=4, experts_per_token=2)
    with pytest.raises(ConfigError, match="^plan.benefit=true knows no model with experts, as num_experts=4; leave"):
        check_benefit(PLANNED, experts, experts.with_shape(layers=1))


@pytest.mark.parametrize(
    "run_price, days, verdict, words",
    [
        (10, 100, "go", "pays for the run within 365 days, and the run costs less than one from scratch at either end"),
        (50, 100, "open", "costs less than one from scratch if it ends at a low loss of the range and more if at a"),
        (200, 100, "no-go", "costs no less than one from scratch at either end of the range"),
        (10, 400, "no-go", "does not pay for the run within 365 days, and the run costs less than one from scratch at"),
        (10, math.inf, "no-go", "does not pay for the run within 365 days"),
    ],
)
def test_the_verdict_says_what_it_rests_on(run_price: float, days: float, verdict: str, words: str) -> None:
    prices = {"low": 200.0, "middle": 60.0, "high": 20.0}
    scratch = {end: FromScratch(price * 1e9, price * 1e19, price) for end, price in prices.items()}
    served_both = [Serving(1, 0.1, 0.01, True, price) for price in (0.3, 0.1)]
    found = Benefit(
        run=PLANNED, recovered=Recovered(Range(0.18, 0.07, 0.48), Range(0.06, 0.02, 0.15), ()),
        extrapolated=("by far",), run_price=run_price, scratch=scratch, scratch_utilisation=0.5,
        teacher=served_both[0], student=served_both[1], break_even=BreakEven(days * 1e9, days),
        verdict=decide(run_price, scratch["high"], scratch["low"], days, 365),
        tokens_a_parameter=11.4, removed=0.47,
    )  # fmt: skip
    lines = found.lines()
    assert lines[-1].startswith(f"{verdict}: serving 1.0 billion tokens a day ") and words in lines[-1]
    assert lines[1:5] == [
        "loss: 0.18 nats a token over the teacher's (0.07 to 0.48), scores 94% of the teacher's (85% to 98%), after "
        "11.4 tokens a parameter with 47% removed",
        "extrapolated: by far",
        f"this run: ${run_price}.00",
        "from scratch to the same loss: 60.0 billion tokens (20.0 billion to 200.0 billion), $60.00 ($20.00 to $200.00)"
        " at 50% MFU",
    ]
    assert lines[-2].startswith("break-even: never" if math.isinf(days) else f"break-even: {days}.0 billion tokens, ")
    assert found.as_values()["verdict"] == verdict


DIMS = Dims(
    family="llama", num_layers=2, hidden_size=8, ffn_hidden_size=16, num_heads=2, num_query_groups=1, head_dim=4,
    vocab_size=10, max_position_embeddings=64, norm_eps=1e-5, rope_theta=1e4,
)  # fmt: skip


def test_a_model_that_is_served_by_hand() -> None:
    """A layer has 8 x 16 + 8 x 8 weights of attention and 3 x 8 x 16 of the MLP; tokens 1 to 6 read 1 to 6 keys."""
    found = served("it", DIMS, Load(prompt=4, answer=2, batch=1), 2)
    layers = 2 * (8 * 16 + 8 * 8 + 3 * 8 * 16)
    assert found.weight_bytes == 2 * (layers + 2 * 10 * 8 + 2 * 2 * 8 + 8)
    assert found.read_bytes == found.weight_bytes - 2 * 10 * 8
    keys = 2 * 2 * 2 * 2 * 4  # FLOPs of a key: two layers, two products, two heads of width 4, a multiply-add is 2
    assert found.prompt_flops == 4 * 2 * layers + 2 * 10 * 8 + keys * (1 + 2 + 3 + 4)
    assert found.answer_flops == 2 * 2 * (layers + 10 * 8) + keys * (5 + 6)
    a_token = 2 * 2 * 1 * 4 * 2  # bytes: two layers, keys and values of one group of width 4
    assert (found.cache_bytes, found.full_cache_bytes) == (5 * a_token, 6 * a_token)


QWEN3_8B = Dims(
    family="qwen3", num_layers=36, hidden_size=4096, ffn_hidden_size=12288, num_heads=32, num_query_groups=8,
    head_dim=128, vocab_size=151936, max_position_embeddings=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True,
)  # fmt: skip


def test_the_roofline_says_how_much_more_students_serve() -> None:
    """Of NVIDIA Model-Optimizer at a2fbac7, examples/pruning/minitron_vs_puzzletron/README.md, section 7.2: vLLM on an
    H200 NVL, 1,000 tokens in and 200 out, 64 at once, 218.9, 246.7 and 364.0 tokens/s."""
    load = Load(prompt=1000, answer=200, batch=64)
    h200 = ClusterConfig(device="H200 NVL", memory_gib=139.8, bf16_tflops=835, memory_gbs=4800, price_hour=1.0)
    students = QWEN3_8B.with_shape(layers=32, hidden=3840), QWEN3_8B.with_shape(layers=22)
    assert [num_params(dims) for dims in students] == pytest.approx([6.96e9, 5.49e9], rel=2e-3)
    teacher, *others = (
        serving(served("it", dims, load, 2), load, h200, tflops=835, margin=0.1).price_million
        for dims in (QWEN3_8B, *students)
    )
    assert [teacher / each for each in others] == pytest.approx([1.18, 1.61], abs=0.005)
    assert [teacher / each for each in others] == pytest.approx([246.7 / 218.9, 364.0 / 218.9], rel=0.06)
