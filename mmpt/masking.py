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
        rank = _random_order(units, generator)
        # in double precision, like `hidden` below: in single precision 0.35 * 90 is on the other side of a half
        chosen = (self.rate * units.sum(1, keepdim=True).double()).round()
        most = units.shape[1] if limit is None else limit
        action = _exact_actions(rank, chosen, self.mask, self.random)
        return Corruption(action, rank < chosen, hidden=round(self.mask * round(self.rate * most)))


def _random_order(units: Tensor, generator: Generator | None) -> Tensor:
    """The place of each unit in a random order of its row, all others behind them: long (batch, length)."""
    noise = torch.rand(units.shape, device=units.device, generator=generator).masked_fill(~units, 2.0)
    return noise.argsort(1).argsort(1)


def _exact_actions(rank: Tensor, chosen: Tensor, mask: float, random: float) -> Tensor:
    """Exact shares of the first `chosen` (batch, 1) units by rank are hidden and replaced: uint8 (batch, length)."""
    hidden = (mask * chosen).round()
    replaced = torch.minimum((random * chosen).round(), chosen - hidden)
    action = torch.full_like(rank, KEEP, dtype=torch.uint8).masked_fill(rank < hidden, MASK)
    return action.masked_fill((rank >= hidden) & (rank < hidden + replaced), RANDOM)


class Scored(Configurable):
    """The units with the highest scores, of those that are free: who gives the scores decides what is learned.

    With the scores of a network that is trained to find hard units this is adversarial masking (arXiv 2407.08306,
    `mmpt.heads.AdversarialMaskedHead`). A row with f free ones of n units has min(int(u * f), int(limit * n)) chosen,
    with u drawn uniformly between `low` and `high` for each row. Which of the chosen are hidden, replaced or kept is
    random, in exact shares as with `Exact`.

    Args:
        low: smallest share of the free units.
        high: largest share of the free units.
        limit: largest share of all units.
        mask: share of the chosen units that are hidden.
        random: share of the chosen units that are replaced; the others stay as they are.
    """

    def __init__(
        self, low: float = 0.1, high: float = 0.3, limit: float = 0.15, mask: float = 0.8, random: float = 0.1
    ) -> None:
        if not 0 < low <= high <= 1 or not 0 < limit <= 1:
            raise ConfigError(f"low={low}, high={high}, limit={limit} must be shares, with low at most high")
        if mask < 0 or random < 0 or mask + random > 1 + 1e-9:
            raise ConfigError(f"mask={mask} and random={random} must be shares that add up to at most 1")
        self.low, self.high, self.limit, self.mask, self.random = low, high, limit, mask, random

    def __call__(
        self, scores: Tensor, units: Tensor, free: Tensor | None = None, generator: Generator | None = None
    ) -> Corruption:
        """Choose units.

        Args:
            scores: float (batch, length).
            units: bool (batch, length), True where there is a unit.
            free: bool (batch, length): units that may be chosen; None is all.
            generator: source of randomness; None is torch's global one.
        """
        free = units if free is None else units & free
        share = torch.rand(len(units), device=units.device, generator=generator, dtype=torch.float64)
        chosen = self.count(units.sum(1), free.sum(1), self.low + (self.high - self.low) * share)
        predicted = highest(scores, free, chosen)
        rank = _random_order(predicted, generator)
        return Corruption(_exact_actions(rank, chosen.unsqueeze(1).double(), self.mask, self.random), predicted)

    def count(self, units: Tensor, free: Tensor, share: Tensor) -> Tensor:
        """How many are chosen of rows with `units` units of which `free` are free: long (batch,)."""
        # A hair more, as int(0.3 * 1000 in binary fractions) must not be 299.
        return torch.minimum((share * free + 1e-9).long(), (self.limit * units.double() + 1e-9).long())


def highest(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` (batch,) units of each row with the highest scores among some: bool (batch, length)."""
    rank = scores.detach().masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(1)
    return among & (rank < count.unsqueeze(1))


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
