"""The card, its driver and clocks, what is installed, and which fusions can be imported."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from bench.gpu.record import Record

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "liger-kernel", "apex", "transformer-engine", "numpy")
FUSIONS = {
    "apex": "amp_C",
    "apex gradient accumulation": "fused_weight_gradient_mlp_cuda",
    "Transformer Engine": "transformer_engine",
    "Triton": "triton",
    "flash-attn": "flash_attn",
    "Liger": "liger_kernel",
}
"""What is listed -> the module that has it."""
QUERY = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
"""Fields of nvidia-smi."""


def versions() -> dict[str, Any]:
    """Return what is installed; nothing heavy is imported."""
    installed: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def driver() -> dict[str, str]:
    """Return nvidia-smi's word on the first card; its error under `error` where it has none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"error": str(error)}
    return dict(zip(QUERY, (field.strip() for field in done.stdout.splitlines()[0].split(",")), strict=False))


def measure(record: Record, *, dry: bool) -> None:
    """Record the machine."""
    record.detail("versions", versions())
    importable = [name for name, module in FUSIONS.items() if importlib.util.find_spec(module)]
    record.detail("importable", importable)
    record.detail("cpus", len(os.sched_getaffinity(0)))
    record.detail("nvidia-smi", driver())
    import torch

    from compactlm_nemo.parallel.devices import device_name, peak_tflops
    from compactlm_nemo.training.fusions import available_fusions, fusions_text

    record.detail("card", device_name())
    record.detail("peak_tflops", peak_tflops(device_name()))
    record.figure("card", device_name())
    record.figure("importable", ", ".join(importable) or "nothing")
    record.figure("fusions", fusions_text(available_fusions(is_cuda=torch.cuda.is_available())))
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        record.detail("torch CUDA", {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()})
        record.figure("free memory", round(free / 2**30, 1), f"of {total / 2**30:.1f} GiB")
        record.figure("bf16 matrix product", round(_product_tflops()), "TFLOP/s")


def _product_tflops(size: int = 8192) -> float:
    """Return the speed of a square bf16 product of random numbers: what the goals can be held against."""
    import torch

    from bench.gpu.clock import in_turn

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = in_turn({"product": lambda: a @ b}, 12, lambda: 60.0)["product"]
    return 2 * size**3 / sorted(times)[len(times) // 2] / 1e9
