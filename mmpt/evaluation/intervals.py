"""How far a number would move with other examples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array


def bootstrap_interval(
    values: Array,
    statistic: Callable[[np.ndarray], float] = np.mean,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap (Efron 1979): the statistic's spread over resampled examples.

    It speaks of the examples only. What another seed of training would have given is not in it.

    Args:
        values: (examples, ...), e.g. 1.0 for each right answer and 0.0 for each wrong one, or ranks.
        statistic: examples of the same shape -> a number.
        n: number of resamples.
        seed: of the resampling.
        level: share of the resampled statistics that lies inside.

    Returns:
        Lower and upper end.

    Raises:
        DataError: no examples, or a level outside (0, 1).
    """
    array = torch.as_tensor(values).detach().cpu().numpy()
    if array.ndim == 0 or len(array) == 0:
        raise DataError(f"values have the shape {array.shape}; an interval needs at least one example")
    if not 0.0 < level < 1.0:
        raise DataError(f"level is {level}; expected a share between 0 and 1, e.g. 0.95")
    generator = np.random.default_rng(seed)
    resampled = [float(statistic(array[generator.integers(0, len(array), len(array))])) for _ in range(n)]
    low, high = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def macro_recall(pairs: np.ndarray) -> float:
    """Mean over the classes that occur as targets of the share of their examples that were found.

    Args:
        pairs: integers (n, 2), target and answer.
    """
    right, support, _ = _counts(pairs)
    return float((right[support > 0] / support[support > 0]).mean())


def macro_f1(pairs: np.ndarray) -> float:
    """Mean F1 score over the classes that occur as targets or answers, as scikit-learn's `f1_score(average="macro")`.

    Args:
        pairs: integers (n, 2), target and answer.
    """
    right, support, given = _counts(pairs)
    both = support + given
    return float((2 * right[both > 0] / both[both > 0]).mean())


def _counts(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each class how many examples were right, have it, and were given it."""
    targets, answers = pairs[:, 0], pairs[:, 1]
    size = int(pairs.max()) + 1
    right = np.bincount(targets[targets == answers], minlength=size)
    return right, np.bincount(targets, minlength=size), np.bincount(answers, minlength=size)
