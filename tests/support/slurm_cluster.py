"""A Slurm of two nodes on this machine, where its programs are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

SLURM_CONF = """
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
OverTimeLimit=10
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 Gres=gpu:8
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 Gres=gpu:8
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _missing_for_slurm() -> str:
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root to start Slurm's daemons"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    programs = ("sbatch", "srun", "scontrol", "sinfo", "munged", "slurmctld", "slurmd")
    missing = [name for name in programs if not shutil.which(name, path=path)]
    return f"needs Slurm and munge installed; missing: {', '.join(missing)}" if missing else ""


_daemons: dict[Path, list[subprocess.Popen[bytes]]] = {}
"""Daemons of a cluster, by its configuration."""


def _node_daemon(node: str, conf: Path) -> list[str]:
    return ["slurmd", "-D", "-f", str(conf), "-N", node]


def _start(command: list[str], env: dict[str, str]) -> None:
    conf = Path(env["SLURM_CONF"])
    with (conf.parent / "daemons.log").open("ab") as log:
        _daemons[conf].append(subprocess.Popen(command, env=env, stdout=log, stderr=log))


@contextmanager
def slurm_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Start a munged, a slurmctld and two slurmd of this test alone; yield the environment that clients need."""
    reason = _missing_for_slurm()
    if reason:
        pytest.skip(reason)
    folder = tmp_path / "s"
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    ports = _free_ports(3)
    # A job's rendezvous port follows from its number: the jobs of two clusters on one host must not have the same ones.
    first_job = 1 + ports[0] % 19000
    host = socket.gethostname().split(".")[0]
    conf.write_text(SLURM_CONF.format(host=host, folder=folder, ports=ports, first_job=first_job))
    # Plain files stand for the GPUs: slurmd counts them and never opens them.
    for gpu in range(8):
        (folder / f"gpu{gpu}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    env = os.environ | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    munge = [f"--{name}={folder}/munge.{end}" for name, end in (("key-file", "key"), ("socket", "socket"))]
    munge += [f"--{name}={folder}/munge.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
    commands = [
        ["munged", "--foreground", "--force", *munge, f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(conf)],
        _node_daemon("n1", conf),
        _node_daemon("n2", conf),
    ]
    daemons = _daemons[conf] = []
    try:
        for command in commands:
            _start(command, env)
            if command[0] == "munged":
                wait_for(lambda: (folder / "munge.socket").exists(), folder, "munged")
        wait_for(lambda: _idle_nodes(env) == 2, folder, "two idle nodes")
        yield env
    finally:
        if len(daemons) >= len(commands):  # a test that failed leaves no job behind
            subprocess.run(["scancel", "--partition=all"], env=env, capture_output=True, timeout=60)
            end = time.monotonic() + 60  # the daemons would leave its processes behind
            while (
                time.monotonic() < end
                and subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, timeout=30).stdout.strip()
            ):
                time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()


def wait_for(holds: Callable[[], bool], folder: Path, what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in folder.glob("*.log"))
            pytest.fail(f"no {what} within {seconds:g} s\n{logs}")
        time.sleep(0.2)


def start_soon(job: str, folder: Path, env: dict[str, str]) -> None:
    """Wait until a job is requeued, and spare it the two minutes that Slurm lets it wait.

    Not at once: a node revokes what it knows of the job by the second, and refuses a start in the same one.
    """
    wait_for(lambda: job_facts(job, env)["JobState"] == "PENDING", folder, f"requeued job {job}", 120)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], env=env, check=True)


def _idle_nodes(env: dict[str, str]) -> int:
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    return done.stdout.split().count("idle")


def job_facts(job: str, env: dict[str, str]) -> dict[str, str]:
    """Return what `scontrol show job` says of a job."""
    shown = subprocess.run(["scontrol", "show", "job", job], env=env, capture_output=True, text=True, check=True).stdout
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def lose_node(node: str, env: dict[str, str]) -> None:
    """Kill a node's daemon and all processes of jobs on it, as if its power were cut; Slurm is told that it is down."""
    conf = Path(env["SLURM_CONF"])
    for process in _processes_of(node, conf):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert not [process for process in _processes_of(node, conf) if process.status() != psutil.STATUS_ZOMBIE]
    words = ["scontrol", "update", f"NodeName={node}", "State=down", "Reason=power"]
    subprocess.run(words, env=env, check=True)


def return_node(node: str, env: dict[str, str]) -> None:
    """Start a node's daemon again, and wait until Slurm gives it jobs."""
    folder = Path(env["SLURM_CONF"]).parent
    _start(_node_daemon(node, folder / "slurm.conf"), env)
    command = ["sinfo", "--noheader", "--Node", "--format=%T", f"--nodes={node}"]

    def is_idle() -> bool:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout.strip() == "idle"

    wait_for(is_idle, folder, f"idle node {node}")


def _processes_of(node: str, conf: Path) -> list[psutil.Process]:
    """Return a node's slurmd, and the managers of its job steps, which have a socket in its spool, with their jobs."""
    spool, found = f"{conf.parent}/spool-{node}/", []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            is_daemon = process.cmdline() == _node_daemon(node, conf)
            manages = process.name() == "slurmstepd" and any(
                str(socket_.laddr).startswith(spool) for socket_ in process.net_connections(kind="unix")
            )
            if is_daemon or manages:
                found += [process, *process.children(recursive=True)]
    return found
