"""Tuning and prediction that are killed with SIGKILL go on to the end that they would have had."""

import copy
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from points import make_model
from safetensors.torch import load_file
from test_resume import Program, read

METRIC = "validation/classification/loss"
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Program]:
    started = Program(tmp_path_factory.mktemp("program"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return make_model(dropout=0.1).save_pretrained(tmp_path_factory.mktemp("pretrained"))


def configuration(folder: Path, pretrained: Path) -> Path:
    """Three epochs of four steps, with everything that a resumed tuning could forget."""
    config = copy.deepcopy(toy.FINETUNE)
    losses = {"path": str(folder / "losses.txt"), "metric": METRIC}
    newest = {
        "dirpath": str(folder / "run" / "checkpoints"),
        "filename": "{step}",
        "every_n_train_steps": 2,
        "save_top_k": -1,
        "enable_version_counter": False,
    }
    config["trainer"] |= {
        "max_epochs": 3,
        "callbacks": [
            {"class_path": "test_resume.Losses", "init_args": losses},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": newest},
        ],
    }
    config["model"]["init_args"] |= {
        "pretrained": str(pretrained),
        "lr": 3e-2,
        "warmup_steps": 2,
        "layer_decay": 0.8,
        "unfreeze_every": 3,
        "class_weights": "balanced",
        "monitor": METRIC,
        "patience": 5,
    }
    config["data"]["eval_batch_size"] = 5
    return toy.write(folder, config, "finetune.yaml")


def ended(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What a tuning comes to: its losses, and the weights of the best model and of its classifier."""
    model = folder / "run" / "model"
    return read(folder), load_file(model / "model.safetensors"), load_file(model / "classifier.safetensors")


def same(first: tuple, second: tuple) -> None:
    assert first[0] == second[0]
    for own, other in zip(first[1:], second[1:], strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in own.items())


@pytest.fixture(scope="module")
def straight(program, pretrained, tmp_path_factory) -> Path:
    """A tuning that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    assert program.run("fit", "--config", configuration(folder, pretrained), "--output", folder / "run") == 0
    return folder


def test_a_tuning_killed_in_an_epoch_in_validation_and_while_writing(program, pretrained, straight, tmp_path):
    config, run = configuration(tmp_path, pretrained), tmp_path / "run"
    assert program.run("fit", "--config", config, "--output", run, kill_at="step 3") == KILLED
    for moment in ("write 4", "validation 8"):
        assert program.run("fit", "--resume", run, kill_at=moment) == KILLED, moment
    assert program.run("fit", "--resume", run) == 0
    same(ended(tmp_path), ended(straight))


def killed_at_random(run: Callable[..., int], kills: int, seed: int, longest: float) -> None:
    """Start again and again, killed after a random time, until so many were; a run may also come to its end."""
    generator = torch.Generator().manual_seed(seed)
    while kills:
        status = run(kill_after=0.1 + longest * float(torch.rand((), generator=generator)))
        assert status in (0, KILLED)
        kills -= status != 0
        if status == 0:
            return


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_tuning_killed_at_random_moments(program, pretrained, straight, tmp_path, seed):
    """Four times five kills."""
    config, run = configuration(tmp_path, pretrained), tmp_path / "run"

    def start(**options: float) -> int:
        begun = (run / "config.yaml").is_file()
        given = ["--resume", run] if begun else ["--config", config, "--output", run]
        return program.run("fit", *given, **options)

    killed_at_random(start, 5, seed, 2.5)
    assert start() == 0
    same(ended(tmp_path), ended(straight))


def prediction(program: Program, straight: Path, output: Path, **options: object) -> int:
    """`mmpt predict` of all 96 samples, 5 at a time; the stream's parts have 8 rows or more."""
    config = toy.write(output.parent, toy_prediction(output.parent), "predict.yaml")
    given = ["--model.pretrained", straight / "run" / "model", "--output", output]
    return program.run("predict", "--config", config, *given, **options)


def toy_prediction(folder: Path) -> dict:
    config = copy.deepcopy(toy.FINETUNE)
    config["data"] |= {"eval_batch_size": 5, "predict": "everything"}
    seen = {"class_path": "test_resume.Losses", "init_args": {"path": str(folder / "losses.txt")}}
    config["trainer"]["callbacks"] = [seen]
    return config


@pytest.fixture(scope="module")
def predicted(program, straight, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("predicted")
    assert prediction(program, straight, folder / "out") == 0
    return files(folder / "out")


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("predictions.*") if path.is_file()}


def test_a_killed_prediction_goes_on_behind_what_is_written(program, straight, predicted, tmp_path):
    for _ in range(2):
        assert prediction(program, straight, tmp_path / "out", kill_at="predict 7") == KILLED
        assert not (tmp_path / "out" / "predictions.csv").exists()
    assert prediction(program, straight, tmp_path / "out") == 0
    assert files(tmp_path / "out") == predicted
    lines = (tmp_path / "losses.txt").read_text().splitlines()
    seen = [line.split()[1] for line in lines if line.startswith("predicted")]
    assert len(set(seen)) == 20  # every batch
    assert len(seen) == 20 + 2 * 2  # of seven batches six make whole parts; the one begun and the one open are repeated


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_prediction_killed_at_random_moments(program, straight, predicted, tmp_path, seed):
    """Up to four times five kills; a prediction that came to its end begins anew."""
    killed_at_random(lambda **options: prediction(program, straight, tmp_path / "out", **options), 5, seed, 1.2)
    assert prediction(program, straight, tmp_path / "out") == 0
    assert files(tmp_path / "out") == predicted
    assert np.all([len(content) for content in predicted.values()])
