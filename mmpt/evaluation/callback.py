"""Evaluation during a pretraining run, which goes on as it would without."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mmpt.commands import probe_metrics, retrieval_metrics, zero_shot_metrics
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError
from mmpt.model import MultimodalModel


class EvaluationCallback(Callback):
    """Runs `mmpt evaluate`'s tasks after every so many epochs, and logs their numbers as `evaluation/...`.

    Neither the weights, nor the modes, nor the state of random numbers, nor the position in the data change. In a
    configuration:

        trainer:
          callbacks:
            - class_path: mmpt.evaluation.callback.EvaluationCallback
              init_args: {tasks: [retrieval, knn], modality: image, every_n_epochs: 5}

    Args:
        tasks: what is measured.
        modality: of the samples.
        label: for zero-shot, linear-probe and knn.
        templates: prompts of zero-shot, each with one {}.
        every_n_epochs: training epochs between two evaluations.
        neighbours: k of knn.

    Raises:
        ConfigError: no task, or less than one epoch between two evaluations.
    """

    def __init__(
        self,
        tasks: list[Literal["retrieval", "zero-shot", "linear-probe", "knn"]],
        modality: str,
        label: str = "class",
        templates: list[str] | None = None,
        every_n_epochs: int = 1,
        neighbours: int = 5,
    ) -> None:
        if not tasks or every_n_epochs < 1:
            raise ConfigError(f"tasks {tasks}, every_n_epochs {every_n_epochs}: expected a task, and at least 1")
        self.tasks, self.modality, self.label = tasks, modality, label
        self.templates, self.every_n_epochs, self.neighbours = templates or ["{}"], every_n_epochs, neighbours

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Evaluate where it is time."""
        if (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultimodalData):
            raise ConfigError("EvaluationCallback takes its data from mmpt.MultimodalData")
        own = MultimodalData(data.sources, batch_size=data.eval_batch_size, seed=data.seed)
        own.attach(pl_module.model.processors)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            numbers = self.measure(pl_module.model, own)
        pl_module.log_dict({f"evaluation/{name}": value for name, value in numbers.items()}, batch_size=1)

    def measure(self, model: MultimodalModel, data: MultimodalData) -> dict[str, float]:
        """The numbers of all tasks on the validation split."""
        numbers: dict[str, float] = {}
        for task in self.tasks:
            if task == "retrieval":
                numbers |= retrieval_metrics(model, data, self.modality, "validation")
            elif task == "zero-shot":
                numbers |= zero_shot_metrics(model, data, self.modality, "validation", self.label, self.templates)
            else:
                numbers |= probe_metrics(
                    model, data, self.modality, "validation", self.label, task == "knn", self.neighbours
                )
        return numbers
