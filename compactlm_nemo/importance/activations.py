"""One forward pass over calibration samples measures heads, groups, neurons, channels and layers.

Source: Minitron (arXiv 2407.14679), section 2.2. Activations only:

- heads: L2 norm over the head dimension of the input of the output projection; groups: over all heads of the group;
- neurons: the input of fc2 (after the activation), or the output of fc1 (before; of a gated MLP the gate's half);
- hidden channels: the output of every norm, scores summed over the norms;
- layers: block importance `BI_i = 1 - E[cos(x_i, x_{i+1})]`, x_i the input of layer i, E over all tokens;
- experts: `experts.py`.

The sequence aggregator is applied within a sample, the batch aggregator over samples; tokens whose place is marked
(`data.marks`) are left out. Ranks that hold parts of one sequence (sequence and context parallel) add up small sums
once a micro-batch; all else is merged at the end, so every layout gives equal numbers. Nothing waits for the device
before that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.config.score import DepthMetric, Neurons, ScoreConfig
from compactlm_nemo.importance.accumulator import Accumulator, StateKey, is_sharded
from compactlm_nemo.importance.aggregators import Length, State, blocks_of, counted_length, sequence_parts
from compactlm_nemo.importance.experts import hook_experts
from compactlm_nemo.models.build import HiddenStateModel, ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, forward_each, sequence_share
from compactlm_nemo.parallel.collectives import all_gather, gather_objects
from compactlm_nemo.parallel.mesh import Mesh


class ActivationHooks:
    """Hooks on the layers of one model chunk fill accumulators with what the layers compute."""

    def __init__(self, chunk: HiddenStateModel, mesh: Mesh, dims: Dims, cfg: ScoreConfig) -> None:
        self.mesh, self.dims, self.cfg = mesh, dims, cfg
        self.aggs = {metric.pair[1] for metric in cfg.width if metric.pair}
        split = [mesh.cp_group] if mesh.cp_size > 1 else []
        along = split + ([mesh.tp_group] if mesh.is_sequence_parallel else [])
        self.whole, self.norms, self.experts = Accumulator(split), Accumulator(along), Accumulator(split)
        self.depth, self.routed = Accumulator(along, is_over_tokens=True), Accumulator(split, is_over_tokens=True)
        self.handles: list[Any] = []
        self.length = 0
        self.counts_SB: Tensor | None = None
        """Which tokens of the micro-batch count, on this context-parallel rank; None for all."""
        self.part_counts_SB: Tensor | None = None
        """The same of the tokens that this rank has under sequence parallelism."""
        for layer in chunk.decoder.layers:
            self._hook_layer(layer)
        if self.aggs and chunk.post_process:
            self._on_output(chunk.decoder.final_layernorm, self._norm(2 * dims.num_layers))

    def _hook_layer(self, layer: Any) -> None:
        idx = layer.layer_number - 1
        if DepthMetric.bi in self.cfg.depth:
            self.handles.append(layer.register_forward_hook(self._layer_hook(idx), with_kwargs=True))
        if not self.aggs:
            return
        self._on_input(layer.self_attention.linear_proj, self._heads(idx))
        self._on_output(layer.input_layernorm, self._norm(2 * idx))
        self._on_output(layer.pre_mlp_layernorm, self._norm(2 * idx + 1))
        if not self.dims.is_dense(idx):
            hook_experts(self, layer.mlp, idx)
        else:
            self.on_neurons(layer.mlp, f"mlp.{idx}")

    def start(self, counts_SB: Tensor | None) -> None:
        """Say which tokens of the next micro-batch count; None for all."""
        self.counts_SB = counts_SB
        self.part_counts_SB = None if counts_SB is None else sequence_share(counts_SB, self.mesh)

    def on_neurons(self, mlp: Any, element: str) -> None:
        """Measure an MLP that sees whole sequences `[S, B, H]`."""
        put = lambda x_SBF: self.whole.put(element, sequence_parts(x_SBF, self.aggs, self.counts_SB))  # noqa: E731
        if self.cfg.neurons is Neurons.after:
            self._on_input(mlp.linear_fc2, put)
        else:
            hook = lambda _, args, out: put(self.before_activation(*out))  # noqa: E731
            self.handles.append(mlp.linear_fc1.register_forward_hook(hook))

    def before_activation(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return the part of fc1's output that goes through the activation: all of the output, or its gate's half.

        Megatron hands on the bias by itself.
        """
        x = x if bias is None else x + bias
        return x.chunk(2, dim=-1)[0] if self.dims.gated_mlp else x

    def _heads(self, idx: int) -> Callable[[Tensor], None]:
        def put(x_SBE: Tensor) -> None:
            heads = (block.unflatten(-1, (-1, self.dims.head_dim)) for block in blocks_of(x_SBE))
            norm_SBE = torch.cat([torch.linalg.vector_norm(head, dim=-1) for head in heads])
            per_group = self.dims.num_heads // self.dims.num_query_groups
            self.whole.put(f"heads.{idx}", sequence_parts(norm_SBE, self.aggs, self.counts_SB))
            groups_SBE = torch.linalg.vector_norm(norm_SBE.unflatten(-1, (-1, per_group)), dim=-1)
            self.whole.put(f"groups.{idx}", sequence_parts(groups_SBE, self.aggs, self.counts_SB))

        return put

    def _norm(self, number: int) -> Callable[[Tensor], None]:
        def put(x_SBH: Tensor) -> None:
            self.length = x_SBH.shape[0]
            self.norms.put(f"norm.{number}", sequence_parts(x_SBH, self.aggs, self.part_counts_SB))

        return put

    def _layer_hook(self, idx: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            self.length = before.shape[0]
            pairs = zip(blocks_of(before), blocks_of(after), strict=True)
            change_SB = torch.cat([1 - _cosine(x, y) for x, y in pairs])
            if self.part_counts_SB is not None:
                change_SB = change_SB.masked_fill(~self.part_counts_SB, 0)
            self.depth.put(f"depth.{idx}", {"abs": change_SB.abs().sum(dim=0)[:, None]})

        return hook

    def _on_input(self, module: Any, put: Callable[[Tensor], None]) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: put(args[0])))

    def _on_output(self, module: Any, put: Callable[[Tensor], None]) -> None:
        hook = lambda _, args, out: put(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        self.handles.append(module.register_forward_hook(hook))

    def finish(self, counted_B: Tensor | None, counted_by_experts: Tensor | None) -> None:
        """Close a micro-batch; the masks say which samples count and are None where a batch only fills the schedule."""
        part_places = self.length
        places = part_places * (self.mesh.tp_size if self.mesh.is_sequence_parallel else 1)
        part: Length = part_places
        whole: Length = places
        of_experts: Length = places
        if self.counts_SB is not None and self.part_counts_SB is not None:
            whole, part = counted_length(self.counts_SB), counted_length(self.part_counts_SB)
            of_experts = self.experts_length(whole)
        self.whole.flush(places, whole, counted_B)
        self.norms.flush(part_places, part, counted_B)
        self.depth.flush(part_places, part, counted_B)
        self.experts.flush(places, of_experts, counted_by_experts)
        self.routed.flush(places, of_experts, counted_by_experts)

    def experts_length(self, length_B1: Tensor) -> Tensor:
        """Return `length_B1` of all samples that share this rank's experts."""
        return all_gather(length_B1, self.mesh.ep_group, dim=0) if self.mesh.ep_size > 1 else length_B1

    def pop(self) -> dict[StateKey, State]:
        """Give the states since the last call that this rank has to report: replicated elements come from one rank."""
        parts = (self.whole, self.norms, self.depth, self.experts, self.routed)
        states = {key: state for part in parts for key, state in part.pop().items()}
        if self.mesh.cp_rank > 0:
            return {}
        return {key: state for key, state in states.items() if self.mesh.tp_rank == 0 or is_sharded(key[0])}

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()


def _cosine(x_SBH: Tensor, y_SBH: Tensor) -> Tensor:
    """Return cosine of each token, `[S, B]`; torch's own divides both vectors first and takes three times as long."""
    norms = torch.linalg.vector_norm(x_SBH, dim=-1) * torch.linalg.vector_norm(y_SBH, dim=-1)
    return (x_SBH * y_SBH).sum(dim=-1) / norms


def collect(
    chunks: ModelChunks,
    windows_NS: Tensor,
    cfg: ScoreConfig,
    progress: Callable[[int], None],
    on_batch: Callable[[int, Tensor | None], None] = lambda counted, counts_SB: None,
) -> dict[StateKey, State]:
    """Run the samples and gather the states, whole vectors, on the main rank; empty on the others. Collective.

    Args:
        windows_NS: Equal on every rank; data-parallel ranks take every dp-th sample.
        progress: Called with the number of samples of each finished batch over all data-parallel ranks.
        on_batch: Called before a chunk runs a micro-batch with the number of samples, the leading ones, that count, and
            which of their tokens do, as `DataParallelSamples.places` gives; for other hooks in the pass.
    """
    mesh, dims = chunks.mesh, chunks.dims
    samples = DataParallelSamples(windows_NS, mesh, cfg.micro_batch)
    hooks = [ActivationHooks(chunk, mesh, dims, cfg) for chunk in chunks]
    current: list[int | None] = [None]
    for chunk, of_chunk in zip(chunks, hooks, strict=True):
        of_chunk.handles.append(
            chunk.register_forward_hook(
                lambda *_, of_chunk=of_chunk: of_chunk.finish(*_counted(samples, current[0], mesh))
            )
        )

    def start(idx: int | None) -> None:
        current[0] = idx
        counts_SB = None if idx is None else samples.places(idx)
        for of_chunk in hooks:
            of_chunk.start(counts_SB)
        on_batch(0 if idx is None else samples.num_local(idx), counts_SB)

    try:
        forward_each(chunks, samples.batches, lambda idx, hidden: progress(samples.num_counted(idx)), start)
        states: dict[StateKey, State] = {}
        for of_chunk in hooks:
            states |= of_chunk.pop()
    finally:
        for of_chunk in hooks:
            of_chunk.remove()
    return merge_ranks(gather_objects((mesh.dp_rank, mesh.tp_rank, states)))


def _counted(samples: DataParallelSamples, idx: int | None, mesh: Mesh) -> tuple[Tensor | None, Tensor | None]:
    """Give two masks of a batch: over this rank's samples, and over those of all ranks that share its experts."""
    if idx is None:
        return None, None
    first = mesh.dp_rank - mesh.ep_rank
    of_experts = torch.cat([samples.counted(idx, first + rank) for rank in range(mesh.ep_size)])
    return samples.counted(idx, mesh.dp_rank), of_experts


def merge_ranks(gathered: list[tuple[int, int, dict[StateKey, State]]]) -> dict[StateKey, State]:
    """Make whole vectors over all samples: tensor-parallel parts one after another, data-parallel ranks in order."""
    by_rank: dict[tuple[StateKey, int], list[State]] = {}
    for dp_rank, _, states in sorted(gathered, key=lambda item: item[:2]):
        for key, state in states.items():
            by_rank.setdefault((key, dp_rank), []).append(state)
    merged: dict[StateKey, State] = {}
    for (key, _), parts in by_rank.items():
        whole = State(parts[0].num, torch.cat([p.mean for p in parts]), torch.cat([p.m2 for p in parts]))
        merged[key] = merged[key].merged(whole) if key in merged else whole
    return merged
