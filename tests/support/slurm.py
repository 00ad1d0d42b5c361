"""Starts the batch script with stubs of Slurm's programs, which record what reaches them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "run.sbatch"
OVERRIDES = [
    "experiment=smollm2_135m_cpu",
    "run.dir=runs/with two  spaces",
    "search.heads=[6, 9]",
    "search.ffn_multiples=[2.5,*]",
    """wandb.name='it''s "quoted" $HOME `id`'""",
    "model.tokenizer=",
    "data.train={a: {path: x\\y.jsonl}}",
]
# Prints its arguments and the variables Slurm and the script set, one JSON file a process.
RECORDER = """#!{python}
import json, os, sys
keys = ["MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_NNODES", "SLURMD_NODENAME"]
keys += ["CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"]
keys += ["SLURM_JOB_END_TIME", "NCCL_IB_HCA", "NCCL_DEBUG", "TORCH_NCCL_DUMP_ON_TIMEOUT", "RANK", "WORLD_SIZE"]
env = {{key: os.environ.get(key) for key in keys}}
name = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
checks = "-check" if "recipes.check_nodes" in sys.argv else ""
with open({folder!r} + "/{prefix}" + name + checks + ".json", "w") as file:
    json.dump({{"argv": sys.argv[1:], "env": env}}, file)
"""
FAKE_SRUN = """#!{python}
import json, os, sys
options = [arg for arg in sys.argv[1:] if arg.startswith("--")]
count = next(i for i, arg in enumerate(sys.argv[1:]) if not arg.startswith("--"))
with open({folder!r} + "/srun.json", "w") as file:
    json.dump(sys.argv[1 : 1 + count], file)
os.execvp(sys.argv[1 + count], sys.argv[1 + count :])
"""
# `yes`-long output: the first line must be taken without breaking the pipe.
FAKE_SCONTROL = """#!/bin/bash
[[ "$1" == requeue ]] && exec touch {folder}/requeued-"$2"
[[ "$*" == "show hostnames gpu[01-99]" ]] || exit 7
for i in $(seq 1 20000); do printf '{host}-%d\\n' "$i"; done | sed '1s/.*/{host}/'
"""


FAKE_SQUEUE = """#!/bin/bash
[[ "$*" == "--noheader --jobs=135791 --format=%e" ]] && echo "{ends}"
"""


def write_script(path: Path, text: str, **values: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


def run_with_stubs(
    tmp_path: Path,
    words: list[str],
    host: str = "gpu01",
    ends: str = "NONE",
    command: list[str] | None = None,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """The script as Slurm starts it in a folder that has recipes, with these arguments and stubs of all programs."""
    folder, bin_dir = str(tmp_path), tmp_path / "bin"
    recipes_in(tmp_path)
    write_script(bin_dir / "srun", FAKE_SRUN, folder=folder)
    write_script(bin_dir / "scontrol", FAKE_SCONTROL, host=host, folder=folder)
    write_script(bin_dir / "squeue", FAKE_SQUEUE, ends=ends)
    write_script(bin_dir / "python", RECORDER, folder=folder, prefix="python")
    job = {"SLURM_JOB_ID": "135791", "SLURM_JOB_NODELIST": "gpu[01-99]", "SLURM_NNODES": "3"}
    return subprocess.run(
        command or ["bash", str(SCRIPT), *words],
        cwd=tmp_path,
        env={"PATH": f"{bin_dir}:/usr/bin:/bin", "HOME": folder} | job | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def recipes_in(folder: Path) -> None:
    """Make the folder one that jobs can be submitted from, unless it has recipes."""
    for name in ("recipes", "conf"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
