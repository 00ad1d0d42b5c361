"""What the plan says of an experiment, as a row of docs/planning.md: `python -m tests.support.planned [NAME ...]`."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from compactlm_nemo.config.load import CONF, compose, group_names
from compactlm_nemo.config.schema import Config
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.source import declared_dims
from compactlm_nemo.workflow.preflight import largest_student

PAGE = CONF.parent / "docs" / "planning.md"
GIB = 2**30
_ROW = re.compile(r"^\| `(\w+)` \| (\d+) x \d+ ([^|]+?) \| ([\d.]+) \| ([\d,.]+) \| ([\d,]+) \|", re.MULTILINE)


class Row(NamedTuple):
    """An experiment's training on the nodes that it names."""

    nodes: int
    device: str
    gib: float
    hours: float
    dollars: float


def settings(name: str) -> Config:
    """Return the settings of an experiment, for a teacher that is not here."""
    return compose([f"experiment={name}", "model.source=absent", "run.dir=none"])


def on_clusters() -> list[str]:
    """Return the experiments for clusters; those whose names end so are for a CPU."""
    return [name for name in group_names("experiment") if not name.endswith("_cpu")]


def models(run: Config) -> tuple[Dims, Dims]:
    """Return the teacher and the largest student."""
    teacher = declared_dims(run.model)
    assert teacher is not None
    return teacher, largest_student(run, teacher)


def planned(name: str) -> Row:
    """Return what the plan says of the training of an experiment; in a pipeline by the arithmetic of `plan.search`."""
    from compactlm_nemo.planning.layouts import planned_layout, simulated_layout

    run = settings(name)
    of = planned_layout if run.parallel.pp == 1 else simulated_layout
    layout = of(run, *models(run), run.meant_ranks)
    hours = layout.seconds_a_step * run.distill.steps / 3600
    dollars = hours * run.meant_ranks * run.cluster.price_hour
    return Row(run.nodes, str(run.cluster.device), layout.bytes / GIB, hours, dollars)


def documented() -> dict[str, Row]:
    """Return the rows of the page."""
    rows = {}
    for name, nodes, device, gib, hours, dollars in _ROW.findall(PAGE.read_text()):
        rows[name] = Row(int(nodes), device, float(gib), float(hours.replace(",", "")), float(dollars.replace(",", "")))
    return rows


def as_line(name: str) -> str:
    """Return the row as it stands in the page."""
    row, run = planned(name), settings(name)
    layout, cfg = run.parallel, run.distill
    words = [f"{key.upper()} {size}" for key in ("tp", "pp", "ep") if (size := getattr(layout, key)) > 1]
    words += [f"micro-batch {cfg.micro_batch}", f"recompute {cfg.recompute.name}"]
    place = f"{row.nodes} x {run.cluster.devices_per_node} {row.device}"
    figures = f"{row.gib:.1f} | {row.hours:,.0f} | {row.dollars:,.0f}"
    return f"| `{name}` | {place} | {figures} | {', '.join(words)} |"


if __name__ == "__main__":
    for each in sys.argv[1:] or on_clusters():
        print(as_line(each), flush=True)
