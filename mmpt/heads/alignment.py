"""Alignment heads: does this text belong to this sample, and write the text of this sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.model import TEXT, MultimodalModel
from mmpt.tokens import Tokens


class MatchingHead(Head):
    """Tells true pairs from in-batch hard negatives with the fused text (ALBEF, arXiv 2107.07651; BLIP).

    For each pair (sample, text) two wrong ones are made: the sample with another text, the text with another sample.
    The other one is drawn with probability softmax(similarity / temperature) over the batch without the pair's own
    group, so that nearly right ones come often. Where a batch holds one group only, the negatives have no loss.

    Args:
        modality: paired with text.
        temperature: of the draw.
    """

    contrastive = True

    def __init__(self, modality: str, temperature: float = 0.07) -> None:
        super().__init__()
        self.modalities = (modality, TEXT)
        self.temperature = temperature

    def bind(self, model: MultimodalModel) -> None:
        """See `Head`."""
        super().bind(model)
        self.classifier = nn.Linear(model.text.width, 2)

    def logits(self, features: Features, text_rows: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """(n, 2): not matching, matching; the softmax's second entry is the probability of a match."""
        return self.score(features.model, features.fused(self.modalities[0], text_rows=text_rows, rows=rows))

    def score(self, model: MultimodalModel, fused: Tokens) -> Tensor:
        """(n, 2) logits of fused texts, which are pooled as the model pools texts."""
        return self.classifier(model.modality(TEXT).pool(fused))

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        modality = self.modalities[0]
        samples, texts = features.embedding(modality).detach(), features.embedding(TEXT).detach()
        size = len(samples)
        groups = features.label("group")
        own = torch.arange(size, device=samples.device)
        groups = own if groups is None else groups
        similarity = samples @ texts.T / self.temperature  # (samples, texts)
        wrong_text, has_wrong = hard_negatives(similarity, groups)
        wrong_sample, _ = hard_negatives(similarity.T, groups)
        logits = self.logits(
            features, text_rows=torch.cat([own, wrong_text, own]), rows=torch.cat([own, own, wrong_sample])
        )
        labels = torch.zeros(3 * size, dtype=torch.long, device=logits.device)
        labels[:size] = 1
        weight = torch.cat([torch.ones_like(has_wrong), has_wrong, has_wrong]).to(logits.dtype)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        right = (logits.argmax(1) == labels).to(weight.dtype)
        return HeadOutput(loss, {"accuracy": ((right * weight).sum() / weight.sum()).detach()})


def hard_negatives(similarity: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row a column of another group, the more similar the more often.

    Args:
        similarity: (n, n), row i and column i are a pair.
        groups: long (n,).

    Returns:
        long (n,) columns, and bool (n,): whether the row has a column of another group at all.
    """
    other = groups[:, None] != groups[None, :]  # (n, n)
    probability = similarity.float().masked_fill(~other, float("-inf")).softmax(1)
    possible = other.any(1)
    probability = torch.where(possible[:, None], probability, torch.ones_like(probability))
    return torch.multinomial(probability, 1).squeeze(1), possible


class CaptioningHead(Head):
    """Writes the text of a sample: the sample is a visible prefix (or context), the text is causal.

    The loss is the mean cross-entropy of the next token over the real tokens of the text.

    Args:
        modality: what the text describes.
        label_smoothing: 0.1 in BLIP.
    """

    def __init__(self, modality: str, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.modalities = (modality, TEXT)
        self.label_smoothing = label_smoothing

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        text = features.inputs(TEXT)
        tokens = features.fused(self.modalities[0], attention="prefix")
        real = text["mask"][:, 1:]  # (batch, length - 1): the next token exists
        targets = text["ids"][:, 1:][real]
        logits = features.model.text.lm_logits(tokens.values[:, :-1][real])  # (real tokens, vocabulary)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        return HeadOutput(loss, {"accuracy": (logits.argmax(-1) == targets).float().mean()})
