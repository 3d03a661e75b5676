"""What a run folder holds, read and checked; the other half, what it looks like, is in report_page.py.

Everything in the folder but metrics or logs may be missing. What is there has to be sound: a damaged file raises
`DataError` with its name and line, because a report that quietly leaves a part out would be believed.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmpt.errors import DataError

LOWER_IS_BETTER = frozenset(
    {"loss", "rank", "error", "errors", "perplexity", "entropy", "mae", "mse", "rmse", "ece", "nll", "seconds"}
)
"""Words of a metric's last name part that turn its direction round."""

MISSING = "\N{EN DASH}"
"""Stands where there is no value."""

MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class MetricRow:
    """A metric with its baselines.

    Attributes:
        name: full name, e.g. `retrieval/unseen_style/R@1`.
        value: the run's own number.
        baselines: suffix -> number, e.g. {"chance": 0.001, "hog": 0.21}.
    """

    name: str
    value: float
    baselines: dict[str, float]

    @property
    def lower_is_better(self) -> bool:
        """Whether a small value is a good one: losses, errors, ranks (but not reciprocal ranks)."""
        words = set(re.split(r"[_\W]+", self.name.rpartition("/")[2].lower()))
        return bool(words & LOWER_IS_BETTER) and "reciprocal" not in words

    @property
    def best(self) -> float:
        """The best of the run's value and its baselines; NaN if none is a number."""
        return self._best([self.value, *self.baselines.values()])

    @property
    def difference(self) -> float:
        """The run's value minus the best baseline; NaN without one."""
        return self.value - self._best(list(self.baselines.values()))

    @property
    def gain(self) -> float:
        """`difference`, turned so that a positive number means better than the best baseline."""
        return -self.difference if self.lower_is_better else self.difference

    def _best(self, values: list[float]) -> float:
        numbers = [v for v in values if not math.isnan(v)]
        if not numbers:
            return math.nan
        return min(numbers) if self.lower_is_better else max(numbers)


def metric_rows(metrics: Mapping[str, float]) -> list[MetricRow]:
    """Put every baseline beside its metric.

    `name_suffix` is a baseline of `name` if both are there. Where several names fit, the longest one that is a metric
    itself counts: `accuracy_top5` is more than a baseline of `accuracy` when it has a baseline that `accuracy` has too.

    Args:
        metrics: flat name -> number, in the order of the rows.
    """

    def shorter(name: str) -> list[str]:
        cuts = [match.start() for match in re.finditer("_", name)]
        return [name[:cut] for cut in cuts if name[:cut] in metrics and "/" not in name[cut:]]

    suffixes: dict[str, set[str]] = {}
    for name in metrics:
        for base in shorter(name):
            suffixes.setdefault(base, set()).add(name[len(base) + 1 :])

    def is_metric(name: str) -> bool:
        return all(suffixes[base] & suffixes.get(name, set()) for base in shorter(name))

    rows = {name: MetricRow(name, value, {}) for name, value in metrics.items() if is_metric(name)}
    for name, value in metrics.items():
        if name not in rows:
            base = max((b for b in shorter(name) if b in rows), key=len)
            rows[base].baselines[name[len(base) + 1 :]] = value
    return list(rows.values())


def metric_groups(metrics: Mapping[str, float]) -> dict[str, list[MetricRow]]:
    """`metric_rows` by the first part of their names (`retrieval`, `zero_shot`), "" for names without parts."""
    groups: dict[str, list[MetricRow]] = {}
    for row in metric_rows(metrics):
        groups.setdefault(row.name.partition("/")[0] if "/" in row.name else "", []).append(row)
    return groups


def columns_of(rows: list[MetricRow]) -> list[str]:
    """Every baseline that some row has, in the order of first mention."""
    return list(dict.fromkeys(suffix for row in rows for suffix in row.baselines))


def number(value: float) -> str:
    """A number for people: three decimals for shares, fewer for large values, whole numbers whole."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    size = abs(value)
    if size >= 1000 or (value == int(value) and size > 1):
        text = f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    elif size >= 100:
        text = f"{value:.1f}"
    elif size >= 10:
        text = f"{value:.2f}"
    elif size >= 0.001 or size == 0:
        text = f"{value:.3f}"
    else:
        text = f"{value:.2g}"
    return text.replace("-", MINUS)


@dataclass(frozen=True)
class Curve:
    """One column of a log.

    Attributes:
        steps: int (points,), ascending.
        values: float (points,), finite.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class HeadCurves:
    """The losses of one head.

    Attributes:
        stage: which log below `logs/` it is from; "" for a run with one log.
        head: name of the head; "" for the weighted sum.
        splits: "train" and "validation" -> curve, those that were logged.
    """

    stage: str
    head: str
    splits: dict[str, Curve]


@dataclass(frozen=True)
class Map:
    """Embeddings in the plane.

    Attributes:
        points: float (n, 2).
        labels: n strings.
        kinds: n strings, e.g. "image" and "text".
    """

    points: np.ndarray
    labels: list[str]
    kinds: list[str]


@dataclass(frozen=True)
class Run:
    """A run folder, read. Missing parts are None or empty.

    Attributes:
        folder: where it lies.
        facts: what was trained on what.
        metrics: flat name -> number.
        curves: losses per head.
        examples: title and rows of retrieval examples, as in examples.json.
        map: embeddings in the plane.
        skipped: records of inputs that could not be used.
        configuration: text of config.yaml.
        model_files: path below model/ -> bytes.
        details: of the last evaluation, as evaluation.json has them: intervals, classes, confusion, calibration.
    """

    folder: Path
    facts: dict[str, Any]
    metrics: dict[str, float]
    curves: list[HeadCurves]
    examples: dict[str, Any] | None
    map: Map | None
    skipped: list[dict[str, Any]]
    configuration: str | None
    model_files: dict[str, int]
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the run calls itself, or the folder's name."""
        return str(self.facts.get("title") or self.folder.resolve().name)


def read_run(folder: Path) -> Run:
    """Read everything that a report shows.

    Args:
        folder: a run folder, with metrics.json, run.json or a log below logs/. A run of fewer steps than the logging
            interval has run.json alone.

    Raises:
        DataError: not a run folder, or a damaged file in it.
    """
    logs = sorted((folder / "logs").rglob("metrics.csv"))
    if not logs and not any((folder / name).is_file() for name in ("metrics.json", "run.json")):
        problem = "holds no metrics.json, run.json or logs/**/metrics.csv" if folder.is_dir() else "is not a folder"
        raise DataError(
            f"{folder} {problem}; expected the folder of a run, as `mmpt fit` and a recipe's `run.py --output` write it"
        )
    model = folder / "model"
    configuration = folder / "config.yaml"
    facts, metrics, details = read_numbers(folder)
    return Run(
        folder=folder,
        facts=facts,
        metrics=metrics,
        curves=_curves(folder / "logs", logs),
        examples=_examples(folder / "examples.json"),
        map=_map(folder / "embeddings.npz"),
        skipped=_lines(folder / "skipped.jsonl"),
        configuration=_text(configuration) if configuration.is_file() else None,
        model_files={
            path.relative_to(model).as_posix(): path.stat().st_size
            for path in sorted(model.rglob("*"))
            if path.is_file() and not path.is_symlink()
        },
        details=details,
    )


def read_numbers(folder: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, Any]]:
    """The facts, metrics and details of a run folder (`Run`), each empty where its file is missing.

    Raises:
        DataError: a damaged file.
    """
    return (
        _object(folder / "run.json") or {},
        _metrics(folder / "metrics.json"),
        _object(folder / "evaluation.json") or {},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text; the file is damaged, restore or delete it") from error


def _json(path: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}: not JSON ({error.msg}); the file is damaged, restore or delete it"
        ) from error


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = _json(path, _text(path))
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; expected an object of names and values")
    return value


def _metrics(path: Path) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, value in (_object(path) or {}).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"{path}: {name!r} is {value!r}; expected a number, or null for one that is not finite")
        metrics[name] = math.nan if value is None else value
    return metrics


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # What follows the last line end is a record that a killed process did not finish.
    complete = _text(path).split("\n")[:-1]
    records = [_json(path, line, position) for position, line in enumerate(complete, 1) if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise DataError(f"{path}: expected one object per line")
    return records


def _examples(path: Path) -> dict[str, Any] | None:
    examples = _object(path)
    if examples is None:
        return None
    rows = examples.get("rows")
    sound = isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("query"), dict)
        and isinstance(row.get("results"), list)
        and all(isinstance(result, dict) for result in row["results"])
        for row in rows
    )
    if not sound:
        raise DataError(
            f'{path}: expected {{"title": ..., "rows": [{{"query": {{...}}, "results": [{{...}}, ...]}}, ...]}}'
        )
    return examples


def _map(path: Path) -> Map | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            points, labels, kinds = (arrays[name] for name in ("points", "labels", "kinds"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: {error}; expected arrays points (n, 2), labels (n,) and kinds (n,)") from error
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) == len(labels) == len(kinds):
        raise DataError(
            f"{path}: points {points.shape}, labels {labels.shape}, kinds {kinds.shape}; expected (n, 2), (n,), (n,)"
        )
    return Map(points.astype(np.float64), [str(label) for label in labels], [str(kind) for kind in kinds])


def _curves(root: Path, logs: list[Path]) -> list[HeadCurves]:
    """The losses of every log; `version_0`, `version_1`, ... of one folder are one run that was resumed."""
    stages: dict[str, list[Path]] = {}
    for path in logs:
        version = re.fullmatch(r"version_(\d+)", path.parent.name)
        stage = (path.parent.parent if version else path.parent).relative_to(root).as_posix()
        stages.setdefault("" if stage == "." else stage, []).append(path)

    found: dict[tuple[str, str], dict[str, Curve]] = {}
    for stage, paths in stages.items():
        for path in sorted(paths, key=_version):
            for (head, split), curve in _losses(path).items():
                splits = found.setdefault((stage, head), {})
                splits[split] = _resumed(splits[split], curve) if split in splits else curve
    # The weighted sum first, then heads as they were logged.
    return [HeadCurves(*key, splits) for key, splits in sorted(found.items(), key=lambda item: item[0][1] != "")]


def _version(path: Path) -> int:
    digits = path.parent.name.rpartition("_")[2]
    return int(digits) if digits.isdigit() else -1


def _resumed(earlier: Curve, later: Curve) -> Curve:
    """What the earlier process did beyond the point where the later one took over is not part of the run."""
    kept = earlier.steps < later.steps[0]
    return Curve(
        np.concatenate([earlier.steps[kept], later.steps]), np.concatenate([earlier.values[kept], later.values])
    )


def _losses(path: Path) -> dict[tuple[str, str], Curve]:
    """Columns `train/<head>/loss` and `validation/<head>/loss`, sums without a head: (head, split) -> curve."""
    text = _text(path)
    if not text.endswith("\n"):  # a row that a killed process did not finish
        text = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = {}
    for column in reader.fieldnames or ():
        match = re.fullmatch(r"(train|validation)/(?:(.+)/)?loss", column)
        if match:
            columns[column] = (match[2] or "", match[1])
    points: dict[str, list[tuple[int, float]]] = {column: [] for column in columns}
    for row in reader:
        for column in columns:
            if row[column]:
                try:
                    point = int(row["step"]), float(row[column])
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{path}, line {reader.line_num}: step {row.get('step')!r} with {column} {row[column]!r}; "
                        "expected numbers, the file is damaged"
                    ) from error
                if math.isfinite(point[1]):
                    points[column].append(point)
    curves = {}
    for column, key in columns.items():
        if any(value != 0 for _, value in points[column]):  # exactly 0 throughout: batches without what a head compares
            steps, values = zip(*sorted(points[column]), strict=True)
            curves[key] = Curve(np.array(steps), np.array(values))
    return curves
