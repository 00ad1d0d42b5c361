"""The optimizer's state in a checkpoint: each rank stores and reads the part that it holds, in any layout.

A data-parallel rank of Megatron's distributed optimizer holds one range of every flattened parameter that its share
of the gradient buffer meets: main weight and both moments, 12 bytes a parameter over all ranks. Megatron's own way to
a checkpoint for every layout gathers all ranges on each rank's host. Here a range is cut into boxes of the whole
parameter, which a distributed checkpoint can hold as they are: nothing is gathered, and loading fills the optimizer in
place. Adam's count of steps, which torch keeps with each parameter and apex and Transformer Engine with each group, is
stored once, so that a checkpoint of one implementation loads into another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Box(NamedTuple):
    """A box of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Cut the range [start, end) of a flattened tensor into boxes of the tensor.

    Args:
        shape: Of the tensor, n >= 1 axes, the last of which varies fastest.
    Returns:
        At most 2n - 1 boxes, each contiguous, in the order of the range.
    """
    if start == end:
        return []
    if len(shape) == 1:
        return [Box((start,), (end - start,))]
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), end // row
    if first_whole > end_whole:  # the range lies inside one row
        return _boxes_of_row(shape, end_whole, start - end_whole * row, end - end_whole * row)
    boxes = _boxes_of_row(shape, first_whole - 1, start % row, row) if start % row else []
    if end_whole > first_whole:
        boxes.append(Box((first_whole, *[0] * (len(shape) - 1)), (end_whole - first_whole, *shape[1:])))
    return boxes + _boxes_of_row(shape, end_whole, 0, end % row)


def _boxes_of_row(shape: tuple[int, ...], row: int, start: int, end: int) -> list[Box]:
    return [Box((row, *box.offset), (1, *box.shape)) for box in flat_boxes(shape[1:], start, end)]


def allocate(optimizer: Any) -> None:
    """Give every Adam the state that it makes at its first step, which a checkpoint before that step needs as well."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        part.init_state_fn(adam, part.config)  # zeros, for parameters without state
        if _keeps_step_by_parameter(adam):
            for group in adam.param_groups:
                for parameter in group["params"]:
                    where = parameter.device if group.get("fused") else torch.device("cpu")
                    adam.state[parameter].setdefault("step", torch.zeros((), device=where))


def num_updates(optimizer: Any) -> int:
    """Return the steps that Adam has made, by which it corrects its moments."""
    counts: set[int] = set()
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if _keeps_step_by_parameter(adam):
            counts.update(int(state["step"]) for state in list(adam.state.values())[:1])
        else:  # a group without parameters on this rank is not counted on
            counts.update(int(group["step"]) for group in adam.param_groups if group["params"] and "step" in group)
    return max(counts, default=0)


def set_num_updates(optimizer: Any, count: int) -> None:
    """Let Adam go on after `count` steps; `allocate` comes first."""
    for part in optimizer.chained_optimizers:
        adam = part.optimizer
        if _keeps_step_by_parameter(adam):
            for state in adam.state.values():
                state["step"].fill_(count)
            continue
        for group in adam.param_groups:
            if count:
                group["step"] = count
            else:  # it counts from its absence
                group.pop("step", None)


def _keeps_step_by_parameter(adam: Any) -> bool:
    """Whether this is torch's Adam; apex' and Transformer Engine's count the steps of a group."""
    return isinstance(adam, (torch.optim.Adam, torch.optim.AdamW))


def sharded_state(optimizer: Any, weights: dict[str, Any]) -> list[ShardedTensor]:
    """Return this rank's main weights and moments as boxes of `optimizer.state.{kind}.{parameter}`, without a copy.

    Args:
        optimizer: Megatron's, `allocate`d.
        weights: Megatron's sharded state of the model's chunks, by which parameters are named and placed.
    Returns:
        Tensors that share the optimizer's memory, so that loading them changes it; their order depends on the layout.
    """
    pieces = {base.data: _pieces(base) for base in nested_values(weights) if isinstance(base.data, torch.nn.Parameter)}
    return [
        box
        for part in optimizer.chained_optimizers
        for parameter, start, end in _held_ranges(part)
        for kind, shard in _state_of(part, parameter).items()
        for piece in pieces[parameter]
        for box in _piece_boxes(piece, parameter, kind, shard, start, end)
    ]


def _pieces(base: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the tensors of a checkpoint that hold a parameter: two where gate and up are stored apart, else one."""
    return list(nested_values(base.build())) if isinstance(base, ShardedTensorFactory) else [base]


def _held_ranges(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield each parameter of which this rank holds optimizer state, with the range of the flattened parameter."""
    for by_dtype in part.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _state_of(part: Any, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """Return the one-dimensional float32 shards of a parameter's main weight and moments on this rank."""
    group, place = part.model_param_group_index_map[parameter]
    main_weight = part.optimizer.param_groups[group]["params"][place]
    moments = part.optimizer.state[main_weight]
    return {"param": main_weight} | {kind: moments[kind] for kind in MOMENTS}


def _piece_boxes(
    piece: ShardedTensor, parameter: torch.nn.Parameter, kind: str, shard: Tensor, start: int, end: int
) -> Iterator[ShardedTensor]:
    """Yield what the range [start, end) of a parameter, which `shard` holds, has in common with a piece of it."""
    begin = piece.data.storage_offset() - parameter.storage_offset()
    first, last = max(start, begin), min(end, begin + piece.data.numel())
    if first >= last:
        return
    place, shape = first - start, (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    for box in flat_boxes(shape, first - begin, last - begin):
        yield ShardedTensor(
            key=f"optimizer.state.{kind}.{piece.key}",
            data=shard.detach()[place : place + box.numel].view(box.shape),
            dtype=shard.dtype,
            local_shape=box.shape,
            global_shape=piece.global_shape,
            global_offset=tuple(map(sum, zip(piece.global_offset, box.offset, strict=True))),
            axis_fragmentations=None,  # no regular grid
            replica_id=(*piece.replica_id[:2], 0),  # data-parallel ranks hold different ranges
            allow_shape_mismatch=piece.allow_shape_mismatch,
        )
        place += box.numel
