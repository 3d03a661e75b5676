"""Tokens: the one currency between encoders, the shared text transformer and the heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """A padded batch of vector sequences.

    Attributes:
        values: float (batch, length, width).
        mask: bool (batch, length), True where the position is real.
    """

    values: Tensor
    mask: Tensor

    @property
    def width(self) -> int:
        """Size of one vector."""
        return self.values.shape[-1]

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return self.values.shape[1]

    def rows(self, index: Tensor) -> Tokens:
        """The batch rows that `index` (n,) names, in that order."""
        return Tokens(self.values[index], self.mask[index])

    def mean(self) -> Tensor:
        """Mean over the real positions: (batch, width); zeros for a row without any."""
        weight = self.mask.unsqueeze(-1).to(self.values.dtype)
        return (self.values * weight).sum(1) / weight.sum(1).clamp(min=1.0)

    def first(self) -> Tensor:
        """The first position ([CLS] in most encoders): (batch, width)."""
        return self.values[:, 0]

    def last(self) -> Tensor:
        """The last real position (end of text in causal encoders): (batch, width)."""
        positions = torch.arange(self.length, device=self.mask.device)
        index = (positions * self.mask).argmax(1)
        return self.values[torch.arange(len(index), device=index.device), index]


def full(values: Tensor) -> Tokens:
    """Tokens without padding."""
    return Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device))


def concatenate(*parts: Tokens) -> Tokens:
    """The parts one behind the other along the length; padding stays where it is and stays masked."""
    return Tokens(torch.cat([p.values for p in parts], 1), torch.cat([p.mask for p in parts], 1))
