"""Describes the device of this process: index, name and peak speed."""

from __future__ import annotations

from pathlib import Path

import torch

PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}
"""Part of a device's name -> peak; the first part that occurs in the name counts."""


def device_kind() -> str:
    """Return the name of this process's device, of a CPU that of its model."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else "CPU"


def device_name() -> str:
    """Return the name of this process's device; a CPU's name includes the number of threads."""
    return device_kind() if torch.cuda.is_available() else f"{device_kind()}, {torch.get_num_threads()} threads"


def peak_tflops(name: str) -> float | None:
    """Return the peak dense bf16 TFLOP/s of a device by name, from NVIDIA's data sheets; None for an unknown device."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def device() -> torch.device:
    """Return the device of this process's model."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
