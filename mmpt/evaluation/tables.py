"""Tables read from something else (a chart, a text, a recording): how near they come to the true ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from scipy.optimize import linear_sum_assignment

from mmpt.errors import ConfigError, DataError


class Cell(NamedTuple):
    """A value of a table with what names it.

    Attributes:
        row: name of its row.
        column: name of its column.
        value: a finite number, or a text.
    """

    row: str
    column: str
    value: float | str


@dataclass(frozen=True)
class TableScore:
    """How well a table was read.

    Attributes:
        precision: sum of the cell scores / number of predicted cells.
        recall: sum of the cell scores / number of true cells.
        f1: their harmonic mean.
    """

    precision: float
    recall: float
    f1: float


def rnss(
    targets: Sequence[float], predictions: Sequence[float], mode: Literal["strict", "released"] = "strict"
) -> float:
    """Relative number set similarity (DePlot, Liu et al. 2022, arXiv 2212.10505, section 3.2): 1 is best, 0 worst.

    1 - cost / max(N, M) with the cheapest one-to-one matching of the two sets, in which a pair costs
    min(1, |t - p| / |t|).

    Args:
        targets: the true numbers (N).
        predictions: the numbers that were read (M).
        mode: "strict" lets an unmatched number cost 1 and a pair with the target 0 cost 0 if the prediction is 0 too.
            "released" is the published scorer, where unmatched numbers cost nothing and the pair (0, 0) costs 1, any
            other prediction for 0 nothing. Name the mode wherever the number is reported.

    Raises:
        DataError: a number that is not finite.
        ConfigError: another mode.
    """
    if mode not in ("strict", "released"):
        raise ConfigError(f"mode is {mode!r}; expected 'strict' or 'released'")
    true, read = _finite(targets, "targets"), _finite(predictions, "predictions")
    most = max(len(true), len(read))
    if most == 0:
        return 1.0
    if min(len(true), len(read)) == 0:
        return 0.0
    cost = _relative_distance(true[:, None], read[None, :])
    if mode == "released":
        cost = np.where(true[:, None] == 0, (read[None, :] == 0).astype(float), cost)
    rows, columns = linear_sum_assignment(cost)
    unmatched = abs(len(true) - len(read)) if mode == "strict" else 0
    return float(1.0 - (cost[rows, columns].sum() + unmatched) / most)


def table_f1(
    target: Sequence[Cell],
    prediction: Sequence[Cell],
    text_threshold: float = 0.5,
    number_threshold: float = 0.1,
    transpose: bool = True,
) -> TableScore:
    """Relative mapping similarity (DePlot, arXiv 2212.10505, section 3.3) of two tables.

    Cells are matched one to one by their keys ("row column"). A pair scores key similarity x value similarity: the
    similarity of texts is 1 - edit distance / longer length, and 0 from a normalised distance of `text_threshold` on
    (ANLS); that of numbers 1 - |t - p| / |t|, and 0 from a relative distance of `number_threshold` on. Differs from
    the released scorer where the true value is 0: there 0 scores 1 and anything else 0.

    Args:
        target: the true cells.
        prediction: the cells that were read.
        text_threshold: see above.
        number_threshold: see above.
        transpose: the better of the prediction and its transpose counts.

    Raises:
        DataError: a value that is not finite.
    """
    _finite([c.value for c in [*target, *prediction] if not isinstance(c.value, str)], "values")
    if not target and not prediction:
        return TableScore(1.0, 1.0, 1.0)
    if not target or not prediction:
        return TableScore(0.0, 0.0, 0.0)
    readings = [list(prediction)]
    if transpose:
        readings.append([Cell(column, row, value) for row, column, value in prediction])
    scores = [_scored(target, reading, text_threshold, number_threshold) for reading in readings]
    return max(scores, key=lambda score: score.f1)


def value_errors(target: Sequence[Cell], prediction: Sequence[Cell], span: float) -> list[float]:
    """Errors of the numbers that were read, in shares of an axis; true numbers that were not read are left out.

    Cells are matched by their keys as in `table_f1`; a pair whose keys differ by half or more is no match.

    Args:
        target: the true cells.
        prediction: the cells that were read.
        span: length of the axis in units of the values; above 0.

    Returns:
        |prediction - target| / span of each matched pair of numbers.

    Raises:
        DataError: a span that is not a positive number.
    """
    if not span > 0 or not np.isfinite(span):
        raise DataError(f"span is {span}; expected the positive length of an axis")
    if not target or not prediction:
        return []
    rows, columns, near = _matched(target, prediction, 0.5)
    errors = []
    for i, j, similarity in zip(rows, columns, near, strict=True):
        true, read = target[i].value, prediction[j].value
        if similarity > 0 and not isinstance(true, str) and not isinstance(read, str):
            errors.append(abs(read - true) / span)
    return errors


def _scored(target: Sequence[Cell], prediction: Sequence[Cell], text: float, number: float) -> TableScore:
    rows, columns, near = _matched(target, prediction, text)
    pairs = zip(rows, columns, near, strict=True)
    total = sum(key * _value_similarity(target[i].value, prediction[j].value, text, number) for i, j, key in pairs)
    precision, recall = total / len(prediction), total / len(target)
    f1 = 2 * precision * recall / (precision + recall) if total > 0 else 0.0
    return TableScore(float(precision), float(recall), float(f1))


def _matched(
    target: Sequence[Cell], prediction: Sequence[Cell], threshold: float
) -> tuple[list[int], list[int], list[float]]:
    """The matching of highest total key similarity: places in both tables and the similarity of each pair."""
    keys = [[f"{cell.row} {cell.column}" for cell in table] for table in (target, prediction)]
    distance = cdist(*keys, scorer=Levenshtein.normalized_distance, dtype=np.float64)
    similarity = np.where(distance < threshold, 1.0 - distance, 0.0)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return rows.tolist(), columns.tolist(), similarity[rows, columns].tolist()


def _value_similarity(target: float | str, prediction: float | str, text: float, number: float) -> float:
    if not isinstance(target, str) and not isinstance(prediction, str):
        distance = float(_relative_distance(np.array(target, float), np.array(prediction, float)))
        return 1.0 - distance if distance < number else 0.0
    distance = Levenshtein.normalized_distance(str(target), str(prediction))
    return 1.0 - distance if distance < text else 0.0


def _relative_distance(target: NDArray[np.float64], prediction: NDArray[np.float64]) -> NDArray[np.float64]:
    """min(1, |t - p| / |t|); where t is 0, whether p is something else."""
    scale = np.where(target == 0, 1.0, np.abs(target))
    relative = np.minimum(1.0, np.abs(target / scale - prediction / scale))
    return np.where(target == 0, (prediction != 0).astype(float), relative)


def _finite(numbers: Sequence[float], what: str) -> NDArray[np.float64]:
    array = np.asarray(numbers, dtype=np.float64).reshape(-1)
    if not np.isfinite(array).all():
        raise DataError(f"{what} hold {array[~np.isfinite(array)][0]}; expected finite numbers")
    return array
