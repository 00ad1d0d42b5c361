"""A run is refused before it starts where a stage needs more memory than its ranks have.

What surely fits by a bound that takes no time is let through. Else the plan's simulation decides (`planning/`), in a
process of its own, as it hides GPUs from the process that it runs in.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from compactlm_nemo.config.cluster import ClusterConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.score import WidthMetric
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.parallel.world import launch_world_size
from compactlm_nemo.workflow.dry_run import rank_params
from compactlm_nemo.workflow.preflight import largest_student

GIB = 2**30
SAFETY = 1.25
"""The bound counts tensors; this much more is for what lies between them."""
CHUNK_MIB = {False: 256, True: 1024}
"""The least memory that a chunk of logits gets, on a CPU and on a GPU; large tables get half of their gradient's."""
FULLEST = ("score", "correct_teacher", "cache_teacher", "distill", "evaluate")
"""Stages that are looked at: the others hold no more than these."""
SUGGESTED = ("tp", "sequence_parallel", "pp")
MICRO_BATCH_OF = {
    "score": "score", "correct_teacher": "distill", "cache_teacher": "cache", "evaluate": "evaluate",
}  # fmt: skip
"""Stage -> the section whose `micro_batch` it takes."""


class Need(NamedTuple):
    """What a stage needs on its fullest rank."""

    stage: str
    bytes: int
    by_kind: dict[str, int]
    way_out: str = ""
    """What to change, of the first stage that does not fit."""

    def __str__(self) -> str:
        return f"{self.bytes / GIB:.1f} GiB on a rank ({most_of(self.by_kind)})"


def refuse_what_does_not_fit(config: Config, teacher: Dims, names: Collection[str]) -> None:
    """End with one line where a stage that will run does not fit on this machine's devices.

    Raises:
        ConfigError: the stage, what it needs, what there is, and the nearest layout that fits.
    """
    here = replace(config, cluster=this_cluster())
    if not surely_fits(here, teacher, largest_student(here, teacher)):
        _told(here, teacher, names, launch_world_size())


def planned_lines(config: Config, teacher: Dims, names: Collection[str]) -> list[str]:
    """Return what each stage needs on the cluster that the run is meant for, a line each.

    Raises:
        ConfigError: a stage does not fit there.
    """
    cluster = config.cluster
    return [
        f"{need.stage}: {need} of {limit_of(config) / GIB:.1f} on {cluster.device}"
        for need in _told(config, teacher, names, config.meant_ranks)
    ]


def _told(config: Config, teacher: Dims, names: Collection[str], world: int) -> list[Need]:
    from compactlm_nemo.planning import pool

    try:
        found = needs(config, teacher, names, world)
    finally:
        pool.end()
    if found and found[-1].way_out:
        cluster, need = config.cluster, found[-1]
        raise ConfigError(
            f"{need.stage} needs {need}, and a rank of {cluster.device} has {limit_of(config) / GIB:.1f} GiB "
            f"(plan.margin={config.plan.margin:g} of {cluster.memory_gib:.1f} stays free); {need.way_out}."
        )
    return found


def most_of(by_kind: dict[str, int]) -> str:
    """Return the four largest kinds of memory, in GiB."""
    kinds = sorted(by_kind.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in kinds)


def limit_of(config: Config) -> float:
    """Return the bytes that a rank may take."""
    return config.cluster.usable_bytes(config.plan.margin)


def this_cluster() -> ClusterConfig:
    """Return what is known of the devices that this process and its neighbours have."""
    import torch

    local = int(os.environ.get("LOCAL_WORLD_SIZE") or launch_world_size())
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0")))
        return ClusterConfig(
            device=properties.name, devices_per_node=local, memory_gib=properties.total_memory / GIB
        )  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ClusterConfig(device=f"CPU, {local} ranks", devices_per_node=local, memory_gib=memory / GIB / local)


def needs(config: Config, teacher: Dims, names: Collection[str], world: int) -> list[Need]:
    """Return what the stages need that use most memory, by simulation, up to the first that does not fit."""
    from compactlm_nemo.planning.estimate import estimates
    from compactlm_nemo.planning.planned import planned_stages

    student, found = largest_student(config, teacher), []
    planned = planned_stages(config, teacher, student, world)
    wanted = [stage for name, stage in planned.items() if name in names and name in FULLEST]
    for row in estimates(wanted, config, teacher, student, world=world):
        peak = row.peak
        way_out = _way_out(row.stage, config, teacher, student, world) if peak.bytes > limit_of(config) else ""
        found.append(Need(row.stage, peak.bytes, peak.by_kind, way_out))
        if way_out:
            break
    return found


def _way_out(stage: str, config: Config, teacher: Dims, student: Dims, world: int) -> str:
    """Return the layout that fits with the fewest changes, or what else there is."""
    from compactlm_nemo.planning.layouts import found_layouts

    if stage != "distill":
        micro_batch = f"{MICRO_BATCH_OF[stage]}.micro_batch"
        return f"raise parallel.tp or parallel.pp, lower {micro_batch}, or take devices with more memory"
    found = found_layouts(config, teacher, student, world, limit_of(config))
    if not found:
        more = ", or store the teacher (distill.teacher=stored)" * (config.distill.teacher.name == "live")
        return f"no layout of {world} ranks holds it; use more ranks or devices with more memory{more}"
    best = min(found, key=lambda each: len(changes(config, each.run)))
    return f"{' '.join(changes(config, best.run))} would need {best.bytes / GIB:.1f} GiB"


def changes(config: Config, other: Config) -> list[str]:
    """Return the overrides that lead from one layout to another."""
    words = []
    for section, names in (("parallel", SUGGESTED), ("distill", ("micro_batch", "recompute", "overlap"))):
        for name in names:
            value = getattr(getattr(other, section), name)
            if value != getattr(getattr(config, section), name):
                words.append(f"{section}.{name}={str(getattr(value, 'name', value)).lower()}")
    return words


def surely_fits(config: Config, teacher: Dims, student: Dims) -> bool:
    """Whether every stage fits by a bound: all states on every rank, and every activation of a layer in float32."""
    bf16 = config.model.precision.name == "bf16"
    weight, training = (2, 2 + 4 + 4 + 8) if bf16 else (4, 4 + 4 + 8)
    trains_teacher = config.correct.steps > 0 or WidthMetric.taylor in config.score.width  # its gradients, and a sum
    teaching = max(rank_params(config, teacher)) * (training if trains_teacher else weight)
    held = teaching + max(rank_params(config, student)) * training
    size = max(
        config.distill.micro_batch, config.score.micro_batch, config.evaluate.micro_batch, config.cache.micro_batch
    )
    tokens = size * (config.data.sequence_length + 1) * config.parallel.pp
    activations = tokens * sum(_activations(config, dims) for dims in (teacher, student)) * 4
    # A chunk of logits and what is made of it, the table as it is read, and its gradient.
    table = 4 * teacher.vocab_size * teacher.hidden_size
    chunk = max(CHUNK_MIB[config.cluster.is_gpu], config.distill.loss_memory_mib or 0) * 2**20
    head = 2 * chunk + 4 * table
    moments = 0
    if config.score.second_moments:
        from compactlm_nemo.planning.storage import moment_numbers

        moments = 2 * 4 * moment_numbers(teacher, config)
    return SAFETY * (held + activations + head + moments) <= limit_of(config)


def _activations(config: Config, dims: Dims) -> int:
    """Return how many numbers a token leaves in all layers of a rank at most: attention with all its scores too."""
    experts = (dims.experts_per_token or 0) + 1
    heads = dims.num_heads * (3 * dims.head_dim * 4 + 4 * config.data.sequence_length)
    layer = 24 * dims.hidden_size + heads + 8 * experts * dims.ffn_hidden_size + 8 * dims.shared_expert_ffn
    return layer * -(-dims.num_layers // config.parallel.pp)
