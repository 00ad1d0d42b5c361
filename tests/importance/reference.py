"""Scores by their definition, from hooks on transformers' model in float64. Shares no call with the package."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

AGGREGATORS = ("mean", "l2", "var")
PAIRS = list(product(AGGREGATORS, AGGREGATORS))
"""(batch, sequence)"""


def over(x: Tensor, how: str, dim: int) -> Tensor:
    """One of the paper's aggregators."""
    if how == "mean":
        return x.abs().sum(dim) / x.shape[dim]
    if how == "l2":
        return (x * x).sum(dim) ** 0.5
    centred = x - x.sum(dim, keepdim=True) / x.shape[dim]
    return (centred * centred).sum(dim) / x.shape[dim]


def activations(model: Any, ids_NS: Tensor, neurons: str = "after") -> dict[str, list[Tensor]]:
    """`[N, S, E]` activations by the name of their score; `hidden` has one for each norm, `depth` a pair a layer."""
    config = model.config
    head_dim, groups = config.head_dim, config.num_key_value_heads
    seen: dict[str, list[Tensor]] = {}

    def at(name: str, value: Tensor) -> None:
        seen.setdefault(name, []).append(value)

    def attention(i: int) -> Any:
        def hook(module: Any, args: Any) -> None:
            heads = args[0].reshape(*args[0].shape[:2], -1, head_dim)
            at(f"layers.{i}.heads", heads.pow(2).sum(-1).sqrt())
            grouped = args[0].reshape(*args[0].shape[:2], groups, -1)
            at(f"layers.{i}.groups", grouped.pow(2).sum(-1).sqrt())

        return hook

    handles = []
    for i, layer in enumerate(model.model.layers):
        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(attention(i)))
        handles += [
            norm.register_forward_hook(lambda _, args, out: at("hidden", out))
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        ]
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out: at("depth", torch.stack([args[0], out[0] if isinstance(out, tuple) else out]))
            )
        )
        if hasattr(layer.mlp, "down_proj"):
            first = getattr(layer.mlp, "gate_proj", layer.mlp.up_proj)
            after = layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, i=i: at(f"layers.{i}.mlp", args[0]) if neurons == "after" else None
            )
            before = first.register_forward_hook(
                lambda _, args, out, i=i: at(f"layers.{i}.mlp", out) if neurons == "before" else None
            )
            handles += [after, before]
        else:
            handles.append(layer.mlp.register_forward_pre_hook(_experts(layer.mlp, i, config, neurons, at)))
    handles.append(model.model.norm.register_forward_hook(lambda _, args, out: at("hidden", out)))
    with torch.no_grad():
        model(ids_NS)
    for handle in handles:
        handle.remove()
    return seen


def _experts(moe: Any, i: int, config: Any, neurons: str, at: Any) -> Any:
    """Every expert on every token by plain loops; tokens routed elsewhere give zeros."""

    def hook(module: Any, args: Any) -> None:
        x = args[0]
        gate = (x @ moe.gate.weight.T).softmax(-1)
        top, chosen = gate.topk(config.num_experts_per_tok, dim=-1)
        if config.model_type == "mixtral" or config.norm_topk_prob:
            top = top / top.sum(-1, keepdim=True)
        weight = torch.zeros_like(gate).scatter(-1, chosen, top)
        norms = []
        for e in range(gate.shape[-1]):
            first, up = (x @ moe.experts.gate_up_proj[e].T).chunk(2, dim=-1)
            inner = first / (1 + (-first).exp()) * up * weight[..., e : e + 1]
            is_routed = (weight[..., e : e + 1] > 0).to(x.dtype)
            at(f"layers.{i}.experts.{e}.mlp", inner if neurons == "after" else first * is_routed)
            norms.append((inner @ moe.experts.down_proj[e].T).pow(2).sum(-1).sqrt())
        at(f"layers.{i}.experts", torch.stack(norms, dim=-1))
        if hasattr(moe, "shared_expert"):
            shared = moe.shared_expert
            first = x @ shared.gate_proj.weight.T
            inner = first / (1 + (-first).exp()) * (x @ shared.up_proj.weight.T)
            at(f"layers.{i}.shared_expert.mlp", inner if neurons == "after" else first)

    return hook


def scores_of(seen: dict[str, list[Tensor]], batch: str, sequence: str) -> dict[str, Tensor]:
    """The vectors of one pair, named as in the scores file, with its prefix."""
    return {
        f"{batch}_{sequence}.{name}": sum(over(over(x, sequence, 1), batch, 0) for x in values)
        for name, values in seen.items()
        if name != "depth"
    }


def block_importance(seen: dict[str, list[Tensor]]) -> Tensor:
    """`[layers]`, 1 - E[cos(input, output)]."""
    before, after = torch.stack(seen["depth"], dim=1)
    dots = (before * after).sum(-1)
    return 1 - (dots / (before.pow(2).sum(-1).sqrt() * after.pow(2).sum(-1).sqrt())).mean(dim=(1, 2))


def reference(model: Any, ids_NS: Tensor, neurons: str = "after") -> dict[str, Tensor]:
    """All nine pairs and block importance."""
    seen = activations(model.double(), ids_NS, neurons)
    scores = {"depth.bi": block_importance(seen)}
    for pair in PAIRS:
        scores |= scores_of(seen, *pair)
    return scores
