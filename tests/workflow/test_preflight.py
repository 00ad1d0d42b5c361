"""Rules between settings that need the architecture but no file."""

from __future__ import annotations

import pytest

from compactlm_nemo.config.load import compose
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.stages.context import Run
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.preflight import check
from compactlm_nemo.workflow.stage_table import STAGES

DRY = ["dry_run=true", "run.dir=absent", "model.source=absent"]


LLAMA = [*DRY, "model.architecture.model_type=llama"]


EXPERTS = [
    *DRY,
    "model.architecture.model_type=qwen2_moe",
    "model.architecture.num_experts=6",
    "model.architecture.shared_expert_intermediate_size=36",
    "model.architecture.moe_intermediate_size=64",
]


DEEPSEEK = [*DRY, "model.architecture.model_type=deepseek_v3"]


OLMO2 = [*DRY, "model.architecture.model_type=olmo2"]


LEAST_SQUARES = ["score.second_moments=true", "prune.reconstruct=least_squares"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            [*OLMO2, "search.heads=[16,32]", "search.groups=[16,32]"],
            ["search.heads=16 and search.groups=16 must be the teacher's 32 and 32 for olmo2: its norms"],
        ),
        (
            [*OLMO2, *LEAST_SQUARES, "prune.hidden=rotate"],
            ["prune.hidden=rotate needs attention and MLP without norms behind them, which olmo2 has; use select"],
        ),
        (
            [*OLMO2, *LEAST_SQUARES, "prune.sequential=true"],
            ["prune.sequential=true needs attention and MLP without norms behind them, which olmo2 has; leave it"],
        ),
        (
            [*DEEPSEEK, *LEAST_SQUARES, "prune.sequential=true"],
            ["prune.sequential=true needs one projection of queries, keys and values, and deepseek_v3 makes them from"],
        ),
        (
            [*DEEPSEEK, "prune.heads=merge"],
            ["prune.heads=merge needs heads that share keys and values, and deepseek_v3 makes them from latents; use"],
        ),
        ([*DEEPSEEK, "search.latency_ms=9"], ["search.latency_ms=9 counts layers that are alike, and the first of a"]),
        (
            [*DEEPSEEK, "search.experts=[100]"],
            ["search.experts=100 must be a multiple of 8 and at least 16 for this deepseek_v3"],
        ),
        (
            [*DEEPSEEK, "search.ffn=[1536]"],
            ["search.shared_expert_ffn=2048 must be a multiple of search.ffn=1536 for deepseek_v3"],
        ),
        (
            [*DEEPSEEK, "search.heads=[96]", "search.groups=[64]"],
            ["search.heads=96 must be a multiple of 64 query groups with at most 1 heads each"],
        ),
        ([*LLAMA, "parallel.ep=2"], ["parallel.ep=2 needs a model with experts, which llama is not"]),
        (
            [*LLAMA, "score.second_moments=true", "score.expert_moments=true"],
            ["score.expert_moments=true needs a model with experts, which llama is not"],
        ),
        ([*LLAMA, "score.expert_moments=true"], ["score.expert_moments=true needs score.second_moments=true"]),
        (
            [*EXPERTS, "score.second_moments=true", "prune.reconstruct=least_squares", "search.ffn=[32]"],
            ["search.ffn=32 refits every expert's fc2 and needs score.expert_moments=true"],
        ),
        ([*EXPERTS, "parallel.ep=4"], ["parallel.ep=4 must divide the 6 experts"]),
        ([*EXPERTS, "parallel.tp=2"], ["parallel.tp=2 needs parallel.sequence_parallel=true"]),
        (
            [*EXPERTS, "parallel.tp=8", "parallel.sequence_parallel=true"],
            ["parallel.tp=8 must divide the shared expert's width 36"],
        ),
        ([*EXPERTS, "search.experts=[1]"], ["search.experts=1 must be at least the 4 a token is sent to"]),
        ([*EXPERTS, "search.experts=[4,5]", "parallel.ep=2"], ["parallel.ep=2 must divide the 5 experts"]),
        ([*LLAMA, "search.experts=[4]"], ["search.experts=4 must be in [0, 0] (the teacher's value)"]),
        ([*LLAMA, "search.hidden=[64]", "search.divisors=[hidden]"], ["search.hidden has both values and a rule"]),
        ([*LLAMA, "search.multiples.width=4"], ["know no axis width"]),
        (
            [*LLAMA, "search.latency_ms=9", "search.context=10", "parallel.tp=4", "parallel.sequence_parallel=true"],
            ["search.context=10 must be a multiple of 4"],
        ),
        ([*LLAMA, "search.latency_ms=0"], ["search.latency_ms=0.0 must be > 0; null sets no budget"]),
        ([*LLAMA, "search.multiples.heads=48"], ["no value between search.smallest=0.5 and 1"]),
        (
            [*LLAMA, "distill.hidden.layers=[[-3,-3],[31,40]]", "search.layers=[24]"],
            ["distill.hidden.layers: layer 40 must be one of the student's 24 (0 to 23, or -1 to -24 from the end)"],
        ),
        (
            [*LLAMA, "data.train.a={path: a, tokens: 1000}", "data.train.b=b"],
            ["data.train has texts with `tokens` and texts without"],
        ),
        (
            [
                *LLAMA,
                "data.train.a={path: a, tokens: 1_000}",
                "data.train.b={path: b, tokens: 2000}",
                "distill.steps=2",
            ],
            ["data.train has budgets of 3,000 tokens", "trains 8,192; lower distill.steps or raise them"],
        ),
        (
            [*LLAMA, "data.train.a={path: a, tokens: 9, weight: 1}"],
            ["data.train.a=", "must be a path or a list of paths, {path: PATH, weight: NUMBER} or"],
        ),
        ([*LLAMA, "data.train.a={path: a, tokens: 0}"], ["data.*.tokens=0 must be > 0"]),
        ([*LLAMA, "distill.hidden.layers=[[-1,-1],[31,31]]"], ["distill.hidden names layers_31_31 twice"]),
        (
            [
                *LLAMA,
                "distill.hidden.embedding=true",
                "prune.hidden=rotate",
                "prune.reconstruct=least_squares",
                "score.second_moments=true",
            ],
            ["distill.hidden with prune.hidden=rotate"],
        ),
        (
            [*LLAMA, "correct.while_distilling=true", "correct.steps=2000"],
            ["correct.while_distilling=true needs correct.steps=2000 in [1, distill.steps=1000]"],
        ),
        (
            [*LLAMA, "correct.while_distilling=true", "correct.steps=9", "distill.teacher=stored"],
            ["correct.while_distilling=true needs a live teacher in the student's layout, not distill.teacher=stored"],
        ),
        ([*LLAMA, "distill.hidden.layers=[[3]]"], ["[3] must be [teacher layer, student layer]"]),
        (
            [*LLAMA, "distill.hidden.embedding=true", "model.compile=true"],
            ["model.compile=true compiles the layers that distill.hidden looks into"],
        ),
        (
            [*LLAMA, "distill.hidden.embedding=true", "distill.recompute=selective"],
            ["distill.recompute=selective runs parts of a layer anew, which the losses of distill.hidden cannot"],
        ),
        (
            [*LLAMA, "distill.hidden.embedding=true", "distill.hidden.weight=0"],
            ["distill.hidden.weight=0.0 must be > 0"],
        ),
        (
            [*LLAMA, "distill.hidden.embedding=true", "distill.hidden.projection=none", "search.hidden=[2048]"],
            ["distill.hidden.projection=none needs equal widths, not 4096 and 2048"],
        ),
        (
            [*LLAMA, "distill.hidden.embedding=true", "distill.teacher=stored"],
            ["distill.hidden needs a live teacher in the student's layout, not distill.teacher=stored"],
        ),
        (
            [*LLAMA, "distill.hidden.embedding=true", "distill.loss.forward_kl=0", "distill.loss.cross_entropy=1"],
            ["distill.hidden.weight=null balances with a logit loss, and there is none"],
        ),
        ([*LLAMA, "prune.reconstruct=least_squares"], ["needs score.second_moments=true"]),
        ([*LLAMA, "prune.hidden=rotate"], ["prune.hidden=rotate needs prune.reconstruct=least_squares"]),
        (
            [
                *LLAMA,
                "search.hidden=[4000]",
                "search.heads=[24]",
                "model.architecture.num_key_value_heads=8",
                "model.architecture.mlp_bias=true",
            ],
            ["search.hidden=4000 must be a multiple of search.heads=24"],
        ),
        (
            [*LLAMA, "prune.reconstruct=least_squares", "prune.heads=merge", "score.second_moments=true"],
            ["prune.heads=merge changes what the refit was measured on"],
        ),
    ],
)
def test_a_broken_rule_is_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose(overrides))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*LLAMA, "parallel.tp=2", "search.layers=[8]"],
        [*LLAMA, "distill.hidden.layers=[[-3,-3]]", "distill.hidden.embedding=true", "search.layers=[16]"],
        [*EXPERTS, "parallel.ep=3", "parallel.pp=2"],
        [*EXPERTS, "parallel.ep=2", "parallel.tp=2", "parallel.sequence_parallel=true"],
        [*EXPERTS, "search.layers=[24]", "search.hidden=[2048]", "search.experts=[5]", "search.ffn=[64]"],
    ],
)
def test_what_keeps_the_rules_passes(overrides: list[str]) -> None:
    assert check(compose(overrides)) is not None


def test_ranks_of_expert_parallelism() -> None:
    config = compose([*EXPERTS, "parallel.ep=2", "parallel.pp=2"])
    assert "parallel.ep=2 must divide the 1 data-parallel ranks of 2 processes" in launch_problems(config, 2)
    assert launch_problems(config, 4) == ""


def test_token_budgets_are_the_shares_of_a_blend() -> None:
    budgets = ["data.train.a={path: a, tokens: 1_000_000}", "data.train.b={path: b, tokens: 5_000_000}"]
    config = compose([*LLAMA, *budgets, "data.bos=never"])  # there is no tokenizer to ask
    assert [corpus.share for corpus in Run(config, mesh=None, stage=STAGES["score"]).train_corpora()] == [1e6, 5e6]  # type: ignore[arg-type]
