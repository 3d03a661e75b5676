"""`mmpt fit --resume`: runs that are killed with SIGKILL end with the losses of a run that never was."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # as this file is also the program that is killed

import lightning as L
import pytest
import torch
import toy
from lightning.pytorch.cli import LightningArgumentParser

from mmpt.batches import hash_seed
from mmpt.cli import main
from mmpt.errors import CheckpointError
from mmpt.resume import CheckpointWarning, WholeCheckpointIO, newest_checkpoint, resumed
from mmpt.streams import RowStream

STEPS = 12  # three epochs of four


class Losses(L.Callback):
    """Appends every loss to a file at once, and ends the process without warning where it is told to.

    Args:
        path: of the file.
        metric: what a validation is remembered by.
    """

    def __init__(self, path: str, metric: str = "validation/loss") -> None:
        self.path, self.metric = path, metric

    def write(self, name: str, value: float) -> None:
        with open(self.path, "a") as file:
            file.write(f"{name} {float(value).hex()}\n")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        reached(f"step {trainer.global_step}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.write(f"step {trainer.global_step}", outputs["loss"])

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        reached(f"validation {trainer.global_step}")

    def on_validation_end(self, trainer, pl_module):
        self.write(f"validation {trainer.global_step}", trainer.callback_metrics[self.metric])

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.write(f"predicted {batch.names[0]}", len(batch))
        reached(f"predict {batch_idx}")


def reached(moment: str) -> None:
    if os.environ.get("KILL_AT") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def configuration(folder: Path) -> Path:
    config = copy.deepcopy(toy.PRETRAIN)
    config["trainer"] |= {
        "max_epochs": 3,
        "callbacks": [
            {"class_path": "test_resume.Losses", "init_args": {"path": str(folder / "losses.txt")}},
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {
                    "dirpath": str(folder / "run" / "checkpoints"),
                    "filename": "{step}",
                    "every_n_train_steps": 2,
                    "save_top_k": -1,
                    "enable_version_counter": False,
                },
            },
        ],
    }
    config["model"]["init_args"]["model"]["init_args"]["text"]["init_args"]["dropout"] = 0.1
    return toy.write(folder, config, "config.yaml")


class Program:
    """This file as a process that imports everything once and forks for each run, as imports take seconds."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "program.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def run(self, *arguments: object, kill_at: str = "", kill_after: float = 0.0) -> int:
        """One `mmpt` command, killed at a moment or after some seconds; its exit status, negative for a signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\t".join([kill_at, str(kill_after), *map(str, arguments)]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, Path(self.log.name).read_text()[-3000:]
        return int(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()


def serve() -> None:
    """Read commands and run each in a fork."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    original = torch.save

    def save(checkpoint, file, **options):
        """As ever, but stop in the middle of the file where that is asked for."""
        wanted = os.environ.get("KILL_AT")
        if wanted and isinstance(checkpoint, dict) and wanted == f"write {checkpoint.get('global_step')}":
            original(checkpoint, file, **options)
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        original(checkpoint, file, **options)

    torch.save = save
    RowStream.__init__.__defaults__ = (8,)  # rows of a part: small data have several
    for line in sys.stdin:
        kill_at, kill_after, *arguments = line.rstrip("\n").split("\t")
        child = os.fork()
        if child == 0:
            os.environ["KILL_AT"] = kill_at
            os._exit(main(arguments))
        end = time.monotonic() + (float(kill_after) or 120)
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        answers.write(f"{os.waitstatus_to_exitcode(ended[1])}\n")
        answers.flush()


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Iterator[Program]:
    started = Program(tmp_path_factory.mktemp("program"))
    yield started
    started.close()


def read(folder: Path) -> dict[str, str]:
    """Each loss by its name; one that was computed twice must have been the same."""
    losses: dict[str, str] = {}
    for line in (folder / "losses.txt").read_text().splitlines():
        name, _, value = line.rpartition(" ")
        assert losses.setdefault(name, value) == value, name
    return losses


@pytest.fixture(scope="module")
def straight(program, tmp_path_factory) -> dict[str, str]:
    """The losses of a run that is not disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert program.run("fit", "--config", configuration(folder), "--output", folder / "run") == 0
    losses = read(folder)
    assert len(losses) == STEPS + 3
    return losses


def test_killed_in_an_epoch_in_validation_and_while_writing(program, straight, tmp_path):
    config, run = configuration(tmp_path), tmp_path / "run"
    assert program.run("fit", "--config", config, "--output", run, kill_at="step 1") == -signal.SIGKILL
    for moment in ("step 3", "write 4", "validation 4", "step 7", "validation 8", "write 10"):
        assert program.run("fit", "--resume", run, kill_at=moment) == -signal.SIGKILL, moment
    assert program.run("fit", "--resume", run) == 0
    assert read(tmp_path) == straight
    assert not list(run.rglob("*.damaged"))
    log = Path(program.log.name).read_text()
    assert "stopped before its first checkpoint" in log


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_twenty_random_moments(program, straight, tmp_path, seed):
    config, run = configuration(tmp_path), tmp_path / "run"
    generator = torch.Generator().manual_seed(seed)
    arguments = ["fit", "--config", config, "--output", run]
    kills = 0
    while kills < 20:
        seconds = 0.2 + 2.3 * float(torch.rand((), generator=generator))
        status = program.run(*arguments, kill_after=seconds)
        assert status in (0, -signal.SIGKILL)
        if status == 0:  # came to its end: go on from an early checkpoint, as if the later ones had never been written
            for path in run.rglob("*.ckpt"):
                if path.is_file() and hash_seed(kills) % 2 and path.stem != "step=2":
                    path.unlink()
        kills += status != 0
        arguments = ["fit", "--resume", run] if (run / "config.yaml").is_file() else arguments
    assert program.run(*arguments) == 0
    assert read(tmp_path) == straight


@pytest.fixture(scope="module")
def killed(program, straight, tmp_path_factory) -> tuple[Path, dict[Path, bytes]]:
    """A run that was killed at step 9, with checkpoints at 2, 4, 6 and 8, and the content of its files."""
    folder = tmp_path_factory.mktemp("killed")
    program.run("fit", "--config", configuration(folder), "--output", folder / "run", kill_at="step 9")
    return folder, {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(killed) -> Path:
    """The same run again for each test."""
    folder, files = killed
    for path in folder.rglob("*"):
        if path.is_file() or path.is_symlink():
            path.unlink()
    for path, content in files.items():
        path.write_bytes(content)
    return folder


@pytest.fixture
def copied(stopped) -> Path:
    """Its run folder."""
    return stopped / "run"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "empty":
        content.clear()
    elif how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(copied, how):
    checkpoints = copied / "checkpoints"
    damage(checkpoints / "step=8.ckpt", how)
    with pytest.warns(CheckpointWarning, match=r"step=8\.ckpt is damaged.*step=6\.ckpt, step 6"):
        assert newest_checkpoint(copied) == (checkpoints / "step=6.ckpt").resolve()
    assert (checkpoints / "step=8.ckpt.damaged").is_file()
    assert newest_checkpoint(copied) == (checkpoints / "step=6.ckpt").resolve()


def test_the_losses_after_a_fall_back_are_those_of_the_straight_run(program, straight, stopped):
    damage(stopped / "run" / "checkpoints" / "step=8.ckpt", "flipped")
    assert program.run("fit", "--resume", stopped / "run") == 0
    assert read(stopped) == straight


def test_only_damaged_checkpoints_are_an_error_with_the_way_out(copied):
    for path in (copied / "checkpoints").glob("*.ckpt"):
        damage(path, "cut")
    with pytest.raises(CheckpointError, match=r"step=2\.ckpt.*remove them"):
        newest_checkpoint(copied)


def test_the_step_decides_and_not_the_time_of_the_file(copied):
    os.utime(copied / "checkpoints" / "step=4.ckpt")
    chosen = newest_checkpoint(copied)
    assert chosen is not None
    assert chosen.name == "step=8.ckpt"


def test_another_batch_size_is_refused_with_the_reason(program, copied):
    offset = Path(program.log.name).stat().st_size
    assert program.run("fit", "--resume", copied, "--data.batch_size", 8) == 2
    assert "batch_size=16, this run has batch_size=8" in Path(program.log.name).read_text()[offset:]


def test_another_number_of_workers_is_refused_with_the_reason(program, copied):
    offset = Path(program.log.name).stat().st_size
    assert program.run("fit", "--resume", copied, "--data.num_workers", 2) == 2
    assert (
        "num_workers=0, this run has num_workers=2; a source that keeps" in Path(program.log.name).read_text()[offset:]
    )


def test_options_of_the_command_line():
    assert resumed(["fit", "--config", "x.yaml"]) == ["fit", "--config", "x.yaml"]
    with pytest.raises(CheckpointError, match="nowhere has no config"):
        resumed(["fit", "--resume", "nowhere"])
    with pytest.raises(CheckpointError, match="needs the folder"):
        resumed(["fit", "--resume"])
    with pytest.raises(CheckpointError, match="not `mmpt test`"):
        resumed(["test", "--resume=x"])


def test_further_options_change_the_run(copied):
    options = resumed(["fit", "--resume", str(copied), "--trainer.max_epochs", "5"])
    assert options[-2:] == ["--trainer.max_epochs", "5"]
    assert options[options.index("--ckpt_path") + 1].endswith("step=8.ckpt")


def test_a_checkpoint_that_can_not_be_written_leaves_the_old_one(tmp_path):
    writer = WholeCheckpointIO()
    writer.save_checkpoint({"global_step": 1}, tmp_path / "a.ckpt")
    with pytest.raises(Exception, match=r"pickle|lambda|local"):
        writer.save_checkpoint({"global_step": 2, "bad": lambda: 0}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"global_step": 1}


def test_a_run_killed_while_its_configuration_is_written_keeps_the_whole_one(copied, monkeypatch):
    def save(self, config, path, **options):
        Path(path).write_text("mod")
        raise KeyboardInterrupt

    whole = (copied / "config.yaml").read_text()
    monkeypatch.setattr(LightningArgumentParser, "save", save)
    with pytest.raises(SystemExit):  # how Lightning ends a run on Ctrl-C
        main(["fit", "--resume", str(copied)])
    assert (copied / "config.yaml").read_text() == whole


def test_a_run_keeps_two_checkpoints_and_a_pointer_to_the_newest(program, tmp_path):
    config = toy.write(tmp_path, toy.PRETRAIN, "plain.yaml")
    assert program.run("fit", "--config", config, "--output", tmp_path / "run", "--trainer.max_epochs", 3) == 0
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt", "last.ckpt"]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").resolve().name == "epoch=2-step=12.ckpt"


if __name__ == "__main__":
    serve()
