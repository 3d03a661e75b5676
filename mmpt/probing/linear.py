"""Linear probing of words: how much of the answer does logistic regression read from the frozen embedding?

It is shown the answers of other items, so it says what is in an encoder, where Stroop probing says what comes out of it
unasked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.probing.embedders import Embedder, Pooling
from mmpt.probing.scoring import macro_accuracy, majority
from mmpt.probing.task import Task

FOLDS = 5
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse regularisation strengths that are tried within each fold."""


@dataclass(frozen=True, eq=False)
class LinearResult:
    """Cross-validated predictions of one encoder on one task.

    Attributes:
        model: the encoder's name.
        pooling: that was used.
        task: what was asked.
        correct: bool (items,), each predicted by a classifier that has not seen it.
        macro_accuracy: mean over the options.
    """

    model: str
    pooling: str
    task: Task
    correct: np.ndarray
    macro_accuracy: float

    def summary(self) -> dict[str, Any]:
        """Plain data for a report."""
        return {
            "model": self.model,
            "probe": "linear",
            "settings": {"pooling": self.pooling, "folds": FOLDS},
            "task": self.task.name,
            "kind": self.task.kind,
            "visual": self.task.visual,
            "items": len(self.task.items),
            "accuracy": float(self.correct.mean()),
            "macro_accuracy": self.macro_accuracy,
            "chance": float(np.mean([1 / len(item.options) for item in self.task.items])),
            "majority": majority(self.task),
        }


class LinearWordProbe:
    """Logistic regression on the embedding of an item's words, without any prompt, in stratified folds.

    Args:
        encoder: a frozen text encoder.
        pooling: None is the encoder's own.
        seed: of the folds and of the choice of the regularisation within each.

    Raises:
        ConfigError: a pooling that the encoder can't do.
    """

    def __init__(self, encoder: Embedder, pooling: Pooling | None = None, seed: int = 0) -> None:
        self.encoder, self.pooling, self.seed = encoder, encoder.check(pooling), seed

    def run(self, task: Task, progress: Callable[[int], Any] | None = None) -> LinearResult:
        """Predict every item from the others.

        Raises:
            ConfigError: items with different options, or too few of an option for the folds.
        """
        answers = fixed_answers(task)
        vectors: Tensor = self.encoder.embed(
            [", ".join(item.slots.values()) for item in task.items], self.pooling, progress=progress
        )
        folds = StratifiedKFold(FOLDS, shuffle=True, random_state=self.seed)
        # Chosen by log-loss: on so few words several strengths are equally accurate, and the strongest of them answers
        # by the class sizes alone.
        inner = StratifiedKFold(3, shuffle=True, random_state=self.seed)
        classifier = LogisticRegressionCV(Cs=STRENGTHS, cv=inner, scoring="neg_log_loss", max_iter=500)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # scikit-learn announces other defaults, which don't differ
            warnings.simplefilter("ignore", ConvergenceWarning)  # weak regularisation, which is then not chosen
            predictions = cross_val_predict(
                make_pipeline(StandardScaler(), classifier), vectors.numpy(), answers, cv=folds
            )
        macro = macro_accuracy(answers, predictions)
        return LinearResult(self.encoder.name, self.pooling, task, predictions == answers, macro)


def fixed_answers(task: Task) -> np.ndarray:
    """The number of each item's answer among the task's options: (items,).

    Raises:
        ConfigError: items with different options, a cloze, or too few items of an option for the folds.
    """
    if task.fixed_options is None or task.kind != "choice":
        raise ConfigError(f"task {task.name}: a linear probe needs words with the same options for all items")
    options = {option: number for number, option in enumerate(task.fixed_options)}
    answers = np.array([options[item.options[item.answer]] for item in task.items])
    fewest = int(np.unique(answers, return_counts=True)[1].min())
    if fewest < FOLDS:
        raise ConfigError(f"task {task.name} has an option with {fewest} items; {FOLDS} folds need as many of each")
    return answers
