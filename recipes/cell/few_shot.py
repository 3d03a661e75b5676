"""LangCell's few-shot tuning: a few labelled cells pull at both encoders and at the matching head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from mmpt.heads.alignment import MatchingHead
from mmpt.model import TEXT, MultimodalModel
from mmpt.tokens import Tokens


def few_shot_loss(
    cosines: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperature: float = 0.05,
    matching: Literal["log_odds", "released"] = "log_odds",
) -> Tensor:
    """Cross-entropy of similarities and cross-entropy of matching scores, summed (LangCell, arXiv 2405.06708).

    Args:
        cosines: (cells, types).
        logits: (cells, types, 2) of the matching head.
        labels: long (cells,), number of the type.
        temperature: of the similarities.
        matching: "log_odds" of a match are the logits of the types. "released" takes the probabilities of a match for
            logits, as the released code does, so that its softmax is taken twice and the gradient stays small.

    Returns:
        A scalar.
    """
    scores = logits.softmax(-1)[..., 1] if matching == "released" else logits[..., 1] - logits[..., 0]
    return functional.cross_entropy(cosines / temperature, labels) + functional.cross_entropy(scores, labels)


def tune(
    model: MultimodalModel,
    head: MatchingHead,
    cells: Sequence[Any],
    labels: Sequence[int],
    texts: Sequence[str],
    epochs: int = 10,
    batch_size: int = 12,
    lr: float = 3e-4,
    seed: int = 0,
) -> None:
    """Tune model and head in place on labelled cells and the descriptions of all types.

    Args:
        model: pretrained.
        head: its matching head.
        cells: raw samples.
        labels: their types, numbers of `texts`.
        texts: one description for each type.
        epochs: passes over the cells; 10 in the paper.
        batch_size: 12 in the paper.
        lr: of Adam; 1e-5 in the paper, whose model is a hundred times as large.
        seed: of the order of cells.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=lr)
    words = model.process(TEXT, texts)
    targets = torch.tensor(list(labels))
    model.eval()  # few cells: no dropout, and batch norm keeps the statistics of pretraining
    for _ in range(epochs):
        for rows in torch.randperm(len(cells), generator=generator).split(batch_size):
            inputs = model.process("cell", [cells[row] for row in rows.tolist()])
            encoded = model.modality("cell").encoder(inputs)
            cosines = model.project("cell", encoded) @ model.embed(TEXT, words).T
            logits = pair_logits(model, head, model.connect("cell", encoded), words)
            loss = few_shot_loss(cosines, logits, targets[rows].to(cosines.device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def pair_logits(model: MultimodalModel, head: MatchingHead, context: Tokens, words: dict[str, Tensor]) -> Tensor:
    """Logits of the matching head for every cell with every text: (cells, types, 2)."""
    cells, types = len(context.mask), len(words["ids"])
    repeated = {key: value.repeat(cells, *[1] * (value.ndim - 1)) for key, value in words.items()}
    fused = model.fuse_tokens(repeated, [context.rows(torch.arange(cells).repeat_interleave(types))])
    return head.score(model, fused).unflatten(0, (cells, types))
