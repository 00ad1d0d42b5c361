"""Tables of the docs that are made from the tests: which family, axis, layout and format, and which stage, is proved.

A test says what it proves, beside what it is parametrised by:

    @pytest.mark.proves("axes", ["layers", "ffn"], "{case}", "cut")

names a table of `tables`, columns, rows and the word of their cells; texts in braces are the test's own parameters.
Rows of models are cases of `tiny_models`, which stand for their families. `python -m tests.support.proofs` collects the
tests, runs none, and writes the pages; `--check` only compares them.
"""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import pytest

from compactlm_nemo.config.load import CONF
from compactlm_nemo.models.axes import AXES
from compactlm_nemo.models.families import FAMILIES
from compactlm_nemo.models.hf_config import DEFAULTS
from compactlm_nemo.workflow.stage_table import STAGES
from tests.support.meshes import EXPERT_LAYOUTS, LAYOUTS
from tests.support.tiny_models import CASES

ROOT = CONF.parent
MARK = "proves"
FORMATS = [
    "Hugging Face in", "Hugging Face out", "transformers 4 reads it", "torch_dist in", "Bridge in", "Bridge out",
    "GGUF in",
]  # fmt: skip
"""Columns that come first, in this order; others follow as tests name them."""
MODELS_IN = ["Hugging Face folder", "repository of the Hub", "NeMo 2 checkpoint", "Megatron-Bridge checkpoint"]
"""Rows of formats that come first."""
WORDS = ["logits", "gradients", "scored", "cut", "refitted"]
"""Words of a cell that come first."""


def family_of(case: str) -> str:
    """The family of a case, whose name may have a suffix of the test."""
    while case not in CASES:
        case, found = case.rpartition("_")[0], case
        assert case, f"{found} begins with no case of tiny_models"
    return str(CASES[case][0].model_type)


def _has_axis(family: str, axis: str) -> bool:
    if axis == "shared_expert_ffn":
        return bool({"shared_expert_intermediate_size", "n_shared_experts"} & DEFAULTS[family].keys())
    return axis != "experts" or FAMILIES[family].experts


def _has_layout(family: str, layout: str) -> bool:
    return layout not in EXPERT_LAYOUTS or FAMILIES[family].experts


@dataclass
class Table:
    """One table: what heads it, its first rows and columns, and the cells that were found."""

    title: str
    words: str
    corner: str
    rows: list[str]
    columns: list[str]
    row_of: Callable[[str], str] = str
    can_be: Callable[[str, str], bool] = lambda row, column: True
    """Whether a row can have a column at all."""
    cells: dict[tuple[str, str], set[str]] = field(default_factory=lambda: defaultdict(set))
    tests: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Word -> the tests that prove its cells."""

    def add(self, columns: Iterable[str], rows: Iterable[str], word: str, test: str) -> None:
        for row in map(self.row_of, rows):
            for column in filter(lambda column: self.can_be(row, column), columns):
                self.rows += [row] * (row not in self.rows)
                self.columns += [column] * (column not in self.columns)
                self.cells[row, column].add(word)
                self.tests[word].add(test)

    def lines(self) -> list[str]:
        columns = [column for column in self.columns if any((row, column) in self.cells for row in self.rows)]
        table = [f"| {' | '.join([self.corner, *columns])} |", "|" + "---|" * (1 + len(columns))]
        for row in self.rows:
            cells = [self._cell(row, column) for column in columns]
            table.append(f"| {' | '.join([row, *cells])} |")
        proofs = [
            f"- {word}: {', '.join(f'`{test}`' for test in sorted(self.tests[word]))}" for word in _sorted(self.tests)
        ]
        return [f"## {self.title}", "", self.words, "", *table, "", "Proved by", "", *proofs, ""]

    def _cell(self, row: str, column: str) -> str:
        if (row, column) in self.cells:
            return ", ".join(_sorted(self.cells[row, column]))
        return "" if self.can_be(row, column) else "–"


def _sorted(words: Iterable[str]) -> list[str]:
    return sorted(words, key=lambda word: (WORDS.index(word) if word in WORDS else len(WORDS), word))


def tables() -> dict[str, Table]:
    """The tables, empty."""
    layouts = [*LAYOUTS, *(name for name in EXPERT_LAYOUTS if name not in LAYOUTS)]
    axis_words = (
        "Scored: the importance of its units is the definition in float64. Cut: the student is the slice of the\n"
        "teacher. Refitted: what is left is the least squares fit on the tokens."
    )
    layout_words = (
        "Logits equal those of transformers, and what is exported again equals the original bit for bit; gradients\n"
        "equal those of transformers. tp2: two tensor-parallel ranks, sp: sequence parallel, pp: pipeline, vpp:\n"
        "virtual stages, cp: context, dp: data, ep: experts; pp1_3 has stages of one and three layers."
    )
    stage_words = "What a stage has read, or written, in a test of the whole stage."
    return {
        "layouts": Table("Families and layouts", layout_words, "family", [*FAMILIES], layouts, family_of, _has_layout),
        "axes": Table("Families and axes", axis_words, "family", [*FAMILIES], [*AXES], family_of, _has_axis),
        "formats": Table("Families and formats", FORMAT_WORDS, "family", [*FAMILIES], [*FORMATS], family_of),
        "stages": Table("Formats and stages", stage_words, "format", [*MODELS_IN], [*STAGES]),
    }


FORMAT_WORDS = (
    "Equal: every tensor that comes in, or goes out and is read by the other tool, is equal bit for bit. What is\n"
    "`torch_dist` is a checkpoint as NeMo 2 and Megatron-Core write it, with the companions of `model.hf_assets`."
)
MADE = (
    "This page is made from the tests by `python -m tests.support.proofs`: a cell says what a test proves that names\n"
    "it, an empty one that no test does, – that there is no such thing."
)
MODELS = f"""# Which models, and what is proved of them

{MADE}

NVIDIA's own tools dropped the teachers of the Minitron papers: Megatron-Bridge stopped maintaining Mistral 7B and
Nemotron-4 in 0.6 and announced their removal in 0.7
([its notice](https://docs.nvidia.com/nemo/megatron-bridge/0.6.0/models/README.html)). They are kept here: the families
`mistral` and `nemotron`. What sets a family apart is one entry of `compactlm_nemo/models/families.py`; how one is added
is in [CONTRIBUTING.md](../CONTRIBUTING.md).

A model comes from a folder, a file, or the Hugging Face Hub, of which only safetensors and small files are fetched:

```bash
python -m recipes.import_model run.dir=runs/mine model.source=meta-llama/Llama-3.1-8B model.revision=main
```

The commit that the branch is at the start stays that of the run (`run.dir/hub.json`). `HF_TOKEN` opens what is gated,
`HF_HOME` names the disk of the cache, and with `HF_HUB_OFFLINE=1` the cache alone is read. While weights are read, a
rank holds its own and at most 1.3 times the largest file (`tests/models/test_import_memory.py`).

"""
COMPATIBILITY = f"""# Which formats go through which stages

{MADE} The stages are those of
[configuration.md](configuration.md#stages). What each family can is in [models.md](models.md).

"""
PAGES = {"models.md": (MODELS, ["layouts", "axes", "formats"]), "compatibility.md": (COMPATIBILITY, ["stages"])}


class Collector:
    """A plugin of pytest that reads the marks of collected tests."""

    def __init__(self) -> None:
        self.tables = tables()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            for mark in item.iter_markers(MARK):
                table, columns, rows, word = mark.args
                test = item.nodeid.split("[")[0]
                self.tables[table].add(filled(columns, parameters), filled(rows, parameters), word, test)


def filled(names: str | Iterable[str], parameters: dict[str, Any]) -> list[str]:
    """Names with the parameters of a test in place of the words in braces."""
    return [name.format(**parameters) for name in ([names] if isinstance(names, str) else names)]


def pages() -> dict[str, str]:
    """Page of `docs/` -> what it should be."""
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if f"mark.{MARK}(" in path.read_text()]
    collector = Collector()
    with redirect_stdout(io.StringIO()) as told:
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *marked], [collector])
    assert code == 0, f"the tests cannot be collected: {told.getvalue()[-2000:]}"
    found = {}
    for page, (head, names) in PAGES.items():
        lines = [line for name in names for line in collector.tables[name].lines()]
        found[page] = head + "\n".join(lines)
    return found


def main() -> None:
    stale = []
    for page, text in pages().items():
        path = ROOT / "docs" / page
        if not path.exists() or path.read_text() != text:
            stale.append(page)
            if "--check" not in sys.argv:
                path.write_text(text)
    if stale and "--check" in sys.argv:
        raise SystemExit(
            f"docs: {', '.join(stale)}: not what the tests prove; python -m tests.support.proofs makes them."
        )


if __name__ == "__main__":
    main()
