"""`mmpt probe`, as a user meets it, and the probe during a training run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from probes import write

from mmpt.cli import main
from mmpt.model import MultimodalModel
from mmpt.probing.plots import bars, heat_map
from mmpt.probing.scoring import summary
from mmpt.probing.stroop import StroopProbe
from mmpt.probing.task import load_task


def mmpt(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    made = {kind: tmp_path_factory.mktemp("probe") / kind for kind in ("bert", "clip", "bert-mlm")}
    for kind, folder in made.items():
        write(kind, folder)
    return made


def test_two_models_and_two_tasks_in_one_command(folders, tmp_path, capsys):
    out = tmp_path / "out.json"
    models = ["--model", folders["bert"], "--model", f"seeing={folders['clip']}"]
    tasks = ["--task", "shape", "--task", "concreteness", "--limit", 9]
    assert mmpt("probe", "stroop", *models, *tasks, "--output", out) == 0
    written = json.loads(out.read_text())
    found = {(row["model"], row["task"]): row for row in written["results"]}
    assert set(found) == {(m, t) for m in ("bert", "seeing") for t in ("shape", "concreteness")}
    shape = found["bert", "shape"]
    assert shape["settings"] == {"pooling": "pooler", "neutral": "", "attention_mask": True, "normalize": True}
    assert found["seeing", "shape"]["settings"]["pooling"] == "projected"
    task = load_task("shape").sample(9)
    right = np.array(shape["predictions"]) == [item.options[item.answer] for item in task.items]
    assert shape["over_prompts"]["accuracy"]["mean"] == pytest.approx(right.mean())
    assert {row["task"] for row in written["comparisons"]} == {"shape", "concreteness"}
    pictures = sorted(path.name for path in (tmp_path / "out-plots").iterdir())
    assert pictures[-1] == "tasks.png"
    assert len(pictures) == 3  # and a heat map of each model's shapes
    printed = capsys.readouterr().out
    for word in ("chance 0.333", "majority", "Paired differences", "Spearman"):
        assert word in printed


def test_a_folder_holds_the_page_that_every_run_has(folders, tmp_path):
    models = ["--model", folders["bert"], "--model", f"seeing={folders['clip']}"]
    options = [*models, "--task", "shape", "--task", "concreteness", "--limit", 9]
    assert mmpt("probe", "stroop", *options, "--output", tmp_path / "page") == 0
    metrics = json.loads((tmp_path / "page" / "metrics.json").read_text())
    written = {
        (r["model"], r["task"]): r for r in json.loads((tmp_path / "page" / "probe.json").read_text())["results"]
    }
    shape = written["seeing", "shape"]
    assert metrics["shape/seeing/accuracy"] == pytest.approx(shape["over_prompts"]["accuracy"]["mean"])
    assert metrics["shape/seeing/accuracy_chance"] == pytest.approx(1 / 3)
    assert "concreteness/bert/spearman" in metrics
    details = json.loads((tmp_path / "page" / "evaluation.json").read_text())
    assert details["intervals"]["shape/seeing/accuracy"] == pytest.approx(shape["accuracy_interval"])
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    for word in ("bootstrap", "seeing", "chance", "9 items"):
        assert word in page
    linear = ["--model", folders["bert"], "--task", "shape", "--output", tmp_path / "linear"]
    assert mmpt("probe", "linear", *linear) == 0
    assert "shape/bert/macro_accuracy" in json.loads((tmp_path / "linear" / "metrics.json").read_text())


def test_the_same_command_gives_the_same_numbers(folders, tmp_path):
    outs = [tmp_path / name for name in ("a.json", "b.json")]
    for out in outs:
        options = ["--model", folders["bert"], "--task", "color", "--limit", 20, "--output", out]
        assert mmpt("probe", "stroop", *options, "--prompt", "a MASK WORD") == 0
    assert outs[0].read_text() == outs[1].read_text()


def test_a_grid_covers_poolings_neutral_texts_and_masks(folders, tmp_path):
    out = tmp_path / "grid.json"
    options = ["--model", folders["bert"], "--task", "shape", "--limit", 4, "--prompt", "a MASK WORD", "--grid"]
    assert mmpt("probe", "stroop", *options, "--output", out) == 0
    settings = [row["settings"] for row in json.loads(out.read_text())["results"]]
    assert len(settings) == 4 * 2 * 2
    assert {row["pooling"] for row in settings} == {"pooler", "mean", "cls", "eos"}


def test_the_released_preset_leaves_the_mask_out(folders, tmp_path):
    out = tmp_path / "released.json"
    options = ["--model", folders["bert"], "--task", "shape", "--limit", 4, "--output", out]
    assert mmpt("probe", "stroop", *options, "--preset", "released") == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["settings"] == {"pooling": "pooler", "neutral": "", "attention_mask": False, "normalize": True}
    assert mmpt("probe", "stroop", *options, "--preset", "released", "--neutral", "x") == 2


def test_masked_lm_and_linear_probes_run_on_the_same_tasks(folders, tmp_path, capsys):
    out = tmp_path / "mlm.json"
    options = [
        "--model",
        folders["bert-mlm"],
        "--task",
        "size",
        "--limit",
        10,
        "--output",
        out,
        "--policy",
        "pseudo_likelihood",
    ]
    assert mmpt("probe", "masked-lm", *options) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["probe"] == "masked-lm"
    assert row["settings"] == {"policy": "pseudo_likelihood"}
    assert mmpt("probe", "masked-lm", "--model", folders["bert"], "--task", "size") == 2
    assert "head" in capsys.readouterr().err
    assert mmpt("probe", "linear", "--model", folders["bert"], "--task", "shape", "--output", tmp_path / "l.json") == 0
    (row,) = json.loads((tmp_path / "l.json").read_text())["results"]
    assert row["chance"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "nowhere", "--task", "shape"], "Nothing is downloaded"),
        (["--model", "BERT", "--task", "colour"], "color"),
        (["--model", "BERT", "--task", "shape", "--pooling", "projected"], "pooler"),
        (["--model", "BERT", "--task", "shape", "--output", "x.txt"], ".json"),
        (["--model", "BERT", "--task", "cloze", "--prompt", "a MASK WORD"], "own sentence"),
    ],
)
def test_mistakes_are_explained(arguments, hint, folders, capsys):
    assert mmpt("probe", "stroop", *(str(folders["bert"]) if a == "BERT" else a for a in arguments)) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert "Traceback" not in error


def test_tasks_are_listed(capsys):
    assert mmpt("probe", "tasks") == 0
    printed = capsys.readouterr().out
    assert "shape_adjectives" in printed
    assert "sentiment" in printed


def test_plots_show_each_model_and_mark_the_answers(folders):
    from mmpt.probing.loading import load_embedder

    task = load_task("shape").sample(9).with_prompts(["a MASK WORD", "MASK WORD"])
    results = [StroopProbe(load_embedder(folders[kind])).run(task) for kind in ("bert", "clip")]
    drawn = bars([summary(result, resamples=50) for result in results])
    assert len([text.get_text() for text in drawn.legends[0].get_texts()]) == 2
    image = heat_map(results[0]).axes[0]
    assert [label.get_text() for label in image.get_xticklabels()] == list(task.items[0].options)
    circles = image.lines[0].get_xdata()
    options = list(task.items[0].options)
    assert sorted(circles) == sorted(options.index(item.options[item.answer]) for item in task.items)


# During training


def configuration(folder: Path, callbacks: list) -> Path:
    config = json.loads(json.dumps(toy.PRETRAIN))
    config["trainer"]["callbacks"] = callbacks
    return toy.write(folder, config, "config.yaml")


def test_probing_during_training_is_logged_and_changes_nothing(tmp_path):
    probing = {
        "class_path": "mmpt.probing.callback.StroopCallback",
        "init_args": {"tasks": ["shape", "concreteness"], "every_n_steps": 2, "prompts": 1, "limit": 6},
    }
    weights = []
    for name, callbacks in (("with", [probing]), ("without", [])):
        (tmp_path / name).mkdir()
        config = configuration(tmp_path / name, callbacks)
        options = ["--output", tmp_path / name / "run", "--trainer.max_steps", 5]
        assert mmpt("fit", "--config", config, *options) == 0
        model = MultimodalModel.from_pretrained(tmp_path / name / "run" / "model", trust=["shapes"])
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    run = tmp_path / "with" / "run"
    history = json.loads((run / "probing" / "stroop.json").read_text())
    assert [row["step"] for row in history] == [0, 2, 4, 5]
    assert (run / "probing" / "stroop.png").stat().st_size > 1000
    header = next(run.glob("logs/version_0/metrics.csv")).read_text().splitlines()[0]
    assert "probe/shape/accuracy" in header
    assert "probe/concreteness/spearman" in header
    # the last entry is the finished model
    from mmpt.probing.embedders import ModelEmbedder

    finished = MultimodalModel.from_pretrained(run / "model", trust=["shapes"])
    task = load_task("shape").sample(6)
    task = task.with_prompts(task.prompts[:1])
    wanted = summary(StroopProbe(ModelEmbedder(finished)).run(task))["over_prompts"]["accuracy"]["mean"]
    assert history[-1]["numbers"]["probe/shape/accuracy"] == pytest.approx(wanted)


def test_a_model_folder_of_ours_is_probed_by_the_same_command(tmp_path):
    config = configuration(tmp_path, [])
    assert mmpt("fit", "--config", config, "--output", tmp_path / "run", "--trainer.max_steps", 2) == 0
    out = tmp_path / "out.json"
    options = ["--model", tmp_path / "run" / "model", "--trust", "shapes", "--task", "shape", "--limit", 5]
    assert mmpt("probe", "stroop", *options, "--output", out) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert (row["model"], row["settings"]["pooling"]) == ("run", "projected")
