"""An accumulator holds the aggregator states of one chunk's elements and adds to them micro-batch by micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from compactlm_nemo.config.score import Aggregator
from compactlm_nemo.importance.aggregators import Length, Parts, State, join_parts, over_sequence, state_of

StateKey = tuple[str, Aggregator]
"""(element, sequence aggregator). Elements are named `heads.{i}`, `groups.{i}`, `mlp.{i}`, `norm.{k}` (two a layer, the
final one last), `depth.{i}`, `experts.{i}.{e}`, `routed.{i}.{e}`, `expert_mlp.{i}.{e}`, `shared_expert.{i}`."""


SHARDED = ("heads", "groups", "mlp", "expert_mlp", "shared_expert")
"""Elements of which each tensor-parallel rank has a part; of the others all ranks have equal values."""


class Accumulator:
    """Elements of one chunk whose values cover one set of samples and one part of a sequence.

    Args:
        groups: See the attribute.
        is_over_tokens: A sample weighs as its share of tokens that count, so that the mean is over tokens.
    """

    def __init__(self, groups: list[ProcessGroup], *, is_over_tokens: bool = False) -> None:
        self.is_over_tokens = is_over_tokens
        self.groups = groups
        """Ranks that hold other tokens of the sequences, group by group."""
        self.pending: dict[str, Parts] = {}
        self.widths: dict[str, int] = {}
        self.states: dict[Aggregator, State] = {}

    def put(self, element: str, parts: Parts) -> None:
        """Keep the parts of one element until the micro-batch ends."""
        self.pending[element] = parts

    def flush(self, places: int, length: Length, counted_B: Tensor | None) -> None:
        """Finish the samples of a micro-batch, of whose `places` on a rank `length` count.

        `counted_B` leaves out samples that only fill up; None leaves out all.
        """
        pending, self.pending = self.pending, {}
        if not pending or counted_B is None:
            return
        self.widths = {element: next(iter(parts.values())).shape[1] for element, parts in pending.items()}
        joined = {
            name: torch.cat([parts[name] for parts in pending.values()], dim=1) for name in next(iter(pending.values()))
        }
        for group in self.groups:
            joined, length = join_parts(joined, length, group)
            places *= group.size()
        for agg, values_BE in over_sequence(joined, length).items():
            weight = length / places if self.is_over_tokens and not isinstance(length, int) else None
            # Most batches count whole: a mask, which is on the CPU, would wait for the device.
            if not counted_B.all():
                values_BE = values_BE[counted_B]
                weight = None if weight is None else weight[counted_B]
            state = state_of(values_BE, weight)
            self.states[agg] = self.states[agg].merged(state) if agg in self.states else state

    def pop(self) -> dict[StateKey, State]:
        """Give the states since the last call, element by element, on the CPU, and start anew."""
        states, self.states = self.states, {}
        return {
            (element, agg): State(state.num.cpu(), mean, m2)
            for agg, state in states.items()
            for element, mean, m2 in zip(self.widths, self._split(state.mean), self._split(state.m2), strict=True)
        }

    def _split(self, values_E: Tensor) -> list[Tensor]:
        """Split into elements and copy each: a view would be sent to the main rank with all that the view is of."""
        return [part.clone() for part in values_E.cpu().split(list(self.widths.values()))]


def is_sharded(element: str) -> bool:
    """Whether each tensor-parallel rank has a part of the element."""
    return element.split(".")[0] in SHARDED
