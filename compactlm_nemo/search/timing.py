"""The time of single decoder layers, embedding and output layer on the present device, for `search.latency`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from compactlm_nemo.models.build import ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.collectives import broadcast_object, gather_objects
from compactlm_nemo.parallel.devices import device
from compactlm_nemo.parallel.mesh import Mesh
from compactlm_nemo.search.latency import PARTS, LatencyTable, sizes_of

WARM_UP = 2


RUNS = 5
"""Runs of which the median counts, after the warm-up."""


OUTPUT_TOKENS = 1024
"""Tokens whose logits exist at once."""


def time_layers(
    table: LatencyTable,
    candidates: list[Dims],
    *,
    build: Callable[[Dims], ModelChunks],
    mesh: Mesh,
    tokens_BS: Tensor,
    keep: Callable[[LatencyTable], None],
    progress: Callable[[int], None],
) -> LatencyTable:
    """The times that these candidates need, from `table` where it has them; equal on every rank. Collective.

    Args:
        build: This rank's share of a model of these sizes.
        tokens_BS: ``[B, S]`` of one forward pass, the same on every rank.
        keep: Called after each timed model with all that is known, so that nothing is timed twice.
        progress: Called with the number of models timed.
    """
    for dims in table.missing(candidates):
        chunks = build(dims.with_shape(layers=mesh.layout.num_chunks))
        needs_head = sizes_of("head", dims) not in table.times["head"]
        found = time_parts(chunks, mesh, tokens_BS, with_output=needs_head)
        times = {part: dict(table.times[part]) for part in PARTS}
        for part in PARTS if needs_head else ("attention", "mlp"):
            times[part].setdefault(sizes_of(part, dims), found[part])
        table = LatencyTable(table.about, times)
        keep(table)
        progress(1)
    return table.only(candidates)


@torch.no_grad()
def time_parts(chunks: ModelChunks, mesh: Mesh, tokens_BS: Tensor, *, with_output: bool) -> dict[str, float]:
    """Median milliseconds of the parts of `search.latency.PARTS`, of the slowest rank. Collective.

    Every chunk holds one layer; the weights are overwritten by random ones. Without output the head is not complete.
    """
    for parameter in chunks.parameters():
        parameter.normal_(std=0.02)  # memory as it was found may hold NaNs and numbers that take longer
    watch = Stopwatch()
    handles = [handle for chunk in chunks.eval() for handle in watch.attach(chunk)]

    def visit(_: int, hidden_SBH: Tensor) -> None:
        for part_NH in hidden_SBH.flatten(0, 1).split(OUTPUT_TOKENS if with_output else hidden_SBH.numel()):
            if with_output:
                torch.matmul(part_NH, chunks.head_weight.T)
        watch.lap("output")

    for run in range(WARM_UP + RUNS):
        if run == WARM_UP:
            watch.laps.clear()
        forward_each(chunks, mesh, [tokens_BS], visit)
    for handle in handles:
        handle.remove()
    ranks = gather_objects(watch.milliseconds())
    slowest = {lap: max(held.get(lap, 0.0) for held in ranks) for lap in {lap for held in ranks for lap in held}}
    ms = broadcast_object(slowest)
    return {"attention": ms["attention"], "mlp": ms["mlp"], "head": ms["embedding"] + ms["output"]}


class Stopwatch:
    """Laps of a forward pass, by the device's own clock: nothing waits for a GPU until they are read."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def lap(self, name: str | None) -> None:
        """Now ends what is called so and began at the last call; None only begins."""
        if torch.cuda.is_available():
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        if name is not None:
            self.laps.append((name, self._last, now))
        self._last = now

    def attach(self, chunk: Any) -> list[RemovableHandle]:
        """Call `lap` where the parts of a chunk of one layer meet."""
        [layer] = chunk.decoder.layers
        first = "embedding" if chunk.pre_process else None
        return [
            chunk.register_forward_pre_hook(lambda *_: self.lap(None)),
            layer.register_forward_pre_hook(lambda *_: self.lap(first)),
            layer.pre_mlp_layernorm.register_forward_pre_hook(lambda *_: self.lap("attention")),
            layer.register_forward_hook(lambda *_: self.lap("mlp")),
        ]

    def milliseconds(self) -> dict[str, float]:
        """Lap -> median over its repetitions."""
        found: dict[str, list[float]] = defaultdict(list)
        if torch.cuda.is_available():
            torch.cuda.synchronize(device())
        for name, start, end in self.laps:
            found[name].append(start.elapsed_time(end) if torch.cuda.is_available() else 1000 * (end - start))
        return {name: median(values) for name, values in found.items()}
