"""FineTuning: a pretrained model folder and labelled data -> a classifier of samples or a tagger of their units."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from mmpt.batches import Batch
from mmpt.blocks import compile_blocks, recompute_activations
from mmpt.checkpoint import load_weights
from mmpt.config import from_config, packages, to_config
from mmpt.data import MultimodalData
from mmpt.encoder import IGNORED, KEEP
from mmpt.errors import ConfigError, DataError
from mmpt.masking import MaskingPolicy
from mmpt.model import MultimodalModel
from mmpt.optimization import parameter_groups, warmup_cosine
from mmpt.pretraining import FINITE_EVERY, check_finite
from mmpt.task_heads import PooledHead, TaskHead, UnitHead

CLASSIFIER, TASK = "classifier.safetensors", "task.json"


class FineTuning(L.LightningModule):
    """Classification of one modality's samples, or tagging of their units.

    The label set is read from the data. The folder that is saved holds the tuned model, the classifier and the label
    names; given as `pretrained` again, it classifies without training.

    Args:
        pretrained: model folder (`save_pretrained`, a recipe's RUN/model). A checkpoint is no way in: loading one
            would overrule the configuration.
        modality: what is classified.
        label: the label of the data that is learned; for tagging a label of the units (`Encoder.unit_labels`).
        task: "classification" of samples, or "tagging" of their units.
        head: from tokens to scores; by default one linear layer on the modality's pooling, or on each unit's token.
        masking: in training, hide units of the input; for tagging the hidden ones are left out of the loss.
        freeze: train the classifier only (linear probing).
        from_scratch: keep the folder's architecture and start from random weights, as a baseline.
        lr: peak learning rate of AdamW.
        weight_decay: on weight matrices.
        warmup_steps: linear warm-up, then cosine to zero.
        label_smoothing: of the cross-entropy.
        checkpointing: see `mmpt.Pretraining`.
        compile: see there.
        trust: packages besides mmpt whose classes the folder may name.
    """

    def __init__(
        self,
        pretrained: str,
        modality: str,
        label: str = "class",
        task: Literal["classification", "tagging"] = "classification",
        head: TaskHead | None = None,
        masking: MaskingPolicy | None = None,
        freeze: bool = False,
        from_scratch: bool = False,
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        warmup_steps: int = 20,
        label_smoothing: float = 0.0,
        checkpointing: bool = False,
        compile: bool = False,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if task not in ("classification", "tagging"):
            raise ConfigError(f"task is {task!r}; choose 'classification' or 'tagging'")
        self.task = task
        self.head = head or (UnitHead() if task == "tagging" else PooledHead())
        if self.head.per_unit != (task == "tagging"):
            kind = "each unit" if self.head.per_unit else "whole samples"
            raise ConfigError(f"the head {type(self.head).__name__} scores {kind}, which is not {task}")
        self.masking = masking
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
            if tower.through_text:
                self.model.text.requires_grad_(True)
        if checkpointing:
            recompute_activations(self.model)
        if compile:
            compile_blocks(self.model)
        self.label_names: list[str] = []
        saved = self.pretrained / TASK
        if saved.is_file():
            facts = json.loads(saved.read_text(encoding="utf-8"))
            if (facts["task"], facts["modality"], facts["label"]) == (task, modality, label):
                self.head = from_config(facts["head"], trust=list(trust))
                self._build_head(facts["label_names"])
                load_weights(self.head, self.pretrained / CLASSIFIER)

    def _build_head(self, names: Sequence[str]) -> None:
        self.label_names = list(names)
        count = len(names)
        self.head.build(self.model.pooled_width(self.modality), count)
        self.metrics = nn.ModuleDict(
            {
                stage: nn.ModuleDict(
                    {
                        "accuracy": MulticlassAccuracy(count, average="micro", ignore_index=IGNORED),
                        "macro_f1": MulticlassF1Score(count, average="macro", ignore_index=IGNORED),
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
            self._build_head(names)
        elif list(names) != self.label_names:
            raise DataError(f"the data's labels {names[:5]}... are not those of the folder: {self.label_names[:5]}...")

    def forward(self, batch: Batch) -> Tensor:
        """Scores: (batch, labels), or (batch, length, labels) for tagging."""
        return self._scores(batch)[0]

    def _scores(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Scores, and what they are compared with: (batch,) or (batch, length), `IGNORED` where nothing is."""
        tower = self.model.modality(self.modality)
        inputs, targets = batch.inputs[self.modality], batch.labels.get(self.label)
        if self.task == "tagging":
            inputs, targets = tower.encoder.unit_labels(inputs, self.label)
        corruption = None
        if self.training and self.masking is not None:
            encoder = tower.encoder
            corruption = self.masking(encoder.units(inputs), encoder.groups(inputs), encoder.max_units(inputs))
            if self.task == "tagging" and targets is not None:
                targets = targets.masked_fill(corruption.action != KEEP, IGNORED)
        tokens = tower.encoder(inputs, corruption)
        if tower.through_text:
            tokens = self.model.contextualize(self.modality, tokens)
        return self.head(tokens, tower.pool), targets

    def _loss(self, scores: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over what has a label; 0 where nothing has one."""
        losses = F.cross_entropy(
            scores.flatten(0, -2).float(),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=label_smoothing,
        )
        return losses / (targets != IGNORED).sum().clamp(min=1)

    def _targets(self, targets: Tensor | None) -> Tensor:
        if targets is None:
            raise DataError(f"the data has samples without the label {self.label!r}")
        return targets

    def on_train_epoch_start(self) -> None:
        """A frozen tower stays in evaluation mode."""
        if self.frozen:
            self.model.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Cross-entropy."""
        if not batch.inputs:
            return None
        scores, targets = self._scores(batch)
        loss = self._loss(scores, self._targets(targets), self.label_smoothing)
        logs = {f"{self.task}/loss": loss.detach()}
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
        scores, found = self._scores(batch)
        targets = self._targets(found)
        weight = max(1, int((targets != IGNORED).sum()))
        self.log(f"{stage}/{self.task}/loss", self._loss(scores, targets), batch_size=weight)
        for name, metric in self.metrics[stage].items():  # type: ignore[operator]
            metric.update(scores.flatten(0, -2), targets.flatten())
            self.log(f"{stage}/{self.task}/{name}", metric, batch_size=weight, on_epoch=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The name, predicted label and its probability of each sample; for tagging lists of them, unit by unit."""
        probability, index = self(batch).softmax(-1).max(-1)
        if self.task == "classification":
            labels: list[Any] = [self.label_names[i] for i in index.tolist()]
            return {"names": batch.names, "label": labels, "probability": probability.tolist()}
        units = self.model.modality(self.modality).encoder.units(batch.inputs[self.modality])
        labels = [[self.label_names[i] for i in row[real].tolist()] for row, real in zip(index, units, strict=True)]
        shares = [row[real].tolist() for row, real in zip(probability, units, strict=True)]
        return {"names": batch.names, "label": labels, "probability": shares}

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
        save_file({name: value.contiguous() for name, value in self.head.state_dict().items()}, folder / CLASSIFIER)
        facts = {
            "task": self.task,
            "modality": self.modality,
            "label": self.label,
            "label_names": self.label_names,
            "head": to_config(self.head),
        }
        (folder / TASK).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        return folder


def rebuilt(model: MultimodalModel) -> MultimodalModel:
    """The same architecture with new random weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.config(Path(folder))
        return from_config(config, folder=Path(folder), trust=sorted(packages(config)))
