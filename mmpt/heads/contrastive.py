"""Contrastive heads: pairs of modalities, and members of a group."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mmpt.distributed import gather
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.losses.contrastive import (
    ContrastiveResult,
    SameGroup,
    grouped_contrastive,
    sigmoid_contrastive,
    softmax_contrastive,
)


class Temperature(nn.Module):
    """A learnable scale, 1 / temperature, kept as a logarithm (1,) and bounded.

    Args:
        temperature: where it starts; 0.07 in CLIP.
        learnable: whether it is trained.
        max_scale: the scale never exceeds this; 100 in CLIP.
    """

    def __init__(self, temperature: float = 0.07, learnable: bool = True, max_scale: float = 100.0) -> None:
        super().__init__()
        if temperature <= 0 or 1 / temperature > max_scale * (1 + 1e-6):
            raise ConfigError(
                f"temperature is {temperature}; it must be positive and at least 1 / max_scale = {1 / max_scale:g}"
            )
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(temperature)]), requires_grad=learnable)
        self.max_log = math.log(max_scale)

    def forward(self) -> Tensor:
        """The scale, a scalar."""
        self.bound()
        return self.logit_scale.exp().squeeze(0)

    @torch.no_grad()
    def bound(self) -> None:
        """Bring the parameter back into its bounds: behind a clamp it would have no gradient and never come back."""
        self.logit_scale.clamp_(max=self.max_log)


class ContrastiveHead(Head):
    """Pulls the two modalities of a sample together and pushes those of different samples apart.

    Args:
        first: a modality.
        second: another one, or the same: then two passes with different dropout are compared (SimCSE, arXiv
            2104.08821).
        loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
        same_group: what samples with equal `group` labels are to each other; see `mmpt.losses.contrastive`.
        temperature: start of the temperature; 0.07 in CLIP, 0.1 in SigLIP, 0.05 in LangCell.
        learn_temperature: whether it is trained.
        bias: start of the sigmoid loss's bias.
        chunk: rows of the loss at a time; a larger batch needs memory that grows with its size instead of its square.
    """

    contrastive = True

    def __init__(
        self,
        first: str,
        second: str = "text",
        loss: Literal["softmax", "sigmoid"] = "softmax",
        same_group: SameGroup = "soft",
        temperature: float = 0.07,
        learn_temperature: bool = True,
        bias: float = -10.0,
        chunk: int = 512,
    ) -> None:
        super().__init__()
        self.modalities = (first, second)
        self.loss = loss
        self.same_group = same_group
        self.chunk = _checked(chunk)
        self.temperature = Temperature(temperature, learn_temperature)
        self.logit_bias = nn.Parameter(torch.tensor([float(bias)])) if loss == "sigmoid" else None

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        first, second = self.modalities
        a = features.embedding(first)
        b = features.embedding(second, view=1 if first == second else 0)
        groups = features.label("group")
        all_groups = None if groups is None else _everyone(self, groups)[0]
        all_b, offset = _everyone(self, b)
        result: ContrastiveResult
        if self.logit_bias is not None:
            result = sigmoid_contrastive(
                a,
                b,
                self.temperature(),
                self.logit_bias.squeeze(0),
                groups=groups,
                same_group=self.same_group,
                all_b=all_b,
                all_groups=all_groups,
                offset=offset,
                chunk=self.chunk,
            )
        else:
            result = softmax_contrastive(
                a,
                b,
                self.temperature(),
                groups=groups,
                same_group=self.same_group,
                all_a=_everyone(self, a)[0],
                all_b=all_b,
                all_groups=all_groups,
                offset=offset,
                chunk=self.chunk,
            )
        return HeadOutput(result.loss, {"accuracy": result.accuracy, "scale": self.temperature().detach()})


class GroupContrastiveHead(Head):
    """Pulls the samples of one modality that share a group together (supervised contrastive, arXiv 2004.11362).

    The data must carry a `group` label, and batches several members of a group.

    Args:
        modality: which.
        temperature: start of the temperature.
        learn_temperature: whether it is trained.
        chunk: rows of the loss at a time; see `ContrastiveHead`.
    """

    contrastive = True

    def __init__(
        self, modality: str, temperature: float = 0.07, learn_temperature: bool = True, chunk: int = 512
    ) -> None:
        super().__init__()
        self.modalities = (modality,)
        self.chunk = _checked(chunk)
        self.temperature = Temperature(temperature, learn_temperature)

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        a = features.embedding(self.modalities[0])
        groups = features.label("group")
        if groups is None:
            raise ConfigError("GroupContrastiveHead needs data with a `group` label; its source gives none")
        all_a, offset = _everyone(self, a)
        result = grouped_contrastive(
            a,
            self.temperature(),
            groups,
            all_a=all_a,
            all_groups=_everyone(self, groups)[0],
            offset=offset,
            chunk=self.chunk,
        )
        return HeadOutput(result.loss, {"accuracy": result.accuracy, "scale": self.temperature().detach()})


def _checked(chunk: int) -> int:
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; it must be at least 1")
    return chunk


def _everyone(head: Head, rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes and the place of the own ones; in evaluation the own rows alone.

    Evaluation batches differ in size and number between processes, so that they can't wait for each other there.
    """
    return gather(rows) if head.training else (rows, 0)
