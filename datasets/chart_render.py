"""Drawing chart records with matplotlib or Vega-Lite, in many styles, once: pictures are cached with their record."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.progress import track

from mmpt.datasets.chart_records import ChartRecord, label_text, number_text, parse, serialize
from mmpt.errors import DataError, SampleError
from mmpt.files import cache_folder, write_cache

FORMAT = 3
"""Raised whenever pictures would come out differently."""

Renderer = Literal["matplotlib", "vega"]
RECORD = "mmpt-chart"
"""Name of the PNG text chunk that holds the record."""
SMALLEST = 7.5
"""Letters are planned no smaller, in pixels, where there is room: below, digits can't be told apart."""
FEW = 24
"""So many charts are drawn in this process; more are worth starting others."""


@dataclass(frozen=True)
class Style:
    """How a chart looks.

    Attributes:
        renderer: what draws it.
        colors: of the series or slices, in hex.
        gradient: matplotlib's name of the colour map of heatmaps.
        font: family.
        background: of the plot, in hex.
        grid: lines at the ticks.
        font_share: height of the letters as a share of the picture's height.
        ink: of axes and letters, in hex.
        frame: lines at the top and the right too.
        bold: names of the axes and the title.
        bar_share: width of a bar as a share of the room that it has.
        line: width of a line, in pixels of a picture 128 pixels high.
    """

    renderer: Renderer
    colors: tuple[str, ...]
    gradient: str
    font: str
    background: str
    grid: bool
    font_share: float
    ink: str
    frame: bool
    bold: bool
    bar_share: float
    line: float


_SEEN = (("tab10", "Set2", "Dark2", "Accent"), ("viridis", "Blues", "Greens"), ("DejaVu Sans", "DejaVu Sans Mono"))
_UNSEEN = (("Set1", "Paired"), ("magma", "Oranges"), ("DejaVu Serif",))

LIGHT_AT_THE_TOP = ("viridis", "magma")
"""Colour maps whose largest values are the light ones."""


def random_style(renderers: Sequence[Renderer], seed: int, unseen: bool = False) -> Style:
    """A style; those of the test have other colours, colour maps and fonts.

    Args:
        renderers: chosen from.
        seed: of the choice.
        unseen: whether it is for the test.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    generator = np.random.default_rng([seed, int(unseen)])

    def one(options: Sequence[Any]) -> Any:
        return options[int(generator.integers(len(options)))]

    palettes, gradients, fonts = _UNSEEN if unseen else _SEEN
    colors = [to_hex(color) for color in colormaps[one(palettes)].colors]  # type: ignore[attr-defined]
    turn = int(generator.integers(len(colors)))
    return Style(
        renderer=one(renderers),
        colors=tuple(colors[turn:] + colors[:turn]),
        gradient=one(gradients),
        font=one(fonts),
        background=one(("#ffffff", "#ffffff", "#f2f2f2", "#fdf6e3")),
        grid=bool(generator.random() < 0.5),
        font_share=float(generator.uniform(0.045, 0.065)),
        ink=one(("#000000", "#333333", "#555555", "#1b2a49")),
        frame=bool(generator.random() < 0.4),
        bold=bool(generator.random() < 0.4),
        bar_share=float(generator.uniform(0.5, 0.95)),
        line=float(generator.uniform(1.0, 2.2)),
    )


@dataclass(frozen=True)
class Job:
    """A chart to draw.

    Attributes:
        record: what it shows.
        style: how it looks.
        annotated: whether the values are printed on the marks; nothing else depends on it.
        size: width and height in pixels.
    """

    record: ChartRecord
    style: Style
    annotated: bool
    size: tuple[int, int]

    @property
    def letter(self) -> float:
        """Height of the letters in pixels."""
        return max(self.style.font_share * self.size[1], min(SMALLEST, self.size[1] / 12))

    def fitted(self, text: str, letters: int) -> float:
        """A height in pixels at which the text has room where `letters` have it at a twentieth of the picture."""
        return min(self.letter, 0.05 * self.size[1] * letters / max(1, len(text)))

    @property
    def path(self) -> Path:
        """Where its picture is kept."""
        facts = [FORMAT, serialize(self.record), asdict(self.style), self.annotated, self.size]
        key = hashlib.sha256(json.dumps(facts, ensure_ascii=True).encode()).hexdigest()[:40]
        return cache_folder() / "charts" / key[:2] / f"{key}.png"


def render_all(jobs: Sequence[Job], workers: int | None = None, title: str = "drawing charts") -> list[str | None]:
    """Draw what is not in the cache, several at once, with a progress bar.

    Args:
        jobs: the charts.
        workers: processes; None is one for each CPU, 1 draws in this one.
        title: of the progress bar.

    Returns:
        For each job None, or why it can't be drawn.
    """
    missing = [job for job in dict.fromkeys(jobs) if not job.path.is_file()]
    failed: dict[Job, str | None] = {}
    count = min(workers or os.cpu_count() or 1, max(1, len(missing) // FEW))
    if count == 1:
        shown = track(missing, description=title, transient=True, disable=len(missing) < FEW)
        failed = {job: _draw_to_cache(job) for job in shown}
    else:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
            done = pool.map(_draw_to_cache, missing, chunksize=8)
            failed = dict(zip(missing, track(done, title, total=len(missing), transient=True), strict=True))
    return [failed.get(job) for job in jobs]


def _draw_to_cache(job: Job) -> str | None:
    try:
        picture = render(job)
    except SampleError as error:
        return f"{error.problem}; expected {error.expected}"
    info = PngInfo()
    info.add_itxt(RECORD, serialize(job.record))
    write_cache(job.path, lambda file: picture.save(file, "PNG", pnginfo=info))
    return None


def read_chart(path: Path) -> tuple[Image.Image, ChartRecord | None]:
    """A picture and the record that was drawn in it; None for a picture from elsewhere.

    Raises:
        DataError: no readable picture.
    """
    try:
        with Image.open(path) as file:
            text = file.info.get(RECORD)
            return file.convert("RGB"), None if text is None else parse(str(text))
    except OSError as error:
        raise DataError(f"{path} can't be read as a picture: {error}") from error


def render(job: Job) -> Image.Image:
    """The picture: RGB of exactly the size asked for.

    Raises:
        SampleError: no font has the characters, or the renderer refuses.
        DataError: the renderer is not installed.
    """
    font = font_for(job.record, job.style.font)
    draw: Callable[[Job, str], Image.Image] = _matplotlib if job.style.renderer == "matplotlib" else _vega
    try:
        picture = draw(job, font)
    except (ValueError, RuntimeError, OverflowError) as error:
        raise SampleError(
            job.record.title or job.record.type, f"{job.style.renderer}: {error}"[:300], "a drawable chart"
        ) from error
    return picture if picture.size == job.size else picture.resize(job.size, Image.Resampling.LANCZOS)


def font_for(record: ChartRecord, wanted: str) -> str:
    """A font family with all characters of the record: the wanted one, or the first installed one that has them.

    Raises:
        SampleError: there is none.
    """
    names = [record.title, record.x, record.y, *(series.name for series in record.series)]
    labels = [label_text(point[0]) for series in record.series for point in series.points]
    needed = frozenset(ord(c) for c in "".join([*names, *labels]) if not c.isspace())
    if needed <= _characters(wanted):
        return wanted
    for family in _families():
        if needed <= _characters(family):
            return family
    lacking = "".join(chr(c) for c in sorted(needed - _characters(wanted)))[:20]
    raise SampleError(
        record.title or record.type, f"no installed font has all of {lacking!r}", "characters of one installed font"
    )


@cache
def _families() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    return tuple(sorted({entry.name for entry in fontManager.ttflist}))


@cache
def _characters(family: str) -> frozenset[int]:
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(findfont(family, fallback_to_default=False)).get_charmap())
    except (ValueError, RuntimeError, OSError):
        return frozenset()


def _limits(record: ChartRecord) -> tuple[float, float]:
    """Both ends of the axis of values, with room for printed values."""
    if record.type == "stacked_bar":
        labels = [point[0] for point in record.series[0].points]
        values = [sum(p[1] for s in record.series for p in s.points if p[0] == label) for label in labels]
    else:
        values = list(record.values)
    if record.type in ("bar", "grouped_bar", "stacked_bar", "area", "funnel"):
        values.append(0.0)
    low, high = min(values), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    legend = 3.5 * room if len(record.series) > 1 else 0.0  # it stands above the marks, inside the plot
    return (low if low == 0 else low - room), (high if high == 0 else high + room) + legend


def _note_share(record: ChartRecord) -> float:
    """How much smaller printed values must be to stand side by side."""
    letters = max(sum(len(number_text(point[-1])) + 1 for point in series.points) for series in record.series)
    letters *= len(record.series) if record.type == "grouped_bar" else 1
    return max(0.6, min(1.0, 28 / letters))


# matplotlib


def _matplotlib(job: Job, font: str) -> Image.Image:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    record, style = job.record, job.style
    width, height = job.size
    point = 0.72  # for a pixel, at 100 dots per inch
    settings: Any = {
        "font.family": font, "font.size": job.letter * point, "text.parse_math": False, "text.hinting": "no_hinting",
        "axes.unicode_minus": False, "text.color": style.ink, "axes.labelcolor": style.ink,
        "axes.edgecolor": style.ink, "xtick.color": style.ink, "ytick.color": style.ink,
        "axes.labelweight": "bold" if style.bold else "normal", "axes.titleweight": "bold" if style.bold else "normal",
        "axes.spines.top": style.frame, "axes.spines.right": style.frame, "axes.linewidth": 0.6,
        "lines.linewidth": style.line * height / 128 * point, "lines.markersize": 2 * style.line * height / 128 * point,
    }  # fmt: skip
    with rc_context(settings):
        size = (width / 100, height / 100)
        margins = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02)
        figure = Figure(figsize=size, dpi=200, facecolor="white", layout=margins)  # twice the pixels: smooth letters
        canvas = FigureCanvasAgg(figure)
        pie = record.type == "pie"
        axes = figure.add_subplot()
        axes.set_facecolor(style.background)
        axes.set_title(record.title, fontsize=1.1 * point * job.fitted(record.title, 16 if pie else 24), pad=2)
        axes.tick_params(width=0.6, length=2, pad=1.5)
        if not pie:
            axes.set_xlabel(record.x, labelpad=1, fontsize=point * job.fitted(record.x, 28))
            axes.set_ylabel(record.y, labelpad=1, fontsize=point * job.fitted(record.y, 20))
            if style.grid:
                axes.grid(True, axis="y", linewidth=0.4)
            axes.set_axisbelow(True)
        _MATPLOTLIB[record.type](axes, job)
        if record.type not in ("pie", "heatmap", "funnel") and len(record.series) > 1:
            small = 0.8 * point * job.letter
            axes.legend(fontsize=small, loc="upper left", borderpad=0.2, labelspacing=0.1, handlelength=0.8)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _label_axis(axes: Any, labels: Sequence[str]) -> None:
    crowded = sum(map(len, labels)) > 22
    axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")


def _note(axes: Any, job: Job, x: float, y: float, value: float, **options: Any) -> None:
    if job.annotated:
        from matplotlib import rcParams

        size = rcParams["font.size"] * _note_share(job.record)
        note = axes.text(x, y, number_text(value), ha="center", fontsize=size, **{"va": "bottom", **options})
        note.set_in_layout(False)  # it must not move anything else


def _labels(job: Job) -> list[str]:
    return [label_text(point[0]) for point in job.record.series[0].points]


def _mpl_bars(axes: Any, job: Job) -> None:
    count = len(job.record.series)
    stacked = job.record.type == "stacked_bar"
    width = job.style.bar_share / (1 if stacked else count)
    base = np.zeros(len(_labels(job)))
    for number, series in enumerate(job.record.series):
        values = np.array([point[1] for point in series.points])
        places = np.arange(len(values)) + (0 if stacked else (number - (count - 1) / 2) * width)
        color = job.style.colors[number % len(job.style.colors)]
        axes.bar(places, values, width, bottom=base if stacked else None, color=color, label=series.name)
        for x, y, value in zip(places, base + values, values, strict=True):
            _note(axes, job, x, y - value / 2 if stacked else y, value, va="center" if stacked else "bottom")
        base = base + values if stacked else base
    axes.set_ylim(*_limits(job.record))
    _label_axis(axes, _labels(job))


def _mpl_lines(axes: Any, job: Job) -> None:
    for number, series in enumerate(job.record.series):
        values = [point[1] for point in series.points]
        color = job.style.colors[number % len(job.style.colors)]
        if job.record.type == "area":
            axes.fill_between(range(len(values)), values, color=color, alpha=0.8)
        axes.plot(range(len(values)), values, color=color, marker="o", label=series.name)
        for x, value in enumerate(values):
            _note(axes, job, x, value, value)
    axes.set_xlim(-0.3, len(_labels(job)) - 0.7)
    axes.set_ylim(*_limits(job.record))
    _label_axis(axes, _labels(job))


def _mpl_scatter(axes: Any, job: Job) -> None:
    for number, series in enumerate(job.record.series):
        xs, ys = [p[0] for p in series.points], [p[1] for p in series.points]
        color = job.style.colors[number % len(job.style.colors)]
        axes.scatter(xs, ys, s=10, color=color, label=series.name)
        for x, y in zip(xs, ys, strict=True):
            _note(axes, job, x, y, y)
    axes.margins(0.12)
    axes.locator_params(nbins=5)
    axes.set_ylim(*_limits(job.record))


def _mpl_pie(axes: Any, job: Job) -> None:
    values = [point[1] for point in job.record.series[0].points]
    colors = [job.style.colors[n % len(job.style.colors)] for n in range(len(values))]
    wedges = axes.pie(values, colors=colors, startangle=90, counterclock=False, radius=1.0)[0]
    for wedge, value in zip(wedges, values, strict=True):
        angle = np.deg2rad((wedge.theta1 + wedge.theta2) / 2)
        _note(axes, job, 0.65 * np.cos(angle), 0.65 * np.sin(angle), value, va="center")
    axes.legend(wedges, _labels(job), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handlelength=0.8)


def _mpl_heatmap(axes: Any, job: Job) -> None:
    rows = np.array([[point[1] for point in series.points] for series in job.record.series])
    shown = axes.imshow(rows, cmap=job.style.gradient, aspect="auto")
    axes.figure.colorbar(shown, ax=axes, fraction=0.08, pad=0.03)
    middle = (rows.min() + rows.max()) / 2
    for (y, x), value in np.ndenumerate(rows):
        light = (value > middle) == (job.style.gradient in LIGHT_AT_THE_TOP)
        _note(axes, job, x, y, float(value), va="center", color="black" if light else "white")
    axes.grid(False)
    axes.set_yticks(range(len(rows)), [series.name for series in job.record.series])
    _label_axis(axes, _labels(job))


def _mpl_funnel(axes: Any, job: Job) -> None:
    values = [point[1] for point in job.record.series[0].points]
    for place, value in enumerate(values):
        axes.barh(place, value, left=-value / 2, height=0.85, color=job.style.colors[place % len(job.style.colors)])
        _note(axes, job, 0, place, value, va="center")
    axes.set_yticks(range(len(values)), _labels(job))
    axes.invert_yaxis()
    axes.set_xlabel(job.record.y)
    axes.set_ylabel(job.record.x)
    axes.locator_params(axis="x", nbins=5)


def _mpl_candlestick(axes: Any, job: Job) -> None:
    for place, (_, first, high, low, last) in enumerate(job.record.series[0].points):
        color = job.style.colors[0 if last >= first else 1]
        axes.vlines(place, low, high, color=color, linewidth=1)
        axes.bar(place, last - first, 0.6, bottom=first, color=color)
        _note(axes, job, place, high, last)
    axes.set_ylim(*_limits(job.record))
    _label_axis(axes, _labels(job))


_MATPLOTLIB: dict[str, Callable[[Any, Job], None]] = {
    "bar": _mpl_bars,
    "grouped_bar": _mpl_bars,
    "stacked_bar": _mpl_bars,
    "line": _mpl_lines,
    "area": _mpl_lines,
    "scatter": _mpl_scatter,
    "pie": _mpl_pie,
    "heatmap": _mpl_heatmap,
    "funnel": _mpl_funnel,
    "candlestick": _mpl_candlestick,
}


# Vega-Lite


@cache
def _converter() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise DataError('Vega-Lite charts need vl-convert-python; run: pip install "mmpt[chart]"') from error
    import matplotlib

    vl_convert.register_font_directory(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf"))
    return vl_convert


def _vega(job: Job, font: str) -> Image.Image:
    png = _converter().vegalite_to_png(json.dumps(vega_spec(job, font)), vl_version="5.20")
    with Image.open(io.BytesIO(png)) as picture:
        return picture.convert("RGB")


def vega_spec(job: Job, font: str) -> dict[str, Any]:
    """The Vega-Lite specification of a chart."""
    record, style = job.record, job.style
    names = ("open", "high", "low", "close") if record.type == "candlestick" else ("value",)
    rows = [
        {"label": point[0], "series": series.name, **dict(zip(names, point[1:], strict=True))}
        | {"note": number_text(point[-1]), "order": number, "place": place, "rising": point[-1] >= point[1]}
        for place, series in enumerate(record.series)
        for number, point in enumerate(series.points)
    ]
    size = job.letter
    weight = "bold" if style.bold else "normal"
    text = {"labelFont": font, "titleFont": font, "labelFontSize": size, "titleFontSize": size, "labelColor": style.ink}
    text |= {"titleColor": style.ink, "titleFontWeight": weight}
    axis = text | {"domainColor": style.ink, "tickColor": style.ink, "grid": style.grid, "labelPadding": 1}
    axis |= {"titlePadding": 2, "tickCount": 5, "tickSize": 2}
    title = {"text": record.title, "font": font, "fontSize": 1.1 * job.fitted(record.title, 24), "offset": 2}
    layers = _vega_layers(job)
    if not job.annotated:
        layers = [layer for layer in layers if _mark(layer) != "text"]
    return {
        "width": job.size[0],
        "height": job.size[1],
        "autosize": {"type": "fit", "contains": "padding"},
        "padding": 4,
        "background": "white",
        "title": title | {"color": style.ink, "fontWeight": weight},
        "data": {"values": rows},
        "layer": layers,
        "config": {
            "axis": axis,
            "axisX": {"titleFontSize": job.fitted(record.x, 28)},
            "axisY": {"titleFontSize": job.fitted(record.y, 20)},
            "legend": {**text, "symbolSize": 30, "offset": 4, "rowPadding": 1},
            "range": {"category": list(style.colors)},
            "text": {"font": font, "fontSize": size * _note_share(record), "color": style.ink},
            "line": {"strokeWidth": style.line * job.size[1] / 128},
            "view": {"fill": style.background, "stroke": style.ink if style.frame else None},
        },
    }


def _readable_on(record: ChartRecord, style: Style) -> dict[str, Any]:
    """Black letters on light cells of a heatmap, white ones on dark cells."""
    middle = (min(record.values) + max(record.values)) / 2
    side = ">" if style.gradient in LIGHT_AT_THE_TOP else "<="
    return {"condition": {"test": f"datum.value {side} {middle!r}", "value": "black"}, "value": "white"}


def _mark(layer: dict[str, Any]) -> str:
    return str(layer["mark"]["type"])


def _vega_layers(job: Job) -> list[dict[str, Any]]:
    """Marks, with the printed values last."""
    record, style = job.record, job.style
    crowded = sum(len(label) + 1 for label in _labels(job)) > 24
    low, high = _limits(record)
    x: dict[str, Any] = {"field": "label", "type": "nominal", "sort": None, "title": record.x}
    x["axis"] = {"labelAngle": -30 if crowded else 0}
    y: dict[str, Any] = {"field": "value", "type": "quantitative", "title": record.y}
    scale = {"domain": [low, high], "zero": False, "nice": False}
    color: dict[str, Any] = {"field": "series", "type": "nominal", "sort": None, "title": None}
    legend: dict[str, Any] = {"orient": "top-left", "offset": 1, "fillColor": "white", "padding": 1, "labelLimit": 110}
    color["legend"] = legend if len(record.series) > 1 else None
    note: dict[str, Any] = {"mark": {"type": "text", "dy": -5}}
    value_text = {"field": "note", "type": "nominal"}
    if record.type in ("bar", "line", "area", "grouped_bar", "stacked_bar"):
        y |= {"scale": scale, "stack": "zero" if record.type == "stacked_bar" else None}
        encoding: dict[str, Any] = {"x": x, "y": y, "color": color}
        marks = {"bar": "bar", "grouped_bar": "bar", "stacked_bar": "bar", "line": "line", "area": "area"}
        mark: dict[str, Any] = {"type": marks[record.type]}
        if mark["type"] == "bar":
            mark["width"] = {"band": style.bar_share}
        additions: dict[str, dict[str, Any]] = {"line": {"point": True}, "area": {"line": True, "opacity": 0.8}}
        mark |= additions.get(record.type, {})
        if record.type == "grouped_bar":
            encoding["xOffset"] = {"field": "series", "sort": None}
        noted = {key: channel for key, channel in encoding.items() if key != "color"}
        if record.type == "stacked_bar":
            encoding["order"] = {"field": "place"}
            noted |= {"y": {**y, "bandPosition": 0.5}, "detail": {"field": "series"}, "order": {"field": "place"}}
            note = {"mark": {"type": "text"}}
        return [{"mark": mark, "encoding": encoding}, note | {"encoding": noted | {"text": value_text}}]
    if record.type == "scatter":
        xs = [point[0] for series in record.series for point in series.points]
        x = {"field": "label", "type": "quantitative", "title": record.x, "scale": {"zero": False, "padding": 12}}
        x["axis"] = {"tickCount": 4 if max(xs) - min(xs) > 0 else 1}
        encoding = {"x": x, "y": y | {"scale": scale}, "color": color}
        return [
            {"mark": {"type": "point", "filled": True, "size": 30}, "encoding": encoding},
            note | {"encoding": {"x": x, "y": encoding["y"], "text": value_text}},
        ]
    if record.type == "pie":
        radius = 0.3 * min(job.size)
        slices = {"theta": {"field": "value", "type": "quantitative", "stack": True}, "order": {"field": "order"}}
        hue = {"field": "label", "type": "nominal", "sort": None, "title": None}
        return [
            {"mark": {"type": "arc", "outerRadius": radius}, "encoding": slices | {"color": hue}},
            {"mark": {"type": "text", "radius": 0.65 * radius}}
            | {"encoding": slices | {"text": value_text, "detail": {"field": "label"}}},
        ]
    if record.type == "heatmap":
        side = {"field": "series", "type": "nominal", "sort": None, "title": record.y}
        gradient = {"scheme": style.gradient.lower()}
        fill: dict[str, Any] = {"field": "value", "type": "quantitative", "title": None, "scale": gradient}
        fill["legend"] = {"gradientLength": 0.5 * job.size[1], "gradientThickness": 8}
        return [
            {"mark": {"type": "rect"}, "encoding": {"x": x, "y": side, "color": fill}},
            {"mark": {"type": "text"}}
            | {"encoding": {"x": x, "y": side, "text": value_text, "color": _readable_on(record, style)}},
        ]
    if record.type == "funnel":
        side = {"field": "label", "type": "nominal", "sort": None, "title": record.x}
        wide = {"field": "value", "type": "quantitative", "title": record.y, "stack": "center"}
        hue = {"field": "label", "type": "nominal", "sort": None, "legend": None}
        return [
            {"mark": {"type": "bar"}, "encoding": {"y": side, "x": wide, "color": hue}},
            {"mark": {"type": "text"}, "encoding": {"y": side, "x": wide | {"bandPosition": 0.5}, "text": value_text}},
        ]
    rising = {"condition": {"test": "datum.rising", "value": style.colors[0]}, "value": style.colors[1]}

    def at(field: str) -> dict[str, Any]:
        return {**y, "field": field, "scale": scale}

    return [
        {"mark": {"type": "rule"}, "encoding": {"x": x, "y": at("low"), "y2": {"field": "high"}, "color": rising}},
        {"mark": {"type": "bar", "width": {"band": 0.6}}}
        | {"encoding": {"x": x, "y": at("open"), "y2": {"field": "close"}, "color": rising}},
        note | {"encoding": {"x": x, "y": at("high"), "text": value_text}},
    ]
