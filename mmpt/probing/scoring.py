"""Numbers of a probe: accuracy over prompts, correlations, intervals over items."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import kendalltau, pearsonr, spearmanr
from sklearn.metrics import recall_score

from mmpt.errors import DataError
from mmpt.evaluation.intervals import bootstrap_interval
from mmpt.probing.stroop import ProbeResult
from mmpt.probing.task import Task

RECALL_AT = 5

RANKED = 1_000_000
"""Most words that a bootstrap of correlations ranks for a prompt: with tables of many thousands it resamples less."""


def macro_accuracy(answers: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes that occur among the answers of the share of its items that are right.

    Args:
        answers: integers (items,).
        predictions: integers (items,).
    """
    labels = np.unique(answers)
    return float(recall_score(answers, predictions, labels=labels, average="macro", zero_division=0.0))


def recall_at(scores: np.ndarray, answers: np.ndarray, k: int = RECALL_AT) -> float | None:
    """Share of items whose answer is among the k highest scores (of equal scores the first option is the higher).

    Args:
        scores: (items, options).
        answers: integers (items,).
        k: how many count.

    Returns:
        None where there are no more than k options: the released code says 0 there.
    """
    if scores.shape[1] <= k:
        return None
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == answers[:, None]).any(1).mean())


@dataclass(frozen=True)
class Spread:
    """A number over prompts. The maximum is selected on the items that it is measured on: read it beside the mean.

    Attributes:
        mean: over prompts.
        std: with n - 1; 0.0 for one prompt.
        max: of the best prompt.
    """

    mean: float
    std: float
    max: float


def spread(values: np.ndarray) -> Spread:
    """Mean, standard deviation and maximum of one number for each prompt."""
    values = np.asarray(values, dtype=float)
    return Spread(float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0, float(values.max()))


def consensus(result: ProbeResult) -> np.ndarray:
    """Scores averaged over prompts, which chooses none of them: (items, options), or (items,) for ratings."""
    return np.mean(result.scores, axis=0)


def calibrated(scores: np.ndarray) -> np.ndarray:
    """Scores standardised over items for each option, for options that are the same for all items.

    An option whose word changes any sentence little is chosen for every item; this takes away what an option gets
    whatever the item is (as contextual calibration does, Zhao et al. 2021, arXiv 2102.09690). The scale goes too, not
    only the mean: where items and options disturb by factors (1 - cosine = item * option), options that disturb more
    also vary more, and would be the extremes in both directions. It needs all items at once, but none of their answers.

    Args:
        scores: (items, options), the options in the same order for all items.
    """
    spread_o = scores.std(0, keepdims=True)
    return (scores - scores.mean(0, keepdims=True)) / np.where(spread_o > 0, spread_o, 1.0)


def aligned(task: Task, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores with the options in the order of the first item, and the answers in that order.

    Args:
        task: with fixed options.
        scores: (items, options).
    """
    options = task.fixed_options
    assert options is not None
    order = np.array([[item.options.index(option) for option in options] for item in task.items])
    answers = np.array([options.index(item.options[item.answer]) for item in task.items])
    return np.take_along_axis(scores, order, axis=1), answers


def correlations(scores: np.ndarray, ratings: np.ndarray) -> dict[str, float]:
    """Pearson, Spearman and Kendall (tau-b) of scores with ratings, signed: the method does not say the sign.

    Scores that are all equal order nothing and have the correlation 0.

    Raises:
        DataError: ratings that are all equal.
    """
    if np.ptp(ratings) == 0:
        raise DataError("all ratings are equal, so nothing can be correlated with them")
    if np.ptp(scores) == 0:
        return {"pearson": 0.0, "spearman": 0.0, "kendall": 0.0}
    return {
        "pearson": float(pearsonr(scores, ratings).statistic),
        "spearman": float(spearmanr(scores, ratings).statistic),
        "kendall": float(kendalltau(scores, ratings).statistic),
    }


def spearman(scores: np.ndarray, ratings: np.ndarray) -> float:
    """Spearman's correlation; 0 where either side is constant (a resample of few items), which orders nothing."""
    if np.ptp(scores) == 0 or np.ptp(ratings) == 0:
        return 0.0
    return float(spearmanr(scores, ratings).statistic)


def majority(task: Task) -> float | None:
    """Accuracy of always giving the answer that is most frequent among the items; None where options differ."""
    if task.fixed_options is None:
        return None
    counts = Counter(item.options[item.answer] for item in task.items)
    return counts.most_common(1)[0][1] / len(task.items)


def summary(result: ProbeResult, resamples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Everything that a report says about a probe, as plain data.

    For choices: for each prompt accuracy, macro accuracy, recall at 5 and the option that is given most often; over
    prompts mean, standard deviation and maximum; a bootstrap interval of the mean accuracy over items (it speaks of
    other items, not of other prompts or seeds); the accuracy of the scores averaged over prompts and, with fixed
    options, of the calibrated ones; chance and majority. For ratings: the correlations.

    Args:
        result: of a probe.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    task = result.task
    about = {
        "model": result.model,
        "probe": result.probe,
        "settings": result.settings,
        "task": task.name,
        "kind": task.kind,
        "visual": task.visual,
        "items": len(task.items),
    }
    if task.kind == "rating":
        return about | _rating_summary(result, resamples, seed)
    prompts = []
    for prompt, scores in zip(task.prompts, result.scores, strict=True):
        predictions = scores.argmax(1)
        given = Counter(item.options[choice] for item, choice in zip(task.items, predictions, strict=True))
        option, times = given.most_common(1)[0]
        row = {
            "prompt": prompt,
            "accuracy": float((predictions == task.answers).mean()),
            "macro_accuracy": _macro(task, predictions),
            "recall_at_5": recall_at(scores, task.answers),
            "most_given": option,
            "most_given_share": times / len(task.items),
        }
        if task.fixed_options is not None:
            row["accuracy_calibrated"] = float(_calibrated_right(task, scores).mean())
        prompts.append(row)
    metrics = ["accuracy", "macro_accuracy", "recall_at_5", "accuracy_calibrated"]
    means = consensus(result)
    low, high = bootstrap_interval(result.correct.mean(0), n=resamples, seed=seed)
    over_items: dict[str, Any] = {
        "accuracy_interval": [low, high],
        "accuracy_consensus": float((means.argmax(1) == task.answers).mean()),
        "chance": float(np.mean([1 / len(item.options) for item in task.items])),
        "majority": majority(task),
    }
    if task.fixed_options is not None:
        right = np.stack([_calibrated_right(task, scores) for scores in result.scores]).mean(0)
        over_items["accuracy_calibrated_interval"] = list(bootstrap_interval(right, n=resamples, seed=seed))
    spreads = {
        name: vars(spread(np.array([row[name] for row in prompts])))
        for name in metrics
        if prompts[0].get(name) is not None
    }
    return about | {"over_prompts": spreads, **over_items, "prompts": prompts}


def _macro(task: Task, predictions: np.ndarray) -> float | None:
    """Macro accuracy over the options, which may stand in another order in each item; None where they differ."""
    if task.fixed_options is None:
        return None
    number = {option: place for place, option in enumerate(task.fixed_options)}
    given = [number[item.options[choice]] for item, choice in zip(task.items, predictions, strict=True)]
    answers = [number[item.options[item.answer]] for item in task.items]
    return macro_accuracy(np.array(answers), np.array(given))


def _calibrated_right(task: Task, scores: np.ndarray) -> np.ndarray:
    ordered, answers = aligned(task, scores)
    return calibrated(ordered).argmax(1) == answers


def _rating_summary(result: ProbeResult, resamples: int, seed: int) -> dict[str, Any]:
    ratings = result.task.ratings
    prompts: list[dict[str, Any]] = [
        {"prompt": prompt, **correlations(scores, ratings)}
        for prompt, scores in zip(result.task.prompts, result.scores, strict=True)
    ]
    for row in prompts:
        row |= {f"{name}_absolute": abs(row[name]) for name in ("pearson", "spearman", "kendall")}
    names = [name for name in prompts[0] if name != "prompt"]
    scores = np.stack(result.scores)

    def mean_spearman(items: np.ndarray) -> float:
        return float(np.mean([spearman(of_prompt[items], ratings[items]) for of_prompt in scores]))

    fewer = min(resamples, max(100, RANKED // len(ratings)))
    interval = bootstrap_interval(np.arange(len(ratings)), mean_spearman, fewer, seed)
    return {
        "over_prompts": {name: vars(spread(np.array([row[name] for row in prompts]))) for name in names},
        "consensus": correlations(consensus(result), ratings),
        "spearman_interval": list(interval),
        "chance": 0.0,
        "majority": None,
        "prompts": prompts,
    }
