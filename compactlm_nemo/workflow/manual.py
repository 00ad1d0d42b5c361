"""docs/configuration.md, made from the stage table and the dataclasses: `python -m compactlm_nemo.workflow.manual`."""

from __future__ import annotations

from collections.abc import Iterable

from compactlm_nemo.config.compare import CompareRunsConfig
from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.load import schema_reference
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.submit import SubmitConfig
from compactlm_nemo.workflow.stage_table import STAGES

HEAD = """# Stages and settings

Made from `compactlm_nemo/workflow/stage_table.py` and the dataclasses in `compactlm_nemo/config/` by `make docs`.

## Stages

In their order. Each reads artifacts, folders of `run.dir`, and writes its own; those in parentheses it reads with some
settings only. What is unfinished lies in `progress/STAGE`.

"""
SETTINGS = """
## Settings

The last column says whether another value gives another result: then a finished stage that reads the setting is not
taken for done.

"""


def reference_markdown() -> str:
    """Return the page."""
    settings = [(f"`{key}`", f"`{default}`", text, mark) for key, default, text, mark in schema_reference(Config)]
    others = {"compare": CompareRunsConfig, "compare_scores": CompareConfig, "submit": SubmitConfig}
    return (
        HEAD
        + _table(("stage", "from what to what", "reads", "writes"), _stage_rows())
        + SETTINGS
        + _table(("key", "default", "meaning", "result"), settings)
        + "".join(_own_settings(recipe, schema) for recipe, schema in others.items())
    )


def _own_settings(recipe: str, schema: type) -> str:
    """Return the part of a recipe with settings of its own."""
    rows = [(f"`{key}`", f"`{default}`", text) for key, default, text, _ in schema_reference(schema)]
    return f"\n## Settings of `recipes.{recipe}`\n\n" + _table(("key", "default", "meaning"), rows)


def _stage_rows() -> Iterable[tuple[str, ...]]:
    for stage in STAGES.values():
        reads = [f"`{artifact}`" for artifact in stage.reads] + [f"(`{artifact}`)" for artifact in stage.may_read]
        yield f"`{stage.name}`", stage.summary, ", ".join(reads) or "your files", f"`{stage.writes}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


if __name__ == "__main__":
    print(reference_markdown(), end="")
