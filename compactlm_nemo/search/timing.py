"""Single decoder layers, embedding and output layer are timed on the present device, for `search.latency`."""

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
"""Runs before the timing."""
RUNS = 5
"""Timed runs after the warm-up, of which the median counts."""


OUTPUT_TOKENS = 1024
"""Most tokens whose logits exist at once."""


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
    """Time what these candidates need and `table` lacks; the result is equal on every rank. Collective.

    Args:
        build: Makes this rank's share of a model of these sizes.
        tokens_BS: ``[B, S]`` of one forward pass, equal on every rank.
        keep: Called after each timed model with the table so far, so that nothing is timed twice.
        progress: Called with 1 for each timed model.
    """
    for dims in table.missing(candidates):
        chunks = build(dims.with_shape(layers=mesh.layout.num_chunks))
        needs_head = sizes_of("head", dims) not in table.times["head"]
        ms = time_parts(chunks, tokens_BS, with_output=needs_head)
        times = {part: dict(table.times[part]) for part in PARTS}
        for part in PARTS if needs_head else ("attention", "mlp"):
            times[part].setdefault(sizes_of(part, dims), ms[part])
        table = LatencyTable(table.metadata, times)
        keep(table)
        progress(1)
    return table.only(candidates)


@torch.no_grad()
def time_parts(chunks: ModelChunks, tokens_BS: Tensor, *, with_output: bool) -> dict[str, float]:
    """Measure the median milliseconds of `search.latency.PARTS`, of the slowest rank. Collective.

    Every chunk holds one layer; the weights are overwritten by random ones. Without output the head is not complete.
    """
    for parameter in chunks.parameters():
        parameter.normal_(std=0.02)  # memory that was not written may hold NaNs and numbers that take longer
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
        forward_each(chunks, [tokens_BS], visit)
    for handle in handles:
        handle.remove()
    ranks = gather_objects(watch.milliseconds())
    slowest = {lap: max(laps.get(lap, 0.0) for laps in ranks) for lap in {lap for laps in ranks for lap in laps}}
    ms = broadcast_object(slowest)
    return {"attention": ms["attention"], "mlp": ms["mlp"], "head": ms["embedding"] + ms["output"]}


class Stopwatch:
    """Takes the laps of a forward pass by the device's clock: nothing waits for a GPU until the laps are read."""

    def __init__(self) -> None:
        self.laps: list[tuple[str, Any, Any]] = []
        self._last: Any = None

    def lap(self, name: str | None) -> None:
        """End the lap `name` that began at the last call and begin the next; None only begins one."""
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
        """Map each lap to the median over its repetitions."""
        times: dict[str, list[float]] = defaultdict(list)
        if torch.cuda.is_available():
            torch.cuda.synchronize(device())
        for name, start, end in self.laps:
            times[name].append(start.elapsed_time(end) if torch.cuda.is_available() else 1000 * (end - start))
        return {name: median(values) for name, values in times.items()}
