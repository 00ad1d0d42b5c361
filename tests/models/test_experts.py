"""Experts computed together against sums over numbers, and where they are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from torch import Tensor

from compactlm_nemo.models.experts import Experts, can_group

HIDDEN, WIDTH = 8, 4
needs_products = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10 has none on the CPU")
COUNTS = [3, 0, 2, 4]
"""Tokens of each expert; one has none."""


def experts(gated: bool, has_biases: bool = False) -> Any:
    """Experts of Megatron's shape without its parallel linears."""
    module = Experts.__new__(Experts)
    torch.nn.Module.__init__(module)
    module.config = SimpleNamespace(
        gated_linear_unit=gated, activation_func=F.silu if gated else squared_relu, activation_func_clamp_value=None,
        glu_linear_offset=0.0,
    )  # fmt: skip
    module.tp_group = SimpleNamespace(size=lambda: 2)
    module.local_experts = torch.nn.ModuleList()
    generator = torch.Generator().manual_seed(2)
    for _ in COUNTS:
        expert = torch.nn.Module()
        for name, shape in (("linear_fc1", (WIDTH * (2 if gated else 1), HIDDEN)), ("linear_fc2", (HIDDEN, WIDTH))):
            linear = torch.nn.Module()
            linear.weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
            linear.bias = torch.nn.Parameter(torch.randn(shape[0], generator=generator)) if has_biases else None
            setattr(expert, name, linear)
        module.local_experts.append(expert)
    module.is_grouped = True
    return module


def routed(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return hidden states and probabilities of `COUNTS` tokens, as leaves."""
    hidden_NH = torch.randn(sum(COUNTS), HIDDEN, generator=generator, requires_grad=True)
    return hidden_NH, torch.rand(sum(COUNTS), generator=generator, requires_grad=True)


def one_token(x: list[float], fc1: list[list[float]], fc2: list[list[float]], prob: float, gated: bool) -> list[float]:
    wide = [sum(w * v for w, v in zip(row, x, strict=True)) for row in fc1]
    if gated:
        inner = [g / (1 + math.exp(-g)) * u for g, u in zip(wide[:WIDTH], wide[WIDTH:], strict=True)]
    else:
        inner = [max(v, 0.0) ** 2 for v in wide]
    return [sum(w * v * prob for w, v in zip(row, inner, strict=True)) for row in fc2]


@needs_products
@pytest.mark.parametrize("gated", [True, False])
def test_one_product_is_every_expert_by_itself(gated: bool) -> None:
    module = experts(gated)
    hidden_NH, probs_N = routed(torch.Generator().manual_seed(3))
    got, bias = module(hidden_NH, torch.tensor(COUNTS), probs_N)
    assert bias is None
    expert_N = [expert for expert, count in enumerate(COUNTS) for _ in range(count)]
    want = []
    for n, number in enumerate(expert_N):
        expert = module.local_experts[number]
        weights = [expert.linear_fc1.weight.tolist(), expert.linear_fc2.weight.tolist()]
        want.append(one_token(hidden_NH[n].tolist(), *weights, probs_N[n].item(), gated))
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-5)


@needs_products
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_are_those_of_the_experts_one_after_another(gated: bool) -> None:
    module, generator = experts(gated), torch.Generator().manual_seed(4)
    hidden_NH, probs_N = routed(generator)
    weight_NH = torch.randn(sum(COUNTS), HIDDEN, generator=generator)
    inputs = [hidden_NH, probs_N, *module.parameters()]

    def in_turn() -> Tensor:
        outs = []
        parts = zip(hidden_NH.split(COUNTS), probs_N.split(COUNTS), module.local_experts, strict=True)
        for x, prob, expert in parts:
            wide = x @ expert.linear_fc1.weight.T
            inner = F.silu(wide[:, :WIDTH]) * wide[:, WIDTH:] if gated else F.relu(wide) ** 2
            outs.append((inner * prob[:, None]) @ expert.linear_fc2.weight.T)
        return torch.cat(outs)

    got = torch.autograd.grad((module(hidden_NH, torch.tensor(COUNTS), probs_N)[0] * weight_NH).sum(), inputs)
    want = torch.autograd.grad((in_turn() * weight_NH).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_products
def test_biases_and_a_clamped_activation_are_every_expert_by_itself() -> None:
    """Of two tensor-parallel ranks each adds half of fc2's bias."""
    module, generator = experts(True, has_biases=True), torch.Generator().manual_seed(5)
    module.config.activation_func_clamp_value, module.config.glu_linear_offset = 1.5, 1.0
    hidden_NH, probs_N = routed(generator)
    weight_NH = torch.randn(sum(COUNTS), HIDDEN, generator=generator)
    outs = []
    for x, prob, expert in zip(hidden_NH.split(COUNTS), probs_N.split(COUNTS), module.local_experts, strict=True):
        fc1, fc2 = expert.linear_fc1, expert.linear_fc2
        for row, p in zip(x, prob, strict=True):
            wide = fc1.weight @ row + fc1.bias
            gate = torch.stack([value if value < 1.5 else value.new_tensor(1.5) for value in wide[:WIDTH]])
            up = torch.stack([max(min(value, 1.5), -1.5) + value * 0 for value in wide[WIDTH:]])
            outs.append((fc2.weight @ (gate / (1 + (-gate).exp()) * (up + 1)) + fc2.bias / 2) * p)
    want = torch.stack(outs)
    got, bias = module(hidden_NH, torch.tensor(COUNTS), probs_N)
    assert bias is None
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = [hidden_NH, probs_N, *module.parameters()]
    grads = [torch.autograd.grad((out * weight_NH).sum(), inputs, allow_unused=True) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "device", "capability", "changes", "tp", "wanted"),
    [
        (torch.bfloat16, "cuda", (9, 0), {}, 1, True),
        (torch.bfloat16, "cuda", (10, 0), {}, 2, True),
        (torch.bfloat16, "cuda", (8, 0), {}, 1, False),
        (torch.float32, "cuda", (9, 0), {}, 1, False),
        (torch.bfloat16, "cpu", (9, 0), {}, 1, False),
        (torch.bfloat16, "cuda", (9, 0), {"num_experts": 0}, 1, False),
        (torch.bfloat16, "cuda", (9, 0), {"mlp_bias": True}, 1, True),
        (torch.bfloat16, "cuda", (9, 0), {"hidden_size": 60}, 1, False),
        (torch.bfloat16, "cuda", (9, 0), {"ffn_hidden_size": 48}, 4, False),
    ],
)
def test_experts_are_grouped_where_the_device_can(monkeypatch, dtype, device, capability, changes, tp, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dims = SimpleNamespace(
        **({"num_experts": 4, "mlp_bias": False, "hidden_size": 64, "ffn_hidden_size": 48} | changes)
    )
    chunk = SimpleNamespace(config=SimpleNamespace(params_dtype=dtype))
    chunks: Any = SimpleNamespace(dims=dims, mesh=SimpleNamespace(tp_size=tp), plain=lambda: [chunk])
    assert can_group(chunks, torch.device(device)) is wanted
