"""What the chart recipe measures, and what guessing without learning gives."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from mmpt.datasets.chart import LIST, Chart, Charts
from mmpt.datasets.chart_answers import answer, extract, values_of
from mmpt.datasets.chart_questions import Question, questions
from mmpt.datasets.chart_records import ChartRecord, parse
from mmpt.errors import DataError
from mmpt.evaluation.answers import relaxed_match
from mmpt.evaluation.tables import rnss, table_f1, value_errors
from mmpt.model import MultimodalModel

KINDS = ("literal", "inferential", "reasoning")


def reading(
    model: MultimodalModel, charts: Sequence[Chart], source: Charts, blind: bool
) -> tuple[list[ChartRecord | None], dict[str, float]]:
    """The records that a model writes, and how near they come: apart for charts with and without printed values."""
    pictures = [None if blind else chart.picture for chart in charts]
    records: list[ChartRecord | None] = []
    for text in extract(model, pictures):
        try:
            records.append(parse(text, source.serializer))
        except DataError:
            records.append(None)
    metrics = {"reading/parsed": sum(record is not None for record in records) / len(records)}
    groups = {
        "": charts,
        "/printed": [c for c in charts if c.annotated],
        "/unprinted": [c for c in charts if not c.annotated],
    }
    found = {id(chart): record for chart, record in zip(charts, records, strict=True)}
    for group, members in groups.items():
        if members:
            scored = scores([(source.written(c.record), found[id(c)]) for c in members if c.record is not None])
            metrics |= {f"reading{group}/{name}": value for name, value in scored.items()}
    return records, metrics


def listing(model: MultimodalModel, charts: Sequence[Chart], blind: bool = False) -> dict[str, float]:
    """How near the values come that a model lists, without their names; None of them where it writes something else."""
    shown = [None if blind else chart.picture for chart in charts]
    listed = [values_of(text) for text in extract(model, shown, max_new_tokens=64, prompt=LIST)]
    within, errors, similar = [], [], []
    for chart, values in zip(charts, listed, strict=True):
        record = chart.record
        assert record is not None
        within.append(statistics.fmean(values_within(record.values, values or [])))
        errors += [abs(v - w) / record.span for v, w in zip(record.values, values or [], strict=False)]
        similar.append(rnss(record.values, values or []))
    return {
        "listing/parsed": sum(values is not None for values in listed) / len(listed),
        "listing/value_accuracy": statistics.fmean(within),
        "listing/rnss": statistics.fmean(similar),
        "listing/median_value_error": statistics.median(errors) if errors else float("nan"),
    }


def values_within(true: Sequence[float], read: Sequence[float]) -> list[bool]:
    """Which of the values, in their order, were read within 5 %; missing ones were not."""
    return [i < len(read) and relaxed_match(repr(value), repr(read[i])) for i, value in enumerate(true)]


def scores(pairs: list[tuple[ChartRecord, ChartRecord | None]]) -> dict[str, float]:
    """Means over charts; what could not be parsed counts as nothing read.

    `value_accuracy` compares the values in their order, within 5 %; missing ones are wrong. `rnss` is the strict mode.
    """
    within, errors = [], []
    for true, read in pairs:
        within.append(statistics.fmean(values_within(true.values, [] if read is None else read.values)))
        errors += [] if read is None else value_errors(true.cells(), read.cells(), true.span)
    return {
        "value_accuracy": statistics.fmean(within),
        "rnss": statistics.fmean(rnss(true.values, [] if read is None else read.values) for true, read in pairs),
        "table_f1": statistics.fmean(
            table_f1(true.cells(), [] if read is None else read.cells()).f1 for true, read in pairs
        ),
        "type_accuracy": statistics.fmean(float(read is not None and read.type == true.type) for true, read in pairs),
        "median_value_error": statistics.median(errors) if errors else float("nan"),
    }


def asked_of(charts: Sequence[Chart], source: Charts, seed: int = 0) -> list[tuple[Chart, Question]]:
    """A question of each kind about every chart that has one, drawn."""
    generator = torch.Generator().manual_seed(seed)
    asked = []
    for chart in charts:
        assert chart.record is not None
        for kind in KINDS:
            options = [question for question in questions(source.written(chart.record)) if question.kind == kind]
            if options:
                asked.append((chart, options[int(torch.randint(len(options), (), generator=generator))]))
    return asked


def answering(
    model: MultimodalModel, charts: Sequence[Chart], source: Charts, blind: bool = False, first: bool = True
) -> dict[str, float]:
    """Relaxed accuracy of each kind of question.

    Asked directly; with `_data_prompting` behind the data that the model read first; with `_true_data` behind the true
    ones, the most that data prompting could give.

    Args:
        model: trained on questions.
        charts: of the test.
        source: writes the true data.
        blind: show no pictures.
        first: ask behind data too, for a model that was trained to.
    """
    asked = asked_of(charts, source)
    pictures = [None if blind else chart.picture for chart, _ in asked]
    texts = [question.text for _, question in asked]
    true = [source.data_text(chart.record) for chart, _ in asked if chart.record is not None]
    ways = {"": {}, "_data_prompting": {"data_prompting": True}, "_true_data": {"data": true}} if first else {"": {}}
    metrics: dict[str, float] = {}
    for suffix, way in ways.items():
        given = [written.answer for written in answer(model, pictures, texts, **way)]  # type: ignore[arg-type]
        metrics |= by_kind(asked, given, suffix)
    return metrics


def by_kind(asked: Sequence[tuple[Chart, Question]], given: Sequence[str], suffix: str) -> dict[str, float]:
    """Mean relaxed accuracy of each kind of question, and of all."""
    right = [relaxed_match(question.answer, text) for (_, question), text in zip(asked, given, strict=True)]
    metrics = {f"answering/all{suffix}": statistics.fmean(right)} if right else {}
    for kind in KINDS:
        own = [correct for (_, question), correct in zip(asked, right, strict=True) if question.kind == kind]
        if own:
            metrics[f"answering/{kind}{suffix}"] = statistics.fmean(own)
    return metrics


def majority_answers(train: Iterable[ChartRecord], charts: Sequence[Chart], source: Charts) -> dict[str, float]:
    """Answering each question with the most frequent answer of its template in training."""
    counts: dict[str, Counter[str]] = {}
    for record in train:
        for question in questions(source.written(record)):
            counts.setdefault(question.template, Counter())[question.answer] += 1
    asked = asked_of(charts, source)
    given = [counts[q.template].most_common(1)[0][0] if q.template in counts else "" for _, q in asked]
    return by_kind(asked, given, "_majority")


def middle_of_axis(charts: Sequence[Chart]) -> dict[str, float]:
    """Guessing the middle of the axis for every value, for charts whose axis and labels were given away."""
    within, errors, sets = [], [], []
    for chart in charts:
        record = chart.record
        assert record is not None
        middle = sum(record.axis) / 2
        within += [statistics.fmean(relaxed_match(repr(v), repr(middle)) for v in record.values)]
        errors += [abs(v - middle) / record.span for v in record.values]
        sets.append(rnss(record.values, [middle] * len(record.values)))
    return {
        "reading/value_accuracy_middle": statistics.fmean(within),
        "reading/median_value_error_middle": statistics.median(errors),
        "reading/rnss_middle": statistics.fmean(sets),
    }
