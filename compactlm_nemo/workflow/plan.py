"""The plan of a run on a cluster: what every stage needs, takes and costs, and which layouts there are.

Nothing is read but settings and the teacher's architecture, nothing is sent, and no GPU is used: the stages' own code
runs on tensors without memory (`compactlm_nemo/planning/`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from compactlm_nemo.artifacts import write_json
from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.load import group_names
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params
from compactlm_nemo.training.planned_memory import PLAN_FILE, planned_layout
from compactlm_nemo.workflow.benefit import benefit, check_benefit
from compactlm_nemo.workflow.layout_checks import launch_problems
from compactlm_nemo.workflow.memory_guard import limit_of, most_of
from compactlm_nemo.workflow.preflight import largest_student, ready
from compactlm_nemo.workflow.stage_table import stages_of

if TYPE_CHECKING:
    from compactlm_nemo.planning.estimate import Estimate

GIB = 2**30
PICTURE = "plan.png"


def plan(config: Config) -> None:
    """Print the plan of a run and write `plan.json` into run.dir.

    Raises:
        ConfigError: the settings cannot run, or not on these nodes.
    """
    from compactlm_nemo.planning import pool

    try:
        _plan(config)
    finally:
        pool.end()


def _plan(config: Config) -> None:
    from compactlm_nemo.planning.fake_world import hide_devices
    from compactlm_nemo.planning.pool import start
    from compactlm_nemo.planning.trainings import memory_over_a_step
    from compactlm_nemo.report.memory_plot import plot_memory

    hide_devices()
    if config.cluster.device is None:
        raise ConfigError(f"cluster=NAME must be given; conf/cluster/ has {', '.join(group_names('cluster'))}.")
    run, teacher = ready(replace(config, dry_run=True), stages_of(config))
    if teacher is None:
        raise ConfigError(
            "the teacher's sizes are unknown; give model.source, or model.architecture to plan without it."
        )
    student = largest_student(run, teacher)
    world = config.meant_ranks
    if config.plan.benefit:
        check_benefit(run, teacher, student)
    console = Console(soft_wrap=True)
    precision = run.model.precision.name
    title = (
        f"{num_params(teacher):,} -> {num_params(student):,} parameters, {precision}, {world} x {run.cluster.device}"
    )
    console.print(title, highlight=False)
    if config.plan.search:
        run = _searched(run, teacher, student, world, console)
    if problem := launch_problems(run, world):
        raise ConfigError(f"{problem} plan.search=true looks for layouts.")
    drawn = start(memory_over_a_step, run, teacher, student, world, 0) if run.parallel.pp == 1 else None
    rows, left_out = estimates(run, teacher, student, world)
    console.print(stages_table(rows, run, world))
    for part in left_out:
        console.print(f"not in this plan: {part}", highlight=False)
    values: dict[str, Any] = {
        "cluster": run.cluster.device, "ranks": world, "overrides": layout_words(run),
        "layout": planned_layout(run),
        "teacher_params": num_params(teacher), "student_params": num_params(student),
        "stages": [row.as_values() | _price(row, run.cluster, world) for row in rows],
    }  # fmt: skip
    if config.plan.benefit:
        price = sum(row.seconds for row in rows) * world / 3600 * run.cluster.price_hour
        found = benefit(run, teacher, student, world, price)
        console.print(*found.lines(), sep="\n", highlight=False)
        values["benefit"] = found.as_values()
    folder = Path(run.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN_FILE, values)
    console.print(f"written: {folder / PLAN_FILE}", highlight=False)
    if drawn is None:  # which rank is the fullest had to be found first
        (training,) = [row.parts[0] for row in rows if row.stage == "distill"]
        rank = training.fullest * (world // run.parallel.pp)
        drawn = start(memory_over_a_step, run, teacher, student, world, rank)
    plot_memory(drawn.result(), limit_of(run), folder / PICTURE)
    console.print(f"written: {folder / PICTURE}, memory of the fullest rank over a step", highlight=False)


def estimates(run: Config, teacher: Dims, student: Dims, world: int) -> tuple[list[Estimate], list[str]]:
    """Return a row for every stage of the run that needs devices or room, and what is left out of them."""
    from compactlm_nemo.planning import estimate
    from compactlm_nemo.planning.planned import planned_stages
    from compactlm_nemo.progress import progress_bar

    names = {*stages_of(run), "rank"}
    wanted = [stage for name, stage in planned_stages(run, teacher, student, world).items() if name in names]
    with progress_bar("plan", sum(len(stage.parts) for stage in wanted), 1) as advance:
        rows = estimate.estimates(wanted, run, teacher, student, world=world, advance=lambda: advance(1))
    return rows, [part for stage in wanted for part in stage.left_out]


def layout_words(run: Config) -> str:
    """Return the layout as overrides of a command line."""
    layout, cfg = run.parallel, run.distill
    words = [f"parallel.tp={layout.tp}"]
    words += ["parallel.sequence_parallel=true"] * layout.sequence_parallel
    for name in ("pp", "virtual_stages", "cp", "ep"):
        words += [f"parallel.{name}={getattr(layout, name)}"] * (getattr(layout, name) > 1)
    words += [f"distill.micro_batch={cfg.micro_batch}", f"distill.recompute={cfg.recompute.name}"]
    return " ".join([*words, f"distill.overlap={str(cfg.overlap).lower()}"])


def _price(row: Estimate, cluster: ClusterConfig, world: int) -> dict[str, Any]:
    hours = row.seconds * world / 3600
    return {"device_hours": hours, "price": hours * cluster.price_hour or None}


def stages_table(rows: list[Estimate], run: Config, world: int) -> Table:
    """Return the plan as a table, a stage a row."""
    cluster, limit = run.cluster, limit_of(run) / GIB
    table = Table(show_edge=False, box=None, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in (f"GiB of {limit:.1f}", "time", "tokens/s", "MFU", "device h", "$", "disk GB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most of the memory; shares of the time")
    for row in rows:
        peak, time = row.peak, row.duration
        size = peak.bytes / GIB
        spent = {
            "arithmetic": time.arithmetic, "memory": time.memory, "links": time.links, "bubble": time.bubble,
            "storage": row.storage.storage_seconds,
        }  # fmt: skip
        whole = row.seconds or 1.0
        shares = [f"{name} {part / whole:.0%}" for name, part in spent.items() if part / whole >= 0.005]
        price = _price(row, cluster, world)
        table.add_row(
            row.stage,
            "" if not size else f"{size:.1f}" if size <= limit else f"{size:.1f} too much",
            _time(row.seconds),
            f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else "",
            f"{used:.1%}" if (used := row.utilisation(cluster, world, world // run.parallel.model_ranks)) else "",
            f"{price['device_hours']:,.1f}",
            f"{price['price']:,.0f}" if price["price"] else "",
            f"{row.storage.disk_bytes / 1e9:,.1f}",
            f"{most_of(peak.by_kind)}; {', '.join(shares)}",
        )
    return table


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s"


def _searched(run: Config, teacher: Dims, student: Dims, world: int, console: Console) -> Config:
    """Print the layouts that fit, the cheapest first, and return the settings with the best one."""
    from compactlm_nemo.planning.layouts import found_layouts

    limit = limit_of(run)
    found = found_layouts(run, teacher, student, world, limit)
    if not found:
        raise ConfigError(
            f"nodes={run.nodes} of {run.cluster.device} hold this run in no layout; raise nodes, take a cluster with "
            "more memory, or store the teacher (distill.teacher=stored)."
        )
    console.print(layout_words(found[0].run), highlight=False)
    table = Table(show_edge=False, box=None, pad_edge=False)
    for name in ("GiB", "time", "$"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("layout")
    for each in found[:10]:
        seconds = each.seconds_a_step * run.distill.steps
        price = seconds * world / 3600 * run.cluster.price_hour
        amounts = f"{each.bytes / GIB:.1f}", _time(seconds), f"{price:,.0f}" if price else ""
        table.add_row(*amounts, layout_words(each.run))
    console.print(table)
    return found[0].run
