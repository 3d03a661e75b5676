"""Contrastive losses between two sets of embeddings.

| function              | rows                                        | instead                                      |
|-----------------------|---------------------------------------------|----------------------------------------------|
| `softmax_contrastive` | row i of a belongs to row i of b            | very large batch: `sigmoid_contrastive`      |
| `sigmoid_contrastive` | row i of a belongs to row i of b            | batch of some hundreds: `softmax_...`        |
| `grouped_contrastive` | one set; rows of a group are positives      | two modalities: the two above with `groups`  |

`groups` say which rows are the same thing (several images of one name, several cells of one description). Without
them, the other pictures of a name would count as negatives of it.

With `chunk` a loss is computed for that many rows at a time: the same value and gradients, and memory that grows with
the batch instead of its square (`mmpt.losses.chunked`). Then `loss_a` and `loss_b` are for reports only, without
gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpt.losses.chunked import Pairs, sigmoid_rows, softmax_both_ways, softmax_rows

SameGroup = Literal["soft", "mask", "ignore"]
"""What the other members of a row's own group are: positives that share the target evenly, left out of the
denominator, or negatives like any other."""


class ContrastiveResult(NamedTuple):
    """A contrastive loss and its parts.

    Attributes:
        loss: scalar, mean of the two directions.
        loss_a: scalar, each row of a against all of b.
        loss_b: scalar, each row of b against all of a.
        accuracy: share of the rows of a, and of b, whose best match is a positive; detached scalar.
    """

    loss: Tensor
    loss_a: Tensor
    loss_b: Tensor
    accuracy: Tensor


def softmax_contrastive(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    *,
    groups: Tensor | None = None,
    same_group: SameGroup = "soft",
    all_a: Tensor | None = None,
    all_b: Tensor | None = None,
    all_groups: Tensor | None = None,
    offset: int = 0,
    chunk: int | None = None,
) -> ContrastiveResult:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020), with several positives for each row where groups are given.

    Args:
        a: (n, d), L2-normalised.
        b: (n, d), L2-normalised; row i belongs to row i of `a`.
        scale: scalar that multiplies the cosine, 1 / temperature.
        groups: long (n,), equal numbers are the same thing.
        same_group: treatment of the other members of a group.
        all_a: (m, d), the rows of every process, in rank order; None is `a`.
        all_b: (m, d), likewise.
        all_groups: long (m,), likewise.
        offset: place of the local rows in them.
        chunk: rows at a time; None is all of them.
    """
    all_a = a if all_a is None else all_a
    all_b = b if all_b is None else all_b
    all_groups = groups if all_groups is None else all_groups
    if chunk is not None and chunk < len(a):
        pairs = Pairs(_own(a, offset), groups, all_groups, same_group)
        if all_a is a and all_b is b and (groups is None or same_group != "mask"):
            return ContrastiveResult(*softmax_both_ways(a, b, scale, pairs, chunk))
        weights = a.new_full((len(a),), 1 / len(a))
        loss_a, of_a = softmax_rows(a, all_b, scale, pairs, weights, chunk)
        loss_b, of_b = softmax_rows(b, all_a, scale, pairs, weights, chunk)
        accuracy = (of_a.float().mean() + of_b.float().mean()) / 2
        return ContrastiveResult((loss_a + loss_b) / 2, loss_a.detach(), loss_b.detach(), accuracy)
    loss_a, right_a = _softmax_direction(a, all_b, scale, groups, all_groups, same_group, offset)
    loss_b, right_b = _softmax_direction(b, all_a, scale, groups, all_groups, same_group, offset)
    return ContrastiveResult((loss_a + loss_b) / 2, loss_a, loss_b, (right_a + right_b) / 2)


def _softmax_direction(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    groups: Tensor | None,
    all_groups: Tensor | None,
    same_group: SameGroup,
    offset: int,
) -> tuple[Tensor, Tensor]:
    logits = _logits(queries, keys, scale)  # (n, m)
    own = _own(queries, offset)  # (n,)
    if groups is None or all_groups is None:
        return F.cross_entropy(logits, own), (logits.argmax(1) == own).float().mean()
    positive = groups[:, None] == all_groups[None, :]  # (n, m)
    right = positive.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    if same_group == "mask":
        logits = logits.masked_fill(positive.scatter(1, own[:, None], False), float("-inf"))
    total = logits.logsumexp(1)  # (n,), log of the denominator
    if same_group == "soft":
        target = (logits * positive).sum(1) / positive.sum(1)
    else:
        target = logits.gather(1, own[:, None]).squeeze(1)
    return (total - target).mean(), right


def sigmoid_contrastive(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    groups: Tensor | None = None,
    same_group: SameGroup = "soft",
    all_b: Tensor | None = None,
    all_groups: Tensor | None = None,
    offset: int = 0,
    chunk: int | None = None,
) -> ContrastiveResult:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343): each pair is matched or not, on its own.

    The sum over all pairs is divided by the number of rows, as in the paper. Under several processes each computes
    the pairs of its own rows of `a`; the mean over processes is the full batch's loss.

    Args:
        a: (n, d), L2-normalised.
        b: (n, d), L2-normalised; row i belongs to row i of `a`.
        scale: scalar that multiplies the cosine.
        bias: scalar added to the logits; starts at about -10, as nearly all pairs are negatives.
        groups: long (n,), equal numbers are the same thing.
        same_group: treatment of the other members of a group: positives, left out, or negatives.
        all_b: (m, d), the rows of every process, in rank order; None is `b`.
        all_groups: long (m,), likewise.
        offset: place of the local rows in them.
        chunk: rows at a time; None is all of them.
    """
    all_b = b if all_b is None else all_b
    all_groups = groups if all_groups is None else all_groups
    own = _own(a, offset)
    if chunk is not None and chunk < len(a):
        pairs = Pairs(own, groups, all_groups, same_group)
        loss, of_a = sigmoid_rows(a, all_b, scale, bias, pairs, chunk)
        return ContrastiveResult(loss, loss.detach(), loss.detach(), of_a.float().mean())
    logits = _logits(a, all_b, scale) + bias  # (n, m)
    positive = torch.zeros_like(logits, dtype=torch.bool).scatter(1, own[:, None], True)
    weight = torch.ones_like(logits)
    if groups is not None and all_groups is not None and same_group != "ignore":
        together = groups[:, None] == all_groups[None, :]
        if same_group == "soft":
            positive = together
        else:
            weight = weight.masked_fill(together & ~positive, 0.0)
    sign = positive.to(logits.dtype) * 2 - 1
    loss = -(F.logsigmoid(sign * logits) * weight).sum() / len(a)
    right = positive.gather(1, logits.argmax(1, keepdim=True)).float().mean()
    return ContrastiveResult(loss, loss, loss, right)


def grouped_contrastive(
    a: Tensor,
    scale: Tensor,
    groups: Tensor,
    *,
    all_a: Tensor | None = None,
    all_groups: Tensor | None = None,
    offset: int = 0,
    chunk: int | None = None,
) -> ContrastiveResult:
    """Supervised contrastive loss (arXiv 2004.11362, L_out): the other rows of a row's group are its positives.

    A row never meets itself. Rows without another member of their group have no loss; a batch of only such rows has
    loss zero. Under several processes the mean over them is the full batch's loss.

    Args:
        a: (n, d), L2-normalised.
        scale: scalar that multiplies the cosine.
        groups: long (n,).
        all_a: (m, d), the rows of every process, in rank order; None is `a`.
        all_groups: long (m,), likewise.
        offset: place of the local rows in them.
        chunk: rows at a time; None is all of them.
    """
    all_a = a if all_a is None else all_a
    all_groups = groups if all_groups is None else all_groups
    own = _own(a, offset)
    # Rows with positives, as an average over processes: they may lie unevenly, and the mean of means is another number.
    ordered = all_groups.sort().values
    twin = ordered[1:] == ordered[:-1]  # (m - 1,): a row and its neighbour share a group
    active = (F.pad(twin, (1, 0)) | F.pad(twin, (0, 1))).sum().clamp(min=1) * (len(a) / len(all_a))
    if chunk is not None and chunk < len(a):
        # the sorted groups tell the size of each: the rows that have another member
        size = torch.searchsorted(ordered, groups, right=True) - torch.searchsorted(ordered, groups)
        pairs = Pairs(own, groups, all_groups, without_own=True)
        loss, right = softmax_rows(a, all_a, scale, pairs, (size > 1).to(a.dtype) / active, chunk)
        return ContrastiveResult(loss, loss.detach(), loss.detach(), (right.sum() / active).detach())
    itself = torch.zeros(len(a), len(all_a), dtype=torch.bool, device=a.device).scatter(1, own[:, None], True)
    logits = _logits(a, all_a, scale)
    logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)  # (n, m)
    positive = (groups[:, None] == all_groups[None, :]) & ~itself
    count = positive.sum(1)  # (n,)
    log_probability = logits.log_softmax(1).masked_fill(~positive, 0.0)
    rows = -log_probability.sum(1) / count.clamp(min=1)  # zero where a row has no positives
    loss = rows.sum() / active
    best = positive.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
    return ContrastiveResult(loss, loss, loss, (best.sum() / active).detach())


def _own(rows: Tensor, offset: int) -> Tensor:
    """Where the partners of the local rows stand among those of all processes: long (n,)."""
    return torch.arange(len(rows), device=rows.device) + offset


def _logits(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Scaled cosines (n, m) in the precision of the embeddings, also under autocast.

    At a scale of 100 neighbouring bfloat16 numbers lie 0.5 apart.
    """
    with torch.autocast(a.device.type, enabled=False):
        return scale * a @ b.T
