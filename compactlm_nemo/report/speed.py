"""The part of the report about speed where the models are served, from what the profile stage measured."""

from __future__ import annotations

from typing import Any

from compactlm_nemo.report.tables import comparison_markdown

WHAT = {"prompt_flops": "by FLOPs", "answer_flops": "by FLOPs", "weights": "by weights read"}
"""What an expected ratio counts -> how a column says it."""


def speed_lines(profile: dict[str, Any]) -> list[str]:
    """Return the report's lines: what was measured, the times of both models, and what share of the saving arrived."""
    lines = [
        "## Speed where it runs",
        "",
        f"The exported model ({profile['exported']}) and the teacher, both in {profile['dtype']}, took turns, "
        f"{profile['repeats']} each after a warm-up: prompts of {profile['prompt_tokens']} tokens of "
        f"{profile['text']}, {profile['new_tokens']} new tokens for each. Median, and lowest to highest in brackets.",
        "",
    ]
    for engine in profile["engines"]:
        lines += [
            f"{engine['engine']} {engine['version']}, {engine['device']}, {engine['threads']} threads:",
            "",
            comparison_markdown(_speeds(profile, engine)),
            comparison_markdown(_savings(profile, engine)),
        ]
    return [
        *lines,
        "Time and expected work are the student's over the teacher's, of equal turns. The share is (1 - time) / (1 - "
        "expected): 100% is all of the saving that the sizes promise, below 0% the student is slower.",
        "",
    ]


def _speeds(profile: dict[str, Any], engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a batch and model."""
    rows = []
    for i in range(len(engine["ratios"])):
        for name, model in engine["models"].items():
            at = model["batches"][i]
            rows.append(
                {
                    "batch": at["batch"],
                    "model": name,
                    "parameters": profile["models"][name]["params"],
                    "first token, ms": _spread(at["first_token_seconds"], 1000, 1),
                    "decoding, tokens/s": _spread(at["decode_tokens_per_second"], 1, 1),
                    "all, tokens/s": _spread(at["tokens_per_second"], 1, 1),
                    "peak memory, MiB": None if model["peak_bytes"] is None else round(model["peak_bytes"] / 2**20),
                    "on disk, MiB": round(model["disk_bytes"] / 2**20),
                }
            )
    return rows


def _savings(profile: dict[str, Any], engine: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row a batch, phase and expected ratio."""
    return [
        {
            "batch": row["batch"],
            "phase": phase,
            "time": _spread(row[phase], 1, 3),
            "expected": f"{profile['expected'][bound]:.3f} {WHAT[bound]}",
            "share of the saving": "none expected" if share is None else f"{share:.0%}",
        }
        for row in engine["ratios"]
        for phase in ("prefill", "decode")
        for bound, share in row[phase]["share_of_saving"].items()
    ]


def _spread(values: dict[str, float], scale: float, digits: int) -> str:
    median, low, high = (f"{values[name] * scale:,.{digits}f}" for name in ("median", "low", "high"))
    return f"{median} ({low} to {high})"
