"""Heads: losses and the parameters that they need, over a lazy view of one batch."""

from mmpt.heads.adversarial import AdversarialMaskedHead
from mmpt.heads.alignment import CaptioningHead, MatchingHead
from mmpt.heads.answering import AnsweringHead
from mmpt.heads.contrastive import ContrastiveHead, GroupContrastiveHead
from mmpt.heads.head import Head, HeadOutput
from mmpt.heads.masked import MaskedHead
from mmpt.heads.similarity import SimilarityHead

__all__ = [
    "AdversarialMaskedHead",
    "AnsweringHead",
    "CaptioningHead",
    "ContrastiveHead",
    "GroupContrastiveHead",
    "Head",
    "HeadOutput",
    "MaskedHead",
    "MatchingHead",
    "SimilarityHead",
]
