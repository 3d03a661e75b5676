"""Paired tests between two encoders, or between two groups of them (the seeds of two ways of training)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import binomtest

from mmpt.errors import DataError
from mmpt.evaluation.intervals import bootstrap_interval
from mmpt.probing.scoring import aligned, calibrated, spearman
from mmpt.probing.stroop import ProbeResult
from mmpt.probing.task import Task

Metric = Literal["accuracy", "accuracy_calibrated", "spearman"]


@dataclass(frozen=True)
class Comparison:
    """Two encoders on the same items and prompts.

    Attributes:
        first: name.
        second: name.
        task: name.
        metric: what differs; its mean over prompts and seeds.
        difference: first minus second.
        interval: 95 % bootstrap interval of it over items. Other prompts and seeds are not in it.
        only_first: items that only the first one answers rightly, by scores averaged over prompts and seeds.
        only_second: the other way round.
        p: two-sided exact test that both are equally frequent (McNemar); None for ratings.
        seed_differences: the difference of each seed, where both sides have the same number of them; else of each seed
            of the first from the mean of the second.
    """

    first: str
    second: str
    task: str
    metric: Metric
    difference: float
    interval: tuple[float, float]
    only_first: int | None
    only_second: int | None
    p: float | None
    seed_differences: tuple[float, ...]


def exact_test(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: the binomial test of the discordant items; 1 without any."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def compare(first: ProbeResult, second: ProbeResult, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Test two encoders against each other, item by item; see `compare_groups`."""
    metric: Metric = "spearman" if first.task.kind == "rating" else "accuracy"
    return compare_groups([first], [second], metric, resamples, seed)


def compare_groups(
    first: Sequence[ProbeResult],
    second: Sequence[ProbeResult],
    metric: Metric,
    resamples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Test two groups of encoders against each other, item by item.

    Args:
        first: results of one task, one for each seed.
        second: the same task of the others.
        metric: of choices "accuracy" or "accuracy_calibrated" (with fixed options), of ratings "spearman".
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: results of different items or prompts.
    """
    task = first[0].task
    for other in (*first, *second):
        if other.task.items != task.items or other.task.prompts != task.prompts:
            raise DataError(
                f"{first[0].model} and {other.model} were asked different items or prompts of {task.name}; they can't "
                "be paired"
            )
    sides = [np.stack([np.stack(result.scores) for result in group]) for group in (first, second)]
    names = (first[0].model, second[0].model, task.name, metric)
    if metric == "spearman":
        return _of_ratings(names, sides, task.ratings, resamples, seed)
    answers = task.answers
    if metric == "accuracy_calibrated":
        sides, answers = _calibrated_sides(task, sides)
    right = [side.argmax(3) == answers for side in sides]  # (seeds, prompts, items)
    per_item = right[0].mean((0, 1)) - right[1].mean((0, 1))
    a, b = (side.mean((0, 1)).argmax(1) == answers for side in sides)
    only = int((a & ~b).sum()), int((b & ~a).sum())
    return Comparison(
        *names,
        float(per_item.mean()),
        bootstrap_interval(per_item, n=resamples, seed=seed),
        *only,
        exact_test(*only),
        _seeds(*(side.mean((1, 2)) for side in right)),
    )


def _calibrated_sides(task: Task, sides: Sequence[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """Calibrated scores (seeds, prompts, items, options) with the options in one order, and the answers in it."""
    adjusted = []
    for side in sides:
        flat = [calibrated(aligned(task, scores)[0]) for scores in side.reshape(-1, *side.shape[2:])]
        adjusted.append(np.stack(flat).reshape(side.shape))
    return adjusted, aligned(task, sides[0][0, 0])[1]


def _of_ratings(
    names: tuple[str, str, str, Metric], sides: Sequence[np.ndarray], ratings: np.ndarray, resamples: int, seed: int
) -> Comparison:
    def means(scores: np.ndarray, of: np.ndarray) -> np.ndarray:
        """Mean over prompts of the correlation, for each seed: scores are (seeds, prompts, items)."""
        return np.array([[spearman(prompt, of) for prompt in one] for one in scores]).mean(1)

    def difference(items: np.ndarray) -> float:
        a, b = (means(side[:, :, items], ratings[items]).mean() for side in sides)
        return float(a - b)

    everything = np.arange(len(ratings))
    interval = bootstrap_interval(everything, difference, resamples, seed)
    seeds = _seeds(*(means(side, ratings) for side in sides))
    return Comparison(*names, difference(everything), interval, None, None, None, seeds)


def _seeds(first: np.ndarray, second: np.ndarray) -> tuple[float, ...]:
    differences = first - (second if len(first) == len(second) else second.mean())
    return tuple(float(value) for value in differences)
