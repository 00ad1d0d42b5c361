"""The folder of a run has one owner, which a second command is told of; a dead one's place is taken."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compactlm_nemo.config.load import CONF
from compactlm_nemo.errors import ConfigError
from compactlm_nemo.workflow.owner import FILE, owned

HOLD = """
import sys, time
from pathlib import Path
from compactlm_nemo.workflow.owner import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_the_second_is_told_who_works_there_and_a_dead_ones_place_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {**os.environ, "SLURM_JOB_ID": "4711"}
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=CONF.parent, env=env, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "mine\n"
    who = f"run.dir={tmp_path} is in use by process {first.pid} on {socket.gethostname()}, job 4711 since 20"
    with pytest.raises(ConfigError) as error, owned(tmp_path):
        pass
    assert str(error.value).startswith(who)
    monkeypatch.setenv("RANK", "1")  # other ranks leave this to the main one
    with owned(tmp_path):
        pass
    monkeypatch.delenv("RANK")
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / FILE).read_text()  # it had no time to give the folder back
    with owned(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert (tmp_path / FILE).read_text() == ""


@pytest.mark.parametrize(
    ("owner", "is_free"),
    [
        ({}, True),
        ({"host": socket.gethostname(), "pid": 2**22 + 1}, True),  # no such process
        ({"host": socket.gethostname(), "pid": os.getppid()}, False),
        ({"host": "another", "pid": 1}, False),
    ],
)
def test_without_locks_the_file_itself_tells(
    owner: dict[str, Any], is_free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def no_locks(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    (tmp_path / FILE).write_text(json.dumps(owner))
    if is_free:
        with owned(tmp_path):
            pass
    else:
        with pytest.raises(ConfigError, match=rf"in use by process {owner['pid']} on .* delete {tmp_path}/.owner"):
            with owned(tmp_path):
                pass
    assert sum("has no locks" in record.message for record in caplog.records) == 1
