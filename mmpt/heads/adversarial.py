"""The adversarial masked head: a network learns which units are hard to predict, and those are hidden."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmpt.distributed import world_size
from mmpt.encoder import KEEP, Corruption, UnitLosses
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.mask_book import MaskBook
from mmpt.masking import Exact, Scored, highest
from mmpt.model import MultimodalModel

_REMEMBERED = ("shares", "right", "batches", "epoch", "freezing")
"""What a checkpoint keeps besides the weights and the book."""


class MaskerTargets(NamedTuple):
    """What the masker should have said.

    Attributes:
        high: bool (batch, length): units that were hard to recover, target 1.
        low: bool (batch, length): units that were easy, target 0.
    """

    high: Tensor
    low: Tensor


class AdversarialMaskedHead(Head):
    """Masked modelling of the units that a masker picks (Adversarial-MidiBERT, arXiv 2407.08306).

    The masker is two layers on the encoder's tokens of the clean input and shares the encoder. The units with its
    highest probabilities are hidden; the encoder recovers all of them. Units that were really changed and hard to
    recover are the masker's examples of 1, those that were easy of 0. Every `freeze_every` epochs the units with the
    highest probabilities leave the game, as what context can't tell teaches nothing (`mmpt.mask_book.MaskBook`).

    The recoverer's loss is, over the parts of a unit with weights w, the mean over the chosen units plus the mean over
    all units. w is in inverse proportion to each part's accuracy in the previous epoch. In evaluation 15 % of the units
    are hidden at random as with `MaskedHead`, so that the losses of both can be compared.

    | needs                  | of                                                              |
    |------------------------|-----------------------------------------------------------------|
    | `Encoder.unit_losses`  | the modality's encoder                                          |
    | names                  | the batch: a sample's name is the key of its place in the book  |

    Use `MaskedHead` where all units are about equally hard to tell: the masker costs a second pass through the encoder.

    Args:
        modality: which.
        policy: how many units are hidden, and how.
        hidden: size of the masker's hidden layer.
        dropout: in the masker.
        freeze_every: epochs between two freezings; 0 never freezes.
        targets: share of the chosen units that become examples of 1, and of 0.
        released: reproduce the sign error of the released code, which trains the masker the wrong way round on every
            second row. For comparisons only.

    Raises:
        ConfigError: the encoder gives no loss for single units; several processes.
    """

    def __init__(
        self,
        modality: str,
        policy: Scored | None = None,
        hidden: int = 256,
        dropout: float = 0.1,
        freeze_every: int = 5,
        targets: float = 0.3,
        released: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < targets <= 0.5:
            raise ConfigError(f"targets is {targets}; it must be a share up to 0.5 of the chosen units")
        self.modalities = (modality,)
        self.policy = policy or Scored()
        self.hidden, self.dropout = hidden, dropout
        self.freeze_every, self.targets, self.released = freeze_every, targets, released
        self.book = MaskBook()
        self.freezing = False
        self.epoch = -1
        self.shares: Tensor | None = None  # of the parts in the recoverer's loss; equal until an epoch is over
        self.right: Tensor | None = None  # sum of the accuracies of this epoch's batches, by part
        self.batches = 0

    def bind(self, model: MultimodalModel) -> None:
        """See `Head`."""
        super().bind(model)
        modality = model.modality(self.modalities[0])
        if modality.through_text:
            raise ConfigError("the masker reads the encoder's own tokens; set through_text to false for this modality")
        self.masker = nn.Sequential(
            nn.Dropout(self.dropout),
            nn.Linear(modality.encoder.width, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, 1),
            nn.Sigmoid(),
        )

    def start_epoch(self, epoch: int) -> None:
        """Set the weights of the parts by the accuracies of the epoch before; decide whether this one freezes."""
        self.freezing = self.freeze_every > 0 and epoch > 0 and epoch % self.freeze_every == 0
        if epoch == self.epoch:  # resumed within it
            return
        self.epoch = epoch
        if self.right is not None:
            self.shares, self.right, self.batches = inverse_shares(self.right / self.batches), None, 0

    def probabilities(self, features: Features) -> Tensor:
        """The masker's probability of each unit: (batch, length)."""
        return self.masker(features.encoded(self.modalities[0]).values).squeeze(-1).float()

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        if world_size() > 1:
            raise ConfigError("the mask book knows the samples of one process; train this head with one device")
        modality = self.modalities[0]
        encoder, inputs = features.model.modality(modality).encoder, features.inputs(modality)
        units = encoder.units(inputs)
        if not self.training:
            corruption = Exact()(units, encoder.groups(inputs), encoder.max_units(inputs))
            tokens = features.encoded(modality, corruption)
            return HeadOutput(*encoder.reconstruction_loss(encoder.reconstruct(tokens, corruption), inputs, corruption))

        names = features.batch.names
        scores = self.probabilities(features)
        if self.freezing:
            self.book.freeze(names, scores.detach(), units)
        free = self.book.free(names, units)
        corruption = self.policy(scores, units, free)
        everywhere = Corruption(corruption.action, units)
        tokens = features.encoded(modality, corruption)
        found = encoder.unit_losses(encoder.reconstruct(tokens, everywhere), inputs, everywhere)
        chosen = corruption.predicted[units]  # (units,): in the order of the losses
        part_losses = _mean(found.losses[chosen]) + _mean(found.losses)
        recovery = (part_losses * self._weights(found)).sum()
        by_unit = torch.zeros_like(scores).masked_scatter(units, found.losses.detach().mean(1).to(scores.dtype))
        targets = masker_targets(by_unit, corruption, self.targets, self.released)
        masker = masker_loss(scores, targets)
        accuracy = _mean(found.correct[chosen].float())
        self.right = accuracy if self.right is None else self.right + accuracy
        self.batches += 1
        logs = {
            "recovery": recovery.detach(),
            "masker": masker.detach(),
            "accuracy": accuracy.mean(),
            "frozen": (units & ~free).sum() / units.sum().clamp(min=1),
        }
        return HeadOutput(recovery + masker, logs)

    def _weights(self, found: UnitLosses) -> Tensor:
        if self.shares is None:
            count = found.losses.shape[1]
            return torch.full((count,), 1 / count, device=found.losses.device)
        return self.shares.to(found.losses.device)

    def get_extra_state(self) -> dict[str, Any]:
        """The weights of the parts, for checkpoints."""
        return {name: getattr(self, name) for name in _REMEMBERED}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        for name in _REMEMBERED:
            setattr(self, name, state[name])


def _mean(values: Tensor) -> Tensor:
    """Over the first axis; zeros for no rows."""
    return values.sum(0) / max(len(values), 1)


def inverse_shares(accuracies: Tensor) -> Tensor:
    """Weights of parts (parts,) in inverse proportion to their accuracies, adding up to 1.

    Accuracies below a hundredth count as that, so that a part that is never right does not take all the weight.
    """
    inverse = 1 / accuracies.clamp(min=0.01)
    return inverse / inverse.sum()


def masker_targets(losses: Tensor, corruption: Corruption, share: float, released: bool = False) -> MaskerTargets:
    """Of the units that were changed, the int(share * chosen) of the largest and of the smallest loss in each row.

    Args:
        losses: (batch, length) of each unit; read where the corruption changed something.
        corruption: what was chosen.
        share: of the chosen units.
        released: in every second row, turn the sign of the losses as the released code does. Units that were not
            changed count as 0 there, so they become examples of 1.
    """
    changed = corruption.action != KEEP
    count = (share * corruption.predicted.sum(1) + 1e-9).long()
    count = torch.minimum(count, changed.sum(1) // 2) if not released else count
    sign = torch.ones(len(losses), 1, device=losses.device)
    if released:
        sign[1::2] = -1
        signed = sign * losses.masked_fill(~changed, 0.0)
        return MaskerTargets(highest(signed, torch.ones_like(changed), count), highest(-sign * losses, changed, count))
    return MaskerTargets(highest(losses, changed, count), highest(-losses, changed, count))


def masker_loss(probabilities: Tensor, targets: MaskerTargets) -> Tensor:
    """Mean square error to 1 and to 0, each over its examples of a row, added; mean over the rows that have any."""
    counts = targets.high.sum(1).clamp(min=1)
    square = (targets.high * (1 - probabilities).square()).sum(1) + (targets.low * probabilities.square()).sum(1)
    rows = targets.high.any(1)
    return (square / counts * rows).sum() / rows.sum().clamp(min=1)
