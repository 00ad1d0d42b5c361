"""A recipe's command line is Hydra's: its flags work, what is typed as text stays as typed, the rest is one line."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.command import recipe
from compactlm_nemo.config.load import CONF, compose
from compactlm_nemo.config.overrides import hydra_overrides, parse
from compactlm_nemo.config.schema import Config
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.compress import compress

NEEDED = ["run.dir=x", "model.source=y"]
TYPED = [
    "2024_10_03", "1e-4", "007", "0x10", "1_000", "true", "No", "inf", "nan", "~/x=1", "/data/lr=1e-4/hf",
    "/données/été", "/数据/模型", "/дані/مجلد",
    "a b", " a", "a,b", "[1]", "{a: 1}", "choice(1,2)", "it's", 'say "x"', "a\\b", "a\\",
    "x:y", "a#b", "(", "]", "%s", "@a", "50%", "C:\\new\\", "'",
]  # fmt: skip


def run(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    """Return exit code, output and errors of recipes.compress in this process."""
    monkeypatch.setattr(sys, "argv", ["compress.py", *words])
    code = 0
    try:
        recipe(compress, "The whole road.")()
    except SystemExit as error:
        code = int(error.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function from words to exit code, output and errors; loggers stay as they were before."""
    monkeypatch.setattr(logging.getLogger(), "handlers", list(logging.getLogger().handlers))
    return lambda *words: run(list(words), capsys, monkeypatch)


def test_text_settings_keep_what_was_typed() -> None:
    words = [f"data.train.n{i}={text}x" for i, text in enumerate(TYPED)]
    train = compose([*NEEDED, *words]).data.train
    assert [corpus.path for corpus in train.values()] == [text + "x" for text in TYPED]


@pytest.mark.parametrize("text", TYPED[::3])
def test_run_dir_source_and_names_keep_what_was_typed(text: str) -> None:
    config = compose([f"run.dir={text}", f"model.source={text}", f"wandb.name={text}", f"wandb.tags=[a,{text}]"])
    assert (config.run.dir, config.model.source, config.wandb.name) == (text, text, text)
    if not set(",'[{(])") & set(text):  # which separate the elements of a list
        assert config.wandb.tags == ["a", text.strip()]


def test_text_settings_of_a_sweep_keep_what_was_typed() -> None:
    for text in TYPED:
        if "," in text or text[-1] in "\\'([{]":
            continue  # separates values
        (written,) = hydra_overrides(Config, [f"model.source={text},b"], sweeps=True)
        values = [str(getattr(value, "text", value)) for value in parse(written).sweep_iterator()]
        assert values == [text, "b"], written
    assert hydra_overrides(Config, ["model.source=choice(a,b)"], sweeps=True) == ["model.source=choice(a,b)"]


def test_run_dir_2024_10_03_is_no_number() -> None:
    assert compose(["run.dir=2024_10_03", "model.source=1e-4"]).run.dir == "2024_10_03"
    assert compose(["run.dir=2024_10_03", "model.source=1e-4"]).model.source == "1e-4"


def test_model_source_of_a_path_with_an_equals_sign_or_letters_of_any_script_is_read() -> None:
    for path in ("/data/lr=1e-4/hf", "~/x=1", "/données/été", "/模型"):
        assert compose(["run.dir=x", f"model.source={path}"]).model.source == path


def test_quotes_null_and_interpolations_mean_what_they_mean_in_hydra() -> None:
    words = ["run.dir='a b'", 'model.source="x=1"', "model.hf_assets=null", "wandb.name=${run.dir}-1"]
    config = compose(words)
    assert (config.run.dir, config.model.source, config.model.hf_assets) == ("a b", "x=1", None)
    assert config.wandb.name == "a b-1"


def test_lists_of_text_keep_what_was_typed() -> None:
    config = compose([*NEEDED, "wandb.tags=[007, 1e-4, a=b,'x,y', été]", "evaluate.tasks=[]"])
    assert config.wandb.tags == ["007", "1e-4", "a=b", "x,y", "été"]
    assert config.evaluate.tasks == []


def test_the_path_of_a_corpus_keeps_what_was_typed_and_its_numbers_are_numbers() -> None:
    words = ["data.train.a={path: 2024_10_03, weight: 0.5}", "data.train.b={path: /a=1/b, tokens: 1_000}"]
    train = compose([*NEEDED, *words, "data.train.c={path: c}", "data.train.c.path=007"]).data.train
    assert [(corpus.path, corpus.weight, corpus.tokens) for corpus in train.values()] == [
        ("2024_10_03", 0.5, None), ("/a=1/b", 1.0, 1000), ("007", 1.0, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("distill.lr=a=b", "\"distill.lr='a=b'\""),
        ("distill.lr=$x'y", None),
        ('distill.lr=a"b', None),
        ("+distill.lr=été", "\"+distill.lr='été'\""),
    ],
)
def test_a_grammar_error_names_the_argument_and_shows_it_quoted_rightly(word: str, shown: str | None) -> None:
    with pytest.raises(ConfigError) as error:
        compose([*NEEDED, word])
    message = str(error.value)
    assert message.startswith(repr(word)) and "\n" not in message
    assert shown is None or message.endswith(f"write {shown}")
    (quoted,) = shlex.split(message.rpartition("write ")[2])  # as a shell reads it
    assert quoted.startswith(word.partition("=")[0] + "='")
    hydra_overrides(Config, [quoted])  # can be read


def test_plus_foo_and_minus_distill_are_refused_in_one_line(answer: Any) -> None:
    for word in ("+foo=1", "++foo=1", "~distill", "~distill.lr"):
        code, _, errors = answer(*NEEDED, word)
        assert code == 2 and errors.startswith(f"error: {word} ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cfg", "job", "run.dir=2024_10_03"], "dir: '2024_10_03'"),
        (["distill.lr=3e-4", "-c", "job", "-p", "distill"], "lr: 0.0003"),
        (["-c", "hydra"], "subdir: ${hydra.job.override_dirname}"),
        (["--cfg", "all", "--resolve", "-p", "wandb", "wandb.name=${run.dir}", "run.dir=a"], "name: a"),
        (["--cfg=job", "experiment=llama31_8b_to_4b_width"], "model_type: llama"),
        (["--help"], "--shell-completion, -sc install=bash"),
        (["-h", "distill.lr=3"], "distill.lr = 0.0002"),
        (["--version"], "Hydra 1.3"),
    ],
)
def test_flags_of_hydra_work(answer: Any, words: list[str], expected: str) -> None:
    code, printed, errors = answer(*words)
    assert code == 0 and not errors
    assert expected in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--foo"], "unrecognized arguments: --foo"),
        (["--cfg", "nothing"], "invalid choice: 'nothing'"),
        (["--resolve"], "--resolve belongs to --cfg"),
        (["--config-name", "absent"], "Cannot find primary config 'absent'"),
        (["--config-dir", "/absent"], "Additional config directory '/absent' not found"),
        (["experiment=absent"], "Could not find 'experiment/absent'"),
        (["hydra.run.dir=x"], "hydra.run.dir=x has no effect"),
        (["hydra.sweep.dir=x"], "hydra.sweep.dir=x has no effect"),
        (["hydra/launcher=submitit_slurm"], "has no effect on one run; add --multirun"),
        (["--experimental-rerun", "x.pkl"], "runs a pickle"),
    ],
)
def test_what_flags_cannot_do_is_one_line(answer: Any, words: list[str], message: str) -> None:
    code, _, errors = answer(*words)
    assert code == 2
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--info", "defaults", "experiment=smollm2_135m_cpu"], "experiment/smollm2_135m_cpu"),
        (["--hydra-help"], "--multirun,-m : Run multiple jobs"),
    ],
)
def test_flags_of_hydra_that_set_up_loggers_work(words: list[str], expected: str) -> None:
    command = [sys.executable, "-m", "recipes.distill", *words]
    done = subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr
    assert expected in done.stdout


def test_files_of_the_users_own_are_found(answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndistill: {lr: 0.007}\n")
    (tmp_path / "own.yaml").write_text("defaults: [config, _self_]\ndistill: {steps: 77}\n")
    (tmp_path / "bare.yaml").write_text("run: {dir: x}\n")
    code, printed, _ = answer("--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job", "-p", "distill.lr")
    assert (code, printed) == (0, "0.007\n")
    code, printed, _ = answer("-cd", str(tmp_path), "--config-name=own", "-c", "job", "-p", "distill.steps")
    assert (code, printed) == (0, "77\n")
    code, printed, errors = answer("-cp", str(tmp_path), "-cn", "bare")
    assert code == 2 and "let its defaults begin with `config`" in errors and errors.count("\n") == 1


def test_completion_completes_settings_in_bash(tmp_path: Path) -> None:
    session = f"""
        eval "$({sys.executable} -m recipes.compress -sc install=bash)"
        COMP_CWORD=3
        COMP_WORDS=(python -m recipes.distill distill.log); COMP_LINE="python -m recipes.distill distill.log"
        _compactlm_complete; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(python -m recipes.distill experiment=sm); COMP_LINE="python -m recipes.distill experiment=sm"
        _compactlm_complete; echo "${{COMPREPLY[@]}}"
        COMP_WORDS=(python train.py x) COMPREPLY=(); _compactlm_complete; echo "none ${{COMPREPLY[@]}}"
    """
    (tmp_path / "python").symlink_to(sys.executable)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", session], cwd=CONF.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["distill.log_every=", "experiment=smollm2_135m_cpu", "none "], done.stderr


def documented() -> list[list[str]]:
    """Words of each command of a recipe with flags in docs/command_line.md, with the user's folder in place."""
    text = (CONF.parent / "docs" / "command_line.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if re.match(r"python -m recipes\.(?!submit)", line)]
    return [shlex.split(line)[3:] for line in lines if " -" in line.removeprefix("python -m ")]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_with_flags_run(answer: Any, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    text = (CONF / "experiment" / "llama31_8b_to_4b_width.yaml").read_text()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    text = text.replace("# @package _global_", "").replace("defaults:", "defaults:\n  - config")
    (tmp_path / "own.yaml").write_text(text)
    launcher = ("hydra/launcher=", "hydra.launcher.")  # of a plugin that need not be installed
    words = [word.replace("/my/conf", str(tmp_path)) for word in words if not word.startswith(launcher)]
    shows = {"--cfg", "--info"} & set(words)
    code, printed, errors = answer(*words, *([] if shows else ["dry_run=true", "model.source=absent"]))
    assert code == 0 and (shows or not errors), errors
    assert printed
