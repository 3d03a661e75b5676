"""Nearest neighbours: the label that most of the k most similar training examples have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of, labels_of, same_width


@dataclass(frozen=True, eq=False)
class NearestResult:
    """Test scores of the vote.

    Attributes:
        accuracy: share of right predictions on the test part.
        k: number of neighbours that voted.
        majority: test accuracy of always answering the most frequent class of the training part.
        predictions: long (test examples,).
        confidence: float (test examples,), share of the votes for the answer.
    """

    accuracy: float
    k: int
    majority: float
    predictions: Tensor
    confidence: Tensor

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for a run's metrics with their baseline.

        Args:
            prefix: what the names begin with, e.g. `nearest`.
        """
        return {f"{prefix}/accuracy": self.accuracy, f"{prefix}/accuracy_majority": self.majority}


def nearest(train_x: Array, train_y: Array, test_x: Array, test_y: Array, k: int = 5) -> NearestResult:
    """Classify by an equal vote of the k training examples of highest cosine similarity.

    Needs no fitting and no choices beside k, so it can't flatter an embedding as a tuned classifier can. Equal votes
    go to the class with the smaller number.

    Args:
        train_x: (n, d).
        train_y: integers (n,).
        test_x: (t, d).
        test_y: integers (t,).
        k: number of neighbours, from 1 to n.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or k outside its range.
    """
    fit_x, score_x = embeddings_of(train_x, "training embeddings"), embeddings_of(test_x, "test embeddings")
    same_width(fit_x, score_x, "training and test embeddings")
    fit_y = labels_of(train_y, "training labels", len(fit_x)).cpu().numpy()
    score_y = labels_of(test_y, "test labels", len(score_x)).cpu().numpy()
    if not 1 <= k <= len(fit_y):
        raise DataError(f"k is {k}; expected 1 to {len(fit_y)}, the number of training examples")

    features, test_features = fit_x.cpu().numpy(), score_x.cpu().numpy()
    vote = KNeighborsClassifier(n_neighbors=k, metric="cosine", algorithm="brute").fit(features, fit_y)
    predictions = vote.predict(test_features)
    majority = DummyClassifier(strategy="most_frequent").fit(features, fit_y).predict(test_features)
    return NearestResult(
        accuracy=float((predictions == score_y).mean()),
        k=k,
        majority=float((majority == score_y).mean()),
        predictions=torch.from_numpy(predictions),
        confidence=torch.from_numpy(vote.predict_proba(test_features).max(1)).float(),
    )


def label_similarity(queries: Array, gallery: Array, labels: Array, count: int, chunk: int = 1024) -> Tensor:
    """How similar each query is to the most similar example of each label.

    Added to the similarities of label texts, it joins what a model knows from words with labelled examples in memory,
    without training (Tip-Adapter, Zhang et al. 2022, arXiv 2111.03930, keeps such a cache).

    Args:
        queries: (n, d); the length of a vector plays no role.
        gallery: (m, d), labelled examples.
        labels: integers (m,) from 0 to count - 1.
        count: number of labels.
        chunk: queries compared at once; memory beyond the result is proportional to `chunk * m`.

    Returns:
        float32 (n, count) cosines; -1, the least, for a label without examples.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or labels outside their range.
    """
    query_nd, gallery_md = embeddings_of(queries, "queries"), embeddings_of(gallery, "gallery")
    same_width(query_nd, gallery_md, "queries and gallery")
    label_m = labels_of(labels, "labels", len(gallery_md), classes=count).to(query_nd.device)
    gallery_md = F.normalize(gallery_md, dim=1).to(query_nd.device)
    parts = []
    for rows in F.normalize(query_nd, dim=1).split(chunk):
        least = torch.full((len(rows), count), -1.0, device=rows.device)
        parts.append(least.scatter_reduce(1, label_m.expand(len(rows), -1), rows @ gallery_md.T, "amax"))
    return torch.cat(parts) if parts else query_nd.new_zeros(0, count)
