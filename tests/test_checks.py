"""Rules between settings that need the architecture but no file."""

from __future__ import annotations

import pytest

from compactlm_nemo.checks import check, launch_problems
from compactlm_nemo.config.load import compose
from compactlm_nemo.errors import ConfigError

DRY = ["dry_run=true", "run.dir=absent", "model.source=absent"]
LLAMA = [*DRY, "model.architecture.model_type=llama"]
EXPERTS = [
    *DRY,
    "model.architecture.model_type=qwen2_moe",
    "model.architecture.num_experts=6",
    "model.architecture.shared_expert_intermediate_size=36",
    "model.architecture.moe_intermediate_size=64",
]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([*LLAMA, "parallel.ep=2"], ["parallel.ep=2 needs a model with experts, which llama is not"]),
        ([*EXPERTS, "parallel.ep=4"], ["parallel.ep=4 must divide the 6 experts"]),
        ([*EXPERTS, "parallel.tp=2"], ["parallel.tp=2 needs parallel.sequence_parallel=true"]),
        (
            [*EXPERTS, "parallel.tp=8", "parallel.sequence_parallel=true"],
            ["parallel.tp=8 must divide the shared expert's width 36"],
        ),
        (
            [*EXPERTS, "search.layers=[12,24]", "search.ffn_multiples=[0.01171875]"],
            [
                "search.layers=[12, 24], search.ffn_multiples=[0.01171875] would cut a model with experts",
                "imports and scores such models",
            ],
        ),
        ([*EXPERTS, "search.heads=[8]", "model.architecture.num_key_value_heads=8"], ["search.heads=[8] would cut"]),
        ([*EXPERTS, "search.hidden=[1024]", "search.ffn=[64]"], ["search.hidden=[1024] would cut"]),
    ],
)
def test_a_broken_rule_about_experts_is_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose(overrides))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [*LLAMA, "parallel.tp=2", "search.layers=[8]"],
        [*EXPERTS, "parallel.ep=3", "parallel.pp=2"],
        [*EXPERTS, "parallel.ep=2", "parallel.tp=2", "parallel.sequence_parallel=true"],
        [*EXPERTS, "search.layers=[24]", "search.hidden=[2048]", "search.heads=[16]", "search.ffn=[64]"],
    ],
)
def test_what_keeps_the_rules_passes(overrides: list[str]) -> None:
    assert check(compose(overrides)) is not None


def test_ranks_of_expert_parallelism() -> None:
    config = compose([*EXPERTS, "parallel.ep=2", "parallel.pp=2"])
    assert "parallel.ep=2 must divide the 1 data-parallel ranks of 2 processes" in launch_problems(config, 2)
    assert launch_problems(config, 4) == ""
