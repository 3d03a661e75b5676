"""Nearest neighbours: the label that most of the k most similar training examples have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

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
    """

    accuracy: float
    k: int
    majority: float
    predictions: Tensor

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
    )
