"""From a command line to dataclasses by Hydra: composition, rules of every setting, and the reference of settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Generic, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compactlm_nemo.config.compare import CompareRunsConfig
from compactlm_nemo.config.evaluate import CompareConfig
from compactlm_nemo.config.fingerprint import MARK
from compactlm_nemo.config.gate import GateRunConfig
from compactlm_nemo.config.overrides import hydra_overrides, known_settings, quoted
from compactlm_nemo.config.run import DashboardConfig, VerifyConfig
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.submit import StatusConfig, SubmitConfig
from compactlm_nemo.errors import ConfigError, listed

_FOR_DEVELOPERS = ("full_key:", "object_type=", "reference_type=", "See ", "Config search path:", "provider=")
_APPEND = re.compile(r"To append to your config use \S+")  # which `override_problems` would refuse
_KEY = re.compile(r"^\s*full_key: (\S+)", re.MULTILINE)
CONF = Path(__file__).resolve().parents[2] / "conf"

HYDRA_ERRORS = (HydraException, OmegaConfBaseException)
"""What composing a command line raises, besides errors of our own."""

WORDS_NOW = {"distill.recompute": "of distill.recompute full was true and none was false"}
"""Setting -> what values of earlier versions are called now."""

LARGEST = 1e18
"""No setting is larger in size."""

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
    folders: str | None = None
    """The setting, a list, whose values may stand on the command line as words of their own; None where none may."""

    def overrides(self, words: list[str]) -> list[str]:
        """Return words with those that are folders gathered into one override.

        A word with an equals sign is a folder too where there is one, as `runs/sweep/distill.lr=1e-4`, unless it begins
        with the name of a setting.
        """
        if self.folders is None:
            return words
        folders = [word for word in words if "=" not in word or self._is_folder(word)]
        rest = [word for word in words if word not in folders]
        if not folders:
            return words
        if any(word.startswith(f"{self.folders}=") for word in rest):
            raise ConfigError(f"{self.folders}=... and {folders[0]} both name folders; name them all in one way.")
        return [*rest, f"{self.folders}=[{','.join(map(quoted, folders))}]"]

    def _is_folder(self, word: str) -> bool:
        schema: type = self.schema
        return word.partition("=")[0] not in known_settings(schema).keys and Path(word).is_dir()


RUN = Root(
    Config,
    "schema",
    "config",
    "recipes.RECIPE [experiment=NAME] [model=NAME] [cluster=NAME nodes=N] [gate=NAME] [key=value ...] [dry_run=true]",
)
COMPARE = Root(
    CompareConfig,
    "compare_schema",
    "compare_scores",
    "recipes.compare_scores a=RUN/score b=OTHER/score [key=value ...] [dry_run=true]",
)

PLAN = Root(
    Config,
    "schema",
    "plan",
    "recipes.plan cluster=NAME nodes=N [experiment=NAME] [model=NAME] [plan.search=true] [key=value of a run ...]",
)
GATE = Root(GateRunConfig, "gate_schema", "gate", "recipes.gate run.dir=RUN gate=NAME [key=value ...] [dry_run=true]")
COMPARE_RUNS = Root(
    CompareRunsConfig,
    "compare_runs_schema",
    "compare",
    "recipes.compare RUN RUN ... [out=FOLDER] [wandb.mode=online] [dry_run=true]",
    folders="runs",
)
VERIFY = Root(VerifyConfig, "verify_schema", "verify", "recipes.verify run.dir=RUN [dry_run=true]")
STATUS = Root(StatusConfig, "status_schema", "status", "recipes.status run.dir=RUN")
SUBMIT = Root(
    SubmitConfig,
    "submit_schema",
    "submit",
    "recipes.submit RECIPE [site=NAME] [nodes=N] [time=HH:MM:SS] [chain=N] [dry_run=true] [key=value of RECIPE ...]",
)
DASHBOARD = Root(
    DashboardConfig,
    "dashboard_schema",
    "dashboard",
    "recipes.dashboard [wandb.entity=TEAM] [key=value ...] [dry_run=true]",
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
    if not isinstance(config, schema):
        raise ConfigError("the file of --config-name does not build on ours; let its defaults begin with `config`.")
    if problems := _number_problems(config, ""):
        raise ConfigError(listed(problems))
    return config


def _number_problems(value: Any, key: str) -> list[str]:
    """Return every number of a configuration that no setting can mean, and that some library would stumble over."""
    inner: dict[Any, Any] = {}
    if is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, (dict, list)):
        inner = dict(value.items() if isinstance(value, dict) else enumerate(value))
    if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        return [f"{key}={value} must be a number of at most {LARGEST:g}; give a smaller one."]
    return [problem for name, part in inner.items() for problem in _number_problems(part, f"{key}.{name}".lstrip("."))]


def compose(overrides: list[str]) -> Config:
    """Return the configuration of a run that a command line of these overrides gives."""
    return compose_root(RUN, overrides)


def compose_root(root: Root[T], overrides: list[str]) -> T:
    """Return the configuration of any root that a command line of these overrides gives; a recipe may call it too."""
    register_schema(root)
    written = hydra_overrides(root.schema, root.overrides(overrides))
    running = GlobalHydra.instance().hydra  # of the recipe that calls
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base=None), told_in_words():
            return to_config(hydra.compose(root.file, written), root.schema)
    finally:
        GlobalHydra.instance().hydra = running


@contextmanager
def told_in_words() -> Iterator[None]:
    """Raise what Hydra says as ValueError, as of `experiment=null`, which names no file, as an error of the user."""
    try:
        yield
    except HYDRA_ERRORS:
        raise
    except ValueError as error:
        raise ConfigError(f"{error}; name a file of conf/ or leave the override out.") from error


def to_yaml(config: Any) -> str:
    """Return the resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def one_line(error: BaseException) -> str:
    """Return an error's message without the parts that Hydra adds for its developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [_APPEND.sub("", line) for line in lines if not line.startswith(_FOR_DEVELOPERS)]
    key = _KEY.search(str(error))
    if key is not None and (hint := WORDS_NOW.get(key[1])):
        lines[-1] += f"; {hint}."
    if error.__cause__ is not None:
        lines.append(one_line(error.__cause__))
    return " ".join(lines)


def group_names(group: str) -> list[str]:
    """Return names of the files that conf/ has in a group, `experiment` for example."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


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

    inherited = {key: text for base in cls.__bases__ if base is not object for key, text in _meanings(base).items()}
    body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    return inherited | {
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
