"""Masking policies: which units are hidden or replaced, and which are predicted.

A policy sees only which units exist and which belong together, so the same policies serve patches, frames, genes,
notes, nodes and word pieces. They draw from torch's generator of the units' device, or from the one given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Generator, Tensor

from mmpt.config import Configurable
from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.errors import ConfigError


class MaskingPolicy(Configurable, ABC):
    """Decides a `Corruption` for a batch.

    Args:
        rate: share of the units that are predicted.
        mask: share of the predicted units that are hidden.
        random: share of the predicted units that are replaced by a random one; the others stay as they are.
    """

    def __init__(self, rate: float = 0.15, mask: float = 0.8, random: float = 0.1) -> None:
        if not 0 < rate < 1:
            raise ConfigError(f"rate is {rate}; it must lie between 0 and 1, as a share of the units")
        if mask < 0 or random < 0 or mask + random > 1 + 1e-9:
            raise ConfigError(f"mask={mask} and random={random} must be shares that add up to at most 1")
        self.rate, self.mask, self.random = rate, mask, random

    @abstractmethod
    def __call__(
        self, units: Tensor, groups: Tensor | None = None, limit: int | None = None, generator: Generator | None = None
    ) -> Corruption:
        """Choose units.

        Args:
            units: bool (batch, length), True where a unit may be chosen.
            groups: long (batch, length) with values below length; equal numbers are chosen together.
            limit: the most units that a row can have, where it is known to be less than length.
            generator: source of randomness; None is torch's global one.
        """

    def _actions(self, predicted: Tensor, fate: Tensor) -> Tensor:
        """Split the predicted units by `fate`, a uniform number in [0, 1) for each: (batch, length) of actions."""
        action = torch.full_like(predicted, KEEP, dtype=torch.uint8)
        action = action.masked_fill(predicted & (fate < self.mask), MASK)
        return action.masked_fill(predicted & (fate >= self.mask) & (fate < self.mask + self.random), RANDOM)


class Uniform(MaskingPolicy):
    """Each unit is chosen independently with probability `rate` (BERT, arXiv 1810.04805).

    Args:
        rate: share of the units that are predicted.
        mask: share of the predicted units that are hidden.
        random: share of the predicted units that are replaced.
        whole_groups: choose and treat the units of a group together (whole words).
    """

    def __init__(self, rate: float = 0.15, mask: float = 0.8, random: float = 0.1, whole_groups: bool = False) -> None:
        super().__init__(rate, mask, random)
        self.whole_groups = whole_groups

    def __call__(
        self, units: Tensor, groups: Tensor | None = None, limit: int | None = None, generator: Generator | None = None
    ) -> Corruption:
        """See `MaskingPolicy`."""
        choice = torch.rand(units.shape, device=units.device, generator=generator)
        fate = torch.rand(units.shape, device=units.device, generator=generator)
        if self.whole_groups:
            if groups is None:
                raise ConfigError("whole_groups needs an encoder that says which units belong together")
            choice, fate = choice.gather(1, groups), fate.gather(1, groups)
        predicted = units & (choice < self.rate)
        return Corruption(self._actions(predicted, fate), predicted)


class Exact(MaskingPolicy):
    """Exactly round(rate * n) of a row's n units, of which exact shares are hidden and replaced.

    MAE and SimMIM hide a fixed number of patches (rate 0.75 or 0.6, mask 1, random 0); MidiBERT-Piano (arXiv
    2107.05223) splits 77 of 512 notes into 62 hidden, 8 random and 7 kept. Halves are rounded to even.
    """

    def __call__(
        self, units: Tensor, groups: Tensor | None = None, limit: int | None = None, generator: Generator | None = None
    ) -> Corruption:
        """See `MaskingPolicy`."""
        noise = torch.rand(units.shape, device=units.device, generator=generator).masked_fill(~units, 2.0)
        rank = noise.argsort(1).argsort(1)  # (batch, length): place of each unit in a random order of its row
        # in double precision, like `hidden` below: in single precision 0.35 * 90 is on the other side of a half
        chosen = (self.rate * units.sum(1, keepdim=True).double()).round()
        hidden = (self.mask * chosen).round()
        replaced = torch.minimum((self.random * chosen).round(), chosen - hidden)
        predicted = rank < chosen
        action = torch.full_like(units, KEEP, dtype=torch.uint8)
        action = action.masked_fill(rank < hidden, MASK)
        action = action.masked_fill((rank >= hidden) & (rank < hidden + replaced), RANDOM)
        most = units.shape[1] if limit is None else limit
        return Corruption(action, predicted, hidden=round(self.mask * round(self.rate * most)))


class Span(MaskingPolicy):
    """Runs of neighbouring units with geometric lengths (SpanBERT, arXiv 1907.10529); a run is treated as one.

    Args:
        rate: expected share of the units that are predicted.
        mask: share of the predicted runs that are hidden.
        random: share of the predicted runs that are replaced.
        mean_length: mean of the geometric distribution of run lengths before the cut.
        max_length: longer runs are cut.
    """

    def __init__(
        self,
        rate: float = 0.15,
        mask: float = 0.8,
        random: float = 0.1,
        mean_length: float = 3.8,
        max_length: int = 10,
    ) -> None:
        super().__init__(rate, mask, random)
        if mean_length < 1 or max_length < 1:
            raise ConfigError(f"mean_length={mean_length} and max_length={max_length} must be at least 1")
        self.mean_length, self.max_length = mean_length, max_length
        # probability that a run covers more than k units, k = 0..max_length - 1
        self._survival = [(1 - 1 / mean_length) ** k for k in range(max_length)]

    def __call__(
        self, units: Tensor, groups: Tensor | None = None, limit: int | None = None, generator: Generator | None = None
    ) -> Corruption:
        """See `MaskingPolicy`."""
        # Runs may begin before the row, so that its first units are covered as often as all others.
        before, device = self.max_length - 1, units.device
        shape = (len(units), before + units.shape[1])
        start, size, fate = (torch.rand(shape, device=device, generator=generator) for _ in range(3))
        survival = torch.tensor(self._survival, device=device)
        lengths = (size.unsqueeze(-1) < survival).sum(-1)  # (batch, before + length), 1..max_length
        starts = start < self._start_probability()
        positions = torch.arange(shape[1], device=device).expand(shape)
        end = torch.where(starts, positions + lengths, torch.zeros_like(positions)).cummax(1)
        predicted = units & (end.values > positions)[:, before:]
        return Corruption(self._actions(predicted, fate.gather(1, end.indices)[:, before:]), predicted)

    def _start_probability(self) -> float:
        """The start probability at which a unit is covered with probability `rate`."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            uncovered = 1.0
            for survival in self._survival:  # no run started k units before reaches here
                uncovered *= 1 - middle * survival
            low, high = (middle, high) if 1 - uncovered < self.rate else (low, middle)
        return (low + high) / 2
