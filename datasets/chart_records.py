"""What a chart says: its record, as JSON or in a short form, and as the cells of a table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mmpt.errors import DataError
from mmpt.evaluation.tables import Cell

ChartType = Literal[
    "bar", "grouped_bar", "stacked_bar", "line", "area", "scatter", "pie", "heatmap", "funnel", "candlestick"
]
CHART_TYPES: tuple[ChartType, ...] = get_args(ChartType)

Serializer = Literal["json", "compact", "brief"]

VALUE_NAMES = {"candlestick": ("open", "high", "low", "close")}
"""Names of a point's values, for the types where a point has several."""


def quantized(value: float) -> float:
    """The number as it is drawn and written: whole numbers below 1e15 as they are, others with four digits."""
    if float(value).is_integer() and abs(value) < 1e15:
        return float(value) + 0.0  # no negative zero
    return float(f"{value:.4g}")


def number_text(value: float) -> str:
    """A quantised number as text: whole numbers without a point, others with up to four digits."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.4g}"


@dataclass(frozen=True)
class Series:
    """One series of a chart.

    Attributes:
        name: in the legend.
        points: (label, value, ...) with as many values as the type has (`VALUE_NAMES`); labels of a scatter plot are
            numbers.
    """

    name: str
    points: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class ChartRecord:
    """All that a chart shows. Numbers are quantised on the way in, so picture, text and answers agree.

    Attributes:
        type: kind of chart.
        title: above it; may be empty.
        x: name of the labels' axis.
        y: name of the values' axis.
        series: one or more.

    Raises:
        DataError: an unknown type, no points, a value that is not finite, or points that don't fit the type.
    """

    type: ChartType
    title: str
    x: str
    y: str
    series: tuple[Series, ...]

    def __post_init__(self) -> None:
        if self.type not in CHART_TYPES:
            raise DataError(f"chart type {self.type!r} is unknown; expected one of {', '.join(CHART_TYPES)}")
        if not self.series or any(not series.points for series in self.series):
            raise DataError(f"{self.type} {self.title!r} has a series without points, or no series")
        series = tuple(Series(str(s.name), tuple(self._point(point) for point in s.points)) for s in self.series)
        object.__setattr__(self, "series", series)

    def _point(self, point: Sequence[Any]) -> tuple[Any, ...]:
        label, *values = point
        names = VALUE_NAMES.get(self.type, ("value",))
        numbers = [*values, label] if self.type == "scatter" else values
        if len(values) != len(names) or not all(_is_number(number) for number in numbers):
            raise DataError(
                f"{self.type} {self.title!r} has the point {list(point)!r}; expected a label and finite "
                f"{', '.join(names)}"
            )
        return (quantized(label) if self.type == "scatter" else str(label), *map(quantized, values))

    @property
    def values(self) -> list[float]:
        """All values, in the order of the text."""
        return [value for series in self.series for point in series.points for value in point[1:]]

    @property
    def axis(self) -> tuple[float, float]:
        """The least and the largest value, 0 among them where marks begin there."""
        values = self.values if self.type in ("line", "scatter", "heatmap", "candlestick") else [*self.values, 0.0]
        return min(values), max(values)

    @property
    def span(self) -> float:
        """Length of the axis of the values."""
        low, high = self.axis
        return (high - low) or abs(self.values[0]) or 1.0

    def cells(self) -> list[Cell]:
        """The record as a table: rows are labels, columns are series (and, where there are several, value names)."""
        names = VALUE_NAMES.get(self.type, ("",))
        return [
            Cell(label_text(point[0]), f"{series.name} {name}".strip(), value)
            for series in self.series
            for point in series.points
            for name, value in zip(names, point[1:], strict=True)
        ]


def label_text(label: Any) -> str:
    """A label as it is written."""
    return label if isinstance(label, str) else number_text(label)


def serialize(record: ChartRecord, form: Serializer = "json") -> str:
    """The record as text; `parse(serialize(r)) == r`.

    Args:
        record: what to write.
        form: "json": `{"type":"bar","title":"Rainfall","x":"month","y":"mm","series":[{"name":"rain","data":[["Jan",
            40]]}]}` with this order of keys and no blanks; "compact": `bar|Rainfall|month|mm|rain|Jan=40` with a
            backslash before |, = and backslashes of names; "brief": `bar|40|20|10`, without any name: read again, these
            are the values of the places 1, 2, 3. Labels of scatter plots are numbers and stay; between several series
            stands a blank part.
    """
    if form == "brief":
        series = ("|".join(map(_brief_point, s.points)) for s in record.series)
        return f"{record.type}|{'||'.join(series)}"
    if form == "compact":
        parts = [record.type, *map(_escaped, (record.title, record.x, record.y))]
        for one in record.series:
            parts.append(_escaped(one.name))
            for label, *values in one.points:
                parts.append(f"{_escaped(label_text(label))}={','.join(map(number_text, values))}")
        return "|".join(parts)
    text = ",".join(f'"{key}":{_json(getattr(record, key))}' for key in ("type", "title", "x", "y"))
    written = ",".join(
        f'{{"name":{_json(s.name)},"data":[{",".join(_json_point(point) for point in s.points)}]}}'
        for s in record.series
    )
    return f'{{{text},"series":[{written}]}}'


def parse(text: str, form: Serializer = "json") -> ChartRecord:
    """Read what `serialize` has written, or a model has.

    Raises:
        DataError: the text is no record; says where it stops being one.
    """
    if form == "brief":
        return _parse_brief(text)
    if form == "compact":
        return _parse_compact(text)
    try:
        fields = json.loads(text)
        series = tuple(Series(str(s["name"]), tuple(tuple(point) for point in s["data"])) for s in fields["series"])
        names = {key: str(fields[key]) for key in ("title", "x", "y")}
        return ChartRecord(fields["type"], **names, series=series)
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{text[:80]!r} is not the JSON of a chart: {type(error).__name__} {error}") from error


def _brief_point(point: Sequence[Any]) -> str:
    numbers = point if not isinstance(point[0], str) else point[1:]
    return ",".join(map(number_text, numbers))


def _parse_brief(text: str) -> ChartRecord:
    kind, _, rest = text.partition("|")
    series = []
    for number, part in enumerate(rest.split("||")):
        try:
            rows = [[float(value) for value in point.split(",")] for point in part.split("|")]
        except ValueError as error:
            raise DataError(f"{text[:80]!r} is no chart: {error}") from error
        if kind != "scatter":
            rows = [[str(place), *row] for place, row in enumerate(rows, start=1)]  # type: ignore[list-item]
        name = f"series {number + 1}" if "||" in rest else ""
        series.append(Series(name, tuple(map(tuple, rows))))
    return ChartRecord(kind, "", "place", "value", tuple(series))  # type: ignore[arg-type]


def _parse_compact(text: str) -> ChartRecord:
    parts = _split(text, "|")
    if len(parts) < 6:
        raise DataError(f"{text[:80]!r} is no chart: {len(parts)} parts, expected type, title, x, y, series, points")
    kind, title, x, y = parts[0], *map(_plain, parts[1:4])
    series: list[tuple[str, list[tuple[Any, ...]]]] = []
    for part in parts[4:]:
        pieces = _split(part, "=")
        if len(pieces) == 1:
            series.append((_plain(part), []))
        elif len(pieces) == 2 and series:
            try:
                label: Any = float(_plain(pieces[0])) if kind == "scatter" else _plain(pieces[0])
                series[-1][1].append((label, *(float(value) for value in pieces[1].split(","))))
            except ValueError as error:
                raise DataError(f"{part[:80]!r} is no point of a chart: {error}") from error
        else:
            raise DataError(f"{part[:80]!r} is no point of a chart; expected a series' name first, then label=value")
    return ChartRecord(kind, title, x, y, tuple(Series(name, tuple(points)) for name, points in series))  # type: ignore[arg-type]


def _split(text: str, mark: str) -> list[str]:
    """Split at a mark without a backslash before it."""
    return ["".join(piece) for piece in _pieces(re.findall(r"\\.|[^\\]|\\$", text, re.DOTALL), mark)]


def _pieces(atoms: Sequence[str], mark: str) -> list[list[str]]:
    pieces: list[list[str]] = [[]]
    for atom in atoms:
        if atom == mark:
            pieces.append([])
        else:
            pieces[-1].append(atom)
    return pieces


def _escaped(name: str) -> str:
    return re.sub(r"([\\|=])", r"\\\1", name)


def _plain(name: str) -> str:
    return re.sub(r"\\(.)", r"\1", name, flags=re.DOTALL)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _json_point(point: Sequence[Any]) -> str:
    return f"[{','.join(_json(item) if isinstance(item, str) else number_text(item) for item in point)}]"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
