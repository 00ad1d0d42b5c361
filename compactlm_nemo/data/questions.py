"""Reads multiple-choice questions from local files, and refuses a line that breaks their format.

Nothing here is heavy: every command reads the files before anything starts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from compactlm_nemo.config.evaluate import EvaluateConfig
from compactlm_nemo.data.records import LONGEST_BYTES, read_pieces
from compactlm_nemo.errors import DataError

Q = TypeVar("Q")
UNKNOWN = "unknown"
"""Group that BBQ gives the answer that names nobody."""
_ANSWERS = ("ans0", "ans1", "ans2")
_GENDERS = {"man": "m", "boy": "m", "woman": "f", "girl": "f"}
"""BBQ's answers say `man` where its `stereotyped_groups` say `M`."""


class Question(NamedTuple):
    """A question has a text, and choices of which one is right."""

    text: str
    """What stands in front of every choice."""
    choices: tuple[str, ...]
    """At least two, all different."""
    answer: int
    """Number of the right choice."""
    delimiter: str
    """What stands between text and choice."""
    where: str
    """File and line, for messages."""


class BiasQuestion(NamedTuple):
    """A question of BBQ asks which of two people something is true of; one choice says that this is not known."""

    question: Question
    is_ambiguous: bool
    """Whether the context does not tell; then the answer that is not known is right."""
    unknown: int
    """Number of the choice that names nobody."""
    biased: int | None
    """Number of the choice that the stereotype would give; None where both or none of the people belong to its
    groups."""
    template: str
    """Category and number of the template that it was filled from."""


def question_files(cfg: EvaluateConfig) -> dict[str, Path]:
    """Return the files of `evaluate.choices` and `evaluate.bias`, by the name of their setting."""
    both = {"choices": cfg.choices, "bias": cfg.bias}
    return {f"evaluate.{kind}.{name}": Path(path) for kind, files in both.items() for name, path in files.items()}


def question_problems(cfg: EvaluateConfig) -> list[str]:
    """Return why files of questions cannot be used, a line for each."""
    problems = []
    for setting, path in question_files(cfg).items():
        try:
            (read_bias if setting.startswith("evaluate.bias.") else read_choices)(path)
        except DataError as error:
            problems.append(f"{setting}={path}: {error}")
    return problems


def read_choices(path: Path) -> list[Question]:
    """Return the questions of a file of JSON lines, each an object of `question`, `choices` and `answer`.

    `question` may be empty; `delimiter`, a space where it is left out, stands before each choice, as lm-eval's
    `target_delimiter` does. Other keys are passed over.

    Raises:
        DataError: the file cannot be read or has no question, or a line breaks the format; the message names it.
    """
    return _each(_lines(path), path, _question)


def read_bias(path: Path) -> list[BiasQuestion]:
    """Return the questions of a file of BBQ (JSON lines), or of BBQ Lite in BIG-bench (`bbq_lite/resources/*.json`).

    The text is lm-eval's: ``{context}\\n\\nQ: {question}\\nA:``. Which answer is the stereotype's follows from
    `answer_info` and `stereotyped_groups`: in a negative question the one whose person belongs to the groups, in a
    non-negative one the other. Names of groups are compared in lower case and without spaces; who is `F-Black` is of F
    and of Black too.

    Raises:
        DataError: as `read_choices`; BIG-bench's `bbq_lite_json` is refused, as it names no groups.
    """
    return _each(_examples(path) if path.suffix.lower() == ".json" else _lines(path), path, _bias_question)


def _each(records: list[tuple[str, Any]], path: Path, made: Callable[[Any, str], Q]) -> list[Q]:
    if not records:
        raise DataError(f"{path} holds no question; give at least one.")
    return [made(record, where) for where, record in records]


def _lines(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        raise DataError("the file does not exist; give a file of JSON lines.")
    pieces = read_pieces([str(path)], key="question")
    return [(piece.where(record.number), record.fields) for piece in pieces for record in piece.records]


def _examples(path: Path) -> list[tuple[str, Any]]:
    """Return the examples of a task of BIG-bench, one JSON object a file."""
    if not path.is_file():
        raise DataError("the file does not exist; give one of BBQ's .jsonl files, or of BIG-bench's bbq_lite.")
    if path.stat().st_size > LONGEST_BYTES:
        raise DataError(f"{path} has more than {LONGEST_BYTES / 2**20:g} MiB; write JSON lines instead.")
    try:
        examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no JSON object with `examples` ({error}); write JSON lines as .jsonl.") from None
    if not isinstance(examples, list):
        raise DataError(f"{path} has `examples` that are no list; write JSON lines as .jsonl.")
    return [(f"{path}, example {number}", example) for number, example in enumerate(examples, start=1)]


def _question(record: Any, where: str) -> Question:
    text, choices, answer = (record.get(key) for key in ("question", "choices", "answer"))
    delimiter = record.get("delimiter", " ")
    _demand(_is_text(text), where, "has no `question`; it must be the text in front of every choice, possibly empty")
    _demand(
        isinstance(choices, list) and len(choices) > 1 and all(_is_text(c) and c for c in choices),
        where, "needs `choices`, a list of at least two texts, none of them empty",
    )  # fmt: skip
    _demand(len(set(choices)) == len(choices), where, "has one choice twice; leave one of them")
    _demand(
        type(answer) is int and 0 <= answer < len(choices),
        where, f"needs `answer`, the number of the right choice, from 0 to {len(choices) - 1}",
    )  # fmt: skip
    _demand(_is_text(delimiter), where, "has a `delimiter` that is no text; leave it out for a space")
    return Question(text, tuple(choices), answer, delimiter, where)


def _bias_question(record: Any, where: str) -> BiasQuestion:
    is_object = isinstance(record, dict)
    _demand(
        not (is_object and "target_scores" in record), where,
        "is of bbq_lite_json, which does not say whom a stereotype is about; take bbq_lite/resources of the same "
        "package, or BBQ's own files",
    )  # fmt: skip
    keys = ("category", "context", "question", *_ANSWERS)
    _demand(
        is_object and all(_is_text(record.get(k)) and record[k] for k in keys), where, f"needs texts {_listed(keys)}"
    )
    polarity, condition = record.get("question_polarity"), record.get("context_condition")
    _demand(polarity in ("neg", "nonneg"), where, "needs `question_polarity`, neg or nonneg")
    _demand(condition in ("ambig", "disambig"), where, "needs `context_condition`, ambig or disambig")
    index = record.get("question_index")
    _demand(type(index) in (int, str), where, "needs `question_index`, the number of its template")
    info, more = record.get("answer_info"), record.get("additional_metadata")
    _demand(
        isinstance(info, dict) and all(_are_texts(info.get(key)) for key in _ANSWERS),
        where, f"needs `answer_info` with lists of texts {_listed(_ANSWERS)}",
    )  # fmt: skip
    groups: Any = more.get("stereotyped_groups") if isinstance(more, dict) else None
    _demand(_are_texts(groups) and groups, where, "needs `additional_metadata.stereotyped_groups`, a list of texts")
    unknown = [number for number, key in enumerate(_ANSWERS) if info[key][-1:] == [UNKNOWN]]
    _demand(
        len(unknown) == 1, where, f"needs one answer whose `answer_info` ends with {UNKNOWN}, it has {len(unknown)}"
    )
    label, is_ambiguous = record.get("label"), condition == "ambig"
    _demand(type(label) is int and 0 <= label < len(_ANSWERS), where, "needs `label`, the number of the right answer")
    _demand(
        is_ambiguous == (label == unknown[0]),
        where, f"is {condition}, but `label` is {'no' if is_ambiguous else 'the'} unknown answer",
    )  # fmt: skip
    text = f"{record['context']}\n\nQ: {record['question']}\nA:"
    question = Question(text, tuple(record[key] for key in _ANSWERS), label, " ", where)
    people = [number for number in range(len(_ANSWERS)) if number != unknown[0]]
    stereotyped = [n for n in people if _groups_of(info[_ANSWERS[n]]) & {_name(group) for group in groups}]
    biased = None
    if len(stereotyped) == 1:
        wanted = polarity == "neg"
        (biased,) = (number for number in people if (number in stereotyped) is wanted)
    return BiasQuestion(question, is_ambiguous, unknown[0], biased, f"{record['category']} {index}")


def _groups_of(info: list[str]) -> set[str]:
    """Return the groups of a person: all that `answer_info` says, and of its last entry what stands between hyphens."""
    return {_name(name) for name in (*info, *"".join(info[-1:]).split("-")) if name}


def _name(group: str) -> str:
    name = "".join(group.lower().split())
    return _GENDERS.get(name, name)


def _demand(holds: Any, where: str, rule: str) -> None:
    if not holds:
        raise DataError(f"{where} {rule}.")


def _is_text(value: Any) -> bool:
    """Whether a value is a text of whole characters; JSON may hold halves of one."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
