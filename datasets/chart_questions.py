"""Questions about charts, with answers that are computed from the record: literal, inferential and reasoning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from mmpt.datasets.chart_records import VALUE_NAMES, ChartRecord, Series, label_text, number_text, quantized

QuestionKind = Literal["literal", "inferential", "reasoning"]

MARKS = {
    "bar": "bars",
    "grouped_bar": "bars",
    "stacked_bar": "segments",
    "line": "points",
    "area": "points",
    "scatter": "points",
    "pie": "slices",
    "heatmap": "cells",
    "funnel": "stages",
    "candlestick": "candles",
}
"""What a chart's points are called."""


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: "literal" reads one thing, "inferential" compares, "reasoning" calculates.
        text: the question.
        answer: a number as `number_text` writes it, a label, "yes" or "no".
        template: name of the template, for baselines that answer by it.
    """

    kind: QuestionKind
    text: str
    answer: str
    template: str


def questions(record: ChartRecord) -> list[Question]:
    """All questions about a record whose answer is unique.

    Ties, labels that occur twice and differences that are smaller than the rounding of the numbers give no question.
    """
    marks = MARKS[record.type]
    count = sum(len(series.points) for series in record.series)
    found = [Question("literal", f"How many {marks} are shown?", str(count), "count")]
    kind = record.type.replace("_", " ")
    found.append(Question("literal", "What kind of chart is this?", kind, "type"))
    if len(record.series) > 1:
        found.append(Question("literal", "How many series are shown?", str(len(record.series)), "series"))
    for series in record.series:
        suffix = f" for {series.name}" if len(record.series) > 1 else ""
        for position, name in enumerate(VALUE_NAMES.get(record.type, (record.y,)), 1):
            found += _about(record, series, name, suffix, position)
    return found


def _about(record: ChartRecord, series: Series, name: str, suffix: str, position: int) -> list[Question]:
    """Questions about one value of the points of a series."""
    labels = [label_text(point[0]) for point in series.points]
    values = [point[position] for point in series.points]
    unique = [label for label in labels if labels.count(label) == 1]
    own = {label: value for label, value in zip(labels, values, strict=True) if label in unique}
    x = record.x or "label"
    found: list[Question] = []
    for label, value in own.items():
        text = f"What is the {name} of {label}{suffix}?"
        found.append(Question("literal", text, number_text(value), "value"))
    for word, best in (("highest", max(values)), ("lowest", min(values))):
        at = [label for label, value in zip(labels, values, strict=True) if value == best]
        if len(values) > 1 and len(at) == 1:
            found.append(Question("inferential", f"Which {x} has the {word} {name}{suffix}?", at[0], word))
    for first, second in combinations(own, 2):
        if _apart(own[first], own[second]):
            text = f"Is the {name} of {first} greater than that of {second}{suffix}?"
            found.append(Question("inferential", text, "yes" if own[first] > own[second] else "no", "greater"))
            difference = quantized(abs(own[first] - own[second]))
            text = f"What is the difference in {name} between {first} and {second}{suffix}?"
            found.append(Question("reasoning", text, number_text(difference), "difference"))
    if len(values) > 1:
        mean = sum(values) / len(values)
        found.append(
            Question("reasoning", f"What is the average {name}{suffix}?", number_text(quantized(mean)), "average")
        )
        total = number_text(quantized(sum(values)))
        found.append(Question("reasoning", f"What is the sum of {name}{suffix}?", total, "sum"))
        if all(_apart(value, mean) for value in values):
            above = str(sum(value > mean for value in values))
            text = f"How many {plural(x)} are above the average {name}{suffix}?"
            found.append(Question("reasoning", text, above, "above"))
    return found


def plural(word: str) -> str:
    """The plural of an axis' name, well enough for a question."""
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


def _apart(first: float, second: float) -> bool:
    """Whether two values differ by more than four digits can say."""
    return abs(first - second) > 1e-3 * max(abs(first), abs(second))
