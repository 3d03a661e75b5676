"""Runs that go on after a crash: checkpoints written whole, and the newest good one of a run folder."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from mmpt.errors import CheckpointError

CONFIG = "config.yaml"


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, or there is none, so that a run goes on from an earlier point."""


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when the disk has all of it.

    A run that is killed at any moment leaves whole checkpoints only. Lightning's own writer does not wait for the disk,
    and builds the file in memory first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint; places that are not on a local disk are left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.part")
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)


class Found(NamedTuple):
    """A readable checkpoint.

    Attributes:
        step: optimiser steps before it was written.
        written: time of the file.
        path: where.
    """

    step: int
    written: float
    path: Path


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run folder with the most steps, after a look at every byte of it.

    Damaged ones are put aside as NAME.damaged, with a `CheckpointWarning`, and the one before is taken.

    Args:
        run: a folder that `mmpt fit` wrote.

    Returns:
        None where the run was stopped before its first checkpoint.

    Raises:
        CheckpointError: no run folder; or checkpoints, but no good one.
    """
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"{run} has no {CONFIG}; give the folder that `mmpt fit --output` wrote")
    files = {path.resolve() for path in run.rglob("*.ckpt") if path.is_file()}
    found: list[Found] = []
    damaged: list[Path] = []
    for path in sorted(files):
        step = _step(path)
        if step is None:
            damaged.append(path)
        else:
            found.append(Found(step, path.stat().st_mtime, path))
    for candidate in sorted(found, reverse=True):
        if _whole(candidate.path):
            _put_aside(damaged, candidate)
            return candidate.path
        damaged.append(candidate.path)
    if damaged:
        raise CheckpointError(
            f"every checkpoint of {run} is damaged ({', '.join(path.name for path in damaged)}). Either (1) bring one "
            "back from a copy, or (2) remove them to start from the beginning"
        )
    return None


def _step(path: Path) -> int | None:
    """How far a checkpoint is, without reading its tensors; None if it can't be read."""
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception:  # torch raises many kinds for damaged files
        return None
    return step if isinstance(step, int) else None


def _whole(path: Path) -> bool:
    """Whether all records have their checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


def _put_aside(damaged: Sequence[Path], instead: Found) -> None:
    for path in damaged:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        warnings.warn(
            f"the checkpoint {path} is damaged and now named {path.name}.damaged; the run goes on from {instead.path}, "
            f"step {instead.step}",
            CheckpointWarning,
            stacklevel=4,
        )


def resumed(arguments: Sequence[str]) -> list[str]:
    """Turn `--resume RUN` into the options that go on with a run: its configuration, folder and newest checkpoint.

    Options behind it, as `--trainer.max_epochs 20`, change the configuration; settings that would change the order of
    samples are refused when the data is opened.

    Args:
        arguments: of `mmpt fit`; without `--resume` they are returned as they are.

    Raises:
        CheckpointError: `--resume` without a run folder; see also `newest_checkpoint`.
    """
    given = list(arguments)
    for place, argument in enumerate(given):
        if argument == "--resume":
            if place + 1 == len(given):
                raise CheckpointError("--resume needs the folder of a run")
            run, rest = Path(given[place + 1]), given[:place] + given[place + 2 :]
            break
        if argument.startswith("--resume="):
            run, rest = Path(argument.partition("=")[2]), given[:place] + given[place + 1 :]
            break
    else:
        return given
    if rest[0] != "fit":
        raise CheckpointError(f"--resume goes on with training: `mmpt fit --resume {run}`, not `mmpt {rest[0]}`")
    checkpoint = newest_checkpoint(run)
    options = ["--config", str(run / CONFIG), "--output", str(run)]
    if checkpoint is None:
        warnings.warn(
            f"{run} was stopped before its first checkpoint; it starts from the beginning",
            CheckpointWarning,
            stacklevel=3,
        )
        return [rest[0], *options, *rest[1:]]
    return [rest[0], *options, "--ckpt_path", str(checkpoint), *rest[1:]]
