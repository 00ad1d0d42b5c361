"""Overrides as people type them, `key=value` words, become overrides of Hydra's grammar that mean what was typed.

A setting of text keeps its letters: Hydra's grammar would read `2024_10_03` as a number and refuse `/data/lr=1e-4`, so
such a value is put in quotes. What Hydra would take without a word and without effect is refused.
"""

from __future__ import annotations

import difflib
import re
import shlex
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from compactlm_nemo.errors import ConfigError, listed

OPEN_KEY = re.compile(
    r"(data\.train|data\.heldout|model\.architecture|search\.multiples|rank\.by|site\.environment"
    r"|evaluate\.choices|evaluate\.bias|gate\.limits|score\.data|data\.train\.[^.=]+)\.[^.=]+="
)
"""A name of the user's choosing, as in `data.train.web=web.jsonl`; Hydra would ask for `++` before it."""
OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^\W\d][^=\s]*)(?P<value>=.*)?$", re.DOTALL)
"""The parts of an override that decide whether Hydra heeds it."""
_CORPUS = re.compile(r"data\.(train|heldout)\.[^.]+$")
_CORPUS_PATH = re.compile(
    r"(data\.(train|heldout)\.[^.]+\.(path|name|key)|site\.environment\.[^.]+|evaluate\.(choices|bias)\.[^.]+)$"
)
_SWEEP_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\s*\(.*\)$", re.DOTALL)
_HYDRA_ALWAYS = ("hydra.searchpath", "hydra.verbose", "hydra.callbacks", "hydra.mode", "hydra.job.env_")
_HYDRA_SWEEPS = (
    "hydra/launcher",
    "hydra/sweeper",
    "hydra.launcher",
    "hydra.sweeper",
    "hydra.sweep.subdir",
    "hydra.job.",
)
_QUOTES = "'\""


@dataclass(frozen=True)
class Known:
    """The settings of a schema: all of them, and those that are text or lists of text."""

    keys: tuple[str, ...]
    texts: frozenset[str]
    lists_of_text: frozenset[str]


@cache
def known_settings(schema: type) -> Known:
    """Return the settings of a schema by dotted name."""
    hints = dict(_hints(schema, ""))
    text = frozenset(key for key, hint in hints.items() if hint is str or _is_optional_text(hint))
    return Known(tuple(hints), text, frozenset(key for key, hint in hints.items() if hint == list[str]))


def _hints(schema: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(schema)
    for field in fields(schema):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _hints(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hint


def _is_optional_text(hint: Any) -> bool:
    return typing.get_origin(hint) is UnionType and set(typing.get_args(hint)) == {str, type(None)}


def hydra_overrides(schema: type, words: list[str], sweeps: bool = False) -> list[str]:
    """Return the overrides of Hydra's grammar that set what these words say.

    Args:
        schema: The dataclass whose settings they are.
        words: As typed, without flags.
        sweeps: Whether a comma separates values of a sweep, as with `--multirun`.

    Raises:
        ConfigError: a word that cannot be read, or that would set nothing or reset what it does not name.
    """
    known, problems, overrides = known_settings(schema), [], []
    for word in words:
        match = OVERRIDE.match(word)
        problem = _problem(match, word, known, sweeps)
        if problem is None and match is not None:
            written = _written(match, known, sweeps)
            problem = _grammar_problem(match, word, written)
            overrides.append("++" + written if OPEN_KEY.match(written) else written)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(listed(problems))
    return overrides


def _problem(match: re.Match[str] | None, word: str, known: Known, sweeps: bool) -> str | None:
    """Return what is wrong with an override that Hydra would take without a word, or in words for its developers.

    `~KEY` gives a setting its default back, and `++KEY` adds one that nobody reads; Hydra's own settings move its logs
    and working folder, which recipes do not use.
    """
    if match is None:
        return f"{word!r} is no setting; write KEY=VALUE, and quotes around a value with special letters."
    sign, key = match["sign"], match["key"]
    if re.split(r"[./]", key)[0] == "hydra":
        return _hydra_problem(word, key, sweeps)
    if OPEN_KEY.match(f"{key}="):
        return None
    if sign == "~":
        return f"{word} takes nothing away but gives defaults; leave it out, or set the value you want."
    if sign and key not in known.keys:
        near = difflib.get_close_matches(key, known.keys, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists all."
        return f"{word} sets nothing, as there is no setting {key}; {hint}"
    return None


def _hydra_problem(word: str, key: str, sweeps: bool) -> str | None:
    if key.startswith(_HYDRA_ALWAYS) or (sweeps and key.startswith(_HYDRA_SWEEPS)):
        return None
    if key.startswith(_HYDRA_SWEEPS):
        return f"{word} has no effect on one run; add --multirun, or leave it out."
    return f"{word} has no effect, recipes write into run.dir alone; leave it out."


def _written(match: re.Match[str], known: Known, sweeps: bool) -> str:
    """Return an override with its value in quotes where Hydra's grammar would not read the text that was typed."""
    sign, key, value = match["sign"] or "", match["key"], match["value"]
    if value is None or sign == "~":
        return match.string
    typed = value[1:]
    if key in known.texts or _CORPUS_PATH.match(key):
        return f"{sign}{key}={_sweep(typed, _text) if sweeps else _text(typed)}"
    if key in known.lists_of_text or _CORPUS.match(key):
        return f"{sign}{key}={_sweep(typed, _text_inside) if sweeps else _text_inside(typed)}"
    return match.string


def _sweep(typed: str, spell: Callable[[str], str]) -> str:
    """Return the values of a sweep, each spelled for itself."""
    return typed if _SWEEP_FUNCTION.match(typed.strip()) else ",".join(spell(part) for part in _split(typed))


def _text(typed: str) -> str:
    """Return a text as Hydra's grammar spells it."""
    if typed.lower() == "null" or _is_quoted(typed) or _reads_as(typed, typed):
        return typed
    return quoted(typed)


def quoted(text: str) -> str:
    """Return a text in quotes, which Hydra's grammar reads as this very text."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _text_inside(typed: str) -> str:
    """Return a text, or a list or dictionary whose elements are texts, as Hydra's grammar spells it.

    A number after a key of a dictionary stays one: `{path: 2024_10_03, weight: 0.3}`.
    """
    inner = typed.strip()
    if inner[:1] + inner[-1:] == "[]":
        return f"[{','.join(_text_inside(part.strip()) for part in _split(inner[1:-1]) if inner[1:-1].strip())}]"
    if inner[:1] + inner[-1:] == "{}":
        pairs = [part.strip().partition(":") for part in _split(inner[1:-1])]
        if all(colon and key.strip() for key, colon, _ in pairs):
            is_text = {"path", "name", "key"}
            spelled = [(key, _text_inside(v.strip()) if key.strip() in is_text else v) for key, _, v in pairs]
            return "{" + ",".join(f"{key}:{value}" for key, value in spelled) + "}"
        return typed
    return _text(typed)


def _split(typed: str) -> list[str]:
    """Split at commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    slashes = 0  # in a row, before the letter
    for letter in typed:
        if quote:
            quote = "" if letter == quote and slashes % 2 == 0 else quote
        elif letter in _QUOTES and not parts[-1].strip(" [{(:,"):
            quote = letter
        slashes = slashes + 1 if letter == "\\" else 0
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _is_quoted(typed: str) -> bool:
    if len(typed) < 2 or typed[0] not in _QUOTES or typed[-1] != typed[0]:
        return False
    override = _parsed(f"key={typed}")
    return override is not None and isinstance(override.value(), str)


def _reads_as(typed: str, text: str) -> bool:
    """Whether Hydra's grammar reads a value as this very text."""
    override = _parsed(f"key={typed}")
    return override is not None and not override.is_sweep_override() and override.value() == text


def _parsed(override: str) -> Override | None:
    try:
        return parse(override)
    except (HydraException, ValueError, RecursionError):
        return None


def parse(override: str) -> Override:
    """Return an override as Hydra's grammar reads it."""
    return OverridesParser.create().parse_override(override)


def _grammar_problem(match: re.Match[str], word: str, written: str) -> str | None:
    """Return what is wrong with an override that Hydra's grammar cannot read."""
    if _parsed(written) is not None:
        return None
    if match["value"] is None:
        return f"{word!r} is no setting; write KEY=VALUE."
    if _parsed(f"{match['key']}=1") is None:
        return f"{word!r} has a key that cannot be read; keys have letters a-z, digits, _ and -, with dots between."
    right = f"{match['sign'] or ''}{match['key']}={quoted(match['value'][1:])}"
    if not right.isprintable():
        return f"{word!r} has a value that cannot be read; give it without control characters."
    right = shlex.quote(right) if set(right) & set('"$`\\!') else f'"{right}"'
    return f"{word!r} has a value that cannot be read; where it is meant as text, write {right}"
