"""A task file of a user's folder describes a task; what it names as code is not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from compactlm_nemo.errors import CompactLMError, DataError
from compactlm_nemo.evaluation.outside_tasks import refuse_code
from tests.support import commands
from tests.support.tiny_run import command

BOMB = "from pathlib import Path\nPath({target!r}).touch()\n\n\ndef process(doc):\n    return doc\n"


def make(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(content)
    return folder


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("task: a\nprocess_docs: !function utils.process\n", "plain YAML, without `!function`"),
        ("task: a\nmetric_list:\n  - metric: !function utils.process\n", "plain YAML"),
        ("task: a\nx: !!python/object/apply:os.system ['id']\n", "plain YAML"),
        ("task: a\ndataset_kwargs:\n  trust_remote_code: true\n", "asks for trust_remote_code"),
        ("task: a\ninclude: ../../other.yaml\n", "includes ../../other.yaml, outside of"),
        ("task: a\ninclude: [b.yaml, /etc/x.yaml]\n", "includes /etc/x.yaml, outside of"),
        ("task: [a\n", "cannot be used as data"),
    ],
)
def test_code_in_a_task_file_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    make(tmp_path / "tasks" / "deep", own=content)
    with pytest.raises(DataError, match=problem) as error:
        refuse_code(tmp_path / "tasks")
    assert "\n" not in str(error.value)


def test_plain_task_files_pass(tmp_path: Path) -> None:
    make(tmp_path / "tasks", own="task: a\ninclude: b.yaml\ndoc_to_text: '{{question}}'\n", b="task: b\n")
    refuse_code(tmp_path / "tasks")


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_task_file_that_runs_something_ends_a_run_before_it_starts(
    inputs: Path, tmp_path: Path, dry_run: str
) -> None:
    own = (inputs / "tasks" / "own.yaml").read_text()
    tasks = make(tmp_path / "tasks", own=own + "process_docs: !function utils.process\n")
    (tasks / "utils.py").write_text(BOMB.format(target=str(tmp_path / "ran")))
    words = ["evaluate.tasks=[own_choice]", f"evaluate.task_folder={tasks}", f"dry_run={dry_run}"]
    done = commands.run(command(inputs, tmp_path / "run", *words))
    assert done.returncode == 2 and "without `!function`" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "run").exists()


def test_a_template_of_a_task_cannot_leave_its_sandbox(inputs: Path, tmp_path: Path) -> None:
    """The way from a text to Python's modules that unguarded templates have."""
    reach = "{{ question.__class__.__mro__[1].__subclasses__() | length }}"
    own = (inputs / "tasks" / "own.yaml").read_text().replace("{{question}}", reach)
    assert reach in own
    tasks = make(tmp_path / "tasks", own=own)
    words = ["evaluate.tasks=[own_choice]", f"evaluate.task_folder={tasks}", "distill.steps=1"]
    done = commands.run(command(inputs, tmp_path / "run", *words))
    assert done.returncode == 2, done.stderr
    assert "evaluate.tasks=['own_choice'] failed in lm-eval" in done.stderr and "unsafe" in done.stderr
    assert issubclass(DataError, CompactLMError)
