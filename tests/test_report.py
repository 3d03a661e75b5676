"""The run folder and the page that is made from it."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mmpt import report
from mmpt.errors import DataError
from mmpt.evaluation.record import ClassRow, Evaluation
from mmpt.report import (
    append_skipped,
    build_report,
    print_metrics,
    write_embeddings,
    write_examples,
    write_metrics,
    write_run_facts,
)
from mmpt.report_data import Curve, HeadCurves, Map, read_run
from mmpt.report_page import element
from mmpt.report_plots import loss_figure, map_figure


def log(run: Path, text: str, where: str = "logs") -> None:
    (run / where).mkdir(parents=True, exist_ok=True)
    (run / where / "metrics.csv").write_text(text)


class Outline(HTMLParser):
    """Elements of a page: (tag, attributes), and the text below each section's id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.section = ""
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "wbr"):
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"] or ""

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts[self.section] = self.texts.get(self.section, "") + data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outline(run: Path) -> Outline:
    return Outline(build_report(run).read_text("utf-8"))


def picture(colour: str, size: tuple[int, int] = (20, 10)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_metrics(folder, {"retrieval/R@1": 0.41, "retrieval/R@1_chance": 0.001, "retrieval/R@1_hog": 0.52})
    write_run_facts(folder, {"title": "Emoji", "model": "tiny", "steps": 1200, "parameters": 1234567, "seed": 12345})
    log(folder, "step,train/contrastive/loss,validation/contrastive/loss\n0,5.5,\n9,2.0,\n9,,3.25\n19,1.25,\n")
    results = [{"text": "cat", "score": 0.9, "correct": True}, {"text": "dog", "score": 0.8, "correct": False}]
    write_examples(folder, "Names for pictures", [{"query": {"image": picture("red")}, "results": results}])
    write_embeddings(folder, torch.eye(3, 2), ["cat", "dog", "cat"], ["image", "image", "text"])
    append_skipped(folder, [{"sample": "x.png", "problem": "truncated", "expected": "a picture", "split": "train"}])
    (folder / "config.yaml").write_text("seed_everything: 7\n")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").write_bytes(b"0" * 2500)
    return folder


class TestFiles:
    def test_metrics_come_back(self, tmp_path):
        write_metrics(tmp_path, {"a": torch.tensor(0.5), "n": 3, "bad": math.nan, "np": np.float32(0.25)})
        assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 0.5, "n": 3, "bad": None, "np": 0.25}
        metrics = read_run(tmp_path).metrics
        assert math.isnan(metrics.pop("bad"))
        assert metrics == {"a": 0.5, "n": 3, "np": 0.25}

    def test_facts_are_added_to_those_that_stand_there(self, tmp_path):
        write_run_facts(tmp_path, {"steps": 1, "seed": 0})
        write_run_facts(tmp_path, {"steps": 2, "data": {"path": tmp_path}})
        facts = json.loads((tmp_path / "run.json").read_text())
        assert facts == {"steps": 2, "seed": 0, "data": {"path": str(tmp_path)}}

    def test_pictures_are_kept_once(self, tmp_path):
        red, clear = picture("red"), Image.new("LA", (4, 4), (0, 0))
        results = [{"image": red, "text": "r", "score": torch.tensor(0.5), "correct": np.bool_(True)}, {"image": clear}]
        write_examples(tmp_path, "title", [{"query": {"image": red, "text": "q"}, "results": results}])
        assert json.loads((tmp_path / "examples.json").read_text()) == {
            "title": "title",
            "rows": [
                {
                    "query": {"image": "examples/001.png", "text": "q"},
                    "results": [
                        {"image": "examples/001.png", "text": "r", "score": 0.5, "correct": True},
                        {"image": "examples/002.png"},
                    ],
                }
            ],
        }
        with Image.open(tmp_path / "examples/001.png") as image:
            assert image.getpixel((0, 0)) == (255, 0, 0)
        with Image.open(tmp_path / "examples/002.png") as image:
            assert image.getpixel((0, 0))[3] == 0

    @pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "I;16", "F"])
    def test_pictures_of_any_mode_are_kept(self, tmp_path, mode):
        write_examples(tmp_path, "", [{"query": {"image": Image.new(mode, (5, 5))}, "results": []}])
        with Image.open(tmp_path / "examples/001.png") as image:
            assert image.size == (5, 5)

    def test_embeddings_have_to_match(self, tmp_path):
        with pytest.raises(DataError, match="with 2 labels and 3 kinds"):
            write_embeddings(tmp_path, np.zeros((3, 2)), ["a", "b"], ["x"] * 3)
        with pytest.raises(DataError, match=r"\(3, 3\)"):
            write_embeddings(tmp_path, np.zeros((3, 3)), ["a"] * 3, ["x"] * 3)
        assert not (tmp_path / "embeddings.npz").exists()

    def test_skipped_inputs_are_appended(self, tmp_path):
        write_metrics(tmp_path, {})
        append_skipped(tmp_path, [{"sample": "1"}, {"sample": "ü\n2"}])
        append_skipped(tmp_path, [])
        append_skipped(tmp_path, [{"sample": "3"}])
        assert [record["sample"] for record in read_run(tmp_path).skipped] == ["1", "ü\n2", "3"]

    def test_an_unfinished_record_is_left_out_and_written_over(self, tmp_path):
        write_metrics(tmp_path, {})
        (tmp_path / "skipped.jsonl").write_text('{"sample": "1"}\n{"sam')
        assert read_run(tmp_path).skipped == [{"sample": "1"}]
        append_skipped(tmp_path, [{"sample": "2"}])
        assert read_run(tmp_path).skipped == [{"sample": "1"}, {"sample": "2"}]
        (tmp_path / "skipped.jsonl").write_text('{"sam')
        append_skipped(tmp_path, [{"sample": "3"}])
        assert read_run(tmp_path).skipped == [{"sample": "3"}]

    def test_a_failed_write_leaves_the_old_file(self, tmp_path, monkeypatch):
        write_metrics(tmp_path, {"a": 1})

        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr(report.os, "replace", full)
        with pytest.raises(OSError, match="no space"):
            write_metrics(tmp_path, {"a": 2})
        assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


class TestDamage:
    @pytest.mark.parametrize("make", [False, True])
    def test_a_folder_of_something_else_is_refused(self, tmp_path, make):
        folder = tmp_path / "other"
        if make:
            folder.mkdir()
        with pytest.raises(DataError, match=r"other.*expected the folder of a run"):
            build_report(folder)
        assert not (folder / "report.html").exists()

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("metrics.json", b'{\n"a": 1,\n"b" 2}', r"metrics\.json, line 3: not JSON"),
            ("metrics.json", b'{"a": "0.5"}', r"'a' is '0.5'; expected a number"),
            ("metrics.json", b"[1]", r"metrics\.json holds a list"),
            ("run.json", b"{", r"run\.json, line 1: not JSON"),
            ("run.json", b'{\n"a": "\xff"}', r"run\.json, line 2: not UTF-8"),
            ("examples.json", b'{"rows": [{"query": {}}]}', r"examples\.json: expected"),
            ("skipped.jsonl", b'{"sample": 1}\n\nnonsense\n', r"skipped\.jsonl, line 3: not JSON"),
            ("skipped.jsonl", b"[1]\n", r"skipped\.jsonl: expected one object per line"),
            ("embeddings.npz", b"PK nothing", r"embeddings\.npz"),
        ],
    )
    def test_a_damaged_file_is_named(self, run, name, content, message):
        (run / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            build_report(run)

    def test_arrays_that_would_run_code_are_refused(self, run):
        objects = np.array([{"a": 1}, None, None], dtype=object)
        np.savez(run / "embeddings.npz", points=np.zeros((3, 2)), labels=objects, kinds=np.array(["a"] * 3))
        with pytest.raises(DataError, match=r"embeddings\.npz.*pickle"):
            build_report(run)

    def test_facts_are_not_written_over_damage(self, tmp_path):
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(DataError, match=r"run\.json"):
            write_run_facts(tmp_path, {"steps": 1})

    def test_a_missing_damaged_or_foreign_picture_is_named_in_its_place(self, run):
        outside = run.parent / "secret.png"
        picture("blue").save(outside)
        (run / "examples" / "torn.png").write_bytes((run / "examples/001.png").read_bytes()[:40])
        names = ["gone.png", "examples/torn.png", "../secret.png", str(outside)]
        results = [{"image": name} for name in names]
        (run / "examples.json").write_text(json.dumps({"rows": [{"query": {"text": "q"}, "results": results}]}))
        text = outline(run).texts["examples"]
        assert "gone.png can't be read" in text
        assert "examples/torn.png can't be read" in text
        assert "../secret.png is outside the run folder" in text
        assert f"{outside} is outside the run folder" in text


class TestPage:
    def test_it_needs_nothing_but_itself(self, run):
        page = outline(run)
        assert not {"script", "link", "iframe", "object", "video"} & {tag for tag, _ in page.elements}
        assert len(page.all("img")) == 3  # a loss, an example, the map
        for attributes in page.all("img"):
            assert (attributes["src"] or "").startswith("data:image/")
        for _, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")]
            assert (attributes.get("href") or "#").startswith("#")
        text = (run / "report.html").read_text()
        assert "url(" not in text
        assert "@import" not in text
        policy = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]

    def test_every_part_is_there(self, run):
        page = outline(run)
        ids = ["run", "metrics", "losses", "examples", "map", "skipped-inputs", "model", "configuration"]
        assert [attributes["id"] for attributes in page.all("section")] == ids
        assert [attributes["href"] for attributes in page.all("a")] == [f"#{name}" for name in ids]
        narrow = "\N{NARROW NO-BREAK SPACE}"
        for section, parts in {
            "run": ["model", "tiny", "1200", f"1{narrow}234{narrow}567", "12345"],
            "metrics": ["R@1", "0.410", "0.001", "0.520", "\N{MINUS SIGN}0.110"],
            "losses": ["contrastive", "train 5.500 → 1.250", "validation 3.250 → 3.250"],
            "examples": ["Names for pictures", "cat", "✓ 0.900", "dog", "0.800"],
            "map": ["cat", "dog", "image", "text"],
            "skipped-inputs": ["1 skipped: 1 x truncated", "x.png", "a picture", "train"],
            "model": ["model.safetensors", "2.5 kB"],
            "configuration": ["seed_everything: 7"],
        }.items():
            words = re.sub(" +", " ", page.texts[section])
            for part in parts:
                assert part in words, (section, part)

    def test_it_is_the_same_twice(self, run):
        assert build_report(run).read_bytes() == build_report(run).read_bytes()

    def test_the_best_of_a_row_is_bold(self, run):
        assert re.findall(r"<strong>(.*?)</strong>", build_report(run).read_text()) == ["0.520"]
        write_metrics(run, {"median_rank": 3, "median_rank_hog": 14, "x": 0.5, "x_a": 0.5, "alone": 0.1})
        assert re.findall(r"<strong>(.*?)</strong>", build_report(run).read_text()) == ["3", "0.500", "0.500"]

    def test_a_difference_has_the_colour_of_its_direction(self, run):
        write_metrics(run, {"a/loss": 1.0, "a/loss_unigram": 2.0, "b/acc": 0.4, "b/acc_hog": 0.5})
        cells = re.findall(r'<td class="(better|worse)">(\S+) ', build_report(run).read_text())
        assert cells == [("better", "\N{MINUS SIGN}1.000"), ("worse", "\N{MINUS SIGN}0.100")]

    def test_only_right_answers_are_green(self, run):
        classes = [attributes.get("class") for attributes in outline(run).all("li")]
        assert classes == ["correct", None]

    def test_a_list_without_the_right_answer_says_so(self, run):
        row = {"query": {"text": "q"}, "results": [{"text": "a", "correct": False}, {"text": "b", "correct": False}]}
        write_examples(run, "", [row])
        assert "no right answer among these 2" in outline(run).texts["examples"]
        write_examples(run, "", [{"query": {"text": "q"}, "results": [{"text": "a"}]}])
        assert "no right answer" not in outline(run).texts["examples"]

    def test_pictures_are_shown_small_and_right(self, run):
        wide = picture("blue", (2000, 1000))
        write_examples(run, "", [{"query": {"image": wide, "text": "blue"}, "results": []}])
        shown = next(a for a in outline(run).all("img") if a["alt"] == "blue")
        data = base64.b64decode((shown["src"] or "").partition("base64,")[2])
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (256, 128)
            assert image.convert("RGB").getpixel((5, 5)) == (0, 0, 255)

    @pytest.mark.parametrize(
        "attack", ["<script>alert(1)</script>", "\"><img src=x onerror='a()'>", "&lt;b&gt;", "$x_{$"]
    )
    def test_everything_is_escaped(self, run, attack):
        part = attack.replace("/", "")  # in a metric's name a slash divides
        write_metrics(run, {f"{part}/{part}": 1.0, f"{part}/{part}_{part}": 0.5})
        write_run_facts(run, {"title": attack, attack: {attack: [attack]}})
        log(run, 'step,"train/' + attack.replace('"', '""') + '/loss"\n0,1\n')
        item = {"text": attack, "score": 0.1}
        write_examples(run, attack, [{"query": {**item, "image": picture("red")}, "results": [item]}])
        write_embeddings(run, np.eye(20, 2), [f"{attack}{i}" for i in range(20)], [attack] * 20)
        append_skipped(run, [{"sample": attack, "problem": attack, "expected": attack}])
        (run / "config.yaml").write_text(f"a: {attack}\n")
        page = outline(run)
        assert not page.open
        assert not page.all("script")
        for attributes in page.all("img"):
            assert (attributes["src"] or "").startswith("data:")
        for section in ("run", "metrics", "losses", "examples", "map", "skipped-inputs", "configuration"):
            expected = part if section == "metrics" else attack
            assert expected in re.sub("_ ", "_", page.texts[section]), section
        figures = [a["src"] or "" for a in page.all("img") if "svg" in (a["src"] or "")]
        for figure in figures:
            tree = ElementTree.fromstring(base64.b64decode(figure.partition("base64,")[2]))
            assert not list(tree.iter("{http://www.w3.org/2000/svg}script"))

    def test_missing_parts_are_named_in_one_line(self, tmp_path):
        write_metrics(tmp_path, {})
        page = outline(tmp_path)
        expected = {
            "run": "does not say what was trained",
            "metrics": "nothing was evaluated",
            "losses": "No losses were logged",
            "examples": "No retrieval examples",
            "map": "No map",
            "skipped-inputs": "No input was skipped",
            "model": "No model was saved",
            "configuration": "config.yaml was not saved",
        }
        for section, text in expected.items():
            assert text in page.texts[section]
        assert tmp_path.name in page.texts[""]

    def test_logs_alone_are_enough(self, tmp_path):
        log(tmp_path, "step,train/loss\n0,2\n")
        assert "nothing was evaluated" in outline(tmp_path).texts["metrics"]

    def test_only_the_first_fifty_skipped_inputs_are_listed(self, run):
        append_skipped(run, [{"sample": f"number-{i}", "problem": "empty"} for i in range(59)])
        text = outline(run).texts["skipped-inputs"]
        assert "60 skipped: 59 x empty, 1 x truncated." in text
        assert "number-48" in text
        assert "number-49" not in text

    def test_markup_is_only_what_was_made_as_markup(self):
        assert element("b", "<", element("i", "&"), class_='"') == '<b class="&quot;">&lt;<i>&amp;</i></b>'


class TestLossFigure:
    @pytest.mark.parametrize("points", [1, 5, 500, 20_000])
    def test_a_long_log_stays_a_small_figure(self, points):
        curve = Curve(np.arange(points), np.linspace(5, 1, points))
        svg = loss_figure(HeadCurves("", "a", {"train": curve, "validation": curve}))
        ElementTree.fromstring(svg)
        assert len(loss_figure(HeadCurves("", "a", {"train": curve}))) < 100_000


class TestMap:
    def test_few_labels_are_colours_and_kinds_are_signs(self):
        _, legend = map_figure(Map(np.eye(4, 2), ["a", "b", "a", "b"], ["image", "image", "text", "text"]))
        names, kinds = legend
        assert [text for _, _, text in names] == ["a", "b"]
        assert len({colour for colour, _, _ in names}) == 2
        assert [(colour, text) for colour, _, text in kinds] == [("", "image"), ("", "text")]
        assert kinds[0][1] != kinds[1][1]

    def test_many_labels_leave_the_colour_to_the_kinds(self):
        labels = [f"name {i}" for i in range(40)]
        svg, legend = map_figure(Map(np.random.default_rng(0).normal(size=(40, 2)), labels, ["x"] * 20 + ["y"] * 20))
        assert [text for _, _, text in legend[0]] == ["x", "y"]
        assert len({colour for colour, _, _ in legend[0]}) == 2
        assert len(set(re.findall(r"name \d+</text>", svg))) == 20

    def test_points_stand_where_they_are(self):
        points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        svg, _ = map_figure(Map(points, ["origin", "right", "up"], ["k"] * 3))
        places = [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)]
        origin, right, up = places
        assert right[0] - origin[0] == pytest.approx(origin[1] - up[1], rel=0.02)  # SVG counts y downwards
        assert right[0] > origin[0]
        assert right[1] == pytest.approx(origin[1])

    @pytest.mark.parametrize("name", ["$\\frac{", "日本語", "\x00\x1b[0m", "a\nb", "_hidden", "😀" * 50])
    def test_any_name_makes_a_sound_figure(self, name):
        labels = [f"{name}{i}" for i in range(15)]
        svg, _ = map_figure(Map(np.random.default_rng(0).normal(size=(15, 2)), labels, ["k"] * 15))
        ElementTree.fromstring(svg)

    @pytest.mark.parametrize("points", [[[0.0, 0.0]], [[1.0, 2.0]] * 20, [[np.nan, 0.0], [1.0, 1.0]], [[np.nan] * 2]])
    def test_degenerate_maps_are_drawn(self, points):
        labels = [str(i) for i in range(len(points))]
        svg, _ = map_figure(Map(np.array(points), labels, ["k"] * len(points)))
        ElementTree.fromstring(svg)

    def test_a_large_map_stays_small(self):
        points = np.random.default_rng(0).normal(size=(20_000, 2))
        svg, _ = map_figure(Map(points, ["a", "b"] * 10_000, ["k"] * 20_000))
        assert len(svg) < 1_000_000


def printed(metrics: dict[str, float]) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    print_metrics(metrics, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


class TestPrintedMetrics:
    def test_baselines_stand_beside(self):
        lines = printed({"retrieval/R@1": 0.41, "retrieval/R@1_chance": 0.001, "retrieval/median_rank": 3}).splitlines()
        assert lines[0].strip() == "retrieval"
        cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[0] in "│┃"]
        assert cells == [
            ["metric", "this run", "chance", "difference"],
            ["R@1", "0.410", "0.001", "+0.409"],
            ["median_rank ↓", "3", "\N{EN DASH}", "\N{EN DASH}"],
        ]

    def test_names_are_not_read_as_markup(self):
        assert "[red]x" in printed({"[bold]/[red]x": 1.0})
        assert "[bold]" in printed({"[bold]/[red]x": 1.0})


def test_many_classes_show_their_most_frequent_errors_and_several_labels_only_their_table(tmp_path):
    names = [f"class {i}" for i in range(50)]
    confusion = np.diag([3] * 50)
    confusion[7, 9], confusion[9, 7] = 2, 1
    rows = [ClassRow(name, 1.0, 1.0, 1.0, 3) for name in names]
    write_metrics(tmp_path, {"accuracy": 0.5})
    Evaluation(classes=rows, confusion=confusion.tolist()).write(tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    errors = page[page.index("most frequent errors") :].split("</table>")[0]
    assert errors.index('scope="row">class 7<') < errors.index('scope="row">class 9<')
    assert errors.count("<tr>") == 3
    Evaluation(classes=rows[:2]).write(tmp_path)
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert "class 1" in page
    assert "Confusion" not in page
