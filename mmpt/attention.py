"""Attention on `scaled_dot_product_attention`: self-attention with four kinds of positions, cross-attention, masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpt.cache import KeyValues
from mmpt.errors import ConfigError
from mmpt.positions import pick_relative, rotate, skew

Attention = Literal["bidirectional", "causal", "prefix"]
"""Who sees whom: everybody everybody, only what came before, or a prefix in full and the rest causally."""


class Geometry(NamedTuple):
    """What all layers of one forward pass share.

    Attributes:
        allowed: bool, broadcastable to (batch, 1, query, key): True where the query may look at the key.
        angles: rotary cosine and sine, or None.
        relative_rows: long (batch or 1, 1, query, key): row of the table of relative vectors. None where there are
            none, and in relative_key_query for positions 0, 1, 2, ....
        reach: the table of relative vectors is needed for distances -reach to reach only.
        relative: (rows, width) relative vectors that the layers share (disentangled), or None.
    """

    allowed: Tensor
    angles: tuple[Tensor, Tensor] | None = None
    relative_rows: Tensor | None = None
    reach: int = 0
    relative: Tensor | None = None


def key_mask(mask: Tensor) -> Tensor:
    """Real keys as bool (batch, 1, 1, length).

    A row without any real position may look at all of them: its output is meaningless but finite, so that it can't
    poison a sum over the batch.
    """
    return (mask | ~mask.any(1, keepdim=True))[:, None, None, :]


def attention_mask(
    mask: Tensor,
    attention: Attention,
    prefix: Tensor | None = None,
    segments: Tensor | None = None,
    past: int = 0,
) -> Tensor:
    """Who may look at whom.

    Args:
        mask: bool (batch, length), True where real.
        attention: see `Attention`.
        prefix: bool (batch, length), needed by (and only by) `prefix`: positions that all others see. Prefix
            positions see each other and nothing else, so that nothing later can leak through them.
        segments: long (batch, length): packed sequences; a position sees its own segment only.
        past: leave out the rows of so many first positions, which are only looked at (causal attention).

    Returns:
        bool (batch, 1, 1 or length - past, length).

    Raises:
        ConfigError: an unknown kind of attention, or a prefix without `attention="prefix"` (or the reverse).
    """
    if attention not in ("bidirectional", "causal", "prefix"):
        raise ConfigError(f"attention={attention!r} is unknown; choose 'bidirectional', 'causal' or 'prefix'")
    if (prefix is not None) != (attention == "prefix"):
        given = "without prefix=" if prefix is None else "with prefix="
        raise ConfigError(
            f"attention={attention!r} {given}: pass both attention='prefix' and a bool (batch, length) prefix"
        )
    if attention == "bidirectional" and segments is None:
        return key_mask(mask)
    length = mask.shape[1]
    allowed = mask[:, None, None, :]
    columns = torch.arange(length, device=mask.device)
    rows = columns[past:, None]
    if attention != "bidirectional":
        visible = columns <= rows  # (query, key)
        if prefix is not None:
            from_rest = visible & ~prefix[:, None, :, None]  # (batch, 1, query, key)
            visible = from_rest | prefix[:, None, None, :]
        allowed = allowed & visible
    if segments is not None:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    # Every position may look at itself: a padded query without any key would be NaN in some attention kernels.
    return allowed | (columns == rows)


def split_heads(vectors: Tensor, heads: int) -> Tensor:
    """(batch, length, width) -> (batch, heads, length, head_width)."""
    return vectors.unflatten(-1, (heads, -1)).transpose(-2, -3)


def join_heads(vectors: Tensor) -> Tensor:
    """(batch, heads, length, head_width) -> (batch, length, width)."""
    return vectors.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scale: float | None = None
) -> Tensor:
    """`scaled_dot_product_attention`; on a CPU in 32 bits, as its kernel for 16 bits takes up to four times as long.

    Args:
        query: (batch, heads, query, head_width).
        key: (batch, heads, key, head_width).
        value: the same shape.
        mask: bool, True where a query sees a key, or what is added to the scores.
        dropout: of the probabilities.
        scale: of the scores; None is head_width ** -0.5.

    Returns:
        (batch, heads, query, head_width), of the query's type.
    """
    kind = query.dtype
    if query.device.type == "cpu" and kind in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
        mask = mask if mask.dtype == torch.bool else mask.float()
        with torch.autocast("cpu", enabled=False):
            mixed = functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)
        return mixed.to(kind)
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scale)


class SelfAttention(nn.Module):
    """Multi-head self-attention; rotary positions come in through the geometry.

    Args:
        width: size of the vectors.
        heads: number of heads; divides `width`.
        dropout: dropout of the attention probabilities.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)
        self.scale = (width // heads) ** -0.5

    def forward(self, values: Tensor, geometry: Geometry, past: KeyValues | None = None) -> Tensor:
        """(batch, length, width) -> the same shape; `past` holds what came before, and gets these positions added."""
        query, key, value = (split_heads(part(values), self.heads) for part in (self.query, self.key, self.value))
        if geometry.angles is not None:
            query, key = rotate(query, geometry.angles), rotate(key, geometry.angles)
        if past is not None:
            key, value = past.extend(key, value)
        bias = self.bias(query, key, geometry)
        mask = geometry.allowed
        if bias is not None:
            # A finite minimum: bias and mask must not add up to a row of infinities.
            mask = torch.where(mask, bias.to(query.dtype), torch.finfo(query.dtype).min)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, mask, dropout, self.scale)
        return self.output(join_heads(mixed))

    def bias(self, query: Tensor, key: Tensor, geometry: Geometry) -> Tensor | None:
        """What is added to the scaled scores: (batch, heads, query, key), or None."""
        return None


class RelativeKeyQueryAttention(SelfAttention):
    """Scores (q_l.k_r + q_l.E[l-r] + k_r.E[l-r]) / sqrt(head_width); E belongs to the layer, its heads share it.

    Method 4 of "Improve Transformer Models with Better Relative Position Embeddings" (2009.13658), as the option
    `relative_key_query` of BERT in transformers 4.

    Args:
        width: size of the vectors.
        heads: number of heads.
        dropout: dropout of the attention probabilities.
        max_length: longest sequence; E has 2 * max_length - 1 rows, the middle one for distance 0.
    """

    def __init__(self, width: int, heads: int, dropout: float, max_length: int) -> None:
        super().__init__(width, heads, dropout)
        self.distance = nn.Parameter(torch.empty(2 * max_length - 1, width // heads))

    def bias(self, query: Tensor, key: Tensor, geometry: Geometry) -> Tensor:
        """The two relative terms, scaled; `geometry.relative_rows` has the row of E for query l and key r."""
        middle = len(self.distance) // 2
        table = self.distance[middle - geometry.reach : middle + geometry.reach + 1].T  # (head_width, distances)
        if geometry.relative_rows is None:  # positions 0, 1, 2, ...: several times faster
            return (skew(query @ table.flip(1)) + skew(key @ table).mT) * self.scale
        from_query = pick_relative(query @ table, geometry.relative_rows)  # [l, r] = q_l.E[l-r]
        from_key = pick_relative(key @ table, geometry.relative_rows.mT).mT  # [r, l] = k_r.E[l-r], turned to [l, r]
        return (from_query + from_key) * self.scale


class DisentangledAttention(SelfAttention):
    """DeBERTa's attention: content to content, content to position (c2p), position to content (p2c).

    score(i, j) = (Qc_i.Kc_j + Qc_i.Kr_delta(i,j) + Kc_j.Qr_delta(i,j)) / sqrt(head_width * (1 + position terms)).
    The paper (2006.03654, equation 4) writes the third term with delta(j, i); the released code and weights use
    delta(i, j), and so does this class.

    Args:
        width: size of the vectors.
        heads: number of heads.
        dropout: dropout of the attention probabilities.
        terms: which position terms take part: "c2p", "p2c".
        share: relative vectors pass through the content projections; otherwise they have their own.
    """

    def __init__(self, width: int, heads: int, dropout: float, terms: Sequence[str], share: bool) -> None:
        super().__init__(width, heads, dropout)
        self.terms = tuple(terms)
        self.share = share
        self.scale = ((width // heads) * (1 + len(self.terms))) ** -0.5
        if not share and "c2p" in self.terms:
            self.position_key = nn.Linear(width, width)
        if not share and "p2c" in self.terms:
            self.position_query = nn.Linear(width, width)

    def bias(self, query: Tensor, key: Tensor, geometry: Geometry) -> Tensor | None:
        """The position terms, scaled, from the relative vectors of `geometry`."""
        assert geometry.relative_rows is not None
        assert geometry.relative is not None
        total: Tensor | None = None
        if "c2p" in self.terms:
            project = self.key if self.share else self.position_key
            position_key = split_heads(project(geometry.relative), self.heads)  # (heads, rows, head_width)
            total = pick_relative(query @ position_key.mT, geometry.relative_rows)
        if "p2c" in self.terms:
            project = self.query if self.share else self.position_query
            position_query = split_heads(project(geometry.relative), self.heads)
            from_key = pick_relative(key @ position_query.mT, geometry.relative_rows.mT).mT
            total = from_key if total is None else total + from_key
        return None if total is None else total * self.scale


class CrossAttention(nn.Module):
    """Multi-head attention from the text to a context of another width.

    Args:
        width: size of the vectors that ask.
        heads: number of heads.
        context_width: size of the vectors that are asked.
        dropout: dropout of the attention probabilities.
    """

    def __init__(self, width: int, heads: int, context_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.output = nn.Linear(width, width)

    def forward(self, values: Tensor, context: Tensor, allowed: Tensor, past: KeyValues | None = None) -> Tensor:
        """Read the context.

        Args:
            values: (batch, length, width).
            context: (batch, context length, context_width).
            allowed: bool (batch, 1, 1, context length), True where the context is real.
            past: keeps the context's keys and values; where it holds some, `context` itself is not read again.

        Returns:
            (batch, length, width).
        """
        query = split_heads(self.query(values), self.heads)
        if past is not None and past.key is not None and past.value is not None:
            key, value = past.key, past.value
        else:
            key, value = split_heads(self.key(context), self.heads), split_heads(self.value(context), self.heads)
            if past is not None:
                past.extend(key, value)
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, allowed, dropout)
        return self.output(join_heads(mixed))
