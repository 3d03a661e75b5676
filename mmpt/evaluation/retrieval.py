"""Retrieval: where the right candidate stands when all candidates are sorted by similarity to a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of, labels_of, same_width
from mmpt.evaluation.record import Evaluation

TIE = 1e-6
"""Cosines that differ by less are ties: it is the rounding of float32, not a preference of the model."""


@dataclass(frozen=True, eq=False)
class RetrievalResult:
    """Ranks of the best right candidate, one per query, and their summaries.

    Attributes:
        recall: k -> share of queries whose best positive stands at rank k or better.
        median_rank: median of `ranks`, 1 is best.
        mean_reciprocal_rank: mean of 1 / rank.
        ranks: float (n,) on the CPU; halves come from ties.
        n: number of queries.
        m: number of candidates.
        chance: k -> what `recall` would be if the candidates were sorted at random.
    """

    recall: dict[int, float]
    median_rank: float
    mean_reciprocal_rank: float
    ranks: Tensor
    n: int
    m: int
    chance: dict[int, float]

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for a run's metrics, the chance level beside each recall.

        Args:
            prefix: what the names begin with, e.g. `retrieval/unseen_style`.
        """
        flat: dict[str, float] = {}
        for k, value in self.recall.items():
            flat[f"{prefix}/R@{k}"] = value
            flat[f"{prefix}/R@{k}_chance"] = self.chance[k]
        flat[f"{prefix}/median_rank"] = self.median_rank
        flat[f"{prefix}/mean_reciprocal_rank"] = self.mean_reciprocal_rank
        return flat

    def evaluation(self, prefix: str, names: Sequence[str] = ()) -> Evaluation:
        """The metrics with the ranks behind them, from which come their intervals over queries.

        Args:
            prefix: see `metrics`.
            names: of the queries, where runs shall be compared query by query; without them the outcomes of single
                queries are not kept.
        """
        ranks = self.ranks.numpy()
        means = {f"{prefix}/R@{k}": (ranks <= k).astype(float) for k in self.recall}
        means[f"{prefix}/mean_reciprocal_rank"] = 1.0 / ranks
        found = Evaluation(self.metrics(prefix), means if names else {}, list(names))
        if not names:
            found.statistics |= {name: (values, np.mean) for name, values in means.items()}
        found.statistics[f"{prefix}/median_rank"] = ranks, np.median
        return found


def retrieval(
    queries: Array, candidates: Array, positives: Array, ks: Sequence[int] = (1, 5, 10), chunk: int = 1024
) -> RetrievalResult:
    """Rank all candidates for each query by cosine similarity.

    The rank of a query is 1 + the number of wrong candidates that score higher than its best positive + half the
    number of wrong candidates that score the same. Other positives never push a rank down. Half of the ties is what
    a random order among them gives on average: a model that maps everything to one point lands in the middle of the
    list, not at its top.

    For the other direction call it again with queries and candidates exchanged and `positives.T`.

    Args:
        queries: (n, d); the length of a vector plays no role.
        candidates: (m, d).
        positives: bool (n, m), True where the candidate is right for the query; or integers (n,), the index of the one
            right candidate.
        ks: which recalls to give.
        chunk: queries scored at once; memory beyond the arguments is proportional to `chunk * m`.

    Raises:
        DataError: shapes that do not fit, values that are not finite, a target that is no candidate, or a query
            without a positive.
    """
    query_nd, candidate_md = embeddings_of(queries, "queries"), embeddings_of(candidates, "candidates")
    same_width(query_nd, candidate_md, "queries and candidates")
    n, m = len(query_nd), len(candidate_md)
    if any(k < 1 for k in ks):
        raise DataError(f"ks is {tuple(ks)}; expected ranks from 1")
    right = _check_positives(positives, n, m).to(query_nd.device)

    ranks, chances = [], []
    candidate_md = F.normalize(candidate_md, dim=1).to(query_nd.device)
    for start, right_bm in _masks(right, m, chunk):
        score_bm = F.normalize(query_nd[start : start + chunk], dim=1) @ candidate_md.T  # (chunk, m)
        best_b1 = score_bm.masked_fill(~right_bm, -torch.inf).amax(1, keepdim=True)
        higher = (score_bm > best_b1 + TIE).sum(1)  # no positive scores higher than the best one
        tied = (((score_bm - best_b1).abs() <= TIE) & ~right_bm).sum(1)
        ranks.append((1.0 + higher + 0.5 * tied).cpu())
        chances.append(_chance(right_bm.sum(1).cpu(), m, ks))
    rank_n = torch.cat(ranks)
    chance_nk = torch.cat(chances)  # (n, len(ks))
    return RetrievalResult(
        recall={k: float((rank_n <= k).float().mean()) for k in ks},
        median_rank=float(np.median(rank_n.numpy())),
        mean_reciprocal_rank=float((1.0 / rank_n).mean()),
        ranks=rank_n,
        n=n,
        m=m,
        chance={k: float(chance_nk[:, i].mean()) for i, k in enumerate(ks)},
    )


def _check_positives(positives: Array, n: int, m: int) -> Tensor:
    """Bool (n, m) or long (n,), whichever was given, once it is sound."""
    tensor = torch.as_tensor(positives).detach()
    if tensor.ndim == 1:
        return labels_of(tensor, "positives", n, classes=m)
    if tensor.dtype != torch.bool or tensor.shape != (n, m):
        raise DataError(
            f"positives are {tensor.dtype} of shape {tuple(tensor.shape)}; expected bool ({n}, {m}), or "
            f"integers ({n},) that name one candidate per query"
        )
    without = (~tensor.any(1)).nonzero().flatten()
    if len(without):
        raise DataError(
            f"{len(without)} of {n} queries have no right candidate, the first one is query {int(without[0])}; "
            "leave such queries out, or add what they look for to the candidates"
        )
    return tensor


def _masks(right: Tensor, m: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """For each chunk of queries its start and which candidates are right: bool (chunk, m)."""
    columns = torch.arange(m, device=right.device)
    for start in range(0, len(right), chunk):
        rows = right[start : start + chunk]
        yield start, rows if rows.ndim == 2 else rows.unsqueeze(1) == columns


def _chance(positives_b: Tensor, m: int, ks: Sequence[int]) -> Tensor:
    """Chance that one of `positives_b` (b,) right candidates is among k drawn from m: (b, len(ks)).

    It is 1 - C(m - p, k) / C(m, k), which is 1 minus the product over j < k of (m - p - j) / (m - j).
    """
    values = []
    for k in ks:
        drawn = torch.arange(min(k, m), dtype=torch.float64)  # (k,)
        wrong_bk = (m - positives_b.double().unsqueeze(1) - drawn).clamp(min=0.0) / (m - drawn)
        values.append(1.0 - wrong_bk.prod(1))
    return torch.stack(values, 1)
