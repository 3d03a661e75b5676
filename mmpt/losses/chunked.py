"""Contrastive losses a few rows at a time: exact value and gradients, memory linear in the batch.

The matrix of all similarities of a batch of n has n * n entries, and autograd keeps several such matrices. Here a block
of rows is computed, its part of the loss and of the gradients is taken, and the block is dropped. The gradients are
known after the forward pass, so the backward pass only scales them; second derivatives do not exist.

`mmpt.losses.contrastive` calls these functions when it is given `chunk`; the mathematics stands there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class Pairs(NamedTuple):
    """Which pairs of a query and a key are positives, and which are left out.

    Attributes:
        own: long (n,): the key that belongs to a query.
        groups: long (n,) of the queries, or None: the own key is the only positive.
        all_groups: long (m,) of the keys.
        same_group: other members of the own group are "soft" positives, left out ("mask") or negatives ("ignore").
        without_own: the own key is the query itself, and never met (`grouped_contrastive`).
    """

    own: Tensor
    groups: Tensor | None = None
    all_groups: Tensor | None = None
    same_group: str = "soft"
    without_own: bool = False

    def together(self, rows: slice) -> Tensor | None:
        """Bool (rows, m): of one group, the query's own key included; None without groups."""
        if self.groups is None or self.all_groups is None:
            return None
        return self.groups[rows, None] == self.all_groups[None, :]


class _Block(NamedTuple):
    """Some rows of the matrix of logits.

    Attributes:
        rows: which.
        logits: (rows, m); left out pairs have the least finite number.
        targets: (rows, m) weights that sum to one in each row, or None: all of it on the own key.
        best: long (rows,): the best key.
        right: bool (rows,): whether that is a positive.
    """

    rows: slice
    logits: Tensor
    targets: Tensor | None
    best: Tensor
    right: Tensor


def _slices(count: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]


def _block(queries: Tensor, keys: Tensor, pairs: Pairs, rows: slice, *, judge: bool) -> _Block:
    """Logits of some rows.

    Args:
        queries: (n, d), already multiplied by the scale.
        keys: (m, d).
        pairs: positives.
        rows: which.
        judge: find the best keys too; else `best` and `right` are empty.
    """
    logits = queries[rows] @ keys.T  # (rows, m)
    own = pairs.own[rows, None]
    lowest = torch.finfo(logits.dtype).min
    if pairs.without_own:
        logits.scatter_(1, own, lowest)
    together = pairs.together(rows)
    best = logits.argmax(1) if judge else own[:, 0]
    if together is None:
        right = best == own[:, 0]
    else:
        positive = together.scatter(1, own, False) if pairs.without_own else together
        right = positive.gather(1, best[:, None])[:, 0]
    targets: Tensor | None = None
    if together is not None and pairs.same_group == "soft":
        count = positive.sum(1, keepdim=True).clamp(min=1)
        targets = positive / count.to(logits.dtype)
    elif together is not None and pairs.same_group == "mask":
        logits.masked_fill_(together.scatter(1, own, False), lowest)
    return _Block(rows, logits, targets, best, right)


def _subtract_targets(slope: Tensor, block: _Block, own: Tensor, factor: float | Tensor) -> None:
    """Slope -= factor * targets, in place; `factor` is a number or (rows, 1)."""
    if block.targets is not None:
        slope.sub_(block.targets * factor)
    else:
        value = torch.as_tensor(factor, dtype=slope.dtype, device=slope.device).reshape(-1, 1).expand(len(slope), 1)
        slope.scatter_add_(1, own[block.rows, None], -value)


def _target_sum(block: _Block, own: Tensor) -> Tensor:
    """(rows,): the logits of a row weighted by its targets."""
    if block.targets is None:
        return block.logits.gather(1, own[block.rows, None])[:, 0]
    # left out pairs have huge logits and weight zero; their product is zero
    return (block.logits * block.targets).sum(1)


class _Gradients:
    """Sums of the gradients over blocks."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: Tensor) -> None:
        self.queries, self.keys, self.scale = queries, keys, scale
        self.scaled = queries * scale  # (n, d)
        self.for_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        self.for_keys = torch.zeros_like(keys, memory_format=torch.contiguous_format)
        self.for_scale = torch.zeros_like(scale)

    def add(self, rows: slice, slope: Tensor) -> None:
        """Take the derivative of the loss by the logits of some rows: (rows, m)."""
        moved = torch.mm(slope, self.keys, out=self.for_queries[rows])
        self.for_scale += (moved * self.queries[rows]).sum().to(self.for_scale.dtype)
        self.for_keys.addmm_(slope.T, self.scaled[rows])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and scale."""
        return self.for_queries.mul_(self.scale), self.for_keys, self.for_scale


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, inputs: int, *tensors: Tensor) -> Tensor:
        ctx.inputs = inputs
        ctx.save_for_backward(*tensors[inputs:])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        own = [gradient * known for known in ctx.saved_tensors]
        return (None, None, *own, *([None] * ctx.inputs))


def _attach(value: Tensor, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> Tensor:
    """The value, with these gradients for the inputs."""
    return _WithGradients.apply(value, len(inputs), *inputs, *gradients)


def _wanted(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def softmax_rows(
    queries: Tensor, keys: Tensor, scale: Tensor, pairs: Pairs, weights: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Weighted sum over the rows of (log of the denominator - mean logit of the positives).

    Args:
        queries: (n, d).
        keys: (m, d).
        scale: scalar.
        pairs: positives.
        weights: (n,), of the rows in the sum.
        chunk: rows at a time.

    Returns:
        The loss, and bool (n,): whether the best key of a row is a positive.
    """
    inputs = (queries, keys, scale)
    wanted = _wanted(*inputs)
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
        sums = _Gradients(queries.detach(), keys.detach(), scale.detach())
        loss = torch.zeros((), dtype=queries.dtype, device=queries.device)
        right = []
        for rows in _slices(len(queries), chunk):
            block = _block(sums.scaled, sums.keys, pairs, rows, judge=True)
            right.append(block.right)
            weight = weights[rows].to(block.logits.dtype)
            total = block.logits.logsumexp(1)
            loss += ((total - _target_sum(block, pairs.own)) * weight).sum()
            if wanted:
                slope = block.logits.sub(total[:, None]).exp_().mul_(weight[:, None])
                _subtract_targets(slope, block, pairs.own, weight[:, None])
                sums.add(rows, slope)
    return (_attach(loss, inputs, sums.result()) if wanted else loss), torch.cat(right)


class _Columns:
    """Running maximum and logarithm of the sum of exponentials over the blocks, for each column."""

    def __init__(self, count: int, like: Tensor) -> None:
        lowest = torch.finfo(like.dtype).min
        self.top = like.new_full((count,), lowest)
        self.sum = like.new_zeros(count)
        self.best = torch.zeros(count, dtype=torch.long, device=like.device)

    def add(self, logits: Tensor, first: int) -> None:
        """Take rows `first`, `first` + 1, ... of the matrix."""
        top, best = logits.max(0)
        self.best = torch.where(top > self.top, best + first, self.best)
        top = torch.maximum(top, self.top)
        self.sum = self.sum * (self.top - top).exp_() + logits.sub(top).exp_().sum(0)
        self.top = top

    def total(self) -> Tensor:
        """(columns,)."""
        return self.top + self.sum.log()


def softmax_both_ways(
    a: Tensor, b: Tensor, scale: Tensor, pairs: Pairs, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The symmetric loss of one process, from one matrix: rows and columns of each block are used.

    The blocks are computed twice, as the sums of the columns are known after the last one only. The last block, often
    the only one, is kept.

    Args:
        a: (n, d).
        b: (n, d).
        scale: scalar.
        pairs: positives, of which none are left out.
        chunk: rows at a time.

    Returns:
        The loss; the losses of the rows and of the columns, without gradient; the share of right best matches.
    """
    inputs = (a, b, scale)
    wanted = _wanted(*inputs)
    count = len(a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        sums = _Gradients(a.detach(), b.detach(), scale.detach())
        columns = _Columns(count, sums.scaled)
        totals, targets, right = [], [], []
        column_targets = a.new_zeros(count)
        slices = _slices(count, chunk)
        block: _Block
        for rows in slices:
            block = _block(sums.scaled, sums.keys, pairs, rows, judge=True)
            columns.add(block.logits, rows.start)
            totals.append(block.logits.logsumexp(1))
            targets.append(_target_sum(block, pairs.own))
            right.append(block.right)
            if block.targets is not None:
                column_targets += (block.logits * block.targets).sum(0)  # targets are symmetric
        total, column_total, target = torch.cat(totals), columns.total(), torch.cat(targets)
        loss_b = (column_total - (target if block.targets is None else column_targets)).mean()
        loss_a = (total - target).mean()
        labels = pairs.own if pairs.groups is None else pairs.groups
        right_b = labels[columns.best] == labels
        accuracy = (torch.cat(right).float().mean() + right_b.float().mean()) / 2
        loss = (loss_a + loss_b) / 2
        if wanted:
            for rows in reversed(slices):
                if rows != block.rows:
                    block = _block(sums.scaled, sums.keys, pairs, rows, judge=False)
                slope = block.logits.sub(total[rows, None]).exp_()
                slope += block.logits.sub_(column_total).exp_()
                _subtract_targets(slope, block, pairs.own, 2.0)
                sums.add(rows, slope.div_(2 * count))
    return (_attach(loss, inputs, sums.result()) if wanted else loss), loss_a, loss_b, accuracy


def sigmoid_rows(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, chunk: int) -> tuple[Tensor, Tensor]:
    """Sum over all pairs of the pairwise sigmoid loss, divided by the number of rows.

    Args:
        a: (n, d).
        b: (m, d).
        scale: scalar.
        bias: scalar.
        pairs: positives.
        chunk: rows at a time.

    Returns:
        The loss, and bool (n,): whether the best key of a row is a positive.
    """
    inputs = (a, b, scale, bias)
    wanted = _wanted(*inputs)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        sums = _Gradients(a.detach(), b.detach(), scale.detach())
        loss = torch.zeros((), dtype=a.dtype, device=a.device)
        for_bias = torch.zeros_like(bias)
        right = []
        for rows in _slices(len(a), chunk):
            logits = (sums.scaled[rows] @ sums.keys.T).add_(bias)
            own = pairs.own[rows, None]
            positive, kept = _sigmoid_pairs(logits, own, pairs, rows)
            right.append(positive.gather(1, logits.argmax(1, keepdim=True))[:, 0])
            negated = torch.where(positive, -logits, logits)  # the loss of a pair is softplus of this
            terms = F.softplus(negated)
            slope = negated.sigmoid_() / len(a)
            if kept is not None:
                terms, slope = terms * kept, slope * kept
            loss += terms.sum() / len(a)
            if wanted:
                slope = torch.where(positive, -slope, slope)
                for_bias += slope.sum().to(for_bias.dtype)
                sums.add(rows, slope)
    return (_attach(loss, inputs, (*sums.result(), for_bias)) if wanted else loss), torch.cat(right)


def _sigmoid_pairs(logits: Tensor, own: Tensor, pairs: Pairs, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Positives, and which pairs count (None: all)."""
    itself = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, own, True)
    together = pairs.together(rows)
    if together is None or pairs.same_group == "ignore":
        return itself, None
    return (together, None) if pairs.same_group == "soft" else (itself, ~together | itself)
