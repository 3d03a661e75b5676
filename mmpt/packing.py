"""Packing: the real tokens of a padded batch moved into few full rows, so that no work is spent on padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.tokens import Tokens

SHORT = 4
"""Rows for short sequences are so many times shorter: a token looks at its whole row, so they cost less attention."""


class Plan(NamedTuple):
    """Which sequences stand in which row, in their order.

    Attributes:
        rows: of the full capacity.
        short_rows: of the capacity / `SHORT`.
    """

    rows: list[list[int]]
    short_rows: list[list[int]]


def plan(lengths: Sequence[int], capacity: int) -> Plan:
    """Distribute sequences over rows: first-fit decreasing, where a short sequence that fits nowhere opens a short row.

    Args:
        lengths: number of real tokens of each sequence; empty sequences are left out.
        capacity: length of a row.

    Raises:
        ConfigError: a sequence longer than a row.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    sizes: list[int] = []
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
            size = capacity // SHORT if length <= capacity // SHORT else capacity
            rows.append([])
            free.append(size)
            sizes.append(size)
        rows[row].append(number)
        free[row] -= length
    return Plan(
        [row for row, size in zip(rows, sizes, strict=True) if size == capacity],
        [row for row, size in zip(rows, sizes, strict=True) if size < capacity],
    )


class Rows(NamedTuple):
    """Packed rows of one length.

    Attributes:
        tokens: values (rows, capacity, width) and mask (rows, capacity).
        segments: long (rows, capacity): batch row that a token came from; -1 where there is none.
        position_ids: long (rows, capacity): position of the token in its own sequence.
        prefix: bool (rows, capacity), or None.
    """

    tokens: Tokens
    segments: Tensor
    position_ids: Tensor
    prefix: Tensor | None


class Packed(NamedTuple):
    """A batch after packing.

    Attributes:
        parts: the rows, grouped by their length.
        source: long (n,): places of the real tokens in the flattened padded batch, row by row.
        target: long (n,): places of the same tokens in the flattened and joined parts.
        shape: (batch, length) of the padded batch.
    """

    parts: list[Rows]
    source: Tensor
    target: Tensor
    shape: tuple[int, int]

    def unpack(self, values: Sequence[Tensor]) -> Tokens:
        """Bring values, (rows, capacity, any width) of each part, back to the padded batch; padding becomes zero."""
        joined = torch.cat([part.flatten(0, 1) for part in values])
        real = joined.index_select(0, self.target)
        batch, length = self.shape
        flat = real.new_zeros(batch * length, real.shape[-1]).index_copy(0, self.source, real)
        mask = torch.zeros(batch * length, dtype=torch.bool, device=real.device)
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
    planned = plan(lengths, capacity)
    shapes = [(len(planned.rows), capacity), (len(planned.short_rows), capacity // SHORT)]
    shapes = [shape for shape in shapes if shape[0]] or [(1, capacity)]
    starts = [0] * batch
    end = 0
    for rows, size in ((planned.rows, capacity), (planned.short_rows, capacity // SHORT)):
        for numbers in rows:
            start, end = end, end + size
            for number in numbers:
                starts[number] = start
                start += lengths[number]

    source = tokens.mask.flatten().nonzero().squeeze(1)
    owner = source.div(length, rounding_mode="floor")
    rank = (tokens.mask.cumsum(1) - 1).flatten().index_select(0, source)
    target = torch.tensor(starts, dtype=torch.long, device=device).index_select(0, owner) + rank

    places = [rows * size for rows, size in shapes]

    def move(padded: Tensor, empty: float) -> list[Tensor]:
        flat = padded.flatten(0, 1)
        packed = flat.new_full((sum(places), *flat.shape[1:]), empty)
        packed = packed.index_copy(0, target, flat.index_select(0, source))
        return [part.unflatten(0, shape) for part, shape in zip(packed.split(places), shapes, strict=True)]

    if position_ids is None:
        position_ids = torch.arange(length, device=device)
    segments = torch.arange(batch, device=device).unsqueeze(1).expand(batch, length)
    values, mask = move(tokens.values, 0.0), move(tokens.mask, False)
    prefixes: Sequence[Tensor | None] = [None] * len(shapes) if prefix is None else move(prefix, False)
    moved = zip(values, mask, move(segments, -1), move(position_ids.expand(batch, length), 0), prefixes, strict=True)
    return Packed([Rows(Tokens(v, m), s, p, x) for v, m, s, p, x in moved], source, target, (batch, length))
