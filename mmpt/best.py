"""The best checkpoint of a run, by a metric of the validation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the best value of a metric, and gives its weights back when training ends.

    The checkpoint holds the metrics of its validation. What is saved after training is the best model.
    """

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Load the best weights."""
        super().on_train_end(trainer, pl_module)
        if self.best_model_path:
            checkpoint = torch.load(self.best_model_path, map_location="cpu", weights_only=True)
            pl_module.load_state_dict(checkpoint["state_dict"])
            pl_module.summary = checkpoint["metrics"] | {"best_step": checkpoint["global_step"]}
