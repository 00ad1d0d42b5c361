"""Which settings decide a result."""

from __future__ import annotations

from typing import Any

SPEED_ONLY = {
    "micro_batch",
    "loss_memory_mib",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "stop_after",
    "peak_tflops",
    "eval_every",
    "eval_tokens",
    "shard_samples",
    "recompute",
    "overlap",
    "teacher_tp",
    "teacher_pp",
}
"""Settings that change memory, speed or output, not the result; they may differ when a run goes on."""


def result_settings(section: Any) -> dict[str, Any]:
    """The settings of a section that decide its result."""
    return {name: value for name, value in vars(section).items() if name not in SPEED_ONLY}
