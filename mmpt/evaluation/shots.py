"""Learning curves of a probe: how much a linear classifier reads after a few examples of each class."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of, labels_of
from mmpt.evaluation.linear_probe import linear_probe


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Indices of a few examples of each class, sorted; classes with fewer give all. Smaller draws are nested in larger.

    Args:
        labels: integers (n,).
        shots: examples of each class.
        seed: of the draw.
    """
    if shots < 1:
        raise DataError(f"shots is {shots}; it must be at least 1")
    generator = np.random.default_rng(seed)
    drawn = [generator.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


def shot_curve(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    shots: Sequence[int] = (1, 5, 20, 100),
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, float]:
    """Test accuracy of `linear_probe` after a few examples of each class, mean and standard deviation over draws.

    Args:
        train_x: (n, d).
        train_y: integers (n,).
        test_x: (t, d).
        test_y: integers (t,).
        shots: examples of each class.
        seeds: of the draws.

    Returns:
        `<shots>_shots/accuracy`, its `_majority`, and `<shots>_shots/spread`.
    """
    features = embeddings_of(train_x, "training embeddings")
    labels = labels_of(train_y, "training labels", len(features)).cpu().numpy()
    found: dict[str, float] = {}
    for count in shots:
        results = []
        for seed in seeds:
            chosen = draw_shots(labels, count, seed)
            results.append(linear_probe(features[chosen], labels[chosen], test_x, test_y, seed))
        accuracies = [result.accuracy for result in results]
        found[f"{count}_shots/accuracy"] = float(np.mean(accuracies))
        found[f"{count}_shots/accuracy_majority"] = float(np.mean([result.majority for result in results]))
        found[f"{count}_shots/spread"] = float(np.std(accuracies, ddof=1)) if len(accuracies) > 1 else 0.0
    return found
