"""Answering: texts of prompts and answers in turn, with a loss on the answers alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads.head import Head, HeadOutput
from mmpt.model import TEXT, MultimodalModel


class AnsweringHead(Head):
    """Writes answers to prompts about a sample: the sample is a visible prefix (or context), the text is causal.

    A text is `prompt [SEP] answer [SEP] prompt [SEP] answer [SEP]`, any number of turns; the last [SEP] is the
    tokenizer's own. The loss is the mean cross-entropy over the tokens of the answers and the [SEP] that ends each of
    them (visual instruction tuning, LLaVA, arXiv 2304.08485, with several turns). Logits are computed there only.

    A sample may be absent from single rows (its tokens all padding): these rows train on their text alone.

    Args:
        modality: what the texts are about.
    """

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modalities = (modality, TEXT)

    def bind(self, model: MultimodalModel) -> None:
        """See `Head`.

        Raises:
            ConfigError: a tokenizer without [SEP].
        """
        super().bind(model)
        separator = model.text.tokenizer.sep_token_id
        if separator is None:
            raise ConfigError("the tokenizer has no [SEP] token, which divides prompts from answers; set its sep_token")
        self.separator = separator

    def forward(self, features: Features) -> HeadOutput:
        """See `Head`."""
        text = features.inputs(TEXT)
        tokens = features.fused(self.modalities[0], attention="prefix")
        answers = answer_mask(text["ids"], text["mask"], self.separator)[
            :, 1:
        ]  # (batch, length - 1), of the next token
        targets = text["ids"][:, 1:][answers]
        logits = features.model.text.lm_logits(tokens.values[:, :-1][answers]).float()  # (answer tokens, vocabulary)
        count = max(1, len(targets))
        loss = F.cross_entropy(logits, targets, reduction="sum") / count
        return HeadOutput(loss, {"accuracy": (logits.detach().argmax(-1) == targets).float().sum() / count})


def answer_mask(ids: Tensor, mask: Tensor, separator: int) -> Tensor:
    """Which tokens belong to answers, the separator behind each included: bool (batch, length).

    Args:
        ids: long (batch, length).
        mask: bool (batch, length), True where real.
        separator: id of the token between prompts and answers.
    """
    ends = (ids == separator) & mask
    turn = ends.int().cumsum(1) - ends.int()  # a separator belongs to what it ends
    return mask & (torch.remainder(turn, 2) == 1)
