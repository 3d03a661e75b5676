"""The contract of a head: features of a batch -> a loss and what to log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mmpt.config import Configurable
from mmpt.features import Features
from mmpt.model import MultimodalModel


class HeadOutput(NamedTuple):
    """What a head gives for one batch.

    Attributes:
        loss: scalar.
        logs: name -> detached scalar.
    """

    loss: Tensor
    logs: dict[str, Tensor]


class Head(nn.Module, Configurable, ABC):
    """A training objective. It reads features and never knows which encoder they come from.

    Attributes:
        modalities: what a batch must carry; without it the head rests for that step.
        contrastive: whether the loss compares the samples of a batch with each other, so that it can't be summed over
            smaller batches.
    """

    modalities: Sequence[str]
    contrastive: bool = False

    def bind(self, model: MultimodalModel) -> None:
        """Check that the model can serve this head and make the parameters whose sizes it decides. Called once.

        Raises:
            ConfigError: a modality or an ability is missing; the message says what to change.
        """
        for name in self.modalities:
            model.modality(name)

    def start_epoch(self, epoch: int) -> None:
        """Called before each training epoch, counted from 0."""

    @abstractmethod
    def forward(self, features: Features) -> HeadOutput:
        """The loss of one batch."""
