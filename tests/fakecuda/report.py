"""What a step of distillation asks of a device: `.fakecuda/python -m tests.fakecuda.report [FILE.json]`.

One step of the 8B to 4B width experiment on one rank, with one micro-batch of one sample. It is counted with one and
with two layers a chunk, and continued to all layers of the models, as every layer adds equal counts. Kernels that a
compiler would join are counted one by one. The table is printed, and written with more detail as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from compactlm_nemo.config.distill import Recompute
from tests.fakecuda.cluster import cluster
from tests.fakecuda.counts import Counts
from tests.fakecuda.device import IS_HERE, REASON
from tests.fakecuda.experiment import EXPERIMENT, distillation_step, experiment

LAYERS = 32
"""Layers of teacher and student."""
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TP 1": ({"world": 8}, {}),
    "TP 8": ({"world": 8, "tp": 8}, {}),
    "TP 8, SP, overlap": ({"world": 8, "tp": 8, "sequence_parallel": True}, {"overlap": True}),
    "TP 2, SP, overlap": ({"world": 8, "tp": 2, "sequence_parallel": True}, {"overlap": True}),
    "TP 2, SP, overlap, recompute": (
        {"world": 8, "tp": 2, "sequence_parallel": True}, {"overlap": True, "recompute": Recompute.full},
    ),
    "PP 2, last stage": ({"world": 8, "pp": 2, "rank": 7}, {}),
    "CP 2, documents": ({"world": 8, "cp": 2}, {"document_end": 2}),
}  # fmt: skip
"""Name -> arguments of `cluster` and of `distillation_step`."""

Numbers = dict[str, Any]


def numbers(counts: Counts) -> Numbers:
    """Return what happened in a step, as numbers by name."""
    groups: Counter[str] = Counter()
    for key, size in counts.collective_bytes.items():
        if key.size > 1:
            groups[f"{key.kind} over {key.size} ranks of {key.group}"] += size
    return {
        "kernels": counts.kernels.total(),
        "elementwise_bytes": counts.elementwise_bytes,
        "flops": counts.flops.total(),
        "waits": counts.waits.total(),
        "synchronisations": counts.synchronisations.total(),
        "copies_to_device": sum(counts.copies.values()),
        "collective_bytes": sum(groups.values()),
        "attention": dict(counts.attention),
        "kernels_by_name": dict(counts.kernels.most_common()),
        "bytes_by_name": dict(counts.kernel_bytes.most_common()),
        "collective_bytes_by_group": dict(groups.most_common()),
        "waits_by_line": {str(place): count for place, count in counts.waits.most_common()},
    }


def continued(one: Numbers, two: Numbers, layers: int) -> Numbers:
    """Continue the numbers with one and with two layers a chunk to `layers` of them."""
    result: Numbers = {}
    for name in {**one, **two}:
        first, second = one.get(name, 0), two.get(name, 0)
        if isinstance(first, dict) or isinstance(second, dict):
            result[name] = continued(first or {}, second or {}, layers)
        else:
            result[name] = first + (layers - 1) * (second - first)
    return result


def measure(layout: str) -> Numbers:
    """Return the numbers of a step under a layout, with all layers."""
    place, settings = LAYOUTS[layout]
    found = []
    for layers in (1, 2):
        with cluster(**place) as there:
            distillation_step(there, dims={"layers": layers}, micro_batches=1, **settings)
            found.append(numbers(there.counts))
            chunks = there.mesh.layout.num_chunks
    return continued(found[0], found[1], LAYERS // chunks)


def table(results: dict[str, Numbers]) -> str:
    """Return a Markdown table of the results."""
    lines = [
        "| layout | kernels | GB by element-wise kernels | TFLOP | waits | copies to the device | GB of collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    for layout, found in results.items():
        lines.append(
            f"| {layout} | {found['kernels']:,} | {found['elementwise_bytes'] / 1e9:.0f} | {found['flops'] / 1e12:.0f} "
            f"| {found['waits']:,} | {found['copies_to_device']} | {found['collective_bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, and write the JSON if a file is named."""
    if not IS_HERE:
        sys.exit(f"tests.fakecuda.report {REASON}")
    results = {layout: measure(layout) for layout in LAYOUTS}
    print(table(results))
    if len(sys.argv) > 1:
        header = {
            "experiment": EXPERIMENT,
            "layers": LAYERS,
            "tokens": experiment().data.sequence_length,
            "torch": torch.__version__,
        }
        Path(sys.argv[1]).write_text(json.dumps(header | {"steps": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
