"""FineTuning: a pretrained model folder and own data -> a model tuned for one task, and honest numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch import Tensor

from mmpt.adapters import LoRA, depths, has_adaptable_layers, merged
from mmpt.batches import Batch, hash_seed
from mmpt.best import BestCheckpoint
from mmpt.blocks import compile_blocks, recompute_activations
from mmpt.checkpoint import load_weights
from mmpt.config import from_config, packages
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError
from mmpt.evaluation.record import Evaluation
from mmpt.features import Features
from mmpt.masking import MaskingPolicy
from mmpt.model import MultimodalModel
from mmpt.model_card import CLASSIFIER, TASK
from mmpt.optimization import parameter_groups, warmup_cosine
from mmpt.pretraining import FINITE_EVERY, check_finite
from mmpt.repeatable import RepeatableModule
from mmpt.report_data import MetricRow
from mmpt.task_heads import TaskHead
from mmpt.tasks import TASKS, Task, TaskOptions
from mmpt.tasks.labels import LabelTask
from mmpt.tasks.task import ClassWeights

TaskName = Literal["classification", "multilabel", "tagging", "regression", "matching", "retrieval", "generation"]


class FineTuning(RepeatableModule):
    """Tunes a pretrained model for one task.

    | task           | learns                                       | the data gives                         |
    |----------------|----------------------------------------------|----------------------------------------|
    | classification | one class of each sample                     | an integer label                       |
    | multilabel     | any number of labels of each sample          | a 0 or 1 for each label name           |
    | tagging        | a class of each unit of a sample             | `Encoder.unit_labels`                  |
    | regression     | a number                                     | a number                               |
    | matching       | whether a text belongs to a sample           | texts, and a 0 or 1 or only true pairs |
    | retrieval      | embeddings that bring samples and texts together | texts                              |
    | generation     | the text of a sample                         | texts                                  |

    Labels are read from the data; a table of labels joins any data by `mmpt.labels.Labelled`. The folder that is saved
    holds the tuned model, the task's own layers and its label names; given as `pretrained` again, it predicts without
    training. The checkpoint with the best validation metric is what is saved.

    Args:
        pretrained: model folder (`save_pretrained`, a recipe's RUN/model). A checkpoint is no way in: loading one
            would overrule the configuration.
        modality: what is tuned.
        label: the label of the data that is learned; for tagging a label of the units (`Encoder.unit_labels`).
        task: see the table.
        head: from tokens to scores, for tasks with labels; by default one linear layer on the modality's pooling, or on
            each unit's token.
        encoder: arguments of the modality's encoder that shall differ from the folder's, e.g. {dropout: 0.2}: what is
            hidden or augmented in pretraining may be too much for tuning.
        masking: in every second training batch, drawn at random, hide units of the input; for tagging the hidden ones
            are left out of the loss.
        freeze: train the task's own layers only (linear probing).
        from_scratch: keep the folder's architecture and start from random weights, as a baseline.
        adapter: train low-rank adapters instead of the weights; they are merged into the saved model.
        layer_decay: factor on the learning rate from each block to the one below it (BEiT: 0.65 to 0.9); 1 is none.
        unfreeze_every: gradual unfreezing (ULMFiT, arXiv 1801.06146): begin with the task's own layers and add the
            next block from the top after so many steps.
        class_weights: "balanced" makes up for unequal classes; or a weight for each label.
        focal: gamma of the focal loss; 0 is cross-entropy.
        patience: stop after so many validations without a better one; null never stops early.
        monitor: metric of the best checkpoint, e.g. validation/classification/macro_f1; null is the task's own.
        keep: "best" saves the model of the best validation, "last" that of the last step.
        lr: peak learning rate of AdamW.
        weight_decay: on weight matrices.
        warmup_steps: linear warm-up, then cosine to zero.
        label_smoothing: of the cross-entropy.
        checkpointing: see `mmpt.Pretraining`.
        compile: see there.
        trust: packages besides mmpt whose classes the folder may name.

    Raises:
        ConfigError: options that exclude each other or have no meaning for the task.
    """

    def __init__(
        self,
        pretrained: str,
        modality: str,
        label: str = "class",
        task: TaskName = "classification",
        head: TaskHead | None = None,
        encoder: dict[str, Any] | None = None,
        masking: MaskingPolicy | None = None,
        freeze: bool = False,
        from_scratch: bool = False,
        adapter: LoRA | None = None,
        layer_decay: float = 1.0,
        unfreeze_every: int | None = None,
        class_weights: ClassWeights = "none",
        focal: float = 0.0,
        patience: int | None = None,
        monitor: str | None = None,
        keep: Literal["best", "last"] = "best",
        lr: float = 5e-4,
        weight_decay: float = 0.05,
        warmup_steps: int = 20,
        label_smoothing: float = 0.0,
        checkpointing: bool = False,
        compile: bool = False,
        trust: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if task not in TASKS:
            raise ConfigError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
        if freeze and (adapter is not None or unfreeze_every is not None or layer_decay != 1):
            raise ConfigError("freeze leaves nothing for adapter, unfreeze_every and layer_decay; leave one side out")
        if adapter is not None and from_scratch:
            raise ConfigError("adapters on random weights learn nothing of use; leave out adapter or from_scratch")
        if not 0 < layer_decay <= 1 or (unfreeze_every is not None and unfreeze_every < 1):
            raise ConfigError(
                f"layer_decay is {layer_decay}, unfreeze_every {unfreeze_every}; expected above 0 to 1, and at least 1"
            )
        changed = {modality: encoder} if encoder else None
        self.model = MultimodalModel.from_pretrained(pretrained, trust=list(trust), encoders=changed)
        if from_scratch:
            self.model = rebuilt(self.model)
        self.model.train()
        options = TaskOptions(modality, label, head, masking, class_weights, focal, label_smoothing)
        self.task = TASKS[task](self.model, options)
        self.pretrained, self.from_scratch = Path(pretrained), from_scratch
        self.modality, self.label, self.frozen, self.adapter = modality, label, freeze, adapter
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.layer_decay, self.unfreeze_every = layer_decay, unfreeze_every
        self.patience, self.keep = patience, keep
        self.monitor = monitor or f"validation/{self.task.name}/{self.task.monitor}"
        self._restore(trust)
        parts = self.task.trained(self.model)
        self.model.requires_grad_(False)
        if not freeze:
            for part in parts:
                if adapter is not None and has_adaptable_layers(part):
                    adapter.inject(part)
                elif adapter is None:
                    part.requires_grad_(True)
        self._ready = False
        self.depths = depths(parts)
        self._top = max(self.depths.values(), default=0)
        self._thawing = [p for p in self.model.parameters() if p.requires_grad]
        if checkpointing:
            recompute_activations(self.model)
        if compile:
            compile_blocks(self.model)

    def _restore(self, trust: Sequence[str]) -> None:
        """Take the task's layers from the folder, if it was tuned for this task."""
        if not (self.pretrained / TASK).is_file():
            return
        facts = json.loads((self.pretrained / TASK).read_text(encoding="utf-8"))
        if (facts["task"], facts["modality"], facts["label"]) == (self.task.name, self.modality, self.label):
            self.task.restore(facts, trust)
            load_weights(self.task, self.pretrained / CLASSIFIER)

    @property
    def head(self) -> TaskHead:
        """What turns tokens into scores, for tasks with labels."""
        return cast(LabelTask, self.task).head

    @property
    def label_names(self) -> list[str]:
        """Names of the labels, for tasks with labels."""
        return cast(LabelTask, self.task).label_names

    def train(self, mode: bool = True) -> FineTuning:
        """Switch between training and evaluation; a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def callbacks(self, run: Path) -> list[Callback]:
        """The best checkpoint, and early stopping."""
        mode = "min" if MetricRow(self.monitor, 0.0, {}).lower_is_better else "max"
        found: list[Callback] = []
        if self.keep == "best":
            found.append(
                BestCheckpoint(
                    str(run / "checkpoints"),
                    filename="best",
                    monitor=self.monitor,
                    mode=mode,
                    save_on_train_epoch_end=False,
                    enable_version_counter=False,
                )
            )
        if self.patience is not None:
            found.append(EarlyStopping(self.monitor, patience=self.patience, mode=mode, check_on_train_epoch_end=False))
        return found

    def setup(self, stage: str) -> None:
        """Read the label set from the data.

        Raises:
            DataError: the data has no such label, or a saved classifier has other names.
        """
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MultimodalData):
            raise ConfigError("FineTuning takes its data from mmpt.MultimodalData")
        self.task.prepare(list(data.sources.values()), training=stage == "fit")
        self.task.to(self.device)
        self._ready = True

    def configure_model(self) -> None:
        """Build the task's layers where a callback copies the module before `setup`, as weight averaging does."""
        if not self._ready:
            self.setup(self.trainer.state.fn or "")

    def on_fit_start(self) -> None:
        """Refuse what would train something else than what is asked for."""
        super().on_fit_start()
        if self.unfreeze_every is not None and self.trainer.world_size > 1:
            raise ConfigError("unfreeze_every changes what is trained during the run, which DDP can't; use one process")

    def features(self, batch: Batch) -> Features:
        """What the task reads of a batch."""
        seed = hash_seed(self._seed or 0, self.global_step) if self.training else batch.seed
        return Features(self.model, batch, seed)

    def forward(self, batch: Batch) -> Tensor:
        """Scores of tasks with labels: (batch, labels), or (batch, length, labels) for tagging."""
        return cast(LabelTask, self.task).scores(self.features(batch))[0]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """The loss of the task."""
        if not batch.inputs:
            return None
        self.seed_step(batch)
        self.thaw(self.global_step)
        loss, more = self.task(self.features(batch))
        logs = {f"{self.task.name}/loss": loss.detach(), **{f"{self.task.name}/{k}": v for k, v in more.items()}}
        if self.device.type == "cpu" or self.global_step % FINITE_EVERY == 0:
            check_finite(logs, self.global_step)
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        self.log("loss", loss.detach(), prog_bar=True, logger=False, batch_size=len(batch))
        return loss

    def thaw(self, step: int) -> None:
        """Let the blocks learn that gradual unfreezing has reached by this step."""
        if self.unfreeze_every is None:
            return
        lowest = self._top + 1 - step // self.unfreeze_every
        for parameter in self._thawing:
            parameter.requires_grad_(self.depths.get(id(parameter), 0) >= lowest)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, and notes for the metrics."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss, and notes for the metrics."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        if not batch.inputs:
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch.seed)
            features = self.features(batch)
            values = self.task.evaluate(features)
        self.log_dict(
            {f"{stage}/{self.task.name}/{name}": value for name, value in values.items()},
            batch_size=self.task.weight(features),
            on_epoch=True,
            sync_dist=True,
        )

    def on_validation_epoch_end(self) -> None:
        """Metrics of the whole split."""
        super().on_validation_epoch_end()
        self._finish("validation")

    def on_test_epoch_end(self) -> None:
        """Metrics of the whole split with intervals, and the tables of classes in `evaluation`."""
        found = self._finish("test")
        self.evaluation = found.with_intervals().prefixed(f"test/{self.task.name}")

    def _finish(self, stage: str) -> Evaluation:
        found = self.task.finish()
        self.log_dict({f"{stage}/{self.task.name}/{name}": value for name, value in found.metrics.items()})
        return found

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The samples' names and what the task says of each; for tagging lists, unit by unit."""
        if not batch.inputs:
            return {"names": []}
        return {"names": batch.names, **self.task.predict(self.features(batch))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the numbers of the last validation beside the weights."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["metrics"] = {
            name: float(value)
            for name, value in self.trainer.callback_metrics.items()
            if name.startswith("validation/")
        }

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine, and with `layer_decay` a learning rate for each block."""
        for parameter in self._thawing:
            parameter.requires_grad_(True)
        factors = None
        if self.layer_decay != 1:
            factors = {
                name: self.layer_decay ** (self._top + 1 - self.depths.get(id(p), self._top + 1))
                for name, p in self.named_parameters()
                if p.requires_grad
            }
        groups = parameter_groups(self, self.weight_decay, self.lr, factors)
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps or not self.trainer.training:
            return warmup_cosine(step, max(1, self.warmup_steps), max(1, self.warmup_steps))
        return warmup_cosine(step, self.warmup_steps, int(self.trainer.estimated_stepping_batches))

    @property
    def plain_model(self) -> MultimodalModel:
        """The tuned model, adapters merged."""
        return self.model if self.adapter is None else cast(MultimodalModel, merged(self.model))

    def facts(self) -> dict[str, Any]:
        """See `RepeatableModule`."""
        begin = "the architecture of {}, random weights" if self.from_scratch else "{}"
        return super().facts() | {
            "task": f"{self.task.name} of {self.modality}: {self.label}",
            "starts from": begin.format("/".join(self.pretrained.parts[-2:])),
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the tuned model's folder, adapters merged, with the task's own layers and its label names."""
        folder = self.plain_model.save_pretrained(folder)
        state = {name: value.contiguous() for name, value in self.task.state_dict().items()}
        save_file(state, folder / CLASSIFIER)
        facts = {"task": self.task.name, "modality": self.modality, "label": self.label, **self.task.facts()}
        (folder / TASK).write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
        return folder


def rebuilt(model: MultimodalModel) -> MultimodalModel:
    """The same architecture with new random weights."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.config(Path(folder))
        return from_config(config, folder=Path(folder), trust=sorted(packages(config)))


__all__ = ["FineTuning", "Task"]
