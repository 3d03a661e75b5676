"""MaskBook: which units of each training sample may still be masked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from mmpt.masking import highest


class MaskBook(nn.Module):
    """Remembers by the name of a sample which of its units are frozen: those that hidden units teach nothing about.

    Frozen units are never masked; they stay in the input. The book is part of a checkpoint. It knows the samples of its
    own process only.

    Args:
        low: smallest share of the free units that a freezing takes.
        high: largest share.
        thaw: a freezing frees each unit again with a probability drawn between 0 and this.
    """

    def __init__(self, low: float = 0.1, high: float = 0.3, thaw: float = 0.1) -> None:
        super().__init__()
        self.low, self.high, self.thaw = low, high, thaw
        self.frozen: dict[str, Tensor] = {}

    def free(self, names: Sequence[str], units: Tensor) -> Tensor:
        """Units that may be masked: bool (batch, length).

        Args:
            names: of the samples.
            units: bool (batch, length). A sample whose number of units has changed begins anew.
        """
        free = units.clone()
        for row, name in enumerate(names):
            frozen = self.frozen.get(name)
            if frozen is not None and len(frozen) == int(units[row].sum()):
                free[row, units[row]] = ~frozen.to(units.device)
        return free

    def freeze(self, names: Sequence[str], scores: Tensor, units: Tensor, generator: Generator | None = None) -> None:
        """Freeze the free units with the highest scores, then free each frozen one with a small probability.

        int(u * f) of a sample's f free units are frozen, with u drawn between `low` and `high` for each sample; the
        probability of becoming free is drawn once for the batch.

        Args:
            names: of the samples.
            scores: (batch, length).
            units: bool (batch, length).
            generator: source of randomness; None is torch's global one.
        """
        device = units.device
        free = self.free(names, units)
        share = self.low + (self.high - self.low) * torch.rand(
            len(units), device=device, generator=generator, dtype=torch.float64
        )
        taken = highest(scores, free, (share * free.sum(1) + 1e-9).long())
        thaw = self.thaw * torch.rand((), device=device, generator=generator)
        freed = torch.rand(units.shape, device=device, generator=generator) < thaw
        frozen = ((units & ~free) | taken) & ~freed
        for row, name in enumerate(names):
            self.frozen[name] = frozen[row, units[row]].cpu()

    @property
    def share(self) -> float:
        """Share of the units of all samples in the book that are frozen."""
        total = sum(len(row) for row in self.frozen.values())
        return sum(int(row.sum()) for row in self.frozen.values()) / total if total else 0.0

    def get_extra_state(self) -> dict[str, Any]:
        """For checkpoints."""
        return dict(self.frozen)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.frozen = dict(state)
