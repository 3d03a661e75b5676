"""Measurements over seeds: each is made once and kept as a line of a file, so that a study goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from mmpt.errors import ConfigError


class Study:
    """The finished measurements of a file of JSON lines.

    A line holds the facts that tell a measurement from others (`"run": "main", "seed": 0`), its `metrics` and the
    `seconds` that it took. What is there is not measured again. A line that a killed process left unfinished is
    dropped with the next one that is written.

    Args:
        path: of the file; made with the first measurement.
        minutes: begin no further measurement after these.

    Raises:
        ConfigError: a line before the last one is damaged.
    """

    def __init__(self, path: Path, minutes: float = math.inf) -> None:
        self.path = path
        self.deadline = time.monotonic() + 60 * minutes
        self.rows: list[dict[str, Any]] = []
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        for number, line in enumerate(lines, 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: not JSON ({error}); remove the line") from error

    def has(self, **facts: Any) -> bool:
        """Whether there is a measurement with these facts, and perhaps others."""
        return any(facts.items() <= row.items() for row in self.rows)

    def measure(self, function: Callable[[], Mapping[str, float]], **facts: Any) -> None:
        """Measure, unless the file has these facts already or the time is over.

        Args:
            function: gives the metrics.
            facts: what tells this measurement from others, of types that JSON keeps as they are.
        """
        if self.has(**facts) or time.monotonic() > self.deadline:
            return
        began = time.perf_counter()
        self.add(facts, function(), time.perf_counter() - began)

    def add(self, facts: Mapping[str, Any], metrics: Mapping[str, float], seconds: float) -> None:
        """Keep a measurement, on the disk when this returns, and say so."""
        row = {**facts, "seconds": round(seconds, 1), "metrics": dict(metrics)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        print(f"{', '.join(f'{name} {value}' for name, value in facts.items())}: {seconds:.0f} s", flush=True)

    def values(self, metric: str, **facts: Any) -> list[float]:
        """A metric of all measurements with these facts that have it."""
        return [
            row["metrics"][metric] for row in self.rows if facts.items() <= row.items() and metric in row["metrics"]
        ]

    def print(self, by: Sequence[str] = ("run",)) -> None:
        """Print mean and standard deviation of each metric over the measurements that agree in the facts `by`.

        Args:
            by: names of facts; the others, such as the seed, are averaged over.
        """
        table = Table(*by, "metric", "mean", "sd", "measurements")
        for place in dict.fromkeys(tuple(row.get(name, "") for name in by) for row in self.rows):
            facts = dict(zip(by, place, strict=True))
            own = [row for row in self.rows if all(row.get(name, "") == value for name, value in facts.items())]
            for metric in dict.fromkeys(name for row in own for name in row["metrics"]):
                found = [row["metrics"][metric] for row in own if metric in row["metrics"]]
                table.add_row(*map(str, place), metric, f"{np.mean(found):.3f}", spread(found), str(len(found)))
        Console(width=140).print(table)


def spread(values: Sequence[float]) -> str:
    """The standard deviation of a sample of values; nothing for a single one."""
    return f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
