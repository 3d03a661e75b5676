"""Trainings that go on after a crash as if nothing had happened: what both LightningModules of mmpt share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data.distributed import DistributedSampler

from mmpt.batches import Batch, hash_seed
from mmpt.errors import ConfigError
from mmpt.evaluation.record import Evaluation


class RepeatableModule(L.LightningModule):
    """Steps that depend on the seed of the run, the step and the batch alone, so that a resumed run repeats them.

    A subclass calls `seed_step` at the beginning of `training_step`, and the methods of this class in those hooks that
    it has itself.

    Attributes:
        summary: numbers of the validation that the saved model had; empty where none were kept.
        evaluation: of the last test, where the module makes one.
    """

    summary: dict[str, float]
    evaluation: Evaluation | None

    def __init__(self) -> None:
        super().__init__()
        self.summary = {}
        self.evaluation = None
        self._seed: int | None = None
        self._validated = True  # nothing was trained since the last validation
        self._validation_due = False

    def callbacks(self, run: Path) -> list[Callback]:
        """What the module wants done besides training.

        Args:
            run: the run folder.
        """
        return []

    @property
    def plain_model(self) -> nn.Module:
        """The model as a folder holds it."""
        return self.model  # type: ignore[return-value]

    def facts(self) -> dict[str, Any]:
        """What run.json and the model card say of the module."""
        return {"task": type(self).__name__, "seed": self._seed}

    def seed_step(self, batch: Batch) -> None:
        """Masks and dropout depend on the step and batch alone, not on earlier draws: a resumed run repeats them."""
        torch.manual_seed(hash_seed(self._seed or 0, self.global_step, batch.seed))
        self._validated = False

    def on_fit_start(self) -> None:
        """Take the seed of the run."""
        if self._seed is None:
            self._seed = torch.initial_seed()

    def on_train_start(self) -> None:
        """Refuse batches that Lightning has divided between the processes a second time; make up for a validation."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            raise ConfigError(
                f"Lightning put a {type(sampler).__name__} over the batches, which mmpt.MultimodalData has already "
                "divided between the processes: give the Trainer use_distributed_sampler=False"
            )
        if self._validation_due:
            # The run was stopped between the last step of an epoch and its validation, which Lightning would leave out.
            self._validation_due = False
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def on_validation_epoch_end(self) -> None:
        """Note that there was a validation."""
        self._validated = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of masks and dropout, and whether the validation of the epoch is still to come."""
        checkpoint["pretraining_seed"] = self._seed
        loop = self.trainer.fit_loop
        last = loop.epoch_loop.batch_progress.is_last_batch
        checkpoint["validation_due"] = bool(
            last and not self._validated and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the run."""
        self._seed = checkpoint["pretraining_seed"]
        self._validation_due = checkpoint["validation_due"]
        mend_progress(checkpoint["loops"]["fit_loop"])


def mend_progress(loop: dict[str, Any]) -> None:
    """Set right what Lightning counts wrongly in a run that was resumed before, in the state of its fit loop.

    There an epoch that goes on counts as finished, and the validation before it as half done. A second resume would
    leave out validations and let the last steps of an epoch be the first of the next.
    """
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    within_step = batches["total"]["completed"] < batches["total"]["processed"]
    within_epoch = batches["current"]["ready"] > 0 and not batches["is_last_batch"]
    if (within_step or within_epoch) and epochs["total"]["ready"] == epochs["total"]["completed"]:
        for counts in (epochs["total"], epochs["current"]):
            counts["ready"] += 1
            counts["started"] += 1
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for counts in (validation["total"], validation["current"]):
        counts.update(dict.fromkeys(counts, 0))
