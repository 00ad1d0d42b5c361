"""What pruned students regained by distillation, measured here and published: a row a student, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Unit(Enum):
    """What a gap to the teacher is counted in.

    `nats`: KL(teacher || student), a token of held-out text. Where the teacher is as good as the text allows, the
    student's loss is the teacher's plus this: in table 1 of arXiv 2407.14679 loss minus KL is 1.67 to 1.68 four times.
    `score`: the share of the teacher's mean benchmark score that the student lacks.
    """

    nats = "nats"
    score = "score"


SOURCES = {
    "SmolLM2": "SmolLM2-135M-Instruct, this project: docs/results.md, bench/results/orderings.json and recovery.json",
    "Nemotron-4": "Nemotron-4 15B: Muralidharan et al. 2024, arXiv 2407.14679, tables 1 and 2; the teacher's MMLU by "
    "Parmar et al. 2024, arXiv 2402.16819",
    "Qwen3": "Qwen3-8B: NVIDIA Model-Optimizer at a2fbac7, examples/pruning/minitron_vs_puzzletron, README.md with its "
    "plot distillation_curves.png and advanced_compression_experiments.md",
    "Nemotron-Nano": "Nemotron-Nano-9B-v2: NVIDIA Model-Optimizer at a2fbac7, "
    "examples/pruning/minitron/NVIDIA-Nemotron-Nano-9B-v2/README.md",
}
"""The teachers that rows are about, and where their figures stand."""


@dataclass(frozen=True)
class Recovery:
    """A student that was pruned and distilled."""

    source: str
    """Key of `SOURCES`."""
    what: str
    """What was cut, and what the gap was measured on."""
    unit: Unit
    teacher_params: float
    student_params: float
    tokens: float
    """Tokens it was distilled on."""
    teacher: float
    """In scores the teacher's; in nats 0, the teacher's KL to itself."""
    before: float | None
    """The student's right after the cut, where it is known."""
    after: float
    """The student's after distillation."""

    @property
    def gap(self) -> float:
        """What is left of the gap to the teacher."""
        return self.after if self.unit is Unit.nats else 1 - self.after / self.teacher


def _smollm2(what: str, params: float, tokens: float, after: float) -> Recovery:
    return Recovery("SmolLM2", what, Unit.nats, 134_515_008, params, tokens, 0, None, after)


def _nemotron4(what: str, before: float, after: float) -> Recovery:
    """Return a row of table 1, whose students have the size of Nemotron-3 8B."""
    return Recovery("Nemotron-4", what, Unit.nats, 15.63e9, 8.54e9, 1.8e9, 0, before, after)


def _qwen3(what: str, unit: Unit, params: float, tokens: float, before: float | None, after: float) -> Recovery:
    teacher = 0 if unit is Unit.nats else QWEN3_SCORE
    return Recovery("Qwen3", what, unit, 8.19e9, params, tokens, teacher, before, after)


def _nano(tokens: float, after: float) -> Recovery:
    what = "9B to 7B, mean of eight benchmarks"
    return Recovery("Nemotron-Nano", what, Unit.score, 8.89e9, 7.0e9, tokens, 66.1, 18.4, after)


QWEN3_SCORE = (0.7493 + 0.7653 + 0.8749) / 3
"""Mean of MMLU, HellaSwag and GSM8K, as of its students."""
WIDTH, DEPTH = 100_195_776, 81_413_568
WIKITEXT, LONG = 1.64e6, 1.9e9

RECOVERIES = (
    # Ends of schedules; the first and the last pair are means of three seeds.
    _smollm2("23 layers, MLP 1296, Wikipedia leads", WIDTH, 20480, 0.8652),
    _smollm2("23 layers, MLP 1296, Django docs", WIDTH, 20480, 1.1141),
    _smollm2("23 layers, MLP 1296, Wikipedia leads", WIDTH, 51200, 0.7694),
    _smollm2("23 layers, MLP 1296, Django docs", WIDTH, 51200, 1.0082),
    _smollm2("23 layers, MLP 1296, Wikipedia leads", WIDTH, 102400, 0.6853),
    _smollm2("23 layers, MLP 1296, Django docs", WIDTH, 102400, 0.9554),
    _smollm2("23 layers, MLP 1296, refitted, Wikipedia leads", WIDTH, 51200, 0.6792),
    _smollm2("23 layers, MLP 1296, refitted, Django docs", WIDTH, 51200, 1.0605),
    _smollm2("15 layers, Wikipedia leads", DEPTH, 20480, 2.1611),
    _smollm2("15 layers, Django docs", DEPTH, 20480, 2.5691),
    _nemotron4("layers, MLP, heads, hidden", 5.35, 0.38),
    _nemotron4("MLP, heads, hidden", 6.33, 0.37),
    _nemotron4("MLP, heads", 5.07, 0.42),
    _nemotron4("layers", 8.35, 0.49),
    # Table 2: 63.8 and 80.7 beside 64.2 and 84.6. GSM8K, where the student is ahead (51.3, 46.0), would leave no gap.
    Recovery(
        "Nemotron-4", "Minitron 8B, mean of MMLU and HellaSwag", Unit.score, 15.63e9, 8.27e9, 94e9, 74.4, None, 72.25
    ),
    # Read off the plot: the last validation points.
    _qwen3("32 layers, hidden 3840, WikiText-103", Unit.nats, 6.96e9, WIKITEXT, 0.93, 0.40),
    _qwen3("MLP and heads by layer, WikiText-103", Unit.nats, 6.99e9, WIKITEXT, 0.58, 0.285),
    # The text gives two final losses; that the first is of WikiText-103 is taken from the paragraph before.
    _qwen3("28 layers, WikiText-103", Unit.nats, 6.65e9, WIKITEXT, None, 0.559),
    _qwen3("MLP and heads by layer, Nemotron-v2", Unit.nats, 7.75e9, LONG, None, 0.0563),
    _qwen3("MLP and heads by layer", Unit.score, 7.75e9, WIKITEXT, 0.6178, 0.7308),
    _qwen3("MLP and heads by layer", Unit.score, 7.75e9, LONG, 0.6178, 0.7648),
    _qwen3("28 layers", Unit.score, 6.65e9, WIKITEXT, 0.3498, 0.6076),
    _qwen3("28 layers", Unit.score, 6.65e9, LONG, 0.3498, 0.7068),
    _qwen3("32 layers, MLP and heads by layer", Unit.score, 7.42e9, WIKITEXT, 0.6568, 0.7010),
    _qwen3("32 layers, MLP and heads by layer", Unit.score, 7.42e9, LONG, 0.6568, 0.7652),
    _qwen3("32 layers", Unit.score, 7.42e9, WIKITEXT, 0.5647, 0.7337),
    _nano(2.5e9, 59.8),
    _nano(20e9, 63.5),
    _nano(40e9, 64.1),
    _nano(60e9, 64.4),
    _nano(80e9, 65.1),
)
"""Students by forward KL on logits alone. Not among them: students that end nearer to the text than their teacher, as
after training on a narrow text with its labels, whose gap has no logarithm."""
