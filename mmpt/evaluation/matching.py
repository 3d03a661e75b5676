"""Scores of sample-text pairs by a matching head, alone or together with the similarity of the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.heads.alignment import MatchingHead
from mmpt.model import TEXT, MultimodalModel, evaluating


def match_probabilities(
    model: MultimodalModel, head: MatchingHead, samples: Sequence[Any], texts: Sequence[str], batch_size: int = 64
) -> Tensor:
    """The probability of a match of every sample with every text.

    Each text is tokenized once and each sample encoded once; the text transformer runs over all pairs.

    Args:
        model: holds the modality that the head is of.
        head: trained with this model.
        samples: raw samples (anything that can be sliced).
        texts: candidates.
        batch_size: samples at once, each with all texts in turn.

    Returns:
        float32 (samples, texts).
    """
    modality = head.modalities[0]
    rows = []
    with evaluating(model), evaluating(head), torch.no_grad():
        text = model.process(TEXT, list(texts))
        for start in range(0, len(samples), batch_size):
            inputs = model.process(modality, samples[start : start + batch_size])
            context = model.connect(modality, model.modality(modality).encoder(inputs))
            columns = []
            for number in range(len(texts)):
                one = {key: value[number : number + 1].expand(len(context.mask), -1) for key, value in text.items()}
                columns.append(head.score(model, model.fuse_tokens(one, [context])).float().softmax(1)[:, 1])
            rows.append(torch.stack(columns, 1))
    return torch.cat(rows) if rows else torch.zeros(0, len(texts))


def mixed_scores(
    cosines: Tensor,
    probabilities: Tensor,
    share: float = 0.5,
    temperature: float = 0.05,
    matching_norm: Literal["softmax", "none"] = "softmax",
) -> Tensor:
    """LangCell's zero-shot score (arXiv 2405.06708): similarity and matching, mixed.

    Args:
        cosines: (samples, texts).
        probabilities: (samples, texts) of a match.
        share: of the similarity; the rest is the matching's. Choose it on validation samples.
        temperature: of the softmax over similarities.
        matching_norm: "softmax" over the probabilities, as published, which is nearly flat; or "none".

    Returns:
        (samples, texts); with "softmax", rows sum to 1.

    Raises:
        ConfigError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"share is {share}; it must lie between 0 (matching alone) and 1 (similarity alone)")
    similar = (cosines / temperature).softmax(1)
    matching = probabilities.softmax(1) if matching_norm == "softmax" else probabilities
    return share * similar + (1 - share) * matching


def choose_share(
    cosines: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    shares: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    temperature: float = 0.05,
    matching_norm: Literal["softmax", "none"] = "softmax",
) -> float:
    """The share with the best accuracy on validation samples; among equals the one nearest to 0.5.

    Args:
        cosines: (samples, texts) of validation samples.
        probabilities: (samples, texts).
        labels: long (samples,), the right text.
        shares: candidates.
        temperature: see `mixed_scores`.
        matching_norm: see `mixed_scores`.
    """

    def right(share: float) -> int:
        scores = mixed_scores(cosines, probabilities, share, temperature, matching_norm)
        return int((scores.argmax(1) == labels).sum())

    return max(shares, key=lambda share: (right(share), -abs(share - 0.5)))
