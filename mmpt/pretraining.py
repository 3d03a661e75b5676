"""Pretraining: the LightningModule that sums the heads over a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from mmpt.adapters import LoRA, has_adaptable_layers, merged
from mmpt.batches import Batch, hash_seed
from mmpt.blocks import compile_blocks, recompute_activations
from mmpt.cached import CachedFeatures, refuse_inexact
from mmpt.checkpoint import save_heads, start_from
from mmpt.distributed import shard
from mmpt.errors import ConfigError, NonFiniteLossError
from mmpt.features import Features
from mmpt.heads.contrastive import Temperature
from mmpt.heads.head import Head
from mmpt.model import MultimodalModel
from mmpt.optimization import interpolate, parameter_groups, warmup_cosine
from mmpt.repeatable import RepeatableModule

FINITE_EVERY = 10
"""Steps between two looks at the losses on a GPU, where each look waits for the device."""


class Pretraining(RepeatableModule):
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
        adapters: part, named as for `freeze` -> low-rank adapters that are trained in place of its weights and merged
            into the saved model (LLaVA with LoRA: freeze [image.encoder], adapters for text.encoder). Projections and
            norms of a modality named as a whole are trained themselves.
        weights: name -> weight of the head's loss: a number, or [step, weight] points with straight lines between them.
            Heads not named have weight 1; with weight 0 a head is not computed.
        sources: name -> the sources of the data that the head learns from, where several sources give other pairs than
            it wants (false statements beside descriptions). Heads not named learn from all.
        lr: peak learning rate of AdamW.
        weight_decay: on weight matrices; norms, biases, embeddings and temperatures have none.
        betas: of AdamW.
        eps: of AdamW.
        warmup_steps: linear warm-up; then a cosine to zero at the last step.
        total_steps: length of the schedule; None is the length of the run, from the trainer's max_steps or max_epochs.
        cached_chunk: encode a training batch this many samples at a time and again in the backward pass: the memory of
            a small batch, the gradients of the large one (`mmpt.cached`). It costs a second forward pass.
        checkpointing: keep only the inputs of transformer layers and run these again in the backward pass: less memory,
            the same gradients (`mmpt.blocks`).
        compile: compile transformer layers with `torch.compile`.
        lr_factors: beginning of parameter names -> factor on `lr`, for parts that are pretrained already, e.g.
            `{"model.modalities.text": 0.02}`; a frozen part (requires_grad False) needs none.

    Raises:
        ConfigError: a head needs what the model lacks, a weight names no head, `freeze` or `adapters` no modality, or
            both name a part.
        CheckpointError: `pretrained` is no model folder, or has weights that the model has no place for.
    """

    def __init__(
        self,
        model: MultimodalModel,
        heads: dict[str, Head],
        pretrained: str | None = None,
        freeze: Sequence[str] = (),
        adapters: dict[str, LoRA] | None = None,
        weights: dict[str, float | list[list[float]]] | None = None,
        sources: dict[str, list[str]] | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        warmup_steps: int = 100,
        total_steps: int | None = None,
        cached_chunk: int | None = None,
        checkpointing: bool = False,
        compile: bool = False,
        lr_factors: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not heads:
            raise ConfigError("Pretraining needs at least one head")
        unknown = set(weights or ()) - set(heads)
        if unknown:
            raise ConfigError(f"weights name {sorted(unknown)}, but the heads are {sorted(heads)}")
        if unknown := set(sources or ()) - set(heads):
            raise ConfigError(f"sources name {sorted(unknown)}, but the heads are {sorted(heads)}")
        self.sources = sources or {}
        self.model, self.pretrained = model, pretrained
        if pretrained is not None:
            start_from(model, Path(pretrained))
        self.frozen = [part for name in freeze for part in model.parts(name)]
        for part in self.frozen:
            part.requires_grad_(False).eval()
        self.adapters = adapters or {}
        for name, adapter in self.adapters.items():
            for part in model.parts(name):
                if any(part is other for other in self.frozen):
                    raise ConfigError(f"{name} is in freeze and in adapters; leave one out")
                if has_adaptable_layers(part):
                    adapter.inject(part)
        for name, head in heads.items():
            try:
                head.bind(model)
            except ConfigError as error:
                raise ConfigError(f"head {name!r} ({type(head).__name__}): {error}") from error
        self.heads = nn.ModuleDict(heads)
        self.weights: dict[str, Any] = dict.fromkeys(heads, 1.0) | (weights or {})
        self.lr, self.weight_decay, self.betas, self.eps = lr, weight_decay, betas, eps
        self.warmup_steps, self.total_steps = warmup_steps, total_steps
        if cached_chunk is not None and cached_chunk < 1:
            raise ConfigError(f"cached_chunk is {cached_chunk}; it must be at least 1, or null for whole batches")
        self.cached_chunk = cached_chunk
        self.lr_factors = lr_factors
        if checkpointing:
            recompute_activations(self)
        if compile:
            compile_blocks(self)
        self._sharded = False

    def train(self, mode: bool = True) -> Pretraining:
        """Switch between training and evaluation; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def on_fit_start(self) -> None:
        """Refuse settings that would train something else than what is asked for."""
        super().on_fit_start()
        self._refuse_accumulation()
        if self.cached_chunk is not None:
            refuse_inexact(self.model)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Keep temperatures within their bounds: here, as parameters that are sharded change outside `forward` only."""
        for part in self.heads.modules():
            if isinstance(part, Temperature):
                part.bound()

    def on_train_epoch_start(self) -> None:
        """Tell the heads; and a schedule may have changed the accumulation."""
        self._refuse_accumulation()
        for head in self.heads.values():
            assert isinstance(head, Head)
            head.start_epoch(self.current_epoch)

    def _refuse_accumulation(self) -> None:
        contrastive = [name for name, head in self.heads.items() if head.contrastive]
        if contrastive and self.trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                f"accumulate_grad_batches={self.trainer.accumulate_grad_batches} with the contrastive head "
                f"{contrastive[0]!r}: each small batch would only be compared with itself, so the gradients are not "
                "those of a large batch. Set accumulate_grad_batches to 1, raise data.batch_size, and where memory "
                "does not suffice set model.cached_chunk to the batch that fits (the gradients are exact)"
            )

    def configure_model(self) -> None:
        """Shard the parameters where the strategy is Lightning's ModelParallelStrategy (FSDP2)."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._sharded:
            assert self.device_mesh is not None
            shard(self, self.device_mesh["data_parallel"])
            self._sharded = True

    def forward(self, batch: Batch) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The weighted sum of the heads' losses (None where every head rests) and everything to log."""
        seed = hash_seed(self._seed or 0, self.global_step) if self.training else torch.initial_seed()
        features = Features(self.model, batch, seed)
        if self.cached_chunk is not None and len(batch) > self.cached_chunk and torch.is_grad_enabled():
            features = CachedFeatures(self.model, batch, self.cached_chunk, seed)
        total: Tensor | None = None
        logs: dict[str, Tensor] = {}
        for name, head in self.heads.items():
            weight = interpolate(self.weights[name], self.global_step)
            assert isinstance(head, Head)
            if weight == 0 or not features.has(head.modalities):
                continue
            if batch.source not in self.sources.get(name, [batch.source]):
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
        self.seed_step(batch)
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

    def facts(self) -> dict[str, Any]:
        """See `RepeatableModule`."""
        return super().facts() | {
            "starts from": "/".join(Path(self.pretrained).parts[-2:]) if self.pretrained else "random weights"
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the model's folder, and beside the model the heads, for `mmpt.checkpoint.load_heads`."""
        model = cast(MultimodalModel, merged(self.model)) if self.adapters else self.model
        folder = model.save_pretrained(folder)
        save_heads({name: head for name, head in self.heads.items() if isinstance(head, Head)}, folder)
        return folder

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine for each step."""
        # In mixed precision Lightning refuses to clip the gradients of a fused optimiser.
        clipped = bool(self.trainer.gradient_clip_val) and "mixed" in str(self.trainer.precision)
        optimizer = torch.optim.AdamW(
            parameter_groups(self, self.weight_decay, self.lr, self.lr_factors),
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
