"""What a text transformer keeps of positions it has read, so that writing one more token costs one position."""

from __future__ import annotations

import torch
from torch import Tensor


class Cache:
    """The positions that a text transformer has read; `TextBackbone.new_cache` gives an empty one.

    Attributes:
        mask: bool (batch, length), which of them are real; None before the first call.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of positions, padding included."""
        return 0 if self.mask is None else self.mask.shape[1]

    def extend(self, mask: Tensor) -> Tensor:
        """Add positions (batch, new) behind those that are there; the mask of all of them."""
        self.mask = mask if self.mask is None else torch.cat([self.mask, mask], dim=1)
        return self.mask

    def select(self, rows: Tensor) -> None:
        """Keep the batch rows that `rows` (n,) names, in that order; a row may be named several times."""
        self.mask = None if self.mask is None else self.mask[rows]


class KeyValues:
    """Keys and values of one attention: (batch, heads, length, head_width) each, None before the first call."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new positions; all of them."""
        if self.key is not None and self.value is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value

    def select(self, rows: Tensor) -> None:
        """See `Cache.select`."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)


class TransformerCache(Cache):
    """The cache of `mmpt.transformer.Transformer`.

    Attributes:
        positions: long (batch, length), where each token stands.
        own: of each layer's self-attention.
        cross: of each layer's cross-attention, which reads its context once.

    Args:
        depth: number of layers.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.positions: Tensor | None = None
        self.own = [KeyValues() for _ in range(depth)]
        self.cross = [KeyValues() for _ in range(depth)]

    def extend_positions(self, position_ids: Tensor) -> Tensor:
        """Add the positions of new tokens (batch, new); those of all tokens."""
        self.positions = position_ids if self.positions is None else torch.cat([self.positions, position_ids], dim=1)
        return self.positions

    def select(self, rows: Tensor) -> None:
        """See `Cache.select`."""
        super().select(rows)
        self.positions = None if self.positions is None else self.positions[rows]
        for kept in (*self.own, *self.cross):
            kept.select(rows)
