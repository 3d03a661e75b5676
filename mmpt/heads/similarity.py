"""The similarity head: the cosine of a pair is its label, 1 for a true pair and 0 for a wrong one."""

from __future__ import annotations

import torch

from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.model import TEXT


class SimilarityHead(Head):
    """Mean squared error between the cosine of two embeddings and a label (ArchBERT, arXiv 2310.17737).

    Data that carry the label, such as statements that are true or false of a sample, are taken as they are. Data
    without it are pairs that belong together: each is also compared with the next sample's text in the batch, with
    label 0 unless both are of one `group`.

    | data                          | pairs                       | instead                                      |
    |-------------------------------|-----------------------------|----------------------------------------------|
    | with `label`                  | (a_i, b_i), label_i         | -                                            |
    | without                       | (a_i, b_i), (a_i, b_i+1)    | `ContrastiveHead`, which compares all of them |

    Args:
        first: a modality.
        second: another one.
        label: name of the data's label, 1 or 0.
        threshold: a cosine above it counts as true, for the accuracy that is logged.
    """

    contrastive = True

    def __init__(self, first: str, second: str = TEXT, label: str = "match", threshold: float = 0.5) -> None:
        super().__init__()
        self.modalities = (first, second)
        self.label, self.threshold = label, threshold

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
        return HeadOutput((cosine - target).square().mean(), {"accuracy": right.float().mean()})
