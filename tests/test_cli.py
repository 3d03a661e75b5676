"""The command line, as a user meets it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import yaml

from mmpt import MultimodalModel
from mmpt.cli import main
from mmpt.evaluation.record import read_outcomes


def mmpt(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished pretraining run of the toy configuration, made by `mmpt fit`."""
    folder = tmp_path_factory.mktemp("cli")
    config = toy.write(folder, toy.PRETRAIN, "pretrain.yaml")
    assert mmpt("fit", "--config", config, "--output", folder / "run", "--trainer.max_epochs", 3) == 0
    return folder / "run"


@pytest.fixture
def config(run) -> Path:
    return run.parent / "pretrain.yaml"


def test_fit_leaves_everything_that_the_documentation_lists(run):
    for name in ("config.yaml", "checkpoints/last.ckpt", "model/config.yaml", "model/model.safetensors", "report.html"):
        assert (run / name).is_file(), name
    assert next(run.glob("logs/version_0/metrics.csv")).stat().st_size > 0
    assert list(run.glob("logs/version_0/events.*"))
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["trainer"]["max_epochs"] == 3
    facts = json.loads((run / "run.json").read_text())
    assert facts["steps"] == 12


def test_a_run_too_short_to_be_logged_still_ends_with_a_report(config, tmp_path):
    options = ["--trainer.max_steps", 2, "--trainer.log_every_n_steps", 10, "--trainer.limit_val_batches", 0]
    assert mmpt("fit", "--config", config, "--output", tmp_path / "run", *options) == 0
    assert not list(tmp_path.glob("run/logs/**/metrics.csv"))
    assert "No losses were logged" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_written_configuration_repeats_the_run(run, tmp_path):
    assert mmpt("fit", "--config", run / "config.yaml", "--output", tmp_path / "again") == 0
    first, second = (MultimodalModel.from_pretrained(f / "model", trust=["shapes"]) for f in (run, tmp_path / "again"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        ("retrieval", "retrieval/points_to_text/R@1"),
        ("zero-shot", "zero_shot/class/accuracy"),
        ("linear-probe", "linear_probe/class/accuracy"),
        ("knn", "knn/class/accuracy"),
        ("n-shot", "n_shot/class/5_shots/accuracy"),
    ],
)
def test_evaluate_writes_numbers_beside_a_baseline(run, config, tmp_path, task, metric):
    out = tmp_path / "numbers.json"
    options = ["--model", run / "model", "--config", config, "--trust", "shapes", "--output", out]
    assert mmpt("evaluate", task, *options) == 0
    numbers = json.loads(out.read_text())
    assert 0 <= numbers[metric] <= 1
    assert any(name.startswith(metric + "_") for name in numbers)


def test_evaluate_leaves_a_report_with_classes_in_a_folder(run, config, tmp_path):
    options = ["--model", run / "model", "--config", config, "--trust", "shapes", "--output", tmp_path / "knn"]
    assert mmpt("evaluate", "knn", *options) == 0
    page = (tmp_path / "knn" / "report.html").read_text(encoding="utf-8")
    assert "Confusion" in page
    assert "bootstrap" in page
    stored = np.load(tmp_path / "knn" / "outcomes.npz")
    assert stored["names"][0] == "test-0"
    numbers = json.loads((tmp_path / "knn" / "metrics.json").read_text())
    assert stored["outcome:knn/class/accuracy"].mean() == pytest.approx(numbers["knn/class/accuracy"])


def test_every_evaluation_has_intervals_and_tables_on_its_page(run, config, tmp_path):
    words = {"retrieval": ["text_to_points/median_rank"], "zero-shot": ["Confusion", "zigzag", "macro_recall"]}
    for task, expected in (words | {"linear-probe": ["Confusion", "Calibration", "macro_f1"]}).items():
        options = ["--model", run / "model", "--config", config, "--trust", "shapes", "--output", tmp_path / task]
        assert mmpt("evaluate", task, *options) == 0
        details = json.loads((tmp_path / task / "evaluation.json").read_text())
        numbers = json.loads((tmp_path / task / "metrics.json").read_text())
        for name, (low, high) in details["intervals"].items():
            assert low <= numbers[name] <= high, name
        page = (tmp_path / task / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
        for word in ["bootstrap", *expected]:
            assert word in page
        names, outcomes = read_outcomes(tmp_path / task)
        assert len(names) == 16
        assert all(len(values) == 16 for values in outcomes.values())


def test_evaluation_during_pretraining_changes_nothing(run, config, tmp_path):
    own = yaml.safe_load(config.read_text())
    own["model"]["init_args"]["model"]["init_args"]["text"]["init_args"]["dropout"] = 0.1
    tasks = ["retrieval", "zero-shot", "linear-probe", "knn"]
    call = {
        "class_path": "mmpt.evaluation.callback.EvaluationCallback",
        "init_args": {"tasks": tasks, "modality": "points"},
    }
    for name, callbacks in (("with", [call]), ("without", [])):
        own["trainer"] = {"max_epochs": 2, "enable_progress_bar": False, "log_every_n_steps": 1, "callbacks": callbacks}
        assert mmpt("fit", "--config", toy.write(tmp_path, own, f"{name}.yaml"), "--output", tmp_path / name) == 0
    first, second = (
        MultimodalModel.from_pretrained(tmp_path / n / "model", trust=["shapes"]).state_dict()
        for n in ("with", "without")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    header = next((tmp_path / "with").glob("logs/version_0/metrics.csv")).read_text().splitlines()[0]
    for name in ("evaluation/retrieval/points_to_text/R@1", "evaluation/knn/class/accuracy"):
        assert name in header


def test_embed_keeps_every_sample_in_order(run, config, tmp_path):
    out = tmp_path / "z.npz"
    options = ["--model", run / "model", "--config", config, "--trust", "shapes", "--input", "unused"]
    assert mmpt("embed", "--modality", "points", *options, "--output", out) == 0
    stored = np.load(out)
    model = MultimodalModel.from_pretrained(run / "model", trust=["shapes"])
    from shapes import PointsSource

    samples = PointsSource().everything()
    assert stored["names"].tolist() == [samples[i].name for i in range(len(samples))]
    expected = model.embed("points", [samples[i].modalities["points"] for i in range(len(samples))])
    np.testing.assert_allclose(stored["embeddings"], expected.numpy(), atol=1e-5)


def test_search_shows_the_samples_nearest_to_a_text(run, config, capsys):
    from shapes import PointsSource

    options = ["--model", run / "model", "--config", config, "--trust", "shapes"]
    assert mmpt("search", "a circle", *options, "--top", 3) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    model = MultimodalModel.from_pretrained(run / "model", trust=["shapes"])
    samples = PointsSource().everything()
    names = [samples[i].name for i in range(len(samples))]
    points = [samples[i].modalities["points"] for i in range(len(samples))]
    best = (model.embed("points", points) @ model.embed("text", ["a circle"])[0]).topk(3)
    assert [line.split("  ", 1)[1] for line in lines] == [names[i] for i in best.indices.tolist()]
    assert [float(line.split()[0]) for line in lines] == [round(v, 3) for v in best.values.tolist()]


def test_export_gives_the_model_of_the_checkpoint(run, tmp_path, capsys):
    given = ["--checkpoint", run / "checkpoints/last.ckpt", "--output", tmp_path / "exported"]
    assert mmpt("export", *given) == 2
    assert "trust" in capsys.readouterr().err
    assert mmpt("export", *given, "--trust", "shapes") == 0
    first, second = (
        MultimodalModel.from_pretrained(f, trust=["shapes"]) for f in (run / "model", tmp_path / "exported")
    )
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_export_writes_each_tower_as_onnx(run, config, tmp_path):
    given = [
        "--checkpoint",
        run / "checkpoints/last.ckpt",
        "--output",
        tmp_path / "exported",
        "--onnx",
        "--trust",
        "shapes",
    ]
    assert mmpt("export", *given) == 2  # without an example to trace
    assert mmpt("export", *given, "--config", config) == 0
    assert {p.name for p in (tmp_path / "exported").glob("*.onnx")} == {"points.onnx", "text.onnx"}


def test_fine_tuning_starts_from_the_folder_and_predicts_from_its_own(run, tmp_path):
    config = toy.write(tmp_path, toy.FINETUNE, "finetune.yaml")
    tuned = tmp_path / "tuned"
    assert mmpt("fit", "--config", config, "--model.pretrained", run / "model", "--output", tuned) == 0
    again = tmp_path / "again"
    assert mmpt("predict", "--config", config, "--model.pretrained", tuned / "model", "--output", again) == 0
    lines = (again / "predictions.csv").read_text().splitlines()
    assert lines[0] == "names,label,probability"
    assert len(lines) == 1 + 16
    assert {line.split(",")[1] for line in lines[1:]} <= {"circle", "line", "spiral", "zigzag"}
    everything = ["--data.predict", "everything", "--output", tmp_path / "all"]
    assert mmpt("predict", "--config", config, "--model.pretrained", tuned / "model", *everything) == 0
    names = [line.split(",")[0] for line in (tmp_path / "all" / "predictions.csv").read_text().splitlines()[1:]]
    assert names == [f"{split}-{i}" for split, n in (("train", 64), ("validation", 16), ("test", 16)) for i in range(n)]


def test_tuned_runs_are_tested_and_compared_on_one_page(run, tmp_path):
    config = toy.write(tmp_path, toy.FINETUNE, "finetune.yaml")
    for name, options in (("tuned", []), ("frozen", ["--model.freeze", "true"])):
        start = ["--config", config, "--output", tmp_path / name]
        assert mmpt("fit", *start, "--model.pretrained", run / "model", *options) == 0
        kept = json.loads((tmp_path / name / "metrics.json").read_text())
        assert "validation/classification/accuracy" in kept
        assert "best_step" in kept
        assert mmpt("test", *start, "--model.pretrained", tmp_path / name / "model") == 0
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["test/classification/accuracy_majority"] == 0.25
        page = (tmp_path / name / "report.html").read_text(encoding="utf-8")
        for word in ("Confusion", "Calibration", "bootstrap", "zigzag"):
            assert word in page
    page = tmp_path / "both.html"
    assert mmpt("report", tmp_path / "tuned", tmp_path / "frozen", "--output", page) == 0
    text = page.read_text(encoding="utf-8")
    row = text[text.index("test/classification/accuracy<") :].split("</tr>")[0]
    assert " to " in row  # the interval of the difference
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_test_command_computes_the_losses(run, config, capsys):
    assert mmpt("test", "--config", config, "--output", run.parent / "tested") == 0
    assert "test/contrastive/loss" in capsys.readouterr().out


def test_foreign_classes_need_trust(run, config, capsys):
    assert mmpt("evaluate", "knn", "--model", run / "model", "--config", config) == 2
    assert "trust" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["evaluate", "knn", "--model", "nowhere", "--config", "x.yaml"], "config.yaml"),
        (["export", "--checkpoint", "nowhere.ckpt", "--output", "y"], "RUN/checkpoints"),
        (["report", "nowhere"], "nowhere"),
        (["recipes", "copy", "smell", "y"], "image"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(arguments, hint, capsys):
    assert mmpt(*arguments) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert "Traceback" not in error


def test_accumulation_with_a_contrastive_head_is_refused_before_the_first_step(run, config, tmp_path, capsys):
    options = ["--config", config, "--output", tmp_path / "r", "--trainer.accumulate_grad_batches", 2]
    assert mmpt("fit", *options) == 2
    assert "batch_size" in capsys.readouterr().err


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert mmpt("recipes") == 0
    assert "image" in capsys.readouterr().out
    assert mmpt("recipes", "copy", "image", tmp_path / "mine") == 0
    assert {"pretrain.yaml", "finetune.yaml", "paper.yaml", "run.py"} <= {p.name for p in (tmp_path / "mine").iterdir()}
    assert mmpt("recipes", "copy", "image", tmp_path / "mine") == 2


@pytest.mark.parametrize("arguments", [["--help"], ["recipes"], ["probe", "stroop", "--help"]])
def test_help_and_lists_come_within_a_second_and_without_torch(arguments):
    code = (
        f"import sys; from mmpt.cli import main\ntry:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=os.environ)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1.0
