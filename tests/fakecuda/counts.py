"""What a fake device counts: waits of the host, copies, collectives, kernels, and the lines that caused them."""

from __future__ import annotations

import linecache
import os
import sys
from collections import Counter
from typing import Any, NamedTuple

_OURS = (f"{os.sep}compactlm_nemo{os.sep}", f"{os.sep}megatron{os.sep}")


class Place(NamedTuple):
    """The line of the package or of Megatron that made something happen."""

    file: str
    """Below the package's folder, or below site-packages."""
    function: str
    text: str
    """The line itself, as numbers of lines change with every edit."""

    def __str__(self) -> str:
        return f"{self.file} {self.function}: {self.text}"


class Collective(NamedTuple):
    """A kind of collective: its operation, the ranks it runs over, and the dtype that travels."""

    kind: str
    group: str
    size: int
    dtype: str


class Copy(NamedTuple):
    """A kind of copy from the host to the device."""

    place: Place
    is_asynchronous: bool
    """Whether it is queued; for any other the host waits until the device has come so far."""
    is_pinned: bool


class Counts:
    """What happened since the last `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self.synchronisations: Counter[Place] = Counter()
        """Where the host waited for the device: reads of values, copies to the host, `synchronize`."""
        self.copies: Counter[Copy] = Counter()
        """Copies from the host to the device."""
        self.copied_bytes = 0
        self.collectives: Counter[Collective] = Counter()
        self.collective_bytes: Counter[Collective] = Counter()
        """Bytes of the tensors that a rank puts in or gets, the larger of the two."""
        self.kernels: Counter[str] = Counter()
        """Operations that start a kernel, by name; one on a list of tensors counts once."""
        self.kernel_bytes: Counter[str] = Counter()
        """Bytes read and written by each kernel, from the sizes of its tensors, though it may pick some entries."""
        self.flops: Counter[str] = Counter()
        """Of matrix products and attention, by name."""
        self.attention: Counter[str] = Counter()
        """Attention kernels by name; `math` where no fused one was chosen."""

    @property
    def waits(self) -> Counter[Place]:
        """Where the host waited for the device: synchronisations, and copies that are not queued."""
        waits = Counter(self.synchronisations)
        for copy, count in self.copies.items():
            if not copy.is_asynchronous:
                waits[copy.place] += count
        return waits

    @property
    def elementwise_bytes(self) -> int:
        """Bytes that kernels other than matrix products and attention read and write."""
        return sum(size for name, size in self.kernel_bytes.items() if name not in self.flops)


def place() -> Place:
    """Return the innermost line of the package or of Megatron that runs."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in _OURS):
            short = path.rpartition("site-packages" + os.sep)[2].rpartition("compactlm_nemo" + os.sep)[2]
            return Place(short, frame.f_code.co_name, linecache.getline(path, frame.f_lineno).strip())
        frame = frame.f_back
    return Place("", "", "")
