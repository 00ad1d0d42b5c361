"""Does `recipes.plan` say what stages take? Planned over measured: live tensors, resident memory, FLOPs.

    python -m bench.plan --runs smollm2 "mixtral, ep 2"

Every run has random weights; its stages are planned on tensors without memory, then done in processes of their own, one
a rank. What a run took is written to bench/results/plan.json as it ends; one that is there is not measured again, and
one that needs more memory than the machine has free is left for later. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.common.memory import ENVIRONMENT
from bench.common.worker import ROOT
from compactlm_nemo.config.load import PLAN, compose_root
from compactlm_nemo.models.families import dims_of
from compactlm_nemo.models.hf import read_config
from compactlm_nemo.planning.estimate import estimate
from compactlm_nemo.planning.passes import LOADING
from compactlm_nemo.planning.planned import planned_stages
from compactlm_nemo.workflow.preflight import largest_student

RESULTS = Path(__file__).parent / "results" / "plan.json"
LENGTH = 128
GIB = 2**30
LEFT_FREE = 6 * GIB
"""Memory that a row leaves to others."""
GOALS = {"live": 0.10, "resident": 0.15}
"""How far planned may be from measured."""

LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama_1b": LLAMA | {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "llama_0.1b": LLAMA | {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "mixtral_0.2b": LLAMA | {
        "model_type": "mixtral", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": False,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}  # fmt: skip
"""Teachers, by the keys of their config.json."""
STUDENTS = {
    "smollm2": ["search.layers=[24]", "search.ffn=[1152]"],
    "llama_1b": ["search.layers=[18]", "search.ffn=[3584]", "search.hidden=[1536]"],
    "llama_0.1b": ["search.layers=[8]", "search.ffn=[1536]"],
    "mixtral_0.2b": ["search.layers=[8]", "search.ffn=[768]"],
}
SETTINGS = [
    f"data.sequence_length={LENGTH}", "model.precision=fp32", "score.samples=4", "score.micro_batch=1",
    "prune.samples=2", "distill.steps=2", "distill.global_batch=4", "distill.micro_batch=1", "distill.warmup_steps=1",
    "evaluate.tokens=512", "evaluate.micro_batch=1", "correct.steps=0", "cache.shard_samples=4",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A run, and those of its stages that are measured."""

    shape: str
    stages: tuple[str, ...]
    words: list[str] = field(default_factory=list)
    ranks: int = 1


TP, PP = ["parallel.tp=2", "parallel.sequence_parallel=true"], ["parallel.pp=2"]
STORED = ["distill.teacher=stored"]
CASES = {
    "smollm2": Case("smollm2", ("score", "distill", "evaluate")),
    "smollm2, top 64": Case("smollm2", ("cache_teacher", "distill"), STORED),
    "smollm2, corrected": Case("smollm2", ("correct_teacher",), ["correct.steps=2"]),
    "smollm2, hidden": Case("smollm2", ("cache_teacher", "distill"), [*STORED, "cache.kind=hidden"]),
    "smollm2, moments": Case("smollm2", ("score",), ["score.second_moments=true"]),
    "smollm2, bf16": Case("smollm2", ("distill",), ["model.precision=bf16"]),
    "smollm2, dp 2": Case("smollm2", ("score", "distill"), ranks=2),
    "smollm2, pp 2": Case("smollm2", ("distill", "evaluate"), PP, 2),
    "llama, tp 2": Case("llama_0.1b", ("score", "distill"), TP, 2),
    "llama, tp 2, pp 2": Case("llama_0.1b", ("distill",), [*TP, *PP], 4),
    "llama, tp 2, dp 2, bf16": Case("llama_0.1b", ("distill",), [*TP, "model.precision=bf16"], 4),
    "mixtral": Case("mixtral_0.2b", ("score", "distill")),
    "mixtral, ep 2": Case("mixtral_0.2b", ("distill",), ["parallel.ep=2"], 2),
    "mixtral, ep 2, pp 2": Case("mixtral_0.2b", ("distill",), ["parallel.ep=2", *PP], 4),
    "llama 1.1B, bf16, scored": Case("llama_1b", ("score",), ["model.precision=bf16"]),
    "llama 1.1B, bf16": Case("llama_1b", ("distill", "evaluate"), ["model.precision=bf16"]),
}
"""What is measured, in this order."""


def make_inputs(shape: str, folder: Path, dtype: torch.dtype) -> None:
    """Write a teacher with random weights and a word-level tokenizer, and texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values, eos_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder / "teacher")
    words = [f"w{number}" for number in range(1000)]
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<unk>")
    wrapped.save_pretrained(folder / "teacher")
    for name, count in (("train", 100), ("heldout", 10)):
        texts = [" ".join(words[x] for x in torch.randint(0, len(words), (LENGTH,)).tolist()) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def words_of(case: Case, folder: Path) -> list[str]:
    """Return the command line of a run."""
    return [
        f"run.dir={folder}/run", f"model.source={folder}/teacher", f"data.train.a={folder}/train.jsonl",
        f"data.heldout.a={folder}/heldout.jsonl", *SETTINGS, *STUDENTS[case.shape], *case.words,
    ]  # fmt: skip


def planned(case: Case, stage: str, folder: Path) -> dict[str, Any]:
    """Return what `recipes.plan` finds out about a stage."""
    cluster = ["cluster=cpu", f"cluster.devices_per_node={case.ranks}"]
    run = compose_root(PLAN, words_of(case, folder) + cluster)
    teacher = dims_of(read_config(folder / "teacher"))
    student = largest_student(run, teacher)
    stages = planned_stages(run, teacher, student, case.ranks)
    (found,) = estimate(stages[stage], run, teacher, student, world=case.ranks).parts
    work, attention = found.cost.work, 0
    for product, count in work.products.items():
        if product.kind == "attention":  # of causal attention the plan counts half, torch's counter all
            attention += count * product.flops * 2 * LENGTH // (LENGTH + 1)
    peak, peaks = found.cost.peak, found.cost.peaks
    # A model that is being loaded is there, but the kernel counts what of it has been written.
    written = max(each.bytes for phase, each in peaks.items() if not phase.startswith(LOADING))
    flops = {"matmul": sum(p.flops * n for p, n in work.products.items() if p.kind == "matmul"), "attention": attention}
    per_stage = case.ranks // run.parallel.pp  # experts of its ranks get more or fewer tokens
    ranks = list(range(found.fullest * per_stage, (found.fullest + 1) * per_stage))
    return {
        "bytes": peak.bytes,
        "written_bytes": written,
        "by_kind": peak.by_kind,
        "place": peak.place,
        "flops": flops,
        "ranks": ranks,
    }


def measured(case: Case, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return what each rank saw of each stage."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={case.ranks}"]
        command = [sys.executable, *(launcher if case.ranks > 1 else []), "-m", "bench.common.stages"]
        command += ["--stages", ",".join(case.stages), "--out", out, *words_of(case, folder)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, check=True, stdout=sys.stderr)
        return {
            stage: [json.loads((Path(out) / f"{stage}.{rank}.json").read_text()) for rank in range(case.ranks)]
            for stage in case.stages
        }


def free_bytes() -> int:
    """Return the memory that programs of this machine could still have."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def rows_of(case: Case, folder: Path) -> dict[str, Any] | None:
    """Plan and measure the stages of a run; None where that would take memory that others need."""
    plans = {stage: planned(case, stage, folder) for stage in case.stages}
    needed = 1.2 * case.ranks * max(plan["bytes"] for plan in plans.values()) + LEFT_FREE
    if free_bytes() < needed:
        print(f"{needed / GIB:.0f} GiB would have to be free", file=sys.stderr)
        return None
    found = {}
    for stage, seen in measured(case, folder).items():
        found[stage] = {
            "ranks": case.ranks, "planned": plans[stage],
            "live": max((rank["live"] for rank in seen), key=lambda live: live["bytes"]),
            "resident_bytes": max(rank["resident_bytes"] for rank in seen),
            "flops": _mean([seen[rank]["flops"] for rank in plans[stage]["ranks"]]),
        }  # fmt: skip
    return found


def _mean(counts: list[dict[str, int]]) -> dict[str, float]:
    return {kind: sum(of_rank.get(kind, 0) for of_rank in counts) / len(counts) for kind in ("matmul", "attention")}


def markdown(results: dict[str, Any]) -> str:
    """Return the table of what is there."""
    lines = ["| run | stage | ranks | planned, MB | live | resident | FLOPs |", "|---|---|---|---|---|---|---|"]
    rows = [(run, *row) for run in CASES if run in results["runs"] for row in results["runs"][run].items()]
    for run, stage, found in rows:
        plan = found["planned"]
        live, resident = plan["bytes"] / found["live"]["bytes"], plan["written_bytes"] / found["resident_bytes"]
        flops = found["flops"]
        equal = "equal" if plan["flops"] == flops else f"{sum(plan['flops'].values()) / sum(flops.values()):.4f}"
        cells = [run, stage, found["ranks"], f"{plan['bytes'] / 1e6:,.0f}", f"{live:.3f}", f"{resident:.3f}", equal]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", ", ".join(f"{name} {number}" for name, number in results["versions"].items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=list(CASES), help="by default all that are not there")
    parser.add_argument("--again", action="store_true", help="measure also those that are there")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    results["versions"] = {name: version(name) for name in ("torch", "megatron-core")}
    for name in args.runs:
        if name in results["runs"] and not args.again:
            continue
        case = CASES[name]
        with tempfile.TemporaryDirectory() as folder:
            is_bf16 = "model.precision=bf16" in case.words
            make_inputs(case.shape, Path(folder), torch.bfloat16 if is_bf16 else torch.float32)
            found = rows_of(case, Path(folder))
        if found is not None:
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else results  # another call may add rows
            results["runs"][name] = found
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
