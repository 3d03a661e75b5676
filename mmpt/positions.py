"""How a transformer knows where a token stands: rotary angles, relative distances and DeBERTa's logarithmic buckets."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Positions = Literal["none", "absolute", "rotary", "relative_key_query", "disentangled"]
"""Kinds of positions.

- `none`: the input carries its own, or order does not matter.
- `absolute`: one learned vector per position, added to the input (BERT).
- `rotary`: queries and keys are turned by an angle that grows with the position (RoFormer, 2104.09864).
- `relative_key_query`: learned vectors per distance, compared with query and key (Huang et al., 2009.13658, method 4).
- `disentangled`: one table of relative vectors for all layers, projected to keys and queries (DeBERTa, 2006.03654).
"""


def relative_distances(position_ids: Tensor, key_position_ids: Tensor | None = None) -> Tensor:
    """Position of the query minus position of the key: long (batch, 1, query, key) from (batch, query), (batch, key).

    Without positions of keys, the queries are the keys.
    """
    keys = position_ids if key_position_ids is None else key_position_ids
    return (position_ids.unsqueeze(-1) - keys.unsqueeze(-2)).unsqueeze(1)


def log_buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """DeBERTa's buckets: exact up to half of them, logarithmic beyond, with the sign of the distance.

    Differs from T5's buckets in that both directions get `buckets` values, so the result lies in
    (-buckets, buckets) for distances below `max_distance` and the table of vectors has 2 * `buckets` rows.

    Args:
        distances: integer tensor of any shape.
        buckets: number of buckets of one direction.
        max_distance: the distance at which the last bucket is reached.

    Returns:
        long tensor of the same shape.
    """
    middle = buckets // 2
    size = distances.abs().clamp(min=middle)
    # The divisor goes through the same float32 logarithm as the numerator: max_distance - 1 must give exactly 1.
    longest = torch.log(torch.full((), (max_distance - 1) / middle, dtype=torch.float32, device=distances.device))
    steps = torch.ceil(torch.log(size / middle) / longest * (middle - 1)).long()
    return torch.where(distances.abs() <= middle, distances, distances.sign() * (middle + steps))


def rotary_angles(position_ids: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles: two float32 (batch, 1, length, head_width // 2)."""
    powers = torch.arange(0, head_width, 2, device=position_ids.device, dtype=torch.float32) / head_width
    angles = position_ids[:, None, :, None].float() * torch.exp(-math.log(base) * powers)
    return angles.cos(), angles.sin()


def rotate(vectors: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn (batch, heads, length, head_width); the first half of a vector pairs with the second half."""
    cosine, sine = angles
    first, second = vectors.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(vectors.dtype)


def pick_relative(scores: Tensor, index: Tensor) -> Tensor:
    """Read, for each pair of positions, the score of their distance.

    Args:
        scores: (batch, heads, length, distances), one per position and distance.
        index: long (batch or 1, 1, length, others), which distance stands between row and column.

    Returns:
        (batch, heads, length, others).
    """
    return scores.gather(-1, index.expand(*scores.shape[:2], -1, -1))


def skew(scores: Tensor) -> Tensor:
    """Read the score of each pair of positions 0, 1, 2, ... by shifting rows, without an index.

    Args:
        scores: (batch, heads, length, 2 * length - 1): [l, c] for the distance c - (length - 1).

    Returns:
        (batch, heads, length, length): [l, r] for the distance r - l.
    """
    length, distances = scores.shape[-2:]
    rows = scores.flatten(-2)[..., length - 1 : length - 1 + length * (distances - 1)]
    return rows.unflatten(-1, (length, distances - 1))[..., :length]
