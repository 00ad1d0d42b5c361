"""A recipe as an application of `hydra.main`: Hydra's flags, its composition and its sweeps, with our words around."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser  # hydra.main calls it; there is no public name
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from compactlm_nemo.config.completion import BASH
from compactlm_nemo.config.load import (
    CONF,
    GATE,
    PLAN,
    RUN,
    SUBMIT,
    Root,
    group_names,
    register_schema,
    schema_reference,
    to_config,
    told_in_words,
)
from compactlm_nemo.config.overrides import hydra_overrides
from compactlm_nemo.config.schema import Config
from compactlm_nemo.config.sweep import Sweep
from compactlm_nemo.errors import ConfigError

T = TypeVar("T")

_OF_A_RUN = ("experiment", "model", "cluster", "gate")
_GROUPS = {RUN.file: _OF_A_RUN, PLAN.file: _OF_A_RUN, SUBMIT.file: ("site",), GATE.file: ("gate",)}
"""Groups of conf/ of which a command line names a file."""


class Application(Generic[T]):
    """One start of a recipe. `folder` is the run's folder, once it is known that the command writes to it."""

    def __init__(self, root: Root[T], run: Callable[[T], None], description: str, leaves_runs: bool) -> None:
        self.root, self.run, self.description, self.leaves_runs = root, run, description, leaves_runs
        self.folder: str | None = None
        self._error: Exception | None = None
        self._sweep: Sweep | None = None

    def start(self, words: list[str]) -> int:
        """Do what a command line says, and return the exit code of a sweep, 0 of all else.

        Raises:
            Exception: whatever the recipe raised, and Hydra's errors of composition.
        """
        flags, overrides, options = parsed_words(words)
        if flags.help:
            print(help_text(self.description, self.root))
            return 0
        if flags.shell_completion:
            if "install=bash" in overrides or "install=zsh" in overrides:
                print(BASH)
                return 0
        else:
            overrides = hydra_overrides(
                self.root.schema, self.root.overrides(overrides), sweeps=_sweeps(flags, overrides)
            )
        register_schema(self.root)
        with contextlib.ExitStack() as stack:
            if _sweeps(flags, overrides):
                if self.root is not RUN:
                    raise ConfigError("--multirun sweeps recipes that make a run; call this one once for each value.")
                self._sweep = Sweep.of(overrides, self.leaves_runs)
                overrides = self._sweep.overrides(overrides, stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(_command_line([*options, *overrides]))
            stack.enter_context(told_in_words())
            hydra.main(config_path=str(CONF), config_name=self.root.file, version_base=None)(self._task())()
        if self._error is not None:
            raise self._error
        return self._sweep.exit_code() if self._sweep else 0

    def _task(self) -> Callable[[DictConfig], None]:
        """Return the function that Hydra calls for the run, or for each run of a sweep."""

        def task(tree: DictConfig) -> None:
            try:  # Hydra would print its own words about a failure
                if self._sweep is not None:
                    subfolder = str(HydraConfig.get().sweep.subdir)
                    self._sweep.run_job(lambda: to_config(tree, self.root.schema), self.run, tree.run.dir, subfolder)
                else:
                    self._run_once(to_config(tree, self.root.schema))
            except Exception as error:
                self._error = error

        task.__module__ = f"recipes.{Path(sys.argv[0]).stem}"  # its last word is Hydra's name of the job
        return task

    def _run_once(self, config: T) -> None:
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            raise ConfigError("a file sets hydra.mode=MULTIRUN; leave it out there, and add --multirun.")
        self.folder = config.run.dir if isinstance(config, Config) and not config.dry_run else None
        self.run(config)


def parsed_words(words: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Return Hydra's flags, the overrides, and the words that are flags and their values.

    An override may stand anywhere between flags.

    Raises:
        ConfigError: a flag is not Hydra's, or lacks its value.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help and --hydra-help list what there is.")

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(words)
    options, left = [], list(flags.overrides)
    for word in words:
        if left and word == left[0]:
            left.pop(0)
        else:
            options.append(word)
    if flags.resolve and not (flags.cfg or flags.help):
        raise ConfigError("--resolve belongs to --cfg; add --cfg job, or leave it out.")
    if flags.experimental_rerun:
        raise ConfigError("--experimental-rerun runs a pickle; give the same command again, which goes on.")
    return flags, list(flags.overrides), options


def _sweeps(flags: argparse.Namespace, overrides: list[str]) -> bool:
    return bool(flags.multirun) or "hydra.mode=MULTIRUN" in overrides


@contextlib.contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Let hydra.main read these words, and raise errors instead of printing them."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = [before[0], *words], "1"
    loggers = [logging.getLogger(name) for name in (None, "hydra")]
    logs = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    try:
        yield
    finally:
        sys.argv = before
        for logger, handlers, level in logs:  # --info leaves its own
            logger.handlers[:] = handlers
            logger.setLevel(level)
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


def help_text(description: str, root: Root[Any] = RUN) -> str:
    """Return what `--help` prints: the recipe, files of conf/ that a run can name, Hydra's flags, every setting."""
    lines = [description, "", f"usage: python -m {root.usage}", ""]
    if groups := _GROUPS.get(root.file):
        lines += [f"{group}s: {', '.join(group_names(group))}" for group in groups] + [""]
    lines += ["flags (those of Hydra):", *_flag_lines(root), ""]
    lines += ["settings (key = default):"]
    lines += [f"  {key} = {default}\n      {meaning}" for key, default, meaning, _ in schema_reference(root.schema)]
    return "\n".join(lines)


def _flag_lines(root: Root[Any]) -> Iterator[str]:
    meanings = {
        "--help, -h": "this page",
        "--hydra-help": "Hydra's own settings",
        "--cfg, -c job|hydra|all": "print the configuration, run nothing; with --package, -p a part of it, --resolve",
        "--info, -i [defaults|searchpath|...]": "how Hydra composes the configuration",
        "--multirun, -m": "a run for each combination of values, as in distill.lr=1e-4,3e-4; folders below run.dir",
        "--config-name, -cn; --config-path, -cp; --config-dir, -cd": "files of your own",
        "--shell-completion, -sc install=bash": 'complete settings: eval "$(python -m RECIPE -sc install=bash)"',
    }
    if root is SUBMIT:
        meanings["--multirun, -m"] = "jobs for each combination of values of the recipe's settings"
    elif root is not RUN:
        del meanings["--multirun, -m"]  # there is no run to sweep
    return (f"  {flag}\n      {meaning}" for flag, meaning in meanings.items())
