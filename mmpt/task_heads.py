"""What fine-tuning puts on an encoder: tokens -> scores of the labels, for a sample or for each of its units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mmpt.config import Configurable
from mmpt.tokens import Tokens

Pool = Callable[[Tokens], Tensor]


class TaskHead(nn.Module, Configurable, ABC):
    """Scores of labels from an encoder's tokens.

    Attributes:
        per_unit: whether every unit gets scores (tagging), or the sample as a whole (classification).
    """

    per_unit: bool

    @abstractmethod
    def build(self, width: int, labels: int) -> None:
        """Make the layers, once the encoder and the data have said the sizes."""

    @abstractmethod
    def forward(self, tokens: Tokens, pool: Pool) -> Tensor:
        """Scores: (batch, labels), or (batch, length, labels) if `per_unit`.

        Args:
            tokens: of the encoder.
            pool: the modality's own pooling, (batch, length, width) to (batch, width).
        """


def mlp(width: int, hidden: int | None, labels: int) -> nn.Module:
    """One linear layer, or two with a ReLU between them."""
    if hidden is None:
        return nn.Linear(width, labels)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, labels))


def standardized(norm: nn.Module, vectors: Tensor) -> Tensor:
    """Batch norm over (batch, width) that takes its running statistics where a batch of one sample has none."""
    if isinstance(norm, nn.BatchNorm1d) and norm.training and len(vectors) == 1:
        return F.batch_norm(vectors, norm.running_mean, norm.running_var, eps=norm.eps)
    return norm(vectors)


class PooledHead(TaskHead):
    """Classification from the modality's own pooling.

    Args:
        dropout: before the first layer.
        hidden: size of a hidden layer; None is a linear classifier.
        batch_norm: standardise every dimension of the pooled vector over the batch, without a learned scale, as MAE's
            linear probing does (arXiv 2111.06377, A.1). The mean over hundreds of tokens hardly differs from sample to
            sample, and a linear layer learns slowly from small differences.
    """

    per_unit = False

    def __init__(self, dropout: float = 0.1, hidden: int | None = None, batch_norm: bool = False) -> None:
        super().__init__()
        self.dropout, self.hidden, self.batch_norm = nn.Dropout(dropout), hidden, batch_norm

    def build(self, width: int, labels: int) -> None:
        """See `TaskHead`."""
        self.norm = nn.BatchNorm1d(width, affine=False) if self.batch_norm else nn.Identity()
        self.classifier = mlp(width, self.hidden, labels)

    def forward(self, tokens: Tokens, pool: Pool) -> Tensor:
        """See `TaskHead`."""
        return self.classifier(self.dropout(standardized(self.norm, pool(tokens))))


class UnitHead(TaskHead):
    """Tagging: the same layers on the token of every unit.

    Args:
        dropout: before the first layer.
        hidden: size of a hidden layer; None is a linear classifier (MidiBERT: 256).
    """

    per_unit = True

    def __init__(self, dropout: float = 0.1, hidden: int | None = None) -> None:
        super().__init__()
        self.dropout, self.hidden = nn.Dropout(dropout), hidden

    def build(self, width: int, labels: int) -> None:
        """See `TaskHead`."""
        self.classifier = mlp(width, self.hidden, labels)

    def forward(self, tokens: Tokens, pool: Pool) -> Tensor:
        """See `TaskHead`."""
        return self.classifier(self.dropout(tokens.values))


class AttentionPoolingHead(TaskHead):
    """Classification from several learned weightings of the tokens (Lin et al., arXiv 1703.03130), as MidiBERT does.

    A = softmax over time of W2 tanh(W1 h), without biases; the weighted sums side by side go through the classifier.
    Differs from MidiBERT's code in that padding gets no weight.

    Args:
        queries: how many weightings.
        attention: width of W1's output.
        hidden: size of the classifier's hidden layer; None is a linear classifier.
        dropout: on the weighted sums.
    """

    per_unit = False

    def __init__(self, queries: int = 4, attention: int = 128, hidden: int | None = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.queries, self.attention, self.hidden = queries, attention, hidden
        self.dropout = nn.Dropout(dropout)

    def build(self, width: int, labels: int) -> None:
        """See `TaskHead`."""
        self.inner = nn.Linear(width, self.attention, bias=False)
        self.outer = nn.Linear(self.attention, self.queries, bias=False)
        self.classifier = mlp(self.queries * width, self.hidden, labels)

    def forward(self, tokens: Tokens, pool: Pool) -> Tensor:
        """See `TaskHead`."""
        return self.classifier(self.dropout(self.sums(tokens).flatten(1)))

    def sums(self, tokens: Tokens) -> Tensor:
        """The weighted sums: (batch, queries, width)."""
        scores = self.outer(self.inner(tokens.values).tanh())  # (batch, length, queries)
        # A row of padding alone gets equal weights instead of NaN.
        hidden = ~(tokens.mask | ~tokens.mask.any(1, keepdim=True))
        weights = scores.float().masked_fill(hidden.unsqueeze(-1), float("-inf")).softmax(1).to(scores.dtype)
        values = tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), 0.0)
        return weights.mT @ values
