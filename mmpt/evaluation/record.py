"""What an evaluation leaves: numbers, their intervals, tables of classes, and the outcome of every example."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from mmpt.errors import DataError
from mmpt.evaluation.calibration import Calibration
from mmpt.evaluation.intervals import bootstrap_interval
from mmpt.files import write_atomically

DETAILS, OUTCOMES = "evaluation.json", "outcomes.npz"
MOST_CONFUSED = 500
"""Classes beyond which no confusion matrix is kept; it grows with their square."""


@dataclass(frozen=True)
class ClassRow:
    """One class in the table of classes.

    Attributes:
        label: its name.
        precision: share of right ones among the examples that were given this label.
        recall: share of this class's examples that were found.
        f1: harmonic mean of both.
        support: number of examples.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass
class Evaluation:
    """One evaluation.

    Attributes:
        metrics: flat name -> number, baselines beside them (`accuracy`, `accuracy_majority`).
        outcomes: name of a metric that is a mean over examples -> what each example adds to it, float (n,).
        names: what names each example, (n,).
        intervals: metric -> 95 % bootstrap interval over examples.
        classes: table of classes, empty where there are none.
        confusion: counts; row is the true class, column the predicted one. Empty where there are no classes.
        calibration: how far confidence and accuracy agree, where there are confidences.
        statistics: name of any other metric -> the examples (m, ...) that it is a function of, and the function. The
            examples may be others than those of `names`: texts, where samples are named.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    classes: list[ClassRow] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    calibration: Calibration | None = None
    statistics: dict[str, tuple[np.ndarray, Callable[[np.ndarray], float]]] = field(default_factory=dict)

    def with_intervals(self, seed: int = 0) -> Evaluation:
        """The same with an interval for each metric whose examples are known."""
        for name, values in self.outcomes.items():
            self.intervals[name] = bootstrap_interval(values, seed=seed)
        for name, (values, statistic) in self.statistics.items():
            self.intervals[name] = bootstrap_interval(values, statistic, seed=seed)
        return self

    def prefixed(self, prefix: str) -> Evaluation:
        """The same with `prefix/` in front of all metric names."""
        return Evaluation(
            {f"{prefix}/{name}": value for name, value in self.metrics.items()},
            {f"{prefix}/{name}": values for name, values in self.outcomes.items()},
            self.names,
            {f"{prefix}/{name}": interval for name, interval in self.intervals.items()},
            self.classes,
            self.confusion,
            self.calibration,
            {f"{prefix}/{name}": examples for name, examples in self.statistics.items()},
        )

    def write(self, run: Path) -> None:
        """Write RUN/evaluation.json and RUN/outcomes.npz; `metrics` are for `mmpt.report.write_metrics`."""
        details = {
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
            "classes": [vars(row) for row in self.classes],
            "confusion": self.confusion,
            "calibration": None if self.calibration is None else vars(self.calibration),
        }
        text = json.dumps(details, indent=1, ensure_ascii=False)
        write_atomically(run / DETAILS, lambda file: file.write(text.encode()))
        buffer = io.BytesIO()
        arrays = {f"outcome:{name}": values.astype(np.float32) for name, values in self.outcomes.items()}
        np.savez_compressed(buffer, names=np.array(self.names, dtype=str), **arrays)  # type: ignore[arg-type]
        write_atomically(run / OUTCOMES, lambda file: file.write(buffer.getvalue()))


def read_outcomes(run: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names and outcomes of RUN/outcomes.npz; empty where there is none.

    Raises:
        DataError: the file is damaged.
    """
    path = run / OUTCOMES
    if not path.is_file():
        return [], {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            outcomes = {key.removeprefix("outcome:"): arrays[key] for key in arrays.files if key != "names"}
            return arrays["names"].tolist(), outcomes
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise DataError(f"{path} can't be read ({error}); restore or delete it") from error


def classified(
    targets: np.ndarray,
    answers: np.ndarray,
    labels: Sequence[str],
    names: Sequence[str],
    **statistics: Callable[[np.ndarray], float],
) -> Evaluation:
    """What any classification leaves besides its numbers: who was right, the tables of classes, what intervals are of.

    Args:
        targets: integers (n,).
        answers: integers (n,).
        labels: name of each class; where there are none, the classes' numbers.
        names: what names each example, (n,).
        statistics: name of a metric -> the function of (target, answer) rows that it is, e.g. `macro_f1`.
    """
    labels = labels or [str(number) for number in range(int(max(answers.max(), targets.max())) + 1)]
    classes, confusion = class_tables(targets, answers, labels)
    correct, pairs = (answers == targets).astype(float), np.stack([targets, answers], 1)
    known = {name: (pairs, statistic) for name, statistic in statistics.items()}
    return Evaluation({}, {"accuracy": correct}, list(names), {}, classes, confusion, None, known)


def class_tables(
    targets: np.ndarray, predictions: np.ndarray, labels: Sequence[str]
) -> tuple[list[ClassRow], list[list[int]]]:
    """The table of classes and the confusion matrix.

    Args:
        targets: integers (n,), or 0 and 1 (n, labels) where an example may have several labels; that has no confusion.
        predictions: of the same shape.
        labels: name of each class.
    """
    numbers = np.arange(len(labels))
    columns = precision_recall_fscore_support(targets, predictions, labels=numbers, zero_division=0.0)
    rows = [
        ClassRow(label, float(p), float(r), float(f), int(n))
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    ]
    if targets.ndim == 2 or len(labels) > MOST_CONFUSED:
        return rows, []
    return rows, confusion_matrix(targets, predictions, labels=numbers).tolist()


def paired_difference(
    first: tuple[Sequence[str], np.ndarray], second: tuple[Sequence[str], np.ndarray], seed: int = 0
) -> tuple[float, float, float] | None:
    """Second minus first over the examples that both have, with a 95 % bootstrap interval over these examples.

    Args:
        first: names and outcomes (n,) of one run.
        second: of another one; names that occur twice in a run are left out.
        seed: of the resampling.

    Returns:
        Difference, lower and upper end; None where they share fewer than two examples.
    """
    left, right = _by_name(*first), _by_name(*second)
    shared = [name for name in left if name in right]
    if len(shared) < 2:
        return None
    differences = np.array([right[name] - left[name] for name in shared])
    low, high = bootstrap_interval(differences, seed=seed)
    return float(differences.mean()), low, high


def _by_name(names: Sequence[str], values: np.ndarray) -> Mapping[str, float]:
    found: dict[str, float] = {}
    twice: set[str] = set()
    for name, value in zip(names, values.tolist(), strict=True):
        if name in found:
            twice.add(name)
        found[name] = value
    return {name: value for name, value in found.items() if name not in twice}


def joined(parts: Sequence[Any]) -> np.ndarray:
    """Tensors of several batches as one array on the CPU."""
    return np.concatenate([part.detach().cpu().float().numpy() for part in parts]) if parts else np.zeros(0)
