"""Connectors: from the width of an encoder to the width at which vectors enter the text transformer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
from torch import nn

from mmpt.config import Configurable
from mmpt.errors import ConfigError
from mmpt.tokens import Tokens, full
from mmpt.transformer import Transformer


class Connector(nn.Module, Configurable, ABC):
    """Maps Tokens of one width to Tokens of another.

    The model calls `build` once, when it knows both widths, so no configuration repeats them.
    """

    @abstractmethod
    def build(self, in_width: int, out_width: int) -> None:
        """Make the parameters."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tokens:
        """(batch, length, in_width) -> (batch, other or same length, out_width)."""


class LinearConnector(Connector):
    """One linear map for each position (LLaVA, arXiv 2304.08485)."""

    def build(self, in_width: int, out_width: int) -> None:
        """See `Connector`."""
        self.linear = nn.Linear(in_width, out_width)

    def forward(self, tokens: Tokens) -> Tokens:
        """See `Connector`; keeps the length."""
        return Tokens(self.linear(tokens.values), tokens.mask)


class MLPConnector(Connector):
    """Layers of linear maps with GELU between them (LLaVA 1.5, arXiv 2310.03744).

    Args:
        depth: number of linear maps.
        hidden: width between them; None is the output width.
    """

    def __init__(self, depth: int = 2, hidden: int | None = None) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"depth is {depth}; an MLP needs at least one linear map")
        self.depth, self.hidden = depth, hidden

    def build(self, in_width: int, out_width: int) -> None:
        """See `Connector`."""
        widths = [in_width, *[self.hidden or out_width] * (self.depth - 1), out_width]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, tokens: Tokens) -> Tokens:
        """See `Connector`; keeps the length."""
        return Tokens(self.layers(tokens.values), tokens.mask)


class ResamplerConnector(Connector):
    """A fixed number of learned queries that attend to the tokens (Perceiver resampler, arXiv 2204.14198; Q-Former).

    Args:
        queries: number of output tokens.
        depth: layers of self-attention among the queries and cross-attention to the tokens.
        heads: attention heads.
    """

    def __init__(self, queries: int = 8, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.queries, self.depth, self.heads = queries, depth, heads

    def build(self, in_width: int, out_width: int) -> None:
        """See `Connector`."""
        self.learned = nn.Parameter(torch.randn(self.queries, out_width) * 0.02)
        self.transformer = Transformer(
            out_width, self.depth, self.heads, positions="none", cross_attention=True, context_width=in_width
        )

    def forward(self, tokens: Tokens) -> Tokens:
        """See `Connector`; the output has `queries` positions."""
        queries = self.learned.expand(len(tokens.values), -1, -1)
        return self.transformer(full(queries), context=tokens)
