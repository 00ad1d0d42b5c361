"""Every metric that a training logs is listed, with its unit and meaning, in docs/dashboards.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from compactlm_nemo.config.load import CONF
from tests.support import commands
from tests.support.tiny_run import command
from tests.support.wandb_files import config_of, finished_records, history_rows

PAGE = CONF.parent / "docs" / "dashboards.md"
EVERYTHING = [
    "distill.eval_every=3", "distill.eval_tokens=64", "distill.peak_tflops=1", "distill.loss.reverse_kl=0.5",
    "distill.hidden.layers=[[-1,-1]]", "distill.hidden.embedding=true", "correct.while_distilling=true",
    "correct.steps=2", "wandb.mode=offline", "wandb.parent=sweep",
]  # fmt: skip


def listed() -> list[re.Pattern[str]]:
    """Names in the page's table of metrics; a word in capitals stands for any word."""
    table = PAGE.read_text().partition("## Metrics")[2].partition("## W&B")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert all(len(row) == 5 and all(cell.strip() for cell in row[1:4]) for row in rows)
    return [re.compile(re.sub("[A-Z]+", r"\\w+", row[1].strip(" `"))) for row in rows]


def test_every_metric_of_a_training_with_all_parts_is_listed_and_at_wandb(inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for recipe in ("import_model", "tokenize", "score", "search", "prune", "distill"):
        result = commands.run(command(inputs, run, *EVERYTHING, recipe=recipe))
        assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert {
        "eval/a_kl_nats_from_14",
        "train/hidden_embedding",
        "train/correct_lr",
        "eval/a_kl_nats",
        "perf/mfu",
        "train/kd_reverse_kl",
    } <= names
    assert [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in listed())] == []
    records = finished_records(run / "progress" / "distill", num_runs=1)
    [sent] = [record.run for record in records if record.HasField("run")]
    assert config_of(sent)["wandb.parent"] == "sweep" and sent.job_type == "distill" and sent.run_group == "run"
    assert [{name: row[name] for name in line} for row, line in zip(history_rows(records), lines, strict=True)] == lines
    assert [line["train/batch"] for line in lines] == list(range(6))
