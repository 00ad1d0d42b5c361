"""A run that does not fit is refused before it starts, with the layout that does; one that fits is let through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.workflow import memory_guard
from compactlm_nemo.workflow.runner import run_stages
from tests.support.shapes import TINY

SIZED = replace(TINY, num_layers=4, hidden_size=256, ffn_hidden_size=768, num_heads=8, num_query_groups=4, head_dim=32)


def settings(*words: str) -> Config:
    return compose(["model.source=none", "run.dir=none", "data.sequence_length=128", *words])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.precision=bf16", "distill.micro_batch=2"],
        ["score.second_moments=true", "score.width=[l2_mean,taylor]", "score.depth=[lm_loss,bi_blocks]"],
        pytest.param(["correct.steps=10", "correct.while_distilling=true", "distill.steps=10"], marks=pytest.mark.slow),
        pytest.param(["distill.hidden.layers=[[-1,-1]]", "cache.kind=hidden"], marks=pytest.mark.slow),
    ],
)
def test_the_bound_is_above_what_is_simulated(words: list[str]) -> None:
    """So nothing that it lets through without a simulation can be too large."""
    config = settings(*words)
    student = memory_guard.largest_student(config, SIZED)
    found = memory_guard.needs(config, SIZED, ["score", "distill", "evaluate"], 1)
    assert [need.stage for need in found] == ["score", "distill", "evaluate"]
    most = max(need.bytes for need in found)
    assert not memory_guard.surely_fits(with_memory(config, most), SIZED, student)
    assert memory_guard.surely_fits(with_memory(config, 100 * most), SIZED, student)


def with_memory(config: Config, limit: float) -> Config:
    cluster = replace(config.cluster, memory_gib=limit / (1 - config.plan.margin) / memory_guard.GIB)
    return replace(config, cluster=cluster)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_nearest_layout() -> None:
    config = settings("distill.global_batch=8", "distill.micro_batch=8", "distill.recompute=none")
    whole = memory_guard.needs(config, SIZED, ["distill"], 4)[0].bytes
    (need,) = memory_guard.needs(with_memory(config, 0.7 * whole), SIZED, ["distill", "evaluate"], 4)
    assert "distill.micro_batch=" in need.way_out and "GiB" in need.way_out
    (need,) = memory_guard.needs(with_memory(config, 0.01 * whole), SIZED, ["distill"], 4)
    assert need.way_out.startswith("no layout of 4 ranks holds it")


@pytest.mark.slow
def test_a_dry_run_tells_what_the_cluster_holds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=llama31_8b_to_4b_depth", "model.source=absent", "run.dir=none", "cluster=h100_sxm"]
    words += ["dry_run=true"]
    config = compose(words)
    run_stages(config, only="distill")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GiB on a rank" in line]
    assert line.startswith("distill: ") and line.endswith("of 71.3 on H100 SXM")
    with pytest.raises(ConfigError, match=r"distill needs .* GiB on a rank .*plan.margin=0.1 of 5.0 stays free\); "):
        run_stages(compose([*words, "cluster.memory_gib=5"]), only="distill")


def test_a_run_is_refused_before_it_makes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Dims = SIZED
    here = memory_guard.this_cluster()
    assert here.memory_gib > 1 and here.device == "CPU, 1 ranks"
    monkeypatch.setattr(memory_guard, "this_cluster", lambda: replace(here, memory_gib=0.01))
    with pytest.raises(ConfigError, match=r"distill needs .* and a rank of CPU, 1 ranks has 0.0 GiB"):
        memory_guard.refuse_what_does_not_fit(settings(f"run.dir={tmp_path}/run"), teacher, ["distill"])
    assert not list(tmp_path.iterdir())
