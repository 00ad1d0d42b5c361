"""Experts and their neurons are measured by hooks: a token counts where the router sent it, with its gate's weight.

Quantities per token, 0 for a token that was routed elsewhere, so that every expert is measured over all tokens:

- expert e: L2 norm of ``g_e(x) * expert_e(x)``, g the gate weight: what the expert adds to the residual stream;
- expert e, "routed": the same norm and 1, whose means' quotient is the mean over the tokens that it was sent (REAP);
- neuron j of expert e: ``g_e(x) * h_j(x)``, the input of the expert's fc2 (after the activation), or the output of its
  fc1 without the gate weight (before);
- neuron of a shared expert: as in a dense MLP.

Under expert parallelism a rank's experts see the tokens of all ranks of the group: the samples of an
element are those of the group, ordered by rank, and no rank reports a sample of an expert twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compactlm_nemo.config.score import Aggregator, Neurons
from compactlm_nemo.data.marks import counts_of, ids_of, mark
from compactlm_nemo.importance.aggregators import Length, Parts, counted_length, quotient
from compactlm_nemo.parallel.collectives import all_reduce_sum
from compactlm_nemo.parallel.mesh import Mesh

if TYPE_CHECKING:
    from compactlm_nemo.importance.activations import ActivationHooks


def hook_experts(hooks: ActivationHooks, moe: Any, layer_idx: int) -> None:
    """Measure a Megatron MoE layer, whichever rank a token comes from."""
    places = TokenPlaces(hooks.mesh, moe, lambda: hooks.part_counts_SB)
    hooks.handles += places.follow()
    for local, expert in enumerate(moe.experts.local_experts):
        number = moe.local_expert_indices[local]
        _hook_expert(hooks, places, expert, local, f"{layer_idx}.{number}")
    if moe.shared_experts is not None:
        hooks.on_neurons(moe.shared_experts, f"shared_expert.{layer_idx}")


class TokenPlaces:
    """Knows which sample each dispatched token belongs to: number ``ep_rank * batch + b`` of the group's samples.

    Args:
        counts: Returns which tokens of this rank's micro-batch count, `[S, B]` as they reach the layer; None for all.
            The sample of a token that does not count is marked (`data.marks`).
    """

    def __init__(self, mesh: Mesh, moe: Any, counts: Callable[[], Tensor | None]) -> None:
        self.mesh, self.moe, self.counts = mesh, moe, counts
        self.shape: tuple[int, int] = (0, 0)
        self.samples: tuple[Tensor, ...] = ()

    def follow(self) -> list[Any]:
        """Hook the layer, so that every batch updates the places; the handles remove the hooks."""
        return [
            self.moe.register_forward_pre_hook(lambda _, args: self.start(args[0])),
            self.moe.experts.register_forward_pre_hook(lambda _, args: self.dispatch(args[1])),
        ]

    def start(self, hidden_SBH: Tensor) -> None:
        """Keep the length and the number of samples of a batch, before the tokens are dispatched."""
        self.shape = (hidden_SBH.shape[0], hidden_SBH.shape[1])

    def dispatch(self, tokens_per_expert: Tensor) -> None:
        """Send the samples of this rank's rows, `(position, sample)`, the way that the rows went to the experts."""
        batch, counts_SB = self.shape[1], self.counts()
        dispatcher = self.moe.token_dispatcher
        row_N = dispatcher.reversed_local_input_permutation_mapping
        sample_N = self.mesh.ep_rank * batch + row_N % batch
        if counts_SB is not None:
            sample_N = mark(sample_N, counts_SB.flatten()[row_N])
        with torch.no_grad():
            sample_N1, _ = dispatcher.token_dispatch(sample_N[:, None], sample_N)
            sample_N1, _, _ = dispatcher.dispatch_postprocess(sample_N1, sample_N1[:, 0])
        self.samples = sample_N1[:, 0].split(tokens_per_expert.tolist())

    @property
    def tp_ranks(self) -> int:
        return self.mesh.tp_size if self.mesh.is_sequence_parallel else 1

    @property
    def num_samples(self) -> int:
        return self.shape[1] * self.mesh.ep_size

    @property
    def length(self) -> int:
        return self.shape[0] * self.tp_ranks


def _hook_expert(hooks: ActivationHooks, places: TokenPlaces, expert: Any, local: int, name: str) -> None:
    def put(element: str, x_NE: Tensor) -> None:
        length: Length = places.length
        if hooks.counts_SB is not None:
            length = hooks.experts_length(counted_length(hooks.counts_SB))
        parts = routed_parts(x_NE, places.samples[local], places.num_samples, length, hooks.aggs)
        hooks.experts.put(f"{element}.{name}", parts)

    def neurons_before(module: Any, args: Any, out: Any) -> None:
        put("expert_mlp", hooks.before_activation(*out))

    def norm(module: Any, args: Any, out: Any) -> None:
        whole_NH = out[0].detach().float()
        if places.mesh.tp_size > 1:  # the ranks hold parts of the sum over the expert's neurons
            whole_NH = all_reduce_sum(whole_NH, places.mesh.tp_group)
        norm_N1 = whole_NH.square().sum(dim=-1, keepdim=True).sqrt()
        put("experts", norm_N1)
        sums = routed_sums(
            torch.cat([norm_N1, torch.ones_like(norm_N1)], dim=1), places.samples[local], places.num_samples
        )
        hooks.routed.put(f"routed.{name}", {"abs": sums})

    if hooks.cfg.neurons is Neurons.after:
        fc2 = expert.linear_fc2
        hooks.handles.append(fc2.register_forward_pre_hook(lambda _, args: put("expert_mlp", args[0])))
    else:
        hooks.handles.append(expert.linear_fc1.register_forward_hook(neurons_before))
    hooks.handles.append(expert.register_forward_hook(norm))


def routed_sums(x_NE: Tensor, sample_N: Tensor, num_samples: int) -> Tensor:
    """Sum N routed tokens of the given samples, marked where a token does not count, `[num_samples, E]`."""
    values_NE = x_NE.masked_fill(~counts_of(sample_N)[:, None], 0)
    return values_NE.new_zeros(num_samples, values_NE.shape[1]).index_add_(0, ids_of(sample_N), values_NE)


def routed_parts(x_NE: Tensor, sample_N: Tensor, num_samples: int, length: Length, aggs: set[Aggregator]) -> Parts:
    """Sum as `sequence_parts` does, over N routed tokens of the given samples; all other tokens count as zeros.

    Args:
        sample_N: Marked where a token does not count, if `length` is that of each sample.
    """
    x_NE = x_NE.detach().to(torch.promote_types(x_NE.dtype, torch.float32))
    ignored_N1 = None if isinstance(length, int) else ~counts_of(sample_N)[:, None]
    sample_N = ids_of(sample_N)

    def summed(values_NE: Tensor) -> Tensor:
        if ignored_N1 is not None:
            values_NE = values_NE.masked_fill(ignored_N1, 0)
        return values_NE.new_zeros(num_samples, values_NE.shape[1]).index_add_(0, sample_N, values_NE)

    parts: Parts = {}
    if Aggregator.mean in aggs:
        parts["abs"] = summed(x_NE.abs())
    if Aggregator.var in aggs:
        parts["mean"] = quotient(summed(x_NE), length)
        zeros_B1 = length - summed(torch.ones_like(x_NE[:, :1]))
        parts["m2"] = summed((x_NE - parts["mean"][sample_N]).square()) + zeros_B1 * parts["mean"].square()
    if Aggregator.l2 in aggs:
        parts["sq"] = summed(x_NE.square())
    return parts
