"""Calibration: whether a confidence of 0.8 is right in 8 of 10 cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torchmetrics.functional.classification import binary_calibration_error

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error and what a reliability diagram shows.

    Attributes:
        ece: mean over examples of |confidence - accuracy| of their bin (Guo et al., arXiv 1706.04599).
        confidence: mean confidence of each bin that has examples.
        accuracy: share of right answers in it.
        count: number of examples in it.
    """

    ece: float
    confidence: list[float]
    accuracy: list[float]
    count: list[int]


def calibration(confidence: Array, correct: Array, bins: int = BINS) -> Calibration:
    """Compare confidences with right and wrong.

    Args:
        confidence: (n,) probability that the model gave its answer.
        correct: bool (n,).
        bins: of equal width between 0 and 1.

    Raises:
        DataError: no examples, shapes that differ, or confidences outside 0 to 1.
    """
    given, right = torch.as_tensor(confidence).float().cpu(), torch.as_tensor(correct).bool().cpu()
    if given.ndim != 1 or given.shape != right.shape or not len(given):
        raise DataError(f"{tuple(given.shape)} confidences for {tuple(right.shape)} answers; expected (n,) of both")
    if not ((given >= 0) & (given <= 1)).all():
        raise DataError("confidences must lie between 0 and 1; these are scores, or not finite")
    error = float(binary_calibration_error(given, right.long(), n_bins=bins))
    place = np.minimum((given.numpy() * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = np.bincount(place, given.numpy(), bins) / np.maximum(count, 1)
    share = np.bincount(place, right.numpy(), bins) / np.maximum(count, 1)
    filled = count > 0
    return Calibration(error, mean[filled].tolist(), share[filled].tolist(), count[filled].tolist())
