"""The README.md of a folder that leaves: what the model was made from, how, and what it loses by that.

Names, paths and the teacher's own card come from outside: they are data, escaped where they stand, and only known keys
of the teacher's card are taken over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compactlm_nemo.config.model import is_repository
from compactlm_nemo.models.hf_assets import CARD, PAPERS

TEACHER_WORDS = "teacher_card.json"
"""In the teacher's artifact: what `teacher_words` found."""

LONGEST = 200
"""Letters that a value of the teacher's card may have."""

_OF_THE_TEACHER = ("license", "license_name", "license_link", "language")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$-])")
_FRONT = re.compile(r"\A---\r?\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card tells."""

    teacher: str
    kind: str
    """What the model is to its teacher, a sentence."""
    shapes: Mapping[str, Mapping[str, int]]
    """Model, the teacher first -> size by axis, and `params`."""
    dtype: str
    data: Mapping[str, str] = field(default_factory=dict)
    """Name of a text of the training -> its file."""
    training: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[Mapping[str, Any]] = ()
    """Rows of the evaluate stage."""
    remarks: Sequence[str] = ()


def escaped(text: Any) -> str:
    """Return text from outside as one line of Markdown that means just that text."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in str(text)).split())
    return _SPECIAL.sub(r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def teacher_name(source: str) -> str:
    """Return the name of a teacher without its path: ORG/NAME in the cache of the Hub, else the folder's."""
    if is_repository(source):
        return source
    path = Path(source).absolute()
    if match := _SNAPSHOT.search(str(path)):
        return f"{match[1]}/{match[2]}"
    if path.parts[-2:] == ("export", "hf"):  # of a run
        path = path.parent.parent
    return path.name


def teacher_words(hf_assets: Path) -> dict[str, Any]:
    """Return licence and languages as the head of the teacher's own card names them; nothing where it has none."""
    try:
        match = _FRONT.match((hf_assets / CARD).read_text(encoding="utf-8")[:65536])
        words = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(words, dict):
        return {}
    return {key: words[key] for key in _OF_THE_TEACHER if _is_plain(words.get(key))}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= 100 and all(isinstance(item, str) and len(item) <= LONGEST for item in value)
    return isinstance(value, str) and 0 < len(value) <= LONGEST


def model_card(card: Card, hf_assets: Path, words: Mapping[str, Any]) -> str:
    """Return the text of a README.md, which the Hub reads too.

    Args:
        hf_assets: The teacher's small files.
        words: Of the teacher's own card, from `teacher_words`.
    """
    head: dict[str, Any] = {**words} | {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["compactlm-nemo"] + ["pruned"] * (len(card.shapes) > 1)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", card.teacher):
        head["base_model"] = card.teacher
    model = list(card.shapes)[-1]
    lines = [
        "---", yaml.safe_dump(head, allow_unicode=True, sort_keys=False).rstrip(), "---", "",
        f"# {escaped(model)}", "",
        f"{card.kind} Teacher: {escaped(card.teacher)}. Weights: {card.dtype}. Made with CompactLM-NeMo.", "",
        *_table("axis", card.shapes),
    ]  # fmt: skip
    if card.training:
        data = [f"- {escaped(name)}: {escaped(file)}" for name, file in card.data.items()]
        settings = [f"- {escaped(key)}: {escaped(value)}" for key, value in card.training.items()]
        lines += ["", "## Training", "", *settings, "", "Texts:", "", *data]
    if card.losses:
        lines += ["", "## Losses on held-out texts", "", "Nats a token.", "", *_losses(card.losses)]
    lines += ["", "## Licence", "", *_licence(words, hf_assets)]
    if card.remarks:
        lines += ["", "## To know", "", *[f"- {escaped(remark)}" for remark in card.remarks]]
    return "\n".join(lines) + "\n"


def _licence(words: Mapping[str, Any], hf_assets: Path) -> list[str]:
    files = sorted(path.name for path in hf_assets.iterdir() if path.name.upper().startswith((*PAPERS, "USE-POLICY")))
    named = words.get("license_name") or words.get("license")
    lines = [f"The teacher's card names the licence {escaped(named)}." if named else "The teacher's card names none."]
    if files:
        lines.append(f"The teacher's terms are beside this file: {', '.join(map(escaped, files))}.")
    return [*lines, "A model made from another one is bound by the terms of that one."]


def _table(first: str, columns: Mapping[str, Mapping[str, int]]) -> list[str]:
    rows = next(iter(columns.values()))
    head = [first, *map(escaped, columns)]
    body = [[escaped(row), *(f"{column[row]:,}" for column in columns.values())] for row in rows]
    return _markdown(head, body)


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    texts = [key.removeprefix("loss_") for key in rows[0] if key.startswith("loss_")]
    head = ["model", "tokens trained", *map(escaped, texts)]
    body = [
        [escaped(row["model"]), f"{row['tokens_trained']:,}", *(f"{row[f'loss_{text}']:.4f}" for text in texts)]
        for row in rows
    ]
    return _markdown(head, body)


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
    """Return the lines of a table whose cells are escaped already."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
