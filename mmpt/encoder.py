"""The contract of a modality: a Processor (raw samples to tensors) and an Encoder (tensors to Tokens)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpt.config import Configurable
from mmpt.errors import ConfigError
from mmpt.tokens import Tokens

KEEP, MASK, RANDOM = 0, 1, 2
"""What may happen to a unit: it stays, it is hidden, or it is replaced by a random one."""

Inputs = dict[str, Tensor]
"""What a processor gives and an encoder reads: tensors whose first axis is the batch."""


class Corruption(NamedTuple):
    """What is done to each unit of a batch, and which units are to be predicted.

    Attributes:
        action: uint8 (batch, length): KEEP, MASK or RANDOM.
        predicted: bool (batch, length), True where the loss is taken. KEEP and predicted together are allowed (BERT's
            10 %).
        hidden: how many units of a full row have action MASK, where the policy fixes that number (exact policies);
            encoders that drop hidden units need it to know the shorter length without asking the device.
    """

    action: Tensor
    predicted: Tensor
    hidden: int | None = None


class Part(NamedTuple):
    """A scalar loss and what to log beside it.

    Attributes:
        loss: scalar.
        logs: name -> detached scalar, e.g. accuracy.
    """

    loss: Tensor
    logs: dict[str, Tensor]


class UnitLosses(NamedTuple):
    """The loss of each predicted unit, for objectives that compare units with each other.

    A unit has one part (the id of a word piece) or several (the fields of a compound word).

    Attributes:
        losses: float (predicted, parts).
        correct: bool (predicted, parts), whether the best guess is right.
    """

    losses: Tensor
    correct: Tensor


IGNORED = -100
"""The label of a unit that has none; losses and metrics leave it out."""


class Processor(Configurable, ABC):
    """Raw samples of one modality -> dict of tensors. Pure and picklable; runs in DataLoader workers.

    Random augmentation, used when `training` is true, draws from torch's global generator, which the data module
    seeds for every batch: the same batch is augmented in the same way whichever worker prepares it.
    """

    @abstractmethod
    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """Turn samples, in the forms that people of the field hold, into tensors with the batch first.

        Raises:
            SampleError: with `index`, for a sample that can't be used.
        """

    def store(self, samples: Sequence[Any], key: str, vectors: Tensor) -> None:
        """Write embeddings into what holds the samples, where people of the field look for them.

        Args:
            samples: raw samples.
            key: under which name.
            vectors: (samples, width).

        Raises:
            ConfigError: there is no place for them; the default.
        """
        raise ConfigError(f"samples of type {type(samples).__name__} have no place to store embeddings under {key!r}")

    def table(self, samples: Sequence[Any], labels: Sequence[str], scores: Tensor) -> Any:
        """Scores of samples for labels in the form that people of the field read; the tensor itself by default."""
        return scores


class Encoder(nn.Module, Configurable, ABC):
    """One modality. What can be masked is a *unit*: a patch, frame, gene, note, node or token.

    Attributes:
        width: size of the vectors that `forward` gives.
        processor: the preprocessing that belongs to these weights.
    """

    width: int
    processor: Processor

    @abstractmethod
    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode a batch; how a hidden unit is hidden (dropped, a mask vector, a random id) is decided here."""

    @abstractmethod
    def units(self, inputs: Inputs) -> Tensor:
        """Which units may be masked: bool (batch, length). Padding and special positions are False."""

    def groups(self, inputs: Inputs) -> Tensor:
        """Which units belong together, for group-wise masking (whole words, notes of a bar).

        Returns:
            long (batch, length), non-decreasing along a row; equal numbers belong together. By default each unit is
            its own group.
        """
        units = self.units(inputs)
        return torch.arange(units.shape[1], device=units.device).expand(units.shape)

    def max_units(self, inputs: Inputs) -> int:
        """The most units that a row can have, known from shapes alone (no reading from the device)."""
        return self.units(inputs).shape[1]

    def unit_names(self) -> Sequence[str]:
        """Names of the kinds of units (genes), by which words of a text may call them; none by default."""
        return ()

    @abstractmethod
    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Any:
        """Predict the units with `corruption.predicted` from the tokens that `forward(inputs, corruption)` gave.

        Returns:
            Predictions at those units only, in row-major order; their form is between this method and
            `reconstruction_loss`.
        """

    @abstractmethod
    def reconstruction_loss(self, predictions: Any, inputs: Inputs, corruption: Corruption) -> Part:
        """Compare predictions with what was there before corruption."""

    def unit_losses(self, predictions: Any, inputs: Inputs, corruption: Corruption) -> UnitLosses:
        """What `reconstruction_loss` sums up, unit by unit; needed by heads that search for units hard to predict.

        Raises:
            ConfigError: the encoder has no loss for a single unit.
        """
        raise ConfigError(f"{type(self).__name__} gives no loss for single units (unit_losses)")

    def unit_labels(self, inputs: Inputs, label: str) -> tuple[Inputs, Tensor]:
        """A label of every unit, for tagging.

        Args:
            inputs: of the processor.
            label: its name.

        Returns:
            The inputs without what would give the label away, and long (batch, length) with `IGNORED` where there is
            no label.

        Raises:
            ConfigError: units have no such label.
        """
        raise ConfigError(f"the units of {type(self).__name__} have no label {label!r}")
