"""FineTuning: a pretrained model folder and labelled data -> a classifier."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mmpt.batches import Batch
from mmpt.checkpoint import load_weights
from mmpt.config import from_config, packages
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError, DataError
from mmpt.model import MultimodalModel
from mmpt.optimization import parameter_groups, warmup_cosine
from mmpt.pretraining import FINITE_EVERY, check_finite

CLASSIFIER, TASK = "classifier.safetensors", "task.json"


class FineTuning(L.LightningModule):
    """Classification of one modality's samples with a linear layer on the pooled encoder.

    The label set is read from the data. The folder that is saved holds the tuned model, the classifier and the label
    names; given as `pretrained` again, it classifies without training.

    Args:
        pretrained: model folder (`save_pretrained`, a recipe's RUN/model). A checkpoint is no way in: loading one
            would overrule the configuration.
        modality: what is classified.
        label: the label of the data that is learned.
        freeze: train the classifier only (linear probing).
        from_scratch: keep the folder's architecture and start from random weights, as a baseline.
        lr: peak learning rate of AdamW.
        weight_decay: on weight matrices.
        dropout: before the classifier.
        warmup_steps: linear warm-up, then cosine to zero.
        label_smoothing: of the cross-entropy.
        trust: packages besides mmpt whose classes the folder may name.
    """

    def __init__(
        self,
        pretrained: str,
        modality: str,
        label: str = "class",
        freeze: bool = False,
        from_scratch: bool = False,
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        dropout: float = 0.1,
        warmup_steps: int = 20,
        label_smoothing: float = 0.0,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.model = MultimodalModel.from_pretrained(pretrained, trust=list(trust))
        if from_scratch:
            self.model = rebuilt(self.model)
        self.model.train()
        self.pretrained = Path(pretrained)
        self.modality, self.label, self.frozen = modality, label, freeze
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.label_smoothing = label_smoothing
        tower = self.model.modality(modality)
        self.model.requires_grad_(False)
        if not freeze:
            tower.requires_grad_(True)
        self.dropout = nn.Dropout(dropout)
        self.label_names: list[str] = []
        task = self.pretrained / TASK
        if task.is_file():
            facts = json.loads(task.read_text(encoding="utf-8"))
            if facts["modality"] == modality and facts["label"] == label:
                self._make_classifier(facts["label_names"])
                load_weights(self.classifier, self.pretrained / CLASSIFIER)

    def _make_classifier(self, names: Sequence[str]) -> None:
        self.label_names = list(names)
        count = len(names)
        self.classifier = nn.Linear(self.model.modality(self.modality).encoder.width, count)
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {
                        "accuracy": MulticlassAccuracy(count, average="micro"),
                        "macro_f1": MulticlassF1Score(count, average="macro"),
                    }
                )
                for stage in ("validation", "test")
            }
        )

    def setup(self, stage: str) -> None:
        """Read the label set from the data.

        Raises:
            DataError: the data has no such label, or a saved classifier has other names.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultimodalData):
            raise ConfigError("FineTuning takes its data from mmpt.MultimodalData")
        names = [name for source in data.sources.values() for name in source.label_names(self.label)]
        if len(names) < 2:
            raise DataError(
                f"the data has {len(names)} values of the label {self.label!r}; classification needs at least two. "
                "Sources say their labels with `label_names`"
            )
        if not self.label_names:
            self._make_classifier(names)
        elif list(names) != self.label_names:
            raise DataError(f"the data's labels {names[:5]}... are not those of the folder: {self.label_names[:5]}...")

    def forward(self, batch: Batch) -> Tensor:
        """(batch, labels) logits."""
        tower = self.model.modality(self.modality)
        pooled = tower.pool(tower.encoder(batch.inputs[self.modality]))
        return self.classifier(self.dropout(pooled))

    def on_train_epoch_start(self) -> None:
        """A frozen tower stays in evaluation mode."""
        if self.frozen:
            self.model.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Cross-entropy."""
        if not batch.inputs:
            return None
        logits = self(batch)
        loss = F.cross_entropy(logits, batch.labels[self.label], label_smoothing=self.label_smoothing)
        logs = {"classification/loss": loss.detach()}
        if self.device.type == "cpu" or self.global_step % FINITE_EVERY == 0:
            check_finite(logs, self.global_step)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, accuracy and macro F1."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, accuracy and macro F1."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        if not batch.inputs:
            return
        logits, labels = self(batch), batch.labels[self.label]
        self.log(f"{stage}/classification/loss", F.cross_entropy(logits, labels), batch_size=len(batch))
        for name, metric in self.metrics[stage].items():  # type: ignore[operator]
            metric.update(logits, labels)
            self.log(f"{stage}/classification/{name}", metric, batch_size=len(batch), on_epoch=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The name, predicted label and its probability of each sample."""
        probability, index = self(batch).softmax(-1).max(-1)
        labels = [self.label_names[i] for i in index.tolist()]
        return {"names": batch.names, "label": labels, "probability": probability.tolist()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine."""
        optimizer = torch.optim.AdamW(parameter_groups(self, self.weight_decay), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps or not self.trainer.training:
            return warmup_cosine(step, max(1, self.warmup_steps), max(1, self.warmup_steps))
        return warmup_cosine(step, self.warmup_steps, int(self.trainer.estimated_stepping_batches))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the tuned model's folder with the classifier and its label names."""
        folder = self.model.save_pretrained(folder)
        save_file(
            {name: value.contiguous() for name, value in self.classifier.state_dict().items()}, folder / CLASSIFIER
        )
        facts = {
            "task": "classification",
            "modality": self.modality,
            "label": self.label,
            "label_names": self.label_names,
        }
        (folder / TASK).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        return folder


def rebuilt(model: MultimodalModel) -> MultimodalModel:
    """The same architecture with new random weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.config(Path(folder))
        return from_config(config, folder=Path(folder), trust=sorted(packages(config)))
