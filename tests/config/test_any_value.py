"""Whatever stands on the command line, a recipe ends well or in one line of error, and soon: no traceback, no hang."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from types import FrameType, UnionType
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.data import CorpusConfig
from compactlm_nemo.config.load import compose
from compactlm_nemo.config.overrides import OPEN_KEY
from compactlm_nemo.config.schema import Config
from compactlm_nemo.workflow.compress import compress
from tests.support.tiny_run import command

MOST_SECONDS = 20
EXAMPLES = int(os.environ.get("CONFIG_EXAMPLES", "300"))

_NUMBERS = ["0", "-1", "1", "7", "1e300", "-1e300", "inf", "-inf", "nan", "9" * 20, "-" + "9" * 20, "1e-320", "0x10"]
_TEXTS = [
    "''",
    "null",
    "true",
    "a b",
    "'a b'",
    "../x",
    "/etc/passwd",
    "/dev/null",
    "ü",
    "[",
    "}",
    "${run.dir}",
    "???",
    "\t",
]
_LISTS = [
    "[]",
    "[1]",
    "[[1]]",
    "[[1,2]]",
    "[a]",
    "[null]",
    "[-1]",
    "[1e300]",
    "[0,0]",
    "{a:1}",
    "[{a:1}]",
    "[99999999999]",
]

integers = st.integers(-3, 10).map(str) | st.integers(-(10**25), 10**25).map(str)
reals = st.floats(width=64).map(repr) | st.floats(0, 1).map(repr)
words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=300)
anything = st.sampled_from(_NUMBERS + _TEXTS + _LISTS) | words


def fields_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting's dotted name with its type."""
    for name, hint in typing.get_type_hints(cls).items():
        if hasattr(hint, "__dataclass_fields__"):
            yield from fields_of(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def values_of(hint: Any) -> st.SearchStrategy[str]:
    """Return a strategy of values as one types them, most of the setting's own type."""
    if typing.get_origin(hint) is UnionType:
        return st.one_of([values_of(part) for part in typing.get_args(hint)])
    if typing.get_origin(hint) is list:
        (inner,) = typing.get_args(hint)
        return st.lists(values_of(inner), max_size=4).map(lambda items: f"[{','.join(items)}]")
    if typing.get_origin(hint) is dict:
        return st.dictionaries(words, integers | words, max_size=3).map(str)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return st.sampled_from([member.name for member in hint])
    kinds: dict[Any, st.SearchStrategy[str]] = {
        bool: st.sampled_from(["true", "false"]),
        int: integers,
        float: reals,
        str: words,
        type(None): st.just("null"),
    }
    return kinds.get(hint, anything)


FIELDS = dict(fields_of(Config))
UNTOUCHED = ("dry_run", "run.dir")
"""What keeps an example from doing work."""


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """Draw one to four overrides of settings by their types, now and then of anything by anything."""
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from([key for key in FIELDS if key not in UNTOUCHED]))
        if draw(st.integers(0, 9)) == 0:
            drawn.append(draw(st.sampled_from(["", "+", "++", "~"])) + key + draw(st.sampled_from(["", "=", ".x=1"])))
            continue
        value = draw(values_of(FIELDS[key]) if draw(st.booleans()) else anything)
        drawn.append(f"{key}={value}")
    return drawn


@pytest.fixture(scope="module")
def run(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], tuple[int, str]]:
    """Return a function from overrides to the exit code and the errors of `recipes.compress ... dry_run=true`."""
    _, _, *words = command(inputs, tmp_path_factory.mktemp("any") / "run", "dry_run=true")
    main = recipe(compress, None)

    def _run(extra: list[str]) -> tuple[int, str]:
        errors, code, arguments = io.StringIO(), 0, sys.argv
        sys.argv = ["compress", *words, *extra]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors), in_time():
                main()
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.argv = arguments
        return code, errors.getvalue()

    return _run


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fail where the body takes longer than it may."""

    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"no answer after {MOST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="CONFIG_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(overrides=overrides())
@example(overrides=["distill.lr=1e300"])
@example(overrides=["run.seed=-1"])
@example(overrides=["=3"])
def test_any_values_end_well_or_in_an_error_that_names_something(
    run: Callable[[list[str]], tuple[int, str]], overrides: list[str]
) -> None:
    code, errors = run(overrides)
    assert code in (0, 2), errors
    assert "Traceback" not in errors
    if code == 2:
        assert errors.startswith("error: ") and errors.count("error: ") >= 1
        is_list = errors.split("\n")[0].endswith("problems:")
        assert is_list or len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("~distill", "~distill takes nothing away"),
        ("~distill.lr", "~distill.lr takes nothing away"),
        ("~run", "~run takes nothing away"),
        ("+foo=1", "there is no setting foo"),
        ("++distill.foo=1", "there is no setting distill.foo; did you mean distill"),
        ("hydra.run.dir=x", "hydra.run.dir=x has no effect"),
        ("=3", "'=3' is no setting"),
        ("distill.lr=inf", "distill.lr=inf must be a number of at most"),
        ("distill.lr=1e300", "distill.lr=1e+300 must be a number"),
        ("distill.loss.mse=inf", "distill.loss.mse=inf must be"),
        ("run.seed=99999999999999999999", "run.seed=99999999999999999999 must be in [0, 2^32)"),
        ("run.seed=-1", "run.seed=-1 must be in [0, 2^32)"),
        ("rank.halving=99999999999", "rank.halving=99999999999 must be"),
        ("distill.hidden.layers=[[[3]]]", "distill.hidden.layers=[[[3]]]"),
        ("run.dir=", "run.dir is empty"),
        ("run.dir=/etc/passwd/run", "below the file /etc/passwd"),
        (f"run.dir={'x' * 300}", "File name too long"),
        ("distill.stepz=3", "distill.stepz"),
    ],
)
def test_what_would_have_no_effect_or_no_meaning_is_refused(
    run: Callable[[list[str]], tuple[int, str]], override: str, answer: str
) -> None:
    code, errors = run([override])
    assert code == 2
    assert answer in errors and len(errors.strip().splitlines()) == 1, errors


def test_what_adds_or_takes_a_name_of_the_users_choosing_is_heeded(
    run: Callable[[list[str]], tuple[int, str]], inputs: Path
) -> None:
    assert OPEN_KEY.match("data.train.web=x")
    assert run([f"+data.train.web={inputs}/train.jsonl", "++distill.steps=6"]) == (0, "")
    assert compose(["run.dir=x", "model.source=y", "data.train.a=b", "data.train.c=d", "~data.train.a"]).data.train == {
        "c": CorpusConfig(path="d")
    }
