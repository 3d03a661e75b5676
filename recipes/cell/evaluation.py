"""What the cell recipe measures, each number beside its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from baseline import log_expression, logistic_regression, marker_scores, ranks, regression_from_scores
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor

from mmpt.datasets.cell import Cells
from mmpt.encoders.cell_processor import usable
from mmpt.evaluation.matching import choose_share, match_probabilities, mixed_scores
from mmpt.evaluation.zero_shot import relative
from mmpt.heads.alignment import MatchingHead
from mmpt.model import TEXT, MultimodalModel
from mmpt.source import Split

Labels = NDArray[np.int64]

TEMPERATURE = 0.05
"""Of similarities, LangCell's."""


class Typed(NamedTuple):
    """Cells of a split with their types.

    Attributes:
        cells: raw samples.
        labels: number of the type of each.
    """

    cells: list[Any]
    labels: Labels


def typed(source: Cells, split: Split) -> Typed:
    """The labelled cells of a split that can be used; training lists the others as skipped."""
    examples = source.split(split)
    samples = [examples[index] for index in range(len(examples))]
    sound = usable([sample.modalities["cell"] for sample in samples])
    samples = [sample for sample, fine in zip(samples, sound, strict=True) if fine and "class" in sample.labels]
    return Typed(
        [s.modalities["cell"] for s in samples], np.array([s.labels["class"] for s in samples], dtype=np.int64)
    )


def scores(right: Labels, predicted: Labels, prefix: str, suffix: str = "") -> dict[str, float]:
    """Accuracy and macro F1 over the types that the cells have."""
    macro = f1_score(right, predicted, average="macro", labels=np.unique(right), zero_division=0)
    return {
        f"{prefix}/accuracy{suffix}": float((right == predicted).mean()),
        f"{prefix}/macro_f1{suffix}": float(macro),
    }


class ZeroShot(NamedTuple):
    """Scores of every cell for every type.

    Attributes:
        cosines: (cells, types).
        probabilities: (cells, types) of a match, or None without a matching head.
    """

    cosines: Tensor
    probabilities: Tensor | None

    def mixed(self, share: float) -> Tensor:
        """LangCell's score; similarity alone without a matching head."""
        return self.cosines if self.probabilities is None else mixed_scores(self.cosines, self.probabilities, share)


def zero_shot(
    model: MultimodalModel, head: MatchingHead | None, cells: Sequence[Any], texts: Sequence[str]
) -> ZeroShot:
    """Compare cells with descriptions."""
    cosines = model.embed("cell", cells, 256) @ model.embed(TEXT, texts).T
    return ZeroShot(cosines, None if head is None else match_probabilities(model, head, cells, texts, 256))


def best_share(model: MultimodalModel, head: MatchingHead | None, source: Cells, texts: Sequence[str]) -> float:
    """The share of similarity in the score, chosen on validation cells."""
    if head is None:
        return 1.0
    held = typed(source, "validation")
    found = zero_shot(model, head, held.cells, texts)
    assert found.probabilities is not None
    return choose_share(found.cosines, found.probabilities, torch.from_numpy(held.labels))


def typing_metrics(
    model: MultimodalModel, head: MatchingHead | None, source: Cells, share: float, test: Typed, prefix: str
) -> dict[str, float]:
    """Zero-shot typing among all types of a source, beside markers of the same descriptions and the majority."""
    names = list(source.label_names("class"))
    texts = [source.definitions.describe(name) for name in names]
    found = zero_shot(model, head, test.cells, texts)
    metrics = scores(test.labels, found.mixed(share).argmax(1).numpy(), prefix)
    metrics |= scores(test.labels, found.cosines.argmax(1).numpy(), prefix, "_similarity_alone")
    markers = marker_scores(test.cells, [source.definitions.find(name) for name in names])
    metrics |= scores(test.labels, markers.argmax(1), prefix, "_markers")
    return metrics | scores(
        test.labels, np.full_like(test.labels, np.bincount(test.labels).argmax()), prefix, "_majority"
    )


def unseen_metrics(
    model: MultimodalModel, head: MatchingHead | None, source: Cells, unseen: Sequence[str], share: float, prefix: str
) -> dict[str, float]:
    """Cells of types that training never saw: choice among these types, and among all.

    Suffix `_standardised`: scores relative to those of all test cells; `_calibrated`: relative to those of the training
    cells, so that a type which training saw is not favoured. `among_all_seen` is the accuracy on the other test cells.
    """
    names = list(source.label_names("class"))
    chosen = np.array([names.index(name) for name in unseen])
    texts = [source.definitions.describe(name) for name in names]
    test = typed(source, "test")
    found = zero_shot(model, head, test.cells, texts)
    reference = zero_shot(model, None, typed(source, "train").cells, texts).cosines
    markers = marker_scores(test.cells, [source.definitions.find(name) for name in names])
    rows = np.isin(test.labels, chosen)
    right = test.labels[rows]
    metrics: dict[str, float] = {}
    for suffix, values in (
        ("", found.mixed(share).numpy()),
        ("_standardised", relative(found.cosines, found.cosines).numpy()),
        ("_calibrated", relative(found.cosines, reference).numpy()),
        ("_markers", markers),
    ):
        among = chosen[values[rows][:, chosen].argmax(1)]
        metrics[f"{prefix}/among_unseen{suffix}"] = float((among == right).mean())
        metrics[f"{prefix}/among_unseen_balanced{suffix}"] = float(balanced_accuracy_score(right, among))
        metrics[f"{prefix}/among_all{suffix}"] = float((values[rows].argmax(1) == right).mean())
        metrics[f"{prefix}/among_all_seen{suffix}"] = float((values[~rows].argmax(1) == test.labels[~rows]).mean())
    metrics[f"{prefix}/among_unseen_balanced_chance"] = 1 / len(chosen)
    metrics[f"{prefix}/among_all_chance"] = 1 / len(names)
    return metrics


def embedding(model: MultimodalModel, cells: Sequence[Any]) -> NDArray[np.float64]:
    """Embeddings of cells, scaled so that a coordinate is about 1: logistic regression's strength suits that."""
    vectors = model.embed("cell", cells, 256).numpy().astype(np.float64)
    return vectors * vectors.shape[1] ** 0.5


def few_shot_metrics(
    models: dict[str, MultimodalModel], source: Cells, shots: Sequence[int | None], prefix: str, draws: int = 10
) -> dict[str, float]:
    """n-shot logistic regression on embeddings of each model, on log expression and on ranks, over the same draws.

    With suffix `_described`, the regression on embeddings starts from typing by description, cosine / 0.05; with
    `_described_log_expression` so does the one on log expression (`regression_from_scores`).

    Args:
        models: suffix -> model; "" is the one that is reported.
        source: shots come from its training split, up to n cells of each type; its test split is typed.
        shots: numbers of cells of each type; None, `all_shot`, is every training cell.
        prefix: of the metrics.
        draws: random draws, from the seeds 0, 1, ...
    """
    train, test = typed(source, "train"), typed(source, "test")
    names = source.label_names("class")
    log = log_expression(train.cells), log_expression(test.cells)
    spaces = {suffix: (embedding(m, train.cells), embedding(m, test.cells)) for suffix, m in models.items()}
    spaces |= {"_log_expression": log, "_ranks": (ranks(log[0]), ranks(log[1]))}
    texts = models[""].embed(TEXT, [source.definitions.describe(name) for name in names]).numpy().astype(np.float64)
    prior = [values / values.shape[1] ** 0.5 @ texts.T / TEMPERATURE for values in spaces[""]]
    metrics: dict[str, float] = {}
    for count in shots:
        results: dict[str, list[float]] = {}
        title = f"{prefix}/{'all' if count is None else count}_shot"

        def add(suffix: str, predicted: Labels, results: dict[str, list[float]] = results, title: str = title) -> None:
            for name, value in scores(test.labels, predicted, title, suffix).items():
                results.setdefault(name, []).append(value)

        for draw in range(1 if count is None else draws):
            rows = np.arange(len(train.labels)) if count is None else drawn(train.labels, count, draw)
            for suffix, (inside, outside) in spaces.items():
                add(suffix, logistic_regression(inside[rows], train.labels[rows], outside))
            for suffix, (inside, outside) in (("", spaces[""]), ("_log_expression", log)):
                found = regression_from_scores(inside[rows], train.labels[rows], prior[0][rows], outside, prior[1])
                add(f"_described{suffix}", found)
        metrics |= {name: float(np.mean(values)) for name, values in results.items()}
        metrics |= {
            name.replace("/accuracy", "/spread"): float(np.std(values))
            for name, values in results.items()
            if "/accuracy" in name
        }
    return metrics


def drawn(labels: Labels, count: int, seed: int) -> Labels:
    """Rows of up to `count` cells of each type."""
    generator = np.random.default_rng(seed)
    rows = [generator.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.concatenate(rows)


def supervised_baselines(train: Typed, test: Typed, prefix: str) -> dict[str, float]:
    """Logistic regression on all training cells."""
    log = log_expression(train.cells), log_expression(test.cells)
    metrics = scores(test.labels, logistic_regression(log[0], train.labels, log[1]), prefix, "_log_expression")
    ranked = ranks(log[0]), ranks(log[1])
    metrics |= scores(test.labels, logistic_regression(ranked[0], train.labels, ranked[1]), prefix, "_ranks")
    commonest = np.full_like(test.labels, np.bincount(train.labels).argmax())
    return metrics | scores(test.labels, commonest, prefix, "_majority")
