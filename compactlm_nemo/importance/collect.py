"""One forward pass over calibration samples -> importance of heads, neurons, hidden channels and layers.

Source: Minitron (arXiv 2407.14679), section 2.2. Activations only:

- heads: L2 norm over the head dimension of the input of the output projection;
- neurons: the input of fc2, that is after the activation;
- hidden channels: the output of every norm, scores summed over the norms;
- layers: block importance `BI_i = 1 - E[cos(x_i, x_{i+1})]`, x_i the input of layer i, E over all tokens.

The sequence aggregator is applied within a sample, the batch aggregator over samples; ranks exchange running sums once,
at the end, so every layout gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compactlm_nemo.config.schema import Aggregator, ScoreConfig
from compactlm_nemo.errors import NumericsError
from compactlm_nemo.importance.statistics import SampleAggregate, over_sequence
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each, micro_batches
from compactlm_nemo.parallel.collectives import gather_objects
from compactlm_nemo.parallel.groups import Mesh

Key = tuple[str, int]
"""(axis, layer): heads, mlp and depth have a 0-based global layer; hidden counts norms, -1 is the final one."""


class Collector:
    """Hooks on this rank's layers that feed one running aggregate per axis and layer."""

    def __init__(self, model: Any, head_dim: int, cfg: ScoreConfig) -> None:
        self.cfg, self.head_dim = cfg, head_dim
        self.aggregates: dict[Key, SampleAggregate] = {}
        self.handles: list[Any] = []
        for layer in model.decoder.layers:
            idx = layer.layer_number - 1
            self._on_input(layer.self_attention.linear_proj, ("heads", idx), self._head_norms)
            self._on_input(layer.mlp.linear_fc2, ("mlp", idx), lambda x: x)
            self._on_output(layer.input_layernorm, ("hidden", 2 * idx))
            self._on_output(layer.pre_mlp_layernorm, ("hidden", 2 * idx + 1))
            self.handles.append(layer.register_forward_hook(self._layer_hook(idx), with_kwargs=True))
        if model.post_process:
            self._on_output(model.decoder.final_layernorm, ("hidden", -1))

    def _head_norms(self, x_SBE: Tensor) -> Tensor:
        return x_SBE.unflatten(-1, (-1, self.head_dim)).float().norm(dim=-1)

    def _on_input(self, module: Any, key: Key, value: Callable[[Tensor], Tensor]) -> None:
        self.handles.append(module.register_forward_pre_hook(lambda _, args: self._add(key, value(args[0]))))

    def _on_output(self, module: Any, key: Key) -> None:
        self.handles.append(module.register_forward_hook(lambda _, args, out: self._add(key, out)))

    def _layer_hook(self, idx: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine_SB = F.cosine_similarity(before.float(), after.float(), dim=-1)
            per_sample = (1 - cosine_SB).mean(dim=0)[:, None]
            self._finite(("depth", idx), per_sample)
            self._aggregate(("depth", idx), Aggregator.mean).add(per_sample)

        return hook

    def _aggregate(self, key: Key, batch: Aggregator) -> SampleAggregate:
        if key not in self.aggregates:
            self.aggregates[key] = SampleAggregate(batch)
        return self.aggregates[key]

    def _finite(self, key: Key, values: Tensor) -> None:
        if not torch.isfinite(values).all():
            raise NumericsError(
                f"score: {key[0]} activations of layer {key[1]} are NaN or infinite; check the teacher."
            )

    def _add(self, key: Key, x_SBE: Tensor) -> None:
        values_BE = over_sequence(x_SBE.transpose(0, 1), self.cfg.sequence_aggregator)
        self._finite(key, values_BE)
        self._aggregate(key, self.cfg.batch_aggregator).add(values_BE)

    def states(self) -> dict[Key, Any]:
        """Running aggregates on the CPU: they are about to travel to ranks with other devices."""
        for handle in self.handles:
            handle.remove()
        return {
            key: {name: value.cpu() if isinstance(value, Tensor) else value for name, value in state.items()}
            for key, state in ((key, aggregate.state()) for key, aggregate in self.aggregates.items())
        }


def collect_scores(
    model: Any, dims: Dims, mesh: Mesh, windows_NS: Tensor, cfg: ScoreConfig, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """Scores under their file names, float32, on every rank. Collective.

    `windows_NS` are the same calibration tokens on every rank; data-parallel ranks take every dp-th sample.
    """
    collector = Collector(model, dims.head_dim, cfg)
    batches = micro_batches(windows_NS[mesh.dp_rank :: mesh.dp_size], cfg.micro_batch)
    forward_each(model, batches, lambda idx, hidden: None, lambda idx: progress(len(batches[idx]) * mesh.dp_size))
    return assemble(dims, cfg, gather_objects((mesh.tp_rank, mesh.dp_rank, collector.states())))


def assemble(dims: Dims, cfg: ScoreConfig, gathered: list[tuple[int, int, dict[Key, Any]]]) -> dict[str, Tensor]:
    """Merge the running aggregates of all ranks: over data parallel by merging, over TP by concatenation."""
    merged: dict[tuple[Key, int], SampleAggregate] = {}
    for tp_rank, _, states in sorted(gathered, key=lambda item: item[:2]):
        for key, state in states.items():
            batch = Aggregator.mean if key[0] == "depth" else cfg.batch_aggregator
            merged.setdefault((key, tp_rank), SampleAggregate(batch)).merge(state)

    def whole(key: Key) -> Tensor:
        parts = [merged[key, rank].result() for rank in sorted(r for k, r in merged if k == key)]
        return torch.cat(parts) if key[0] in ("heads", "mlp") else parts[0]

    scores = {"hidden": sum(whole(key) for key in sorted({k for k, _ in merged if k[0] == "hidden"}))}
    for layer in range(dims.num_layers):
        scores[f"layers.{layer}.heads"] = whole(("heads", layer))
        scores[f"layers.{layer}.mlp"] = whole(("mlp", layer))
    scores["depth.bi"] = torch.cat([whole(("depth", layer)) for layer in range(dims.num_layers)])
    return {name: value.float() for name, value in scores.items()}  # type: ignore[union-attr]
