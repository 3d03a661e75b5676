"""Short answers: right or wrong, with the tolerances that question answering over figures uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from mmpt.errors import ConfigError, DataError


def exact_match(target: str, prediction: str, ignore_case: bool = True) -> bool:
    """Whether two answers are the same text, blanks around them left aside.

    Args:
        target: the right answer.
        prediction: what was answered.
        ignore_case: whether "Jan" and "jan" are the same.
    """
    target, prediction = target.strip(), prediction.strip()
    return target.lower() == prediction.lower() if ignore_case else target == prediction


def relaxed_match(
    target: str,
    prediction: str,
    tolerance: float = 0.05,
    percent: Literal["strict", "lenient"] = "strict",
    zero: Literal["number", "text"] = "number",
) -> bool:
    """The rule of ChartQA (Masry et al. 2022, arXiv 2203.10244): numbers may be off by 5 %, texts may not.

    `x%` stands for x / 100. The limit is included.

    Args:
        target: the right answer.
        prediction: what was answered.
        tolerance: largest |prediction - target| / |target|.
        percent: "lenient" also takes x for x / 100 where one of the two answers has a percent sign and the other has
            none: 5 for 5%.
        zero: where the target is 0 no relative error exists. "number": the prediction must be the number 0 too;
            "text": the texts must be equal, as in the released scorer, for which "0.0" is a wrong answer to "0".

    Raises:
        ConfigError: a tolerance below 0, or an option that does not exist.
    """
    if not tolerance >= 0 or percent not in ("strict", "lenient") or zero not in ("number", "text"):
        raise ConfigError(
            f"tolerance={tolerance}, percent={percent!r}, zero={zero!r}; expected 0 or more, 'strict' or 'lenient', "
            "'number' or 'text'"
        )
    target, prediction = target.strip(), prediction.strip()
    right, given = parse_number(target), parse_number(prediction)
    if right is None or given is None:
        return exact_match(target, prediction)
    if right == 0:
        return given == 0 if zero == "number" else exact_match(target, prediction)
    readings = [given]
    if percent == "lenient" and target.endswith("%") != prediction.endswith("%"):
        readings.append(given / 100 if target.endswith("%") else given * 100)
    return any(abs(reading - right) / abs(right) <= tolerance for reading in readings)


def parse_number(text: str) -> float | None:
    """The number that a text is, `x%` as x / 100; None for other texts, NaN and infinity included."""
    text = text.strip()
    try:
        number = float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text else None


def share_right(
    targets: Sequence[str], predictions: Sequence[str], match: Callable[[str, str], bool] = relaxed_match
) -> float:
    """Share of right answers.

    Args:
        targets: the right answers.
        predictions: what was answered, in the same order.
        match: (target, prediction) -> whether it is right; `exact_match` or `relaxed_match`.

    Raises:
        DataError: no answers, or another number of them than of targets.
    """
    if len(targets) != len(predictions) or not targets:
        raise DataError(f"{len(predictions)} answers for {len(targets)} targets; expected one for each, and at least 1")
    return sum(match(t, p) for t, p in zip(targets, predictions, strict=True)) / len(targets)
