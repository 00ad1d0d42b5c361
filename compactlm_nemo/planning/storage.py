"""What a stage keeps on disk and on the host, and how long the file system takes over it."""

from __future__ import annotations

from dataclasses import dataclass

from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.teacher import StoredKind, TeacherSource
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.search.cost import num_params

TOP_K_BYTES = 5
"""Of an entry before it is compressed: a token's number and a level; as much again for the rest of a token."""


@dataclass(frozen=True)
class Storage:
    """Bytes and seconds."""

    disk_bytes: int
    """What is on disk at its fullest: the artifact, and checkpoints on the way to it."""
    host_bytes_a_node: int
    """What checkpoints and held-out states copy from the devices to a node's memory."""
    storage_seconds: float
    """Of reading models, and of writing while devices wait."""


def storage(stage: str, config: Config, teacher: Dims, student: Dims, kept_bytes: int, *, world: int) -> Storage:
    """Return what a stage stores.

    Args:
        kept_bytes: What a rank puts into a checkpoint; 0 where none is written.
    """
    cluster, layout = config.cluster, config.parallel
    nodes = max(1, world // cluster.devices_per_node)
    weights = {"teacher": _weight_bytes(teacher, config), "student": _weight_bytes(student, config)}
    copies = world // (layout.tp * layout.pp)  # every rank reads its part, equal ranks the same one
    read = sum(weights[model] for model in _read(stage, config)) * copies / nodes
    written = _artifact_bytes(stage, config, teacher, student)
    seconds = read / cluster.read_gbs / 1e9 + written / nodes / cluster.write_gbs / 1e9
    if not kept_bytes:
        states = heldout_state_bytes(config, teacher, student, world=world) if stage == "evaluate" else 0
        return Storage(written, states, seconds)
    cfg = config.distill
    steps = cfg.steps if stage == "distill" else config.correct.steps
    checkpoint = _checkpoint_bytes(student if stage == "distill" else teacher, config)
    if stage == "distill" and config.correct.while_distilling:
        checkpoint += _checkpoint_bytes(teacher, config)
    is_async = cluster.is_gpu if cfg.checkpoint_async is None else cfg.checkpoint_async
    if not is_async:
        seconds += steps // cfg.checkpoint_every * checkpoint / nodes / cluster.write_gbs / 1e9
    on_host = kept_bytes * min(world, cluster.devices_per_node) if cluster.is_gpu else 0
    return Storage(written + (cfg.keep_checkpoints + 1) * checkpoint, on_host, seconds)


def heldout_state_bytes(config: Config, teacher: Dims, student: Dims, *, world: int) -> int:
    """Return the bytes of the teacher's states of all held-out texts on a node, and of a student's of one text.

    Every rank of the last stage keeps those of its samples and places; as many of them as possible are on one node.
    """
    layout, cluster = config.parallel, config.cluster
    if not cluster.is_gpu:  # there they are in the ranks' own memory, which the simulation counts
        return 0
    dp = max(1, world // layout.model_ranks)
    windows = -(-(config.evaluate.tokens // config.data.sequence_length) // dp)
    places = windows * config.data.sequence_length // layout.cp
    width = teacher.hidden_size * max(1, len(config.data.heldout)) + student.hidden_size
    ranks = min(world // layout.pp, cluster.devices_per_node)
    return places * width * (2 if config.model.precision.name == "bf16" else 4) * ranks


def _weight_bytes(dims: Dims, config: Config) -> int:
    return num_params(dims) * (2 if config.model.precision.name == "bf16" else 4)


def _checkpoint_bytes(dims: Dims, config: Config) -> int:
    """Return weights, float32 main weights where they are others, and both moments, once whatever the layout."""
    return num_params(dims) * (2 + 4 + 8 if config.model.precision.name == "bf16" else 4 + 8)


def _read(stage: str, config: Config) -> list[str]:
    """Return the models that a stage reads."""
    if stage == "distill":
        return ["teacher", "student"] if config.distill.teacher is TeacherSource.live else ["student"]
    if stage == "evaluate":
        return ["teacher", "student", "student"]
    return ["student"] if stage == "export" else ["teacher"]


def _artifact_bytes(stage: str, config: Config, teacher: Dims, student: Dims) -> int:
    """Return the bytes of what a stage leaves behind."""
    of_student = _weight_bytes(student, config)
    if stage in ("import_model", "correct_teacher"):
        return _weight_bytes(teacher, config)
    if stage in ("prune", "distill", "export"):
        return of_student
    if stage == "rank":
        kept = config.distill.keep_checkpoints * _checkpoint_bytes(student, config)
        return config.rank.candidates * (2 * of_student + kept)
    if stage == "score" and config.score.second_moments:
        return 4 * moment_numbers(teacher, config)
    if stage == "cache_teacher":
        tokens = config.cached_samples * config.data.sequence_length
        if config.cache.kind is StoredKind.hidden:
            return tokens * teacher.hidden_size * (2 if config.model.precision.name == "bf16" else 4)
        return tokens * (config.cache.k + 1) * TOP_K_BYTES
    return 0


def moment_numbers(dims: Dims, config: Config) -> int:
    """Return how many numbers the second moments are."""
    channels, heads = dims.hidden_size**2, (dims.num_heads * dims.head_dim) ** 2
    total = channels
    for layer in range(dims.num_layers):
        mlp = dims.of_layer(layer)
        experts = mlp.num_experts * config.score.expert_moments if mlp.num_experts else 1
        total += 2 * channels + heads + experts * mlp.ffn_hidden_size**2 + mlp.shared_expert_ffn**2
    return total
