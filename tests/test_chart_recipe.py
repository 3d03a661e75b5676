"""What the chart recipe is compared with, and its third stage."""

import subprocess
import sys

import pytest
import yaml
from recipe_modules import recipe_modules

from mmpt.catalogue import recipes_folder
from mmpt.config import from_config
from mmpt.datasets.chart import Chart, Charts
from mmpt.datasets.chart_records import ChartRecord, Series
from mmpt.pretraining import Pretraining


@pytest.fixture(scope="module")
def recipe():
    """Modules of the recipe by name."""
    with recipe_modules("chart") as modules:
        yield modules


@pytest.fixture(scope="module")
def evaluation(recipe):
    return recipe("evaluation")


def bar(*values: float, kind: str = "bar") -> ChartRecord:
    points = tuple((label, value) for label, value in zip("abcd", values, strict=False))
    return ChartRecord(kind, "", "town", "mm", (Series("mm", points),))


def chart(record: ChartRecord) -> Chart:
    return Chart("one", record, None, False, "table", None)


def test_the_middle_of_the_axis_is_a_guess_of_every_value(evaluation):
    found = evaluation.middle_of_axis([chart(bar(10, 20, 40)), chart(bar(10, 20, 30, kind="line"))])
    # bars begin at 0: the middle is 20, right once of three; a line's axis runs from 10 to 30, the middle is 20
    assert found["reading/value_accuracy_middle"] == pytest.approx(1 / 3)
    assert found["reading/median_value_error_middle"] == pytest.approx(
        (0.25 + 0.5) / 2
    )  # 10/40, 0, 20/40, 10/20, 0, 10/20
    # RNSS of 10, 20, 40 against 20 three times: distances 1, 0, 0.5; of 10, 20, 30: 1, 0, 1/3
    assert found["reading/rnss_middle"] == pytest.approx((0.5 + 1 - 4 / 9) / 2)


def test_the_most_frequent_answer_is_that_of_the_template(evaluation):
    train = [bar(5, 1, 2), bar(6, 1, 2), bar(1, 7, 2)]  # a is the highest in two of three, and b the lowest
    metrics = evaluation.majority_answers(train, [chart(bar(9, 3, 8))], Charts())
    assert set(metrics) == {f"answering/{kind}_majority" for kind in ("all", "literal", "inferential", "reasoning")}
    asked = [(chart(bar(9, 3, 8)), q) for q in evaluation.questions(bar(9, 3, 8))]
    highest = [(c, q) for c, q in asked if q.template == "highest"]
    assert evaluation.by_kind(highest, ["a"], "") == {"answering/all": 1.0, "answering/inferential": 1.0}
    assert evaluation.by_kind(highest, ["b"], "") == {"answering/all": 0.0, "answering/inferential": 0.0}


def test_questions_are_the_same_for_every_model(evaluation):
    charts = [chart(bar(n, 2 * n + 1, 40 - n)) for n in range(1, 9)]
    first, second = evaluation.asked_of(charts, Charts()), evaluation.asked_of(charts, Charts())
    assert [q for _, q in first] == [q for _, q in second]
    assert [q.kind for _, q in first] == ["literal", "inferential", "reasoning"] * 8
    assert len({q.text for _, q in first}) > 8


def test_without_names_questions_and_readings_are_about_places(evaluation):
    asked = evaluation.asked_of([chart(bar(9, 3, 8))], Charts(serializer="brief"))
    assert not any(" of a?" in q.text or " b " in q.text for _, q in asked)
    assert evaluation.values_within([100, 50, 10], [104, 40]) == [True, False, False]


def test_the_third_stage_trains_adapters_and_the_connector_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path))
    folder = recipes_folder() / "chart"
    settings, own = (yaml.safe_load((folder / name).read_text(encoding="utf-8")) for name in ("tune.yaml", "lora.yaml"))
    merged = settings["model"]["init_args"] | own["model"]["init_args"]
    module = Pretraining(**from_config(merged))
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("model.modalities.chart.connector") for name in trained)
    assert not any(name.startswith("model.modalities.chart.encoder") for name in trained)
    inside = {name for name in trained if name.startswith("model.modalities.text.encoder")}
    assert inside
    assert all(".lora_" in name for name in inside)


def test_a_stage_that_is_there_is_not_trained_again(recipe, tmp_path):
    (tmp_path / "model.safetensors").touch()
    study = recipe("study")
    study.trained("no such configuration", {}, 1, 0, tmp_path, None)
    with pytest.raises(FileNotFoundError):
        study.trained("no such configuration", {}, 1, 0, tmp_path / "other", None)


@pytest.mark.slow
def test_the_study_goes_on_where_it_stopped(tmp_path):
    output = tmp_path / "study.jsonl"
    command = [sys.executable, str(recipes_folder() / "chart" / "study.py"), "--smoke", "--seeds", "0"]
    command += ["--output", str(output)]
    for _ in range(2):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        rows = output.read_text(encoding="utf-8").splitlines()
        assert len(rows) == 14  # eight arms, one without pictures, two readers, two alignments, what needs no training
    assert "seed 0:" not in result.stdout  # nothing was trained again
