"""The similarity head: the cosine of a pair is its label, 1 for a true pair and 0 for a wrong one."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads.contrastive import Temperature
from mmpt.heads.head import Head, HeadOutput
from mmpt.model import TEXT


class SimilarityHead(Head):
    """Compares the cosine of two embeddings with a label: by default the squared error (ArchBERT, arXiv 2310.17737).

    Data that carry the label, such as statements that are true or false of a sample, are taken as they are. Data
    without it are pairs that belong together: each is also compared with the next sample's text in the batch, with
    label 0 unless both are of one `group`.

    | data                          | pairs                       | instead                                      |
    |-------------------------------|-----------------------------|----------------------------------------------|
    | with `label`                  | (a_i, b_i), label_i         | -                                            |
    | without                       | (a_i, b_i), (a_i, b_i+1)    | `ContrastiveHead`, which compares all of them |
    | also with `facts` and `fact`  | and all (a_i, b_j)          | -                                             |

    `facts` says for each sample which of a list of facts hold, 0 or 1, and `fact` the number of the one that its text
    states, -1 if it is none of them. Then every text is compared with every sample of the batch for the price of one
    encoding: the mean loss over what is true and that over what is false, in equal parts, are added.

    Many statements are true of one sample, and their vectors can't all be the sample's: `logistic` asks only on which
    side of the threshold a cosine lies, with the cross-entropy of sigmoid((cosine - threshold) / temperature).

    Args:
        first: a modality.
        second: another one.
        label: name of the data's label, 1 or 0.
        threshold: a cosine above it counts as true.
        loss: "error", the squared error (ArchBERT), or "logistic".
        temperature: where that of "logistic" starts; it is learned.
    """

    contrastive = True

    def __init__(
        self,
        first: str,
        second: str = TEXT,
        label: str = "match",
        threshold: float = 0.5,
        loss: Literal["error", "logistic"] = "error",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if loss not in ("error", "logistic"):
            raise ConfigError(f"loss={loss!r} is unknown; choose 'error' or 'logistic'")
        self.modalities = (first, second)
        self.label, self.threshold = label, threshold
        self.temperature = Temperature(temperature) if loss == "logistic" else None

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        first, second = (features.embedding(name) for name in self.modalities)
        label = features.label(self.label)
        cosine = (first * second).sum(1)  # (batch,)
        if label is None:
            groups = features.label("group")
            own = torch.arange(len(first), device=first.device) if groups is None else groups
            cosine = torch.cat([cosine, (first * second.roll(-1, 0)).sum(1)])  # (2 * batch,)
            label = torch.cat([torch.ones_like(own), (own == own.roll(-1, 0)).long()])
        target = label.to(cosine.dtype)
        right = (cosine > self.threshold) == (target > 0.5)
        loss = self._losses(cosine, target).mean()
        logs = {"accuracy": right.float().mean()}
        facts, fact = features.label("facts"), features.label("fact")
        if facts is not None and fact is not None:
            holds = facts[:, fact.clamp(min=0)]  # (batch of samples, batch of texts)
            other = (fact >= 0) & ~torch.eye(len(fact), dtype=torch.bool, device=fact.device)
            losses = self._losses(first @ second.T, holds.to(cosine.dtype))
            for chosen in (other & (holds == 1), other & (holds == 0)):
                loss = loss + 0.5 * (losses * chosen).sum() / chosen.sum().clamp(min=1)
        return HeadOutput(loss, logs)

    def _losses(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of each pair."""
        if self.temperature is None:
            return (cosine - target).square()
        logits = (cosine - self.threshold) * self.temperature()
        return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
