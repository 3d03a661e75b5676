"""Figures of a report, as SVG that reads on a light and on a dark page.

Titles and legends are left to the page: HTML wraps them on a phone and shows every script, and matplotlib would read
`$` in a name as mathematics.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmpt.report_data import Curve, HeadCurves, Map

INK = "#7c838c"
"""Axes and numbers: a grey of about equal contrast to white and to the dark page."""

TRAIN, VALIDATION = "#3b82c4", "#e07b39"

COLOURS = (
    "#3b82c4", "#e07b39", "#3f9e5a", "#b65fc0", "#c9a227", "#2aa6a6",
    "#d4557a", "#7a6fd0", "#8c6d46", "#6f9a1f", "#5b7f95", "#cc4b3c",
)  # fmt: skip
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
SIGNS = ("●", "▲", "■", "◆", "▼", "✚", "✖", "★")
"""The markers as text, for the legend in the page."""

MANY_POINTS = 1000
"""A line of more points is drawn through the means of that many equal parts."""

RASTER_POINTS = 3000
"""A map of more points holds them as one picture instead of one shape each."""

NAMED_POINTS = 20


def loss_figure(curves: HeadCurves) -> str:
    """Training and validation loss of one head over the optimiser's steps, as SVG."""
    figure, axes = _figure(5.2, 3.0)
    train, validation = curves.splits.get("train"), curves.splits.get("validation")
    if train is not None:
        _line(axes, train)
    if validation is not None:
        axes.plot(validation.steps, validation.values, color=VALIDATION, linewidth=1.6, marker="o", markersize=4)
    axes.set_xlabel("step", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(True, color=INK, alpha=0.2, linewidth=0.6)
    return _svg(figure)


def _line(axes: Axes, curve: Curve) -> None:
    """Thin line of what was logged; over a long one, a thick line of its running mean."""
    parts = np.array_split(np.arange(len(curve.steps)), min(MANY_POINTS, len(curve.steps)))
    steps = np.array([curve.steps[part].mean() for part in parts])
    values = np.array([curve.values[part].mean() for part in parts])
    window = len(values) // 50
    if window < 2:
        marker = "." if len(values) < 10 else None
        axes.plot(steps, values, color=TRAIN, linewidth=1.6, marker=marker)
        return
    axes.plot(steps, values, color=TRAIN, linewidth=0.8, alpha=0.35)
    kernel = np.ones(2 * window + 1)
    # Near both ends the mean is over the points that exist.
    smooth = np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
    axes.plot(steps, smooth, color=TRAIN, linewidth=1.8)


def map_figure(embeddings: Map) -> tuple[str, list[list[tuple[str, str, str]]]]:
    """The map, and its legend.

    Up to twelve different labels are shown by colour, and the kind by the shape. With more labels the colour
    shows the kind, and some points, spread over the map, carry their names.

    Returns:
        SVG; and the lines of the legend, each of entries (colour, sign, text), colour "" where it is only about the
        shape.
    """
    names = list(Counter(embeddings.labels))
    kinds = list(Counter(embeddings.kinds))
    by_label = len(names) <= len(COLOURS)
    groups = names if by_label else kinds
    colour_of = {group: COLOURS[i % len(COLOURS)] for i, group in enumerate(groups)}
    marker_of = {kind: i % len(MARKERS) for i, kind in enumerate(kinds)}

    finite = np.isfinite(embeddings.points).all(1)
    width, height = np.ptp(embeddings.points[finite], axis=0) if finite.any() else (1.0, 1.0)
    figure, axes = _figure(7.2, float(np.clip(7.2 * height / max(width, 1e-12), 3.0, 6.0)))
    group_n = np.array(embeddings.labels if by_label else embeddings.kinds, dtype=object)
    kind_n = np.array(embeddings.kinds, dtype=object)
    count = len(embeddings.points)
    for group in groups:
        for kind in kinds:
            chosen = embeddings.points[(group_n == group) & (kind_n == kind) & finite]
            axes.scatter(
                chosen[:, 0],
                chosen[:, 1],
                s=float(np.clip(8000 / max(count, 1), 6, 40)),
                color=colour_of[group],
                marker=MARKERS[marker_of[kind]],
                alpha=0.75,
                linewidths=0,
                rasterized=count > RASTER_POINTS,
            )
    if not by_label:
        _name_some(axes, embeddings, finite)
    axes.set_axis_off()
    axes.margins(0.05)
    axes.set_aspect("equal", "datalim")

    signs = [SIGNS[marker_of[kind]] for kind in kinds]
    if not by_label:
        return _svg(figure), [[(colour_of[kind], sign, kind) for kind, sign in zip(kinds, signs, strict=True)]]
    return _svg(figure), [
        [(colour_of[name], "●" if len(kinds) > 1 else signs[0], name) for name in names],
        [("", sign, kind) for kind, sign in zip(kinds, signs, strict=True)] if len(kinds) > 1 else [],
    ]


def _name_some(axes: Axes, embeddings: Map, finite: np.ndarray) -> None:
    """Write names at points that are far from each other: each next one is the farthest from all before."""
    candidates = np.flatnonzero(finite)
    if len(candidates) == 0:
        return
    points = embeddings.points[candidates]
    middle = (points[:, 0].min() + points[:, 0].max()) / 2
    points = points * (1.0, 4.0)  # names are wide and low, so they may be closer one above the other
    distance = np.full(len(points), np.inf)
    chosen, named = 0, set()
    for _ in range(min(NAMED_POINTS, len(points))):
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen], axis=1))
        index = int(candidates[chosen])
        label = "".join(c for c in embeddings.labels[index] if c.isprintable())
        if label not in named:
            named.add(label)
            leftwards = embeddings.points[index, 0] > middle
            note = axes.annotate(
                label if len(label) <= 28 else f"{label[:27]}…",
                embeddings.points[index],
                xytext=(-3 if leftwards else 3, 3),
                textcoords="offset points",
                ha="right" if leftwards else "left",
                fontsize=8,
                color=INK,
                parse_math=False,
            )
            note.set_in_layout(False)  # else the map would shrink to make room for the names
        chosen = int(distance.argmax())


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=INK, labelsize=9, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    # Text stays text, so a name in any script is drawn with the reader's fonts; matplotlib's own need not have it.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmpt"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
