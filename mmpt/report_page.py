"""The look of a run: one HTML page without scripts, that opens from a file and needs no network.

Every text that comes from the run passes through `element`, which escapes whatever is not markup already.
"""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from mmpt.report_data import MISSING, HeadCurves, MetricRow, Run, columns_of, metric_groups, number
from mmpt.report_plots import TRAIN, VALIDATION, loss_figure, map_figure
from mmpt.report_style import STYLE

THUMBNAIL = 256
"""Longest side of a picture in the page, in pixels."""

SKIPPED_SHOWN = 50

CONFUSION_SHOWN = 40
"""Classes up to which the whole confusion matrix is shown, and number of errors that are shown beyond."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser refuses whatever is not in the page."""


class Markup(str):
    """Text that is HTML already."""


def element(name: str, *children: str, **attributes: str | None) -> Markup:
    """An HTML element.

    Args:
        name: of the element.
        children: markup as it is, other text escaped.
        attributes: a trailing underscore is dropped, other underscores become hyphens; None leaves one out.
    """
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opening = "".join(f' {key}="{html.escape(value)}"' for key, value in given.items())
    content = join(children)
    return Markup(f"<{name}{opening}>" if name in ("img", "meta") else f"<{name}{opening}>{content}</{name}>")


def join(children: Iterable[str]) -> Markup:
    """Markup one behind the other."""
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def page(run: Run) -> str:
    """The whole page of a run."""
    sections = {
        "Run": _facts(run),
        "Metrics": _metrics(run),
        **({"Classes": _classes(run.details)} if run.details else {}),
        "Losses": _losses(run),
        "Examples": _examples(run),
        "Map": _map(run),
        "Skipped inputs": _skipped(run),
        "Model": _model(run),
        "Configuration": _configuration(run),
    }
    return document(run.title, _lead(run), sections)


def document(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """A page of sections, which a line of links leads to.

    Args:
        title: of the page.
        lead: markup below it.
        sections: title -> content.
    """
    links = join(element("a", name, href=f"#{_anchor(name)}") for name in sections)
    body = join(
        element("section", element("h2", name), content, id=_anchor(name)) for name, content in sections.items()
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    header = element("header", element("h1", title), lead, element("nav", links))
    return f"<!DOCTYPE html>\n{element('html', head, element('body', element('main', header, body)), lang='en')}\n"


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _absent(text: str) -> Markup:
    return element("p", text, class_="absent")


def _lead(run: Run) -> Markup:
    """One sentence on how the metrics compare."""
    compared = [row for rows in metric_groups(run.metrics).values() for row in rows if not math.isnan(row.gain)]
    if not compared:
        return Markup("")
    above = sum(row.gain > 0 for row in compared)
    return element("p", f"{above} of {len(compared)} metrics are better than their best baseline.", class_="lead")


def _facts(run: Run) -> Markup:
    facts = {name: value for name, value in run.facts.items() if name != "title"}
    if not facts:
        return _absent("run.json does not say what was trained on what.")
    if "seconds" in facts:
        facts["duration"] = str(timedelta(seconds=round(facts.pop("seconds"))))
    rows = [element("div", element("dt", name), element("dd", _fact(name, value))) for name, value in facts.items()]
    return element("dl", *rows, class_="facts")


def _fact(name: str, value: Any) -> str:
    """A value of run.json as text for people; nested ones in one line."""
    if isinstance(value, dict):
        return join(element("span", f"{key} ", element("b", _fact(key, item))) for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value) if isinstance(value, int) and value >= 10_000 and "seed" not in name else str(value)
    return str(value)


def _metrics(run: Run) -> Markup:
    if not run.metrics:
        return _absent("metrics.json is not there: nothing was evaluated yet.")
    tables = [_metric_table(group, rows) for group, rows in metric_groups(run.metrics).items()]
    note = "In bold the best of a row. The difference is to the best baseline; ↓ marks metrics where less is better."
    return join([element("p", note, class_="note"), *tables])


def _metric_table(group: str, rows: list[MetricRow]) -> Markup:
    suffixes = columns_of(rows)
    compared = ["difference"] if suffixes else []
    titles = ["metric", "this run", *(suffix.replace("_", " ") for suffix in suffixes), *compared]
    head = element("tr", *(element("th", title, scope="col") for title in titles))
    body = []
    for row in rows:
        name = row.name.removeprefix(f"{group}/") if group else row.name
        cells = [element("th", _breakable(name), " ↓" if row.lower_is_better else "", scope="row")]
        cells.append(_value(row.value, row.best if row.baselines else math.nan, "own"))
        for suffix in suffixes:
            cells.append(_value(row.baselines[suffix], row.best) if suffix in row.baselines else element("td", MISSING))
        if suffixes:
            cells.append(_difference(row))
        body.append(element("tr", *cells))
    caption = element("caption", group) if group else Markup("")
    return _scrolling(element("table", caption, element("thead", head), element("tbody", *body), class_="numbers"))


def _classes(details: dict[str, Any]) -> Markup:
    """Intervals, the table of classes, the confusion matrix and the calibration, whichever an evaluation kept."""
    parts: list[Markup] = []
    if details.get("intervals"):
        rows = [
            element(
                "tr", element("th", _breakable(name), scope="row"), element("td", f"{number(low)} to {number(high)}")
            )
            for name, (low, high) in details["intervals"].items()
        ]
        parts.append(_grid("95 % bootstrap intervals over examples", ["metric", "interval"], rows))
    if details.get("classes"):
        names = ("precision", "recall", "f1", "support")
        rows = [
            element(
                "tr", element("th", str(row["label"]), scope="row"), *(element("td", number(row[n])) for n in names)
            )
            for row in details["classes"]
        ]
        parts.append(_grid("Classes", ["class", *names], rows))
        if details.get("confusion"):
            parts.append(_confusion([str(row["label"]) for row in details["classes"]], details["confusion"]))
    if details.get("calibration"):
        found = details["calibration"]
        bins = zip(found["confidence"], found["accuracy"], found["count"], strict=True)
        rows = [element("tr", *(element("td", number(value)) for value in bin_)) for bin_ in bins]
        title = f"Calibration: expected error {number(found['ece'])}"
        parts.append(_grid(title, ["confidence", "accuracy", "examples"], rows))
    return join(parts)


def _confusion(labels: list[str], confusion: list[list[int]]) -> Markup:
    """The matrix, or of many classes the most frequent errors."""
    if len(labels) <= CONFUSION_SHOWN:
        rows = [
            element("tr", element("th", label, scope="row"), *(element("td", str(count)) for count in counts))
            for label, counts in zip(labels, confusion, strict=True)
        ]
        return _grid("Confusion: true class by row, answer by column", ["", *labels], rows)
    errors = [
        (count, labels[true], labels[answer])
        for true, counts in enumerate(confusion)
        for answer, count in enumerate(counts)
        if count and answer != true
    ]
    worst = sorted(errors, key=lambda error: -error[0])[:CONFUSION_SHOWN]
    rows = [
        element("tr", element("th", true, scope="row"), element("td", answer), element("td", str(count)))
        for count, true, answer in worst
    ]
    return _grid("Confusion: the most frequent errors", ["true class", "answer", "examples"], rows)


def _grid(title: str, head: Iterable[str], rows: Iterable[Markup]) -> Markup:
    titled = element("tr", *(element("th", name, scope="col") for name in head))
    table = element(
        "table", element("caption", title), element("thead", titled), element("tbody", *rows), class_="numbers"
    )
    return _scrolling(table)


def _breakable(name: str) -> Markup:
    """A name that a narrow screen may break behind its separators, and not within `R@1`."""
    return Markup(re.sub("([/_])", r"\1<wbr>", html.escape(name)))


def _value(value: float, best: float, class_: str | None = None) -> Markup:
    text = number(value)
    return element("td", element("strong", text) if value == best else text, class_=class_)


def _difference(row: MetricRow) -> Markup:
    if math.isnan(row.gain):
        return element("td", MISSING)
    sign, class_ = ("▲", "better") if row.gain > 0 else ("▼", "worse") if row.gain < 0 else ("", None)
    text = f"{'+' if row.difference > 0 else ''}{number(row.difference)}"
    return element("td", f"{text} ", element("span", sign), class_=class_)


def _losses(run: Run) -> Markup:
    if not run.curves:
        return _absent("No losses were logged.")
    return element("div", *(_loss(curves) for curves in run.curves), class_="figures")


def _loss(curves: HeadCurves) -> Markup:
    title = curves.head or "weighted sum of the heads"
    colours = {"train": TRAIN, "validation": VALIDATION}
    described = []
    for split, curve in curves.splits.items():
        text = f"{split} {number(float(curve.values[0]))} → {number(float(curve.values[-1]))}"
        if split == "validation" and curve.values.argmin() < len(curve.values) - 1:
            best = int(curve.values.argmin())
            text += f", best {number(float(curve.values[best]))} at step {curve.steps[best]}"
        described.append(_key(colours[split], "●", text))
    name = element("b", f"{curves.stage}: {title}" if curves.stage else title)
    caption = element("figcaption", name, element("div", *described, class_="legend"))
    return element("figure", caption, _picture(loss_figure(curves), f"loss of {title} over steps"))


def _key(colour: str, sign: str, text: str) -> Markup:
    return element("span", element("i", sign, style=f"color:{colour}" if colour else None), f" {text}")


def _picture(svg: str, description: str) -> Markup:
    data = base64.b64encode(svg.encode()).decode()
    return element("img", src=f"data:image/svg+xml;base64,{data}", alt=description)


def _examples(run: Run) -> Markup:
    if run.examples is None or not run.examples["rows"]:
        return _absent("No retrieval examples were kept.")
    rows = [_example(run.folder, row) for row in run.examples["rows"]]
    return join([element("p", str(run.examples.get("title") or ""), class_="note"), *rows])


def _example(folder: Path, row: dict[str, Any]) -> Markup:
    """A query and what was found for it, best first."""
    query = element("div", *_shown(folder, row["query"]), class_="query")
    found = [_result(folder, result) for result in row["results"]]
    judged = [result["correct"] for result in row["results"] if "correct" in result]
    note = Markup("")
    if judged and not any(judged):
        note = element("p", f"no right answer among these {len(found)}", class_="missed")
    return element("div", query, element("div", element("ol", *found), note), class_="example")


def _result(folder: Path, result: dict[str, Any]) -> Markup:
    correct = result.get("correct") is True
    score = result.get("score")
    parts = [*_shown(folder, result)]
    if isinstance(score, int | float):
        parts.append(element("small", "✓ " if correct else "", number(float(score))))
    elif correct:
        parts.append(element("small", "✓"))
    return element("li", *parts, class_="correct" if correct else None)


def _shown(folder: Path, item: dict[str, Any]) -> list[Markup]:
    """The picture and the text of a query or a result, whichever it has."""
    parts = []
    if item.get("image"):
        parts.append(_thumbnail(folder, str(item["image"]), str(item.get("text") or "")))
    if item.get("text"):
        parts.append(element("span", str(item["text"])))
    return parts


def _thumbnail(folder: Path, name: str, description: str) -> Markup:
    path = folder / name
    # A run folder may come from somebody else; it must not pull other files of this machine into the page.
    if not path.resolve().is_relative_to(folder.resolve()):
        return _absent(f"{name} is outside the run folder")
    try:
        with Image.open(path) as image:
            picture = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return _absent(f"{name} can't be read")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    # Below the size in which it is shown, a picture's pixels stay sharp.
    small = "small" if max(picture.size) < 96 else None
    return element("img", src=f"data:image/png;base64,{data}", alt=description, class_=small)


def _map(run: Run) -> Markup:
    if run.map is None or not len(run.map.points):
        return _absent("No map of embeddings was made.")
    svg, legend = map_figure(run.map)
    caption = element(
        "figcaption", *(element("div", *(_key(*entry) for entry in line), class_="legend") for line in legend)
    )
    return element("figure", _picture(svg, f"{len(run.map.points)} embeddings in the plane"), caption)


def _skipped(run: Run) -> Markup:
    if not run.skipped:
        return _absent("No input was skipped.")
    causes = Counter(str(record.get("problem", "?")) for record in run.skipped).most_common(5)
    counts = ", ".join(f"{count} x {cause}" for cause, count in causes)
    summary = element("p", f"{len(run.skipped)} skipped: {counts}.", class_="note")
    columns = list(dict.fromkeys(column for record in run.skipped for column in record))
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    rows = [
        element("tr", *(element("td", str(record.get(column, ""))) for column in columns))
        for record in run.skipped[:SKIPPED_SHOWN]
    ]
    title = "which ones" if len(run.skipped) == len(rows) else f"the first {len(rows)}; skipped.jsonl lists all"
    table = _scrolling(element("table", element("thead", head), element("tbody", *rows)))
    return join([summary, element("details", element("summary", title), table)])


def _model(run: Run) -> Markup:
    if not run.model_files:
        return _absent("No model was saved in model/.")
    sizes = {**run.model_files, "together": sum(run.model_files.values())}
    rows = [
        element("tr", element("th", _breakable(name), scope="row"), element("td", _size(size)))
        for name, size in sizes.items()
    ]
    return _scrolling(element("table", element("tbody", *rows), class_="numbers"))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _configuration(run: Run) -> Markup:
    if run.configuration is None:
        return _absent("config.yaml was not saved.")
    return element("details", element("summary", "config.yaml"), element("pre", run.configuration))


def _scrolling(table: Markup) -> Markup:
    return element("div", table, class_="scroll")
