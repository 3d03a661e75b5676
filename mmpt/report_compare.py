"""Several runs on one page: facts and metrics side by side, and how far the differences would move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mmpt.errors import ConfigError
from mmpt.evaluation.record import paired_difference, read_outcomes
from mmpt.report_data import MISSING, MetricRow, Run, number, read_run
from mmpt.report_page import Markup, document, element, join

NOTE = (
    "Differences are to the first run. The interval beside one is a 95 % bootstrap over the examples that both runs "
    "answered, paired by name; it is there where both runs kept the outcome of each example (`mmpt test`, `mmpt "
    "evaluate`). What another seed of training would give is not in it. ↓ marks metrics where less is better."
)


def comparison_page(folders: Sequence[Path]) -> str:
    """The page of several runs.

    Raises:
        ConfigError: fewer than two runs.
        DataError: not a run folder, or a damaged file in one.
    """
    if len(folders) < 2:
        raise ConfigError("a comparison needs at least two runs")
    runs = [read_run(folder) for folder in folders]
    titles = _titles(runs)
    sections = {"Metrics": _metrics(runs, titles), "Runs": _facts(runs, titles)}
    return document(" and ".join(titles), Markup(""), sections)


def _titles(runs: Sequence[Run]) -> list[str]:
    """A different name for each run: its title, or the folder where titles are equal."""
    titles = [run.title for run in runs]
    return titles if len(set(titles)) == len(titles) else [str(run.folder) for run in runs]


def _metrics(runs: Sequence[Run], titles: Sequence[str]) -> Markup:
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if not names:
        return element("p", "None of the runs has metrics.", class_="absent")
    outcomes = [read_outcomes(run.folder) for run in runs]
    head = ["metric", titles[0]]
    for title in titles[1:]:
        head += [title, "difference", "interval"]
    rows = []
    for name in names:
        lower = MetricRow(name, 0.0, {}).lower_is_better
        values = [run.metrics.get(name, math.nan) for run in runs]
        known = [value for value in values if not math.isnan(value)]
        best = min(known) if known and lower else max(known, default=math.nan)
        cells = [element("th", f"{name} ↓" if lower else name, scope="row"), _value(values[0], best)]
        for place in range(1, len(runs)):
            cells += [_value(values[place], best), *_difference(name, values[0], values[place], lower, outcomes, place)]
        rows.append(element("tr", *cells))
    titled = element("tr", *(element("th", title, scope="col") for title in head))
    table = element("table", element("thead", titled), element("tbody", *rows), class_="numbers")
    return join([element("p", NOTE, class_="note"), element("div", table, class_="scroll")])


def _value(value: float, best: float) -> Markup:
    if math.isnan(value):
        return element("td", MISSING)
    return element("td", element("strong", number(value)) if value == best else number(value))


def _difference(
    name: str, first: float, other: float, lower: bool, outcomes: Sequence[tuple], place: int
) -> tuple[Markup, Markup]:
    change = other - first
    if math.isnan(change):
        return element("td", MISSING), element("td", MISSING)
    better = change < 0 if lower else change > 0
    class_ = None if change == 0 else "better" if better else "worse"
    shown = element("td", f"{'+' if change > 0 else ''}{number(change)}", class_=class_)
    (names_a, a), (names_b, b) = outcomes[0], outcomes[place]
    paired = paired_difference((names_a, a[name]), (names_b, b[name])) if name in a and name in b else None
    if paired is None:
        return shown, element("td", MISSING)
    return shown, element("td", f"{number(paired[1])} to {number(paired[2])}")


def _facts(runs: Sequence[Run], titles: Sequence[str]) -> Markup:
    names = list(dict.fromkeys(name for run in runs for name in run.facts if name != "title"))
    head = element("tr", *(element("th", title, scope="col") for title in ("", *titles)))
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(element("td", str(run.facts.get(name, MISSING))) for run in runs),
        )
        for name in names
    ]
    return element("div", element("table", element("thead", head), element("tbody", *rows)), class_="scroll")
