"""Progress of long work on the main rank: samples done, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from compactlm_nemo.parallel.world import is_main_rank


@contextmanager
def progress_bar(
    label: str, samples: int, tokens_per_sample: int = 0, *, tokens: Callable[[], int] | None = None
) -> Iterator[Callable[[int], None]]:
    """Yield `advance(samples)`: a bar on a terminal, one closing line elsewhere, nothing on other ranks.

    Args:
        tokens: Counts the tokens so far, of samples that have not equally many.
    """
    console = Console()
    if not is_main_rank():
        yield lambda count: None
        return
    start, done = time.perf_counter(), 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=samples, speed=0.0)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            num_tokens = done * tokens_per_sample if tokens is None else tokens()
            speed = num_tokens / (time.perf_counter() - start)
            bar.update(task, completed=min(done, samples), speed=speed)

        yield advance
    seconds = time.perf_counter() - start
    num_tokens = samples * tokens_per_sample if tokens is None else tokens()
    console.print(f"  {label}: {samples} samples, {num_tokens / seconds:.0f} tokens/s, {seconds:.0f} s")


@contextmanager
def byte_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield `advance(bytes)`: a bar on a terminal, one closing line elsewhere, nothing on other ranks."""
    console = Console()
    if not is_main_rank():
        yield lambda count: None
        return
    start, done = time.perf_counter(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(label, total=total or None)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(task, completed=done)

        yield advance
    seconds = time.perf_counter() - start
    console.print(f"  {label}: {done / 1e6:.1f} MB read, {done / 1e6 / seconds:.1f} MB/s, {seconds:.0f} s")
