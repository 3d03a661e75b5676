"""Linear probe: how much of the labels a linear classifier reads from frozen embeddings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of, labels_of, same_width

STRENGTHS = tuple(10.0**power for power in range(-4, 3))
"""Inverse regularisation strengths that are tried, the strongest regularisation first."""

VALIDATION_SHARE = 0.2


@dataclass(frozen=True, eq=False)
class LinearProbeResult:
    """Test scores of the probe.

    Attributes:
        accuracy: share of right predictions on the test part.
        macro_f1: mean over classes of the F1 score.
        c: the inverse regularisation strength that the validation part chose.
        majority: test accuracy of always answering the most frequent class of the training part.
        majority_macro_f1: macro F1 of that answer.
        predictions: long (test examples,).
        confidence: float (test examples,), probability that the probe gives its answer.
    """

    accuracy: float
    macro_f1: float
    c: float
    majority: float
    majority_macro_f1: float
    predictions: Tensor
    confidence: Tensor

    def metrics(self, prefix: str) -> dict[str, float]:
        """Flat names for a run's metrics with their baselines.

        Args:
            prefix: what the names begin with, e.g. `linear_probe`.
        """
        return {
            f"{prefix}/accuracy": self.accuracy,
            f"{prefix}/accuracy_majority": self.majority,
            f"{prefix}/macro_f1": self.macro_f1,
            f"{prefix}/macro_f1_majority": self.majority_macro_f1,
        }


def linear_probe(train_x: Array, train_y: Array, test_x: Array, test_y: Array, seed: int = 0) -> LinearProbeResult:
    """Logistic regression on standardised embeddings.

    The regularisation is chosen by accuracy on a fifth of each class of the training part (the stronger one where
    two are equal), then the probe is fitted again on the whole training part. The test part decides nothing.

    Args:
        train_x: (n, d).
        train_y: integers (n,), at least two classes.
        test_x: (t, d).
        test_y: integers (t,).
        seed: which training examples choose the regularisation.

    Raises:
        DataError: shapes that do not fit, values that are not finite, or a single class.
    """
    fit_x, score_x = embeddings_of(train_x, "training embeddings"), embeddings_of(test_x, "test embeddings")
    same_width(fit_x, score_x, "training and test embeddings")
    fit_y = labels_of(train_y, "training labels", len(fit_x)).cpu().numpy()
    score_y = labels_of(test_y, "test labels", len(score_x)).cpu().numpy()
    if len(np.unique(fit_y)) < 2:
        raise DataError(f"all training labels are {fit_y[0]}; a probe needs at least two classes")

    features, test_features = fit_x.cpu().numpy(), score_x.cpu().numpy()
    c = _choose_strength(features, fit_y, seed)
    probe = _probe(c).fit(features, fit_y)
    predictions, confidence = probe.predict(test_features), probe.predict_proba(test_features).max(1)
    majority = DummyClassifier(strategy="most_frequent").fit(features, fit_y).predict(test_features)
    return LinearProbeResult(
        accuracy=float(accuracy_score(score_y, predictions)),
        macro_f1=float(f1_score(score_y, predictions, average="macro", zero_division=0.0)),
        c=c,
        majority=float(accuracy_score(score_y, majority)),
        majority_macro_f1=float(f1_score(score_y, majority, average="macro", zero_division=0.0)),
        predictions=torch.from_numpy(predictions),
        confidence=torch.from_numpy(confidence).float().clamp(max=1.0),
    )


def _probe(c: float) -> Pipeline:
    # Scaling is a step of the pipeline, so its mean and spread come from the examples that are fitted and no others.
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))


def _choose_strength(features: np.ndarray, labels: np.ndarray, seed: int) -> float:
    """The C of best validation accuracy; 1.0 where no class has an example to spare."""
    held_out = _hold_out(labels, seed)
    if not held_out.any():
        return 1.0
    best_c, best_accuracy = STRENGTHS[0], -1.0
    for c in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a strength that converges badly loses or does no harm
            probe = _probe(c).fit(features[~held_out], labels[~held_out])
        accuracy = float(probe.score(features[held_out], labels[held_out]))
        if accuracy > best_accuracy:
            best_c, best_accuracy = c, accuracy
    return best_c


def _hold_out(labels: np.ndarray, seed: int) -> np.ndarray:
    """Bool (n,): a fifth of each class and at least one example, but never the only one of its class.

    scikit-learn's stratified splits refuse classes with one example and fewer held-out examples than classes, which
    few-shot probes have.
    """
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        if len(members) > 1:
            held_out[members[: max(1, round(VALIDATION_SHARE * len(members)))]] = True
    return held_out
