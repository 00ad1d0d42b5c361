"""Forward passes leave out one layer at a time; the activations before that layer are computed once.

For each batch the model runs whole first and keeps the input of every layer. The run without layer j starts from the
stored input of j, so L layers take ``L + L(L - 1) / 2`` layer passes and not ``L + L(L - 1)``. All runs of a batch are
micro-batches of one pipeline schedule: a stage before layer j runs nothing and sends its output of the whole model,
which the stage of j does not read; the stage of j starts in its middle, and later stages run as usual. For the time of
a batch a rank keeps the inputs of all its layers.

Shape suffixes: S sequence, B batch, H width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compactlm_nemo.models.build import HiddenStateModel, ModelChunks
from compactlm_nemo.models.forward import forward_each
from compactlm_nemo.parallel.collectives import all_reduce_sum, last_stage_total

Measure = Callable[[int, int | None, Tensor, Tensor], Tensor]
"""(batch, left-out layer or None, hidden `[S / cp, B, H]`, that of the whole model) -> float64 vector of sums."""


class LeftOut(NamedTuple):
    """Sums of a leave-one-out, and how many layers ran."""

    sums: Tensor
    """`[L + 1, k]` float64 on the CPU, equal on every rank. Row j: without layer j; row L: with every layer."""
    layers_run: int
    """Layers run on batches by the ranks of one pipeline."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One micro-batch runs from the stored input of layer `start` through all later layers but those in `skipped`."""

    start: int
    skipped: frozenset[int] = frozenset()
    stores: bool = False
    """Whether inputs of layers and the output are stored."""
    left_out: int | None = None
    row: int | None = None
    """Row of the sums that the run adds to; None: no row."""


def _plan(num_layers: int, removed: frozenset[int], block: int) -> list[_Run]:
    """Plan the runs: the whole model, the model without `removed`, then without each further block of layers too."""
    runs = [_Run(start=0, stores=True)]
    if removed:
        runs.append(_Run(start=min(removed), skipped=removed, stores=True))
    runs[-1] = replace(runs[-1], row=num_layers)
    firsts = [j for j in range(num_layers - block + 1) if j not in removed]
    return runs + [_Run(start=j, skipped=removed | set(range(j, j + block)), left_out=j, row=j) for j in firsts]


class PartialChunk(torch.nn.Module):
    """A model chunk that runs the layers of `run`, in place of the whole chunk in a pipeline schedule."""

    def __init__(self, chunk: HiddenStateModel) -> None:
        super().__init__()
        self.module = chunk  # the name under which Megatron looks through wrappers
        self.layers: list[Any] = list(chunk.decoder.layers)
        self.run = _Run(start=0)
        self.layers_run = 0
        self.forget()
        self.handles = [layer.register_forward_pre_hook(self._store, with_kwargs=True) for layer in self.layers]

    def forget(self) -> None:
        """Free the stored activations of a batch."""
        self.inputs: dict[int, Tensor] = {}
        self.output: Any = None

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, mask: None) -> Tensor:
        run, chunk = self.run, self.module
        if run.start > _index(self.layers[-1]):
            return self.output
        wanted = [x for x in self.layers if _index(x) >= run.start and _index(x) not in run.skipped]
        start = self.inputs.get(run.start)  # None: the embedding, or the output of the stage before
        if start is not None and not chunk.pre_process:
            chunk.set_input_tensor(start)
        with only_layers(chunk, wanted):
            hidden = chunk(tokens_BS, positions_BS, mask, decoder_input=start)
        self.layers_run += len(wanted)
        if run.stores:
            self.output = hidden
        return hidden

    def _store(self, layer: Any, args: Any, kwargs: Any) -> None:
        if self.run.stores:
            self.inputs[_index(layer)] = args[0] if args else kwargs["hidden_states"]


def _index(layer: Any) -> int:
    return layer.layer_number - 1


@contextmanager
def only_layers(chunk: HiddenStateModel, layers: list[Any]) -> Iterator[None]:
    """Reduce the chunk to some of its layers, possibly none, while the context lasts."""
    decoder: Any = chunk.decoder
    whole, decoder.layers = decoder.layers, torch.nn.ModuleList(layers)
    try:
        yield
    finally:
        decoder.layers = whole


@torch.no_grad()
def leave_one_out(
    chunks: ModelChunks,
    batches: list[Tensor],
    measure: Measure,
    *,
    num_sums: int,
    removed: frozenset[int] = frozenset(),
    block: int = 1,
    progress: Callable[[int], None],
) -> LeftOut:
    """Measure the model without each layer in turn, and with all of them, always without `removed`. Collective.

    With `block` > 1 row j is of the model without the `block` layers from j on.

    Args:
        batches: This data-parallel rank's tokens, `[B, S]` each; expert-parallel ranks need equally many of equal
            shapes.
        measure: Called on the last stage for every run; the whole model includes `removed`. It returns sums over the
            tokens of a context-parallel rank, equal on tensor-parallel ranks.
        num_sums: Numbers that `measure` returns, k.
        progress: Called with the index of every finished batch, on every rank.
    Returns:
        Sums over all batches and ranks; rows of `removed`, and where no block begins, are NaN.
    """
    mesh, dims = chunks.mesh, chunks.dims
    runs, idle = _plan(dims.num_layers, removed, block), _Run(start=dims.num_layers)
    parts = chunks.wrapped(PartialChunk(chunk) for chunk in chunks)
    sums = torch.zeros(dims.num_layers + 1, num_sums, dtype=torch.float64, device=next(chunks.parameters()).device)

    def start(number: int | None) -> None:
        for part in parts:
            part.run = idle if number is None else runs[number]

    def run_batch(idx: int, tokens_BS: Tensor) -> None:
        whole: list[Tensor] = []

        def visit(number: int, hidden_SBH: Tensor) -> None:
            if number == 0:
                whole.append(hidden_SBH)
            if (row := runs[number].row) is not None:
                sums[row] += measure(idx, runs[number].left_out, hidden_SBH, whole[0])

        forward_each(parts, [tokens_BS] * len(runs), visit, start)

    try:
        for idx, tokens_BS in enumerate(batches):
            run_batch(idx, tokens_BS)
            for part in parts:
                part.forget()
            progress(idx)
    finally:
        for handle in (handle for part in parts for handle in part.handles):
            handle.remove()
    total = last_stage_total(sums, mesh)
    total[sorted(removed)] = torch.nan
    total[dims.num_layers - block + 1 : dims.num_layers] = torch.nan
    count = torch.tensor(sum(part.layers_run for part in parts), device=sums.device)
    return LeftOut(total, int(all_reduce_sum(count, mesh.pp_group)))
