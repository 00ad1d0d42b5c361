"""From Hydra's tree to dataclasses and from exceptions to exit codes: the only user of hydra and omegaconf."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import CompactLMError, ConfigError

OPEN_KEY = re.compile(r"(data\.train|data\.heldout|model\.architecture)\.[^.=]+=")
"""A name of the user's choosing, as in `data.train.web=web.jsonl`; Hydra would ask for `++` before it."""
CONF = Path(__file__).resolve().parents[2] / "conf"


def register_schema() -> None:
    """Make the dataclasses known to Hydra as the base of conf/config.yaml."""
    ConfigStore.instance().store(name="schema", node=Config)


def to_config(tree: DictConfig) -> Config:
    """Validated dataclasses from a composed tree; every `__post_init__` rule has run."""
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be set; for example {missing[0]}=VALUE on the command line.")
    config = OmegaConf.to_object(tree)
    assert isinstance(config, Config)
    return config


def compose(overrides: list[str]) -> Config:
    """The configuration that a command line of these overrides gives."""
    register_schema()
    overrides = ["++" + text if OPEN_KEY.match(text) else text for text in overrides]
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        return to_config(hydra.compose("config", overrides))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def one_line(error: BaseException) -> str:
    """An error's message without the parts that Hydra adds for its developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=", "See "))]
    if error.__cause__ is not None:
        lines.append(one_line(error.__cause__))
    return " ".join(lines)


def recipe(run: Callable[[Config], None], description: str | None) -> Callable[[], None]:
    """Turn a function of the configuration into a command: `key=value` overrides in, exit code out.

    A user's error ends in one line and exit code 2, without a traceback.
    """

    def command() -> None:
        overrides = sys.argv[1:]
        if {"-h", "--help"} & set(overrides):
            print(help_text(description or ""))
            return
        try:
            run(compose(overrides))
        except CompactLMError as error:
            sys.exit(_fail(f"error: {error}"))
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from here", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except (HydraException, OmegaConfBaseException) as error:
            sys.exit(_fail(f"error: {_user_cause(error) or one_line(error)}"))

    return command


def help_text(description: str) -> str:
    """What `--help` prints: the verb, the experiments and every setting."""
    experiments = ", ".join(sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
    lines = [description, "", "usage: python -m recipes.VERB [experiment=NAME] [key=value ...] [dry_run=true]", ""]
    lines += [f"experiments: {experiments}", "", "settings (key = default):"]
    lines += [f"  {key} = {default}\n      {meaning}" for key, default, meaning in schema_reference()]
    return "\n".join(lines)


def _user_cause(error: BaseException | None) -> CompactLMError | None:
    while error is not None:
        if isinstance(error, CompactLMError):
            return error
        error = error.__cause__ or error.__context__
    return None


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def schema_reference() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every setting, read from the dataclasses and their docstrings."""
    import ast
    import inspect

    from compactlm_nemo.config import schema

    tree = ast.parse(inspect.getsource(schema))
    docs: dict[tuple[str, str], str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            for item, after in zip(node.body, node.body[1:], strict=False):
                if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr):
                    docs[node.name, item.target.id] = after.value.value  # type: ignore[union-attr,attr-defined]
    rows: list[tuple[str, str, str]] = []

    def walk(cls: type, prefix: str) -> None:
        for f in fields(cls):
            default = f.default_factory() if f.default_factory is not NO_DEFAULT else f.default
            if hasattr(default, "__dataclass_fields__"):
                walk(type(default), f"{prefix}{f.name}.")
            else:
                shown = "required" if default == "???" else getattr(default, "name", repr(default))
                meaning = " ".join(docs.get((cls.__name__, f.name), "").split())
                rows.append((prefix + f.name, shown, meaning))

    walk(Config, "")
    return rows


def reference_markdown() -> str:
    """docs/configuration.md, made from the dataclasses; `python -m compactlm_nemo.config.load` prints it."""
    head = "# Settings\n\nMade from `compactlm_nemo/config/schema.py` by `make docs`.\n\n"
    return (
        head
        + "| key | default | meaning |\n|---|---|---|\n"
        + "".join(f"| `{key}` | `{default}` | {meaning} |\n" for key, default, meaning in schema_reference())
    )


if __name__ == "__main__":
    print(reference_markdown(), end="")
