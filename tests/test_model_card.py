"""The card of a model folder: what the run recorded, in the form of the Hugging Face Hub, and nothing else."""

from pathlib import Path

import pytest
import toy
from huggingface_hub import ModelCard
from points import make_model

from mmpt.cli import main
from mmpt.errors import CheckpointError
from mmpt.export import export_folder
from mmpt.finetuning import FineTuning
from mmpt.report import write_metrics


def mmpt(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A tuned and tested run."""
    folder = tmp_path_factory.mktemp("tuned")
    make_model().save_pretrained(folder / "start")
    config = toy.write(folder, toy.FINETUNE, "finetune.yaml")
    given = ["--config", config, "--output", folder / "run", "--trainer.max_epochs", 1]
    assert mmpt("fit", *given, "--model.pretrained", folder / "start", "--license", "apache-2.0") == 0
    assert mmpt("test", *given, "--model.pretrained", folder / "run" / "model") == 0
    return folder / "run"


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_a_bare_folder_says_that_nothing_is_known(tmp_path):
    make_model().save_pretrained(tmp_path / "bare")
    found = card(tmp_path / "bare")
    assert found.data.license == "unknown"
    assert found.data.library_name == "mmpt"
    assert {"points", "text"} <= set(found.data.tags)
    assert found.data.eval_results is None
    for part in ("Training data\n\nUnknown", "Metrics\n\nUnknown", "Licence\n\nUnknown"):
        assert part in found.text
    assert 'trust=["shapes"]' in found.text


def test_the_card_of_a_run_states_data_numbers_with_intervals_and_licence(run):
    found = card(run / "model")
    assert found.data.license == "apache-2.0"
    assert found.data.model_name == "run"
    results = {result.metric_name: result for result in found.data.eval_results}
    assert "test/classification/accuracy_majority" not in results  # a baseline is no result of the model
    accuracy = results["test/classification/accuracy"]
    assert (accuracy.task_type, accuracy.dataset_split, accuracy.metric_type) == ("classification", "test", "accuracy")
    assert "PointsSource" in accuracy.dataset_name
    text = found.text
    assert "| figures | PointsSource: " in text
    assert "| 64 | 16 | 16 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| test/classification/accuracy |"))
    assert " to " in row
    assert "majority 0.250" in row
    assert "`zigzag`" in text
    assert "The licence of the data, and whom it speaks of: unknown" in text
    assert str(run.parent) not in found.content  # where files lie on somebody's machine is not published


def test_a_test_of_other_weights_leaves_the_card_alone(run, tmp_path):
    config = run.parent / "finetune.yaml"
    before = (run / "model" / "README.md").read_bytes()
    other = ["--model.pretrained", run.parent / "start", "--output", run]
    kept = (run / "metrics.json").read_bytes()
    assert mmpt("test", "--config", config, *other) == 0
    assert (run / "model" / "README.md").read_bytes() == before
    (run / "metrics.json").write_bytes(kept)


def test_an_exported_checkpoint_tells_of_its_own_validation_or_of_the_run_if_the_weights_are_those(run, tmp_path):
    best = run / "checkpoints" / "best.ckpt"
    given = ["--output", tmp_path / "best", "--license", "mit", "--trust", "shapes"]
    assert mmpt("export", "--checkpoint", best, *given) == 0
    found = card(tmp_path / "best")
    assert found.data.license == "mit"
    assert any(r.metric_name == "test/classification/accuracy" for r in found.data.eval_results)
    again = FineTuning(str(tmp_path / "best"), "points", trust=["shapes"])  # the classifier came along
    assert again.label_names == FineTuning(str(run / "model"), "points", trust=["shapes"]).label_names


def test_a_folder_is_exported_whole_and_keeps_its_card_where_no_run_is_known(run, tmp_path):
    given = ["--output", tmp_path / "out", "--license", "bsd-3-clause", "--trust", "shapes"]
    assert mmpt("export", "--model", run / "model", *given) == 0
    assert card(tmp_path / "out").data.license == "bsd-3-clause"
    assert {p.name for p in (run / "model").iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    again = export_folder(tmp_path / "out", tmp_path / "again", "mit", trust=["shapes"])
    found = card(again)
    assert found.data.license == "mit"
    assert found.text.endswith("`mit`, as stated by whoever made the model.\n")
    assert "bsd" not in found.content
    assert len(found.data.eval_results) == len(card(tmp_path / "out").data.eval_results)
    with pytest.raises(CheckpointError):
        export_folder(tmp_path / "nowhere", tmp_path / "x")


@pytest.mark.slow
def test_a_tuned_folder_is_exported_with_its_scores_as_onnx(run, tmp_path):
    pytest.importorskip("onnxscript")
    config = run.parent / "finetune.yaml"
    given = ["--model", run / "model", "--output", tmp_path / "out", "--onnx", "--config", config, "--trust", "shapes"]
    assert mmpt("export", *given) == 0
    names = {path.name for path in (tmp_path / "out").glob("*.onnx")}
    assert names == {"points.onnx", "text.onnx", "points-classification.onnx"}


def test_a_new_run_in_the_folder_of_another_forgets_its_numbers(run, tmp_path):
    write_metrics(tmp_path, {"old/accuracy": 1.0})
    config = run.parent / "finetune.yaml"
    start = ["--model.pretrained", run.parent / "start", "--trainer.max_epochs", 1]
    assert mmpt("fit", "--config", config, *start, "--output", tmp_path) == 0
    assert "old/accuracy" not in (tmp_path / "model" / "README.md").read_text()
