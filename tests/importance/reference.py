"""Scores by their definition, from hooks on transformers' model in float64. Shares no call with the package."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
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
    width = getattr(config, "intermediate_size", None)
    head_dim, groups = getattr(config, "v_head_dim", config.head_dim), config.num_key_value_heads
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
            module.register_forward_pre_hook(
                lambda _, args, kwargs: at("hidden", kwargs.get("hidden_states", *args[:1])), with_kwargs=True
            )
            for module in (layer.self_attn, layer.mlp)
        ]
        handles.append(
            layer.register_forward_hook(
                lambda _, args, out: at("depth", torch.stack([args[0], out[0] if isinstance(out, tuple) else out]))
            )
        )
        if hasattr(layer.mlp, "down_proj"):
            names = ("gate_up_proj", "gate_proj", "up_proj")  # of gate and up together the first half
            first = next(getattr(layer.mlp, name) for name in names if hasattr(layer.mlp, name))
            after = layer.mlp.down_proj.register_forward_pre_hook(
                lambda _, args, i=i: at(f"layers.{i}.mlp", args[0]) if neurons == "after" else None
            )
            before = first.register_forward_hook(
                lambda _, args, out, i=i: at(f"layers.{i}.mlp", out[..., :width]) if neurons == "before" else None
            )
            handles += [after, before]
        else:
            handles.append(layer.mlp.register_forward_pre_hook(experts_hook(layer.mlp, i, config, neurons, at)))
    handles.append(model.model.norm.register_forward_hook(lambda _, args, out: at("hidden", out)))
    with torch.no_grad():
        model(ids_NS)
    for handle in handles:
        handle.remove()
    return seen


def experts_hook(moe: Any, i: int, config: Any, neurons: str, at: Any) -> Any:
    """Every expert on every token by plain loops; tokens routed elsewhere give zeros."""

    def hook(module: Any, args: Any) -> None:
        x = args[0]
        router = moe.gate if hasattr(moe, "gate") else moe.router
        weight = gates(router, x, config)
        norms = []
        for e in range(weight.shape[-1]):
            weight_of_e = weight[..., e : e + 1]
            if config.model_type == "gpt_oss":
                first, inner, written = gpt_oss_expert(moe.experts, e, x)
            else:
                first, up = (x @ moe.experts.gate_up_proj[e].T).chunk(2, dim=-1)
                inner = first / (1 + (-first).exp()) * up
                written = inner @ moe.experts.down_proj[e].T
            is_routed = (weight_of_e > 0).to(x.dtype)
            at(f"layers.{i}.experts.{e}.mlp", inner * weight_of_e if neurons == "after" else first * is_routed)
            norms.append((written * weight_of_e).pow(2).sum(-1).sqrt())
        at(f"layers.{i}.experts", torch.stack(norms, dim=-1))
        if shared := getattr(moe, "shared_expert", None) or getattr(moe, "shared_experts", None):
            first = x @ shared.gate_proj.weight.T
            inner = first / (1 + (-first).exp()) * (x @ shared.up_proj.weight.T)
            at(f"layers.{i}.shared_expert.mlp", inner if neurons == "after" else first)

    return hook


def gates(router: Any, x: Tensor, config: Any) -> Tensor:
    """The weight that every expert has for every token, 0 for those it is not sent to."""
    bias, is_deepseek = getattr(router, "bias", None), config.model_type.startswith("deepseek")
    logits = x @ router.weight.T + (0 if bias is None else bias)
    gate = logits.sigmoid() if config.model_type == "deepseek_v3" else logits.softmax(-1)
    choice = gate + getattr(router, "e_score_correction_bias", 0)
    if is_deepseek and getattr(config, "topk_method", None) != "greedy" and config.n_group > 1:
        groups = choice.reshape(*choice.shape[:-1], config.n_group, -1)
        number = 2 if config.model_type == "deepseek_v3" else 1
        worth = groups.sort(-1, descending=True).values[..., :number].sum(-1)
        least = worth.sort(-1, descending=True).values[..., config.topk_group - 1 : config.topk_group]
        choice = torch.where((worth >= least)[..., None], groups, -torch.inf).reshape(choice.shape)
    chosen = choice.topk(config.num_experts_per_tok, dim=-1).indices
    top = gate.gather(-1, chosen)
    if config.model_type in ("mixtral", "gpt_oss") or config.norm_topk_prob:
        top = top / top.sum(-1, keepdim=True)
    return torch.zeros_like(gate).scatter(-1, chosen, top * getattr(config, "routed_scaling_factor", 1.0))


def gpt_oss_expert(experts: Any, e: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What goes through the activation, what comes out of it, and what the expert writes."""
    wide = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
    first, up = wide[..., 0::2], wide[..., 1::2]
    limited, up = first.minimum(torch.tensor(7.0)), up.minimum(torch.tensor(7.0)).maximum(torch.tensor(-7.0))
    inner = (up + 1) * limited / (1 + (-1.702 * limited).exp())
    return first, inner, inner @ experts.down_proj[e] + experts.down_proj_bias[e]


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
    return scores | {f"reap.{name}": over_routed(x[0]) for name, x in seen.items() if name.endswith(".experts")}


def over_routed(norm_NSE: Tensor, counts_NS: Tensor | None = None) -> Tensor:
    """`[E]`, the mean over the tokens that an expert was sent, of those that count."""
    rows = norm_NSE.flatten(0, 1) if counts_NS is None else norm_NSE[counts_NS]
    return torch.stack([expert[expert > 0].mean() if (expert > 0).any() else expert.sum() for expert in rows.T])


@torch.no_grad()
def logits_without(
    model: Any, ids_NS: Tensor, each: Iterable[tuple[int, ...]]
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Layers left out, and the `[N, S, V]` logits of the model without them."""
    every = list(model.model.layers)
    del model.model.layers  # a plain list takes its place
    for missing in each:
        model.model.layers = [layer for i, layer in enumerate(every) if i not in missing]
        yield missing, model(ids_NS, use_cache=False).logits
    model.model.layers = torch.nn.ModuleList(every)


def taylor_reference(model: Any, ids_NS: Tensor, counts_NS: Tensor | None = None) -> dict[str, Tensor]:
    """Taylor importance by plain loops over the tensors of a Hugging Face model, of the predictions that count."""
    counts_NS = torch.ones_like(ids_NS, dtype=torch.bool) if counts_NS is None else counts_NS
    rows = counts_NS[:, :-1]
    F.cross_entropy(model(ids_NS).logits[:, :-1][rows], ids_NS[:, 1:][rows]).backward()
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    is_centred = model.config.model_type == "nemotron"
    taylor = {}
    for name, p in model.named_parameters():
        weight = p + 1 if is_centred and "norm" in name and name.endswith("weight") else p
        taylor[name] = (weight * p.grad).abs().detach()
    hidden = taylor["model.embed_tokens.weight"].sum(0) + taylor.get("lm_head.weight", torch.zeros(1)).sum(0)
    hidden = hidden + taylor["model.norm.weight"] + taylor.get("model.norm.bias", 0)
    scores = {}
    for i in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): x for name, x in taylor.items() if name.startswith(prefix)}
        if "mlp.router.weight" in own:  # matrices of the experts the other way round, gate and up in turns
            gate_up = own["mlp.experts.gate_up_proj"].transpose(1, 2)
            own["mlp.experts.gate_up_proj"] = torch.cat([gate_up[:, 0::2], gate_up[:, 1::2]], dim=1)
            bias = own["mlp.experts.gate_up_proj_bias"]
            own["mlp.experts.gate_up_proj_bias"] = torch.cat([bias[:, 0::2], bias[:, 1::2]], dim=1)
            own["mlp.experts.down_proj"] = own["mlp.experts.down_proj"].transpose(1, 2)
        for name, x in own.items():
            is_reader = name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight"))
            is_reader = is_reader or name.endswith(("q_a_proj.weight", "kv_a_proj_with_mqa.weight", "router.weight"))
            if is_reader or name.endswith(("gate_proj.weight", "gate.weight")):
                hidden = hidden + x.sum(0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                hidden = hidden + x.sum(1)
            elif ("layernorm" in name and "_a_layernorm" not in name) or name.endswith(
                ("o_proj.bias", "down_proj.bias")
            ):
                hidden = hidden + x
            elif name.endswith("gate_up_proj"):
                hidden = hidden + x.sum((0, 1))
            elif name.endswith("experts.down_proj"):
                hidden = hidden + x.sum((0, 2))
            elif name.endswith("experts.down_proj_bias"):
                hidden = hidden + x.sum(0)
        scores |= {f"layers.{i}.{name}": x for name, x in _taylor_of_layer(own, heads, groups).items()}
    return scores | {"hidden": hidden}


def _taylor_of_layer(own: dict[str, Tensor], heads: int, groups: int) -> dict[str, Tensor]:
    def rows(projection: str, count: int) -> Tensor:
        """Of `count` heads: their rows and biases."""
        total = own[f"self_attn.{projection}.weight"].sum(1) + own.get(f"self_attn.{projection}.bias", 0)
        return total.reshape(count, -1).sum(1)

    makers = [name for name in ("q_proj", "q_b_proj", "kv_b_proj") if f"self_attn.{name}.weight" in own]
    scores = {"heads": own["self_attn.o_proj.weight"].sum(0).reshape(heads, -1).sum(1)}
    scores["heads"] = scores["heads"] + sum(rows(name, heads) for name in makers) + own.get("self_attn.sinks", 0)
    keys_and_values: Any = 0  # with latents a head's own
    if "self_attn.k_proj.weight" in own:
        keys_and_values = rows("k_proj", groups) + rows("v_proj", groups)
    scores["groups"] = scores["heads"].reshape(groups, -1).sum(1) + keys_and_values
    paths = {"mlp.": "mlp", "mlp.shared_expert.": "shared_expert.mlp", "mlp.shared_experts.": "shared_expert.mlp"}
    for path, name in paths.items():
        if f"{path}down_proj.weight" in own:
            first = [x for x in own if x.startswith((f"{path}gate_proj.", f"{path}up_proj."))]
            values = [own[x].sum(1) if x.endswith("weight") else own[x] for x in first]
            scores[name] = sum(values) + own[f"{path}down_proj.weight"].sum(0)
    if "mlp.experts.down_proj" in own:
        gate_up_EF, down_EF = own["mlp.experts.gate_up_proj"].sum(2), own["mlp.experts.down_proj"].sum(1)
        gate_up_EF = gate_up_EF + own.get("mlp.experts.gate_up_proj_bias", 0)
        scores["experts"] = gate_up_EF.sum(1) + down_EF.sum(1)
        if "mlp.experts.down_proj_bias" in own:
            scores["experts"] = scores["experts"] + own["mlp.experts.down_proj_bias"].sum(1)
        for e, (gate_up_F, down_F) in enumerate(zip(gate_up_EF, down_EF, strict=True)):
            scores[f"experts.{e}.mlp"] = gate_up_F.reshape(2, -1).sum(0) + down_F
    return scores


def normed_in_float64(model: Any) -> Any:
    """A Llama whose norms are in the model's precision; transformers computes them in float32."""

    def normed(norm: Any, args: Any, out: Any) -> Tensor:
        x = args[0]
        return norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()

    norms = [model.model.norm]
    for layer in model.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.register_forward_hook(normed)
    return model
