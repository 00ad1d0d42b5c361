"""From Hydra's tree to dataclasses and from exceptions to exit codes: the only user of hydra and omegaconf."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.fingerprint import MARK
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError

OPEN_KEY = re.compile(r"(data\.train|data\.heldout|model\.architecture|search\.multiples)\.[^.=]+=")
"""A name of the user's choosing, as in `data.train.web=web.jsonl`; Hydra would ask for `++` before it."""
_FOR_DEVELOPERS = ("full_key:", "object_type=", "reference_type=", "See ", "Config search path:", "provider=")
CONF = Path(__file__).resolve().parents[2] / "conf"

T = TypeVar("T")


@dataclass(frozen=True)
class Root(Generic[T]):
    """Where the settings of a command come from: a file in conf/ and the dataclass that it lists first."""

    schema: type[T]
    base: str
    """Name of the dataclass in the file's defaults list."""
    file: str
    usage: str
    """What follows `python -m ` on its help page."""


RUN = Root(Config, "schema", "config", "recipes.RECIPE [experiment=NAME] [model=NAME] [key=value ...] [dry_run=true]")
COMPARE = Root(
    CompareConfig,
    "compare_schema",
    "compare_scores",
    "recipes.compare_scores a=RUN/score b=OTHER/score [key=value ...] [dry_run=true]",
)


def register_schema(root: Root[Any]) -> None:
    """Make a root's dataclass known to Hydra as the base of its file."""
    ConfigStore.instance().store(name=root.base, node=root.schema)


def to_config(tree: DictConfig, schema: type[T]) -> T:
    """Return validated dataclasses from a composed tree; every `__post_init__` rule has run."""
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set; for example {missing[0]}=VALUE on the command line.")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, schema)
    return config


def compose(overrides: list[str]) -> Config:
    """Return the configuration of a run that a command line of these overrides gives."""
    return compose_root(RUN, overrides)


def compose_root(root: Root[T], overrides: list[str]) -> T:
    """Return the configuration of any root that a command line of these overrides gives."""
    register_schema(root)
    overrides = ["++" + text if OPEN_KEY.match(text) else text for text in overrides]
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        try:
            tree = hydra.compose(root.file, overrides)
        except (HydraException, OmegaConfBaseException):
            raise
        except ValueError as error:  # Hydra's word on `experiment=null`, which names no file
            raise ConfigError(f"{error}; name a file of conf/ or leave the override out.") from error
        return to_config(tree, root.schema)


def to_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def one_line(error: BaseException) -> str:
    """Return an error's message without the parts that Hydra adds for its developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_FOR_DEVELOPERS)]
    if error.__cause__ is not None:
        lines.append(one_line(error.__cause__))
    return " ".join(lines)


def recipe(run: Callable[[Config], None], description: str | None) -> Callable[[], None]:
    """Turn a function of a run's configuration into a command."""
    return recipe_root(RUN, run, description)


def recipe_root(root: Root[T], run: Callable[[T], None], description: str | None) -> Callable[[], None]:
    """Turn a function of a root's configuration into a command: `key=value` overrides in, exit code out.

    A user's error ends in one line and exit code 2, without a traceback.
    """

    def command() -> None:
        overrides = sys.argv[1:]
        if {"-h", "--help"} & set(overrides):
            print(help_text(description or "", root))
            return
        try:
            run(compose_root(root, overrides))
        except CompactLMError as error:
            sys.exit(_fail(f"error: {error}"))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(_fail(f"error: {_user_cause(error) or one_line(error)}"))

    return command


def help_text(description: str, root: Root[Any] = RUN) -> str:
    """Return what `--help` prints: the recipe, the experiments and models of a run, and every setting."""
    lines = [description, "", f"usage: python -m {root.usage}", ""]
    if root is RUN:
        lines += [f"{group}s: {', '.join(group_names(group))}" for group in ("experiment", "model")] + [""]
    lines += ["settings (key = default):"]
    lines += [f"  {key} = {default}\n      {meaning}" for key, default, meaning, _ in schema_reference(root.schema)]
    return "\n".join(lines)


def group_names(group: str) -> list[str]:
    """Return names of the files that conf/ has in a group, `experiment` or `model`."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _user_cause(error: BaseException | None) -> CompactLMError | None:
    while error is not None:
        if isinstance(error, CompactLMError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def schema_reference(top: type = Config) -> list[tuple[str, str, str, str]]:
    """Return (key, default, meaning, mark) of every setting, read from the dataclasses and their docstrings.

    The mark says whether another value gives another result: yes, no, or depends (on other settings).
    """
    rows: list[tuple[str, str, str, str]] = []

    def walk(cls: type, prefix: str) -> None:
        docs = _meanings(cls)
        for f in fields(cls):
            default = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
            if hasattr(default, "__dataclass_fields__"):
                walk(type(default), f"{prefix}{f.name}.")
            else:
                mark = f.metadata.get(MARK, False)
                decides = "depends" if callable(mark) else ("yes" if mark else "no")
                rows.append((prefix + f.name, _shown(default), " ".join(docs.get(f.name, "").split()), decides))

    walk(top, "")
    return rows


def _meanings(cls: type) -> dict[str, str]:
    """Return the docstring that follows each field of a dataclass in the source, by the field."""
    import ast
    import inspect

    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    return {
        item.target.id: str(after.value.value)
        for item, after in zip(body, body[1:], strict=False)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def _shown(default: Any) -> str:
    """Return a default as one would write it on the command line."""
    if default == "???":
        return "required"
    if isinstance(default, list):
        return f"[{', '.join(map(_shown, default))}]"
    return default.name if isinstance(default, Enum) else repr(default)
