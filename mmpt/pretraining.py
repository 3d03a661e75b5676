"""Pretraining: the LightningModule that sums the heads over a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from mmpt.batches import Batch, hash_seed
from mmpt.checkpoint import start_from
from mmpt.errors import ConfigError, NonFiniteLossError
from mmpt.features import Features
from mmpt.heads.head import Head
from mmpt.model import MultimodalModel
from mmpt.optimization import interpolate, parameter_groups, warmup_cosine

FINITE_EVERY = 10
"""Steps between two looks at the losses on a GPU, where each look waits for the device."""


class Pretraining(L.LightningModule):
    """Trains a model with one or several heads; their weighted losses are summed.

    A head whose modalities a batch does not carry rests for that step. Every head's loss and logs are logged as
    `train/<head>/<name>` and `validation/<head>/<name>`.

    Args:
        model: what is trained.
        heads: name -> head.
        pretrained: model folder (`save_pretrained`, an earlier stage's RUN/model) whose weights the model starts from.
            What `model` has and the folder lacks (a connector, cross-attention) starts new, with a warning.
        freeze: modalities that are not trained: their encoder, connector, projection and norm keep the weights they
            start with and stay in evaluation mode (LiT, arXiv 2111.07991). "image.encoder" locks that part alone, so
            that the connector learns (LLaVA's first stage: [text, image.encoder]).
        weights: name -> weight of the head's loss: a number, or [step, weight] points with straight lines between them.
            Heads not named have weight 1; with weight 0 a head is not computed.
        lr: peak learning rate of AdamW.
        weight_decay: on weight matrices; norms, biases, embeddings and temperatures have none.
        betas: of AdamW.
        eps: of AdamW.
        warmup_steps: linear warm-up; then a cosine to zero at the last step.
        total_steps: length of the schedule; None is the length of the run, from the trainer's max_steps or max_epochs.

    Raises:
        ConfigError: a head needs what the model lacks, a weight names no head, or `freeze` no modality.
        CheckpointError: `pretrained` is no model folder, or has weights that the model has no place for.
    """

    def __init__(
        self,
        model: MultimodalModel,
        heads: dict[str, Head],
        pretrained: str | None = None,
        freeze: Sequence[str] = (),
        weights: dict[str, float | list[list[float]]] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        warmup_steps: int = 100,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        if not heads:
            raise ConfigError("Pretraining needs at least one head")
        unknown = set(weights or ()) - set(heads)
        if unknown:
            raise ConfigError(f"weights name {sorted(unknown)}, but the heads are {sorted(heads)}")
        self.model = model
        if pretrained is not None:
            start_from(model, Path(pretrained))
        self.frozen = [part for name in freeze for part in model.parts(name)]
        for part in self.frozen:
            part.requires_grad_(False).eval()
        for name, head in heads.items():
            try:
                head.bind(model)
            except ConfigError as error:
                raise ConfigError(f"head {name!r} ({type(head).__name__}): {error}") from error
        self.heads = nn.ModuleDict(heads)
        self.weights: dict[str, Any] = dict.fromkeys(heads, 1.0) | (weights or {})
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        self._seed: int | None = None

    def train(self, mode: bool = True) -> Pretraining:
        """Switch between training and evaluation; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuse settings that would train something else than what is asked for."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        self._refuse_accumulation()

    def on_train_start(self) -> None:
        """Refuse batches that Lightning has divided between the processes a second time."""
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            raise ConfigError(
                f"Lightning put a {type(sampler).__name__} over the batches, which mmpt.MultimodalData has already "
                "divided between the processes: give the Trainer use_distributed_sampler=False"
            )

    def on_train_epoch_start(self) -> None:
        """A schedule may have changed the accumulation."""
        self._refuse_accumulation()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of masks and dropout."""
        checkpoint["pretraining_seed"] = self._seed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the seed of the run."""
        self._seed = checkpoint["pretraining_seed"]

    def _refuse_accumulation(self) -> None:
        contrastive = [name for name, head in self.heads.items() if head.contrastive]
        if contrastive and self.trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} with the contrastive head "
                f"{contrastive[0]!r}: each small batch would only be compared with itself, so the gradients are not "
                "those of a large batch. Set accumulate_grad_batches to 1 and raise data.batch_size"
            )

    def forward(self, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum of the heads' losses (None where every head rests) and everything to log."""
        features = Features(self.model, batch)
        total: Tensor | None = None
        logs: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            weight = interpolate(self.weights[name], self.global_step)
            assert isinstance(head, Head)
            if weight == 0 or not features.has(head.modalities):
                continue
            output = head(features)
            total = weight * output.loss if total is None else total + weight * output.loss
            logs[f"{name}/loss"] = output.loss.detach()
            logs.update({f"{name}/{key}": value for key, value in output.logs.items()})
        if total is not None:
            logs["loss"] = total.detach()
        return total, logs

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """One step."""
        # Masks and dropout depend on the step and batch alone, not on earlier draws: a resumed run repeats them.
        torch.manual_seed(hash_seed(self._seed or 0, self.global_step, batch.seed))
        loss, logs = self(batch)
        if loss is None:
            return None
        if self.device.type == "cpu" or self.global_step % FINITE_EVERY == 0:
            check_finite(logs, self.global_step)  # reads from the device, so not at every step of a GPU
        self.log_dict({f"train/{name}": value for name, value in logs.items()}, batch_size=len(batch))
        self.log("loss", logs["loss"], prog_bar=True, logger=False, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same losses on held-out data; masks and draws are the same at every validation."""
        self._evaluate(batch, "validation")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same losses on the test split."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(batch.seed)
            _, logs = self(batch)
        self.log_dict(
            {f"{stage}/{name}": value for name, value in logs.items()},
            batch_size=max(1, len(batch)),
            on_epoch=True,
            sync_dist=True,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Embeddings of every modality of the batch: modality -> (batch, embed_dim), and the samples' names."""
        embeddings = {name: self.model.embed(name, inputs) for name, inputs in batch.inputs.items()}
        return {"names": batch.names, **embeddings}

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model's folder; the heads are not part of it."""
        return self.model.save_pretrained(folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine for each step."""
        # In mixed precision Lightning refuses to clip the gradients of a fused optimiser.
        clipped = bool(self.trainer.gradient_clip_val) and "mixed" in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(
            parameter_groups(self, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=None if clipped else True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return warmup_cosine(step, self.warmup_steps, self.warmup_steps)
        if self.total_steps is None:
            # Not asked in configure_optimizers: there it would build the loaders before their state is restored.
            if not self.trainer.training:
                return 1.0
            estimate = self.trainer.estimated_stepping_batches
            if math.isinf(estimate):
                raise ConfigError(
                    "the run has no end that a learning-rate schedule could lead to: give the model total_steps, or "
                    "the trainer max_steps or max_epochs"
                )
            self.total_steps = max(1, int(estimate))
        return warmup_cosine(step, self.warmup_steps, self.total_steps)


def check_finite(logs: dict[str, Tensor], step: int) -> None:
    """Raise where a loss is not a finite number.

    Raises:
        NonFiniteLossError: naming the heads and the step.
    """
    bad = [name for name, value in logs.items() if name.endswith("loss") and not torch.isfinite(value)]
    if bad:
        raise NonFiniteLossError(
            f"{', '.join(f'{name}={float(logs[name])}' for name in bad)} at step {step}; the last checkpoint is from "
            "before it. Usual causes: a learning rate that is too high (try a third), no gradient clipping "
            "(trainer.gradient_clip_val: 1.0), or values in the data that are not finite"
        )
