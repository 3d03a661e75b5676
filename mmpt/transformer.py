"""One transformer, used by the text side and by every encoder that needs one.

Read top to bottom: `Layer` is attention, optional cross-attention and a feed-forward block; `Transformer` is an input
stage, a stack of layers and a final norm. Positions live in `mmpt.positions`, attention in `mmpt.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpt.attention import Attention as Attention
from mmpt.attention import (
    CrossAttention,
    DisentangledAttention,
    Geometry,
    RelativeKeyQueryAttention,
    SelfAttention,
    attention_mask,
    key_mask,
)
from mmpt.cache import KeyValues, TransformerCache
from mmpt.config import Configurable
from mmpt.errors import ConfigError
from mmpt.packing import pack
from mmpt.positions import Positions, log_buckets, relative_distances, rotary_angles
from mmpt.tokens import Tokens

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
"""Nonlinearity of the feed-forward blocks; `gelu` is the exact one."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}


def activation_function(name: Activation) -> Callable[[Tensor], Tensor]:
    """The function behind a name of `Activation`.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in _ACTIVATIONS:
        raise ConfigError(f"activation={name!r} is unknown; choose one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


class Layer(nn.Module):
    """One block: self-attention, cross-attention if it has any and a context is given, feed-forward.

    Args:
        attention: the self-attention.
        cross: the cross-attention, or None.
        width: size of the vectors.
        feedforward: size of the hidden layer of the feed-forward block.
        pre_norm: norm before each part (residual stream untouched) instead of after the sum.
        activation: see `Activation`.
        dropout: dropout of the output of each part.
        norm_eps: epsilon of the layer norms.
    """

    def __init__(
        self,
        attention: SelfAttention,
        cross: CrossAttention | None,
        *,
        width: int,
        feedforward: int,
        pre_norm: bool,
        activation: Activation,
        dropout: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.cross = cross
        self.cross_norm = None if cross is None else nn.LayerNorm(width, norm_eps)
        self.expand = nn.Linear(width, feedforward)
        self.activation = activation_function(activation)
        self.contract = nn.Linear(feedforward, width)
        self.feedforward_norm = nn.LayerNorm(width, norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        values: Tensor,
        geometry: Geometry,
        context: Tokens | None,
        past: KeyValues | None = None,
        past_context: KeyValues | None = None,
    ) -> Tensor:
        """(batch, length, width) -> the same shape."""
        values = self._residual(values, self.attention_norm, lambda x: self.attention(x, geometry, past))
        if self.cross is not None and self.cross_norm is not None and context is not None:
            cross, allowed = self.cross, key_mask(context.mask)
            informed = self._residual(
                values, self.cross_norm, lambda x: cross(x, context.values, allowed, past_context)
            )
            # A row whose context is all padding has no context: it skips this part like a batch without any.
            values = torch.where(context.mask.any(1)[:, None, None], informed, values)
        return self._residual(values, self.feedforward_norm, lambda x: self.contract(self.activation(self.expand(x))))

    def _residual(self, values: Tensor, norm: nn.LayerNorm, part: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            return values + self.dropout(part(norm(values)))
        return norm(values + self.dropout(part(values)))


class Transformer(nn.Module, Configurable):
    """A stack of transformer layers over padded (or packed) sequences of vectors.

    Invariants: what stands at padded positions, and how much padding there is, never changes the output at a real
    position (even NaN there); a batch row without any real position gives finite numbers.

    Args:
        width: size of the vectors inside and at the output.
        depth: number of layers.
        heads: number of attention heads; divides `width`.
        feedforward: hidden size of the feed-forward blocks; 4 * `width` by default.
        norm: "pre" (norm before each part, stable without warm-up) or "post" (BERT).
        positions: see `mmpt.positions.Positions`.
        max_length: number of positions that `absolute` and `relative_key_query` can tell apart.
        input_width: size of the input vectors; `width` by default, otherwise a linear projection follows the input
            stage.
        input_norm: layer norm of the input, after the positions (BERT).
        final_norm: layer norm after the last layer; by default with pre-norm only.
        activation: see `Activation`.
        dropout: dropout of the input and of every part's output.
        attention_dropout: dropout of attention probabilities.
        norm_eps: epsilon of all layer norms.
        cross_attention: which layers can read a context: all (True), none, or a list of layer numbers from 0.
        context_width: size of the context vectors; `width` by default.
        relative_buckets: (disentangled) number of logarithmic buckets per direction; 0 uses plain distances.
        relative_distance: (disentangled) distance from which on distances are not told apart; `max_length` by default.
        relative_terms: (disentangled) position terms: "c2p", "p2c" or both.
        relative_share: (disentangled) relative vectors use the content projections.
        relative_norm: (disentangled) layer norm of the relative vectors.
        packing: pack the real tokens of a padded batch into full rows before the layers and unpack after them. It asks
            the device for the lengths once per call; pays off where lengths are skewed. A batch with a context is not
            packed.

    Raises:
        ConfigError: sizes that don't divide, unknown options, layer numbers that don't exist.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        feedforward: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        positions: Positions = "absolute",
        max_length: int = 512,
        input_width: int | None = None,
        input_norm: bool = False,
        final_norm: bool | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        cross_attention: Sequence[int] | bool = False,
        context_width: int | None = None,
        relative_buckets: int = 0,
        relative_distance: int | None = None,
        relative_terms: Sequence[Literal["c2p", "p2c"]] = ("c2p", "p2c"),
        relative_share: bool = True,
        relative_norm: bool = True,
        packing: bool = False,
    ) -> None:
        super().__init__()
        cross_layers = _cross_layers(cross_attention, depth)
        _check(width, heads, norm, positions, relative_buckets, relative_distance or max_length)
        self.width = width
        self.depth = depth
        self.heads = heads
        self.input_width = width if input_width is None else input_width
        self.context_width = width if context_width is None else context_width
        self.max_length = max_length
        self.positions = positions
        self.relative_buckets = relative_buckets
        self.reads_context = bool(cross_layers)
        self.packing = packing

        self.position = nn.Embedding(max_length, self.input_width) if positions == "absolute" else None
        self.input_norm = nn.LayerNorm(self.input_width, norm_eps) if input_norm else None
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(self.input_width, width) if self.input_width != width else None
        self.relative_distance = max_length if relative_distance is None else relative_distance
        self.span = relative_buckets or self.relative_distance
        self.relative = nn.Embedding(2 * self.span, width) if positions == "disentangled" else None
        self.relative_norm = nn.LayerNorm(width, norm_eps) if positions == "disentangled" and relative_norm else None

        def self_attention() -> SelfAttention:
            if positions == "relative_key_query":
                return RelativeKeyQueryAttention(width, heads, attention_dropout, max_length)
            if positions == "disentangled":
                return DisentangledAttention(width, heads, attention_dropout, relative_terms, relative_share)
            return SelfAttention(width, heads, attention_dropout)

        def cross(number: int) -> CrossAttention | None:
            return (
                CrossAttention(width, heads, self.context_width, attention_dropout) if number in cross_layers else None
            )

        self.layers = nn.ModuleList(
            Layer(
                self_attention(),
                cross(number),
                width=width,
                feedforward=feedforward or 4 * width,
                pre_norm=norm == "pre",
                activation=activation,
                dropout=dropout,
                norm_eps=norm_eps,
            )
            for number in range(depth)
        )
        with_final_norm = norm == "pre" if final_norm is None else final_norm
        self.final_norm = nn.LayerNorm(width, norm_eps) if with_final_norm else None
        self.reset_parameters(residual_scale=(2 * depth) ** -0.5 if norm == "pre" and depth else 1.0)

    def reset_parameters(self, residual_scale: float = 1.0) -> None:
        """Draw all weights anew: normal with standard deviation 0.02, biases zero, norms one.

        Args:
            residual_scale: factor on the matrices that write into the residual stream, so that its variance does not
                grow with the depth of a pre-norm model (GPT-2).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, RelativeKeyQueryAttention):
                nn.init.normal_(module.distance, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.output.weight", "cross.output.weight", "contract.weight")):
                nn.init.normal_(weight, std=0.02 * residual_scale)

    def forward(
        self,
        tokens: Tokens,
        attention: Attention = "bidirectional",
        context: Tokens | None = None,
        prefix: Tensor | None = None,
        segments: Tensor | None = None,
        position_ids: Tensor | None = None,
        position_limit: int | None = None,
        cache: TransformerCache | None = None,
        shift: Tensor | None = None,
    ) -> Tokens:
        """Run the layers.

        Args:
            tokens: values (batch, length, input_width).
            attention: see `Attention`.
            context: tokens (batch, context length, context_width) for the cross-attention layers; without it, and for
                rows in which it is all padding, those layers are skipped.
            prefix: bool (batch, length) for `attention="prefix"`: positions that all others see. They see each other,
                the rest is causal.
            segments: long (batch, length): number of the packed sequence that a position belongs to; a position sees
                its own segment only.
            position_ids: long (batch, length): where each token stands; the column number by default.
            position_limit: a number that all `position_ids` are known to be below, so that tables of relative vectors
                can be cut short; the length if there are no `position_ids`.
            cache: positions that were read before; `tokens` follow them and are added. Behind them attention is
                causal.
            shift: (input_width,) that is added to every token, such as the vector of a token type.

        Returns:
            Tokens with values (batch, length, width) and the mask of the input.

        Raises:
            ConfigError: widths that don't fit, a sequence longer than `max_length`, a context for a model without
                cross-attention, prefix and attention that contradict each other, a cache with another attention.
        """
        past = 0 if cache is None else cache.length
        regular = position_ids is None and cache is None
        if position_ids is None:
            position_limit = past + tokens.length
        self._check_input(tokens, context, position_limit)
        context = None if context is None else _blank_padding(context)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens.length, device=tokens.mask.device).unsqueeze(0)
        if cache is not None:
            if segments is not None or (past and attention != "causal"):
                raise ConfigError(
                    f"attention={attention!r} behind a filled cache, or packed segments with one: what was read before "
                    "can't see what comes now; continue with attention='causal' and no segments"
                )
            allowed = attention_mask(cache.extend(tokens.mask), attention, prefix, past=past)
            positions = cache.extend_positions(position_ids.expand(tokens.mask.shape))
            geometry = self._geometry(allowed, position_ids, position_limit, key_position_ids=positions)
            values = self._run(_blank_padding(tokens).values, position_ids, geometry, context, cache, shift)
            return Tokens(values, tokens.mask)
        if self.packing and context is None and segments is None:
            packed = pack(tokens, prefix=prefix, position_ids=position_ids)  # moves real tokens only
            outputs = []
            for rows in packed.parts:
                allowed = attention_mask(rows.tokens.mask, attention, rows.prefix, rows.segments)
                geometry = self._geometry(allowed, rows.position_ids, position_limit)
                outputs.append(self._run(rows.tokens.values, rows.position_ids, geometry, None, shift=shift))
            return packed.unpack(outputs)
        allowed = attention_mask(tokens.mask, attention, prefix, segments)
        geometry = self._geometry(allowed, position_ids, position_limit, regular)
        values = self._run(_blank_padding(tokens).values, position_ids, geometry, context, shift=shift)
        return Tokens(values, tokens.mask)

    def _run(
        self,
        values: Tensor,
        position_ids: Tensor,
        geometry: Geometry,
        context: Tokens | None,
        cache: TransformerCache | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        if shift is not None:
            values = values + shift
        if self.position is not None:
            values = values + self.position(position_ids)
        if self.input_norm is not None:
            values = self.input_norm(values)
        values = self.dropout(values)
        if self.projection is not None:
            values = self.projection(values)
        for number, layer in enumerate(self.layers):
            if cache is not None:
                values = layer(values, geometry, context, cache.own[number], cache.cross[number])
            else:
                values = layer(values, geometry, context)
        return values if self.final_norm is None else self.final_norm(values)

    def _geometry(
        self,
        allowed: Tensor,
        position_ids: Tensor,
        position_limit: int | None,
        regular: bool = False,
        key_position_ids: Tensor | None = None,
    ) -> Geometry:
        if self.positions == "rotary":
            return Geometry(allowed, angles=rotary_angles(position_ids, self.width // self.heads))
        if self.positions == "relative_key_query":
            reach = min(position_limit or self.max_length, self.max_length) - 1
            if regular and reach > 0:
                return Geometry(allowed, reach=reach)
            rows = relative_distances(position_ids, key_position_ids) + reach
            return Geometry(allowed, relative_rows=rows, reach=reach)
        if self.relative is not None:
            distances = relative_distances(position_ids, key_position_ids)
            if self.relative_buckets:
                distances = log_buckets(distances, self.relative_buckets, self.relative_distance)
            # Row `span` is distance 0; rows for distances that this batch can't have are left out.
            reach = self.span if position_limit is None else min(max(position_limit, 1) - 1, self.span)
            relative = self.relative.weight[self.span - reach : self.span + reach + 1]
            if self.relative_norm is not None:
                relative = self.relative_norm(relative)
            rows = (distances + reach).clamp(0, len(relative) - 1)
            return Geometry(allowed, relative_rows=rows, reach=reach, relative=self.dropout(relative))
        return Geometry(allowed)

    def _check_input(self, tokens: Tokens, context: Tokens | None, limit: int | None) -> None:
        if tokens.width != self.input_width:
            raise ConfigError(
                f"the transformer takes vectors of size {self.input_width}, got {tokens.width}; "
                "put a connector in front"
            )
        limited = self.positions in ("absolute", "relative_key_query")
        if limited and limit is not None and limit > self.max_length:
            raise ConfigError(
                f"{limit} positions for a transformer with max_length={self.max_length}; shorten the input or "
                f"build it with max_length={limit} or more"
            )
        if context is None:
            return
        if not self.reads_context:
            raise ConfigError("a context for a transformer without cross-attention; build it with cross_attention=True")
        if context.width != self.context_width or len(context.mask) != len(tokens.mask):
            raise ConfigError(
                f"the context is {tuple(context.values.shape)}; expected ({len(tokens.mask)}, length, "
                f"{self.context_width}). Set context_width to the size of the context vectors"
            )


def _blank_padding(tokens: Tokens) -> Tokens:
    """Zeros at padded positions: a NaN there would survive an attention weight of 0."""
    return Tokens(tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), 0.0), tokens.mask)


def _cross_layers(cross_attention: Sequence[int] | bool, depth: int) -> set[int]:
    if isinstance(cross_attention, bool):
        return set(range(depth)) if cross_attention else set()
    chosen = set(cross_attention)
    if not chosen <= set(range(depth)):
        raise ConfigError(f"cross_attention={sorted(chosen)} names layers outside 0..{depth - 1}")
    return chosen


def _check(width: int, heads: int, norm: str, positions: str, buckets: int, distance: int) -> None:
    if width % heads:
        raise ConfigError(f"heads={heads} does not divide width={width}")
    if norm not in ("pre", "post"):
        raise ConfigError(f"norm={norm!r} is unknown; choose 'pre' or 'post'")
    if positions not in ("none", "absolute", "rotary", "relative_key_query", "disentangled"):
        raise ConfigError(f"positions={positions!r} is unknown; see mmpt.positions.Positions")
    if positions == "rotary" and (width // heads) % 2:
        raise ConfigError(f"rotary positions turn pairs: width / heads = {width // heads} must be even")
    if buckets and not 2 <= buckets < 2 * (distance - 1):
        raise ConfigError(
            f"relative_buckets={buckets} must lie between 2 and 2 * (relative_distance - 1) = {2 * (distance - 1)}"
        )
