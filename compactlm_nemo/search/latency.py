"""The latency of a candidate's forward pass is interpolated between layers that were timed (`search.timing`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from compactlm_nemo.artifacts import atomic_write_text
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params

FILE = "latency.json"
PARTS = {
    "attention": ("hidden", "groups", "heads_per_group"),
    "mlp": ("hidden", "ffn", "experts", "shared_expert_ffn"),
    "head": ("hidden",),
}
"""Timed part -> axes that its time depends on. Attention and MLP are of one layer and include the norm before them;
head is the embedding, the final norm and the output layer."""
POINTS = 3
"""Number of values of an axis that are timed: the smallest, the middle and the largest."""

Sizes = tuple[int, ...]


def sizes_of(part: str, dims: Dims) -> Sizes:
    """Return the sizes that the time of a part depends on, in the order of `PARTS`."""
    sizes = dims.shape() | {"heads_per_group": dims.num_heads // dims.num_query_groups}
    return tuple(sizes[axis] for axis in PARTS[part])


def grid(part: str, candidates: list[Dims]) -> list[Sizes]:
    """List the sizes to time: `POINTS` values of each axis among the candidates, in all combinations."""
    axes = [sorted(set(values)) for values in zip(*(sizes_of(part, dims) for dims in candidates), strict=True)]
    return list(product(*(sorted({axis[i * (len(axis) - 1) // (POINTS - 1)] for i in range(POINTS)}) for axis in axes)))


def interpolate(values: dict[Sizes, float], at: Sizes) -> float:
    """Interpolate linearly in each axis between the points of a full grid; outside it the nearest point counts."""
    if not at:
        return values[()]
    points = sorted({sizes[0] for sizes in values})
    low = max((point for point in points if point <= at[0]), default=points[0])
    high = min((point for point in points if point >= at[0]), default=points[-1])

    def on(point: int) -> float:
        return interpolate({sizes[1:]: value for sizes, value in values.items() if sizes[0] == point}, at[1:])

    if low == high:
        return on(low)
    share = (at[0] - low) / (high - low)
    return (1 - share) * on(low) + share * on(high)


@dataclass(frozen=True)
class LatencyTable:
    """A table of milliseconds of a decoder's parts by their sizes, and of the circumstances of the timing."""

    metadata: dict[str, Any]
    """Device, layout, batch and model that were timed."""
    times: dict[str, dict[Sizes, float]]
    """Part -> sizes -> milliseconds."""

    def milliseconds(self, dims: Dims) -> float:
        """Return milliseconds of a pass, ``layers * (attention + MLP) + head``, without messages between stages."""
        ms = {part: interpolate(self.times[part], sizes_of(part, dims)) for part in PARTS}
        return dims.num_layers * (ms["attention"] + ms["mlp"]) + ms["head"]

    def only(self, candidates: list[Dims]) -> LatencyTable:
        """Reduce the table to the points that these candidates need; all must have been timed."""
        needed = {part: grid(part, candidates) for part in PARTS}
        return LatencyTable(self.metadata, {part: {s: self.times[part][s] for s in needed[part]} for part in PARTS})

    def missing(self, candidates: list[Dims]) -> list[Dims]:
        """List as few models as possible, whose parts are the points that these candidates need and the table lacks."""
        lacks = {part: [s for s in grid(part, candidates) if s not in self.times[part]] for part in PARTS}
        smallest = min(candidates, key=num_params)  # gives the parts of a model that no candidate needs
        models = []
        for hidden in sorted({sizes[0] for rows in lacks.values() for sizes in rows}):
            rows = [[sizes[1:] for sizes in lacks[part] if sizes[0] == hidden] for part in PARTS]
            for attention, mlp, _ in zip_longest(*rows):
                groups, per_group = attention or sizes_of("attention", smallest)[1:]
                ffn, experts, shared = mlp or sizes_of("mlp", smallest)[1:]
                models.append(
                    smallest.with_shape(
                        hidden=hidden, ffn=ffn, heads=groups * per_group, groups=groups, experts=experts,
                        shared_expert_ffn=shared,
                    )
                )  # fmt: skip
        return models

    def save(self, path: Path) -> None:
        """Write JSON with one line a point."""
        lines = [f'"metadata": {json.dumps(self.metadata)}']
        for part, times in self.times.items():
            rows = (json.dumps(dict(zip(PARTS[part], at, strict=True)) | {"ms": ms}) for at, ms in times.items())
            lines.append(f'"{part}": [\n    ' + ",\n    ".join(rows) + "\n  ]")
        atomic_write_text(path, "{\n  " + ",\n  ".join(lines) + "\n}\n")

    @staticmethod
    def load(path: Path, metadata: dict[str, Any]) -> LatencyTable:
        """Read the points that were timed under equal circumstances; the table is empty where there are none."""
        stored = json.loads(path.read_text()) if path.is_file() else {}
        known = stored if stored.get("metadata") == metadata else {}
        return LatencyTable(
            metadata,
            {
                part: {tuple(row[axis] for axis in axes): row["ms"] for row in known.get(part, [])}
                for part, axes in PARTS.items()
            },
        )
