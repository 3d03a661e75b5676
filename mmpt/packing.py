"""Packing: the real tokens of a padded batch moved into few full rows, so that no work is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.tokens import Tokens


def plan(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute sequences over rows: first-fit decreasing, at most 11/9 of the optimal number of rows plus one.

    Args:
        lengths: number of real tokens of each sequence; empty sequences are left out.
        capacity: length of a row.

    Returns:
        For each row the numbers of its sequences, in the order in which they stand in it.

    Raises:
        ConfigError: a sequence longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        length = lengths[number]
        if length > capacity:
            raise ConfigError(
                f"sequence {number} has {length} tokens and does not fit into rows of {capacity}; "
                f"raise the capacity to {max(lengths)} or truncate"
            )
        if length == 0:
            continue
        row = next((r for r, room in enumerate(free) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(number)
        free[row] -= length
    return rows


class Packed(NamedTuple):
    """A batch after packing.

    Attributes:
        tokens: values (rows, capacity, width) and mask (rows, capacity).
        segments: long (rows, capacity): batch row that a token came from; -1 where there is none.
        position_ids: long (rows, capacity): position of the token in its own sequence.
        prefix: bool (rows, capacity), or None.
        source: long (n,): places of the real tokens in the flattened padded batch, row by row.
        target: long (n,): places of the same tokens in the flattened packed rows.
        shape: (batch, length) of the padded batch.
    """

    tokens: Tokens
    segments: Tensor
    position_ids: Tensor
    prefix: Tensor | None
    source: Tensor
    target: Tensor
    shape: tuple[int, int]

    def unpack(self, values: Tensor) -> Tokens:
        """Bring values (rows, capacity, any width) back to the padded batch; padding becomes zero."""
        real = values.flatten(0, 1).index_select(0, self.target)
        batch, length = self.shape
        flat = values.new_zeros(batch * length, values.shape[-1]).index_copy(0, self.source, real)
        mask = torch.zeros(batch * length, dtype=torch.bool, device=values.device)
        mask[self.source] = True
        return Tokens(flat.unflatten(0, self.shape), mask.unflatten(0, self.shape))


def pack(
    tokens: Tokens, *, prefix: Tensor | None = None, position_ids: Tensor | None = None, capacity: int | None = None
) -> Packed:
    """Move the real tokens of a padded batch into full rows. Asks the device for the lengths once.

    Args:
        tokens: padded batch; padding may stand anywhere.
        prefix: bool (batch, length) that travels with the tokens.
        position_ids: long (batch or 1, length) that travels with the tokens; the column number by default.
        capacity: length of a row; by default that of the longest sequence.

    Raises:
        ConfigError: a sequence longer than `capacity`.
    """
    batch, length = tokens.mask.shape
    device = tokens.mask.device
    lengths: list[int] = tokens.mask.sum(1).tolist()
    capacity = max([1, *lengths]) if capacity is None else capacity
    rows = plan(lengths, capacity)
    starts = [0] * batch
    for row, numbers in enumerate(rows):
        start = row * capacity
        for number in numbers:
            starts[number] = start
            start += lengths[number]

    source = tokens.mask.flatten().nonzero().squeeze(1)
    owner = source.div(length, rounding_mode="floor")
    rank = (tokens.mask.cumsum(1) - 1).flatten().index_select(0, source)
    target = torch.tensor(starts, dtype=torch.long, device=device).index_select(0, owner) + rank

    shape = (max(1, len(rows)), capacity)

    def move(padded: Tensor, empty: float) -> Tensor:
        flat = padded.flatten(0, 1)
        packed = flat.new_full((shape[0] * shape[1], *flat.shape[1:]), empty)
        return packed.index_copy(0, target, flat.index_select(0, source)).unflatten(0, shape)

    if position_ids is None:
        position_ids = torch.arange(length, device=device)
    segments = torch.arange(batch, device=device).unsqueeze(1).expand(batch, length)
    return Packed(
        tokens=Tokens(move(tokens.values, 0.0), move(tokens.mask, False)),
        segments=move(segments, -1),
        position_ids=move(position_ids.expand(batch, length), 0),
        prefix=None if prefix is None else move(prefix, False),
        source=source,
        target=target,
        shape=(batch, length),
    )
