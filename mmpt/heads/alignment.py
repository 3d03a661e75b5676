"""Alignment heads: does this text belong to this sample, and write the text of this sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpt.distributed import gather, pad_to_longest
from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.model import TEXT, MultimodalModel
from mmpt.tokens import Tokens

CHUNK = 1024
"""Rows of the similarity matrix at a time when negatives are drawn."""


class MatchingHead(Head):
    """Tells true pairs from in-batch hard negatives with the fused text (ALBEF, arXiv 2107.07651; BLIP).

    For each pair (sample, text) two wrong ones are made: the sample with another text, the text with another sample.
    The other one is drawn with probability softmax(similarity / temperature) over the batch without the pair's own
    group, so that nearly right ones come often. Where a batch holds one group only, the negatives have no loss.

    In training the batch is that of all processes together: texts and connected tokens are gathered, the latter with
    gradient, and their greatest length is asked of all (one small exchange that waits for the device).

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
        all_samples, offset = self._everyone(samples)
        all_texts, _ = self._everyone(texts)
        size, total = len(samples), len(all_samples)
        own = torch.arange(size, device=samples.device) + offset
        groups = features.label("group")
        groups = own if groups is None else groups
        all_groups, _ = self._everyone(groups)
        draws = features.draws(2 * total).to(samples.device)  # the same on every process, which takes its rows
        mine = slice(offset, offset + size)
        wrong_text, has_wrong = self._wrong(samples, all_texts, groups, all_groups, draws[:total][mine])
        wrong_sample, _ = self._wrong(texts, all_samples, groups, all_groups, draws[total:][mine])

        text = {key: self._everyone(value)[0] for key, value in features.inputs(TEXT).items()}
        connected = features.connected(modality)
        context = Tokens(self._everyone(connected.values)[0], self._everyone(connected.mask)[0])
        text_rows, rows = torch.cat([own, wrong_text, own]), torch.cat([own, own, wrong_sample])
        fused = features.fuse({key: value[text_rows] for key, value in text.items()}, context.rows(rows))
        logits = self.score(features.model, fused)
        labels = (torch.arange(3 * size, device=logits.device) < size).long()
        weight = torch.cat([torch.ones_like(has_wrong), has_wrong, has_wrong]).to(logits.dtype)
        loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        right = (logits.argmax(1) == labels).to(weight.dtype)
        return HeadOutput(loss, {"accuracy": ((right * weight).sum() / weight.sum()).detach()})

    def _everyone(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of all processes in training, of this one in evaluation; shorter sequences are padded with zeros."""
        if not self.training:
            return rows, 0
        return gather(pad_to_longest(rows) if rows.ndim > 1 else rows)

    def _wrong(
        self, queries: Tensor, keys: Tensor, groups: Tensor, all_groups: Tensor, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`hard_negatives` a few rows at a time: the matrix of all pairs may not fit."""
        parts = [
            hard_negatives(q @ keys.T / self.temperature, g, all_groups, u)
            for q, g, u in zip(queries.split(CHUNK), groups.split(CHUNK), draws.split(CHUNK), strict=True)
        ]
        return torch.cat([column for column, _ in parts]), torch.cat([possible for _, possible in parts])


def hard_negatives(
    similarity: Tensor, groups: Tensor, all_groups: Tensor | None = None, draws: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw for each row a column of another group, the more similar the more often.

    Args:
        similarity: (n, m); the draw is from its softmax.
        groups: long (n,), of the rows.
        all_groups: long (m,), of the columns; None: the same.
        draws: (n,) uniform numbers in [0, 1) that decide; None draws them.

    Returns:
        long (n,) columns, and bool (n,): whether the row has a column of another group at all.
    """
    all_groups = groups if all_groups is None else all_groups
    draws = torch.rand(len(groups), device=groups.device) if draws is None else draws
    other = groups[:, None] != all_groups[None, :]  # (n, m)
    possible = other.any(1)
    probability = similarity.float().masked_fill(~other, float("-inf")).softmax(1)
    probability = torch.where(possible[:, None], probability, torch.ones_like(probability))
    upto = probability.cumsum(1)  # (n, m)
    total = upto[:, -1:]
    # below the total even after rounding, as behind it there are only columns that must not be drawn
    place = torch.minimum(draws.to(total.dtype)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(upto, place, right=True).squeeze(1), possible


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
