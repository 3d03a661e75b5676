"""What the benchmarks share: interleaved rounds, medians of per-round ratios, peak memory, and a table."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch

Run = Callable[[], Any]


def interleaved(variants: Mapping[str, Run], rounds: int = 5, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    The variants of a round run one behind the other, beginning with another one each time, so that a slow moment of the
    machine falls on all of them.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            began = time.perf_counter()
            variants[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], ours: str, other: str) -> tuple[float, float, float]:
    """How many times longer the other one takes: median, least and greatest over the rounds."""
    ratios = sorted(b / a for a, b in zip(seconds[ours], seconds[other], strict=True))
    return statistics.median(ratios), ratios[0], ratios[-1]


def peak_memory(run: Run) -> float:
    """MiB that a run takes beyond what the process had before (Linux: the high-water mark of the resident set)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    run()
    return max(0.0, (_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{name}:"))


def quiet() -> None:
    """One thread, so that a busy neighbour on the machine disturbs less; fixed seed; large blocks are given back."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: freed tensors do not count as used memory


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table under its title."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(_text(cell) for cell in row) + " |")


def _text(cell: object) -> str:
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)


def times(value: tuple[float, float, float]) -> str:
    """A ratio with its range over the rounds."""
    return f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def heading(*packages: str) -> None:
    """Say when, where and with what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    threads = f"{torch.get_num_threads()} thread(s)"
    print(f"{time.strftime('%Y-%m-%d')}; Python {platform.python_version()}, {versions}; {threads}")
