"""Times llama.cpp by its own programs: `convert_hf_to_gguf.py` makes the file, `llama-batched-bench` answers.

The bench draws its prompts at random, from the model's vocabulary: that many tokens, though not the words of the text.
A step of it reads one token of every prompt, N steps for N tokens, and it reports prompt and steps apart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compactlm_nemo.config.hardware import has_cuda
from compactlm_nemo.config.profile import ProfileConfig
from compactlm_nemo.errors import CompactLMError
from compactlm_nemo.evaluation.harness import environment_outside
from compactlm_nemo.evaluation.speed import Timed, check_counts
from compactlm_nemo.parallel.devices import device_kind

BENCH, CONVERTER = "llama-batched-bench", "convert_hf_to_gguf.py"
_FORMATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""torch's name of a number format -> the converter's."""
LOOK_SECONDS = 0.05
"""How often the memory of the bench is looked at."""
_CACHE_MULTIPLE = 256
"""llama.cpp keeps keys and values of a multiple of so many tokens."""


def find(path: str | None, name: str) -> str | None:
    """Return the program that is named, or the one on PATH; None where there is none."""
    if path is None:
        return shutil.which(name)
    return path if Path(path).is_file() else None


def problems(cfg: ProfileConfig) -> list[str]:
    """Return what of llama.cpp is not here."""
    found = {
        "llama_cpp": (BENCH, find(cfg.llama_cpp, BENCH)),
        "converter": (CONVERTER, find(cfg.converter, CONVERTER)),
    }
    return [
        f"profile.{setting}={getattr(cfg, setting)} is no file, and profile.engines has llama_cpp; give the path of "
        f"llama.cpp's {name}."
        if getattr(cfg, setting) is not None
        else f"profile.engines=[llama_cpp] needs llama.cpp's {name}, which is not on PATH; set profile.{setting}=PATH, "
        "or leave llama_cpp out."
        for setting, (name, program) in found.items()
        if program is None
    ]


def convert(cfg: ProfileConfig, folder: Path, file: Path, dtype: str) -> Path:
    """Make llama.cpp's file of a Hugging Face folder, with the converter of the user's llama.cpp."""
    converter = find(cfg.converter, CONVERTER)
    assert converter is not None  # `problems` came first
    words = [sys.executable, converter, str(folder), "--outfile", str(file), "--outtype", _FORMATS[dtype]]
    done = subprocess.run(words, env=environment_outside(), capture_output=True, text=True)
    if done.returncode or not file.is_file():
        raise CompactLMError(f"profile.converter={converter} cannot convert {folder.name}: {_last(done.stderr)}")
    return file


class Bench:
    """A model that `llama-batched-bench` loads for each answer; it warms up by itself."""

    def __init__(self, name: str, file: Path, cfg: ProfileConfig, threads: int) -> None:
        self._name, self._file, self._cfg, self._threads = f"llama_cpp with the {name}", file, cfg, threads
        self._program = find(cfg.llama_cpp, BENCH)
        self._peak = 0
        self.disk_bytes = file.stat().st_size
        self.about: dict[str, Any] = {"device": device_kind(), "threads": threads, "version": self._version()}

    def _version(self) -> str:
        done = subprocess.run([str(self._program), "--version"], capture_output=True, text=True)
        lines = (done.stdout + done.stderr).splitlines()
        return next((line.strip() for line in lines if line.startswith("version")), "not told")

    def answer(self, batch: int, turn: int) -> Timed:
        prompt, new = self._cfg.prompt_tokens, self._cfg.new_tokens
        context = batch * -(-(prompt + new) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        sizes = {"-c": context, "-npp": prompt, "-ntg": new, "-npl": batch, "-t": self._threads, "-tb": self._threads}
        words = [str(self._program), "-m", str(self._file), "--output-format", "jsonl"]
        words += [str(word) for pair in sizes.items() for word in pair]
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, env=environment_outside())
            # What the kernel tells at the end (ru_maxrss) counts this process too, which the other was forked from.
            while process.poll() is None:
                self._peak = max(self._peak, _resident_peak(process.pid))
                time.sleep(LOOK_SECONDS)
            out.seek(0)
            text = out.read()
        told = _row(text)
        if process.returncode or told is None:
            raise CompactLMError(f"profile.engines: {self._name} failed: {_last(text)}")
        check_counts(self._name, [int(told["tg"])] * int(told["pl"]), batch, new)
        return Timed(told["t_pp"], told["t_tg"] / new, new * batch, told["t_pp"] + told["t_tg"])

    def peak_bytes(self) -> int | None:
        """Return the most resident memory of the program; None where there is a GPU, which may hold the weights."""
        return None if has_cuda() or not self._peak else self._peak

    def close(self) -> None:
        pass


def _resident_peak(pid: int) -> int:
    """Return the most resident bytes of a process so far, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _row(text: str) -> dict[str, Any] | None:
    """Return the row of figures that the bench has printed, None without one."""
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if {"tg", "pl", "t_pp", "t_tg"} <= row.keys() and row["t_pp"] > 0 and row["t_tg"] > 0:
                found: dict[str, Any] = row
                return found
    return None


def _last(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]
