"""Classic baselines of cell typing: logistic regression on log expression and on ranks, and marker genes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from mmpt.datasets.cell_text import CellType
from mmpt.encoders.cell_expression import Cell
from mmpt.encoders.cell_vocabulary import in_linear_space
from mmpt.source import Sample

Array = NDArray[np.float64]


def log_expression(cells: Sequence[Cell], genes: Sequence[str] | None = None) -> Array:
    """log1p of counts per ten thousand (log-normalised data as they are): (cells, genes).

    Args:
        cells: of one matrix or several.
        genes: the columns; by default the genes that all matrices have, as `genes_of` gives them.
    """
    columns = genes_of(cells) if genes is None else genes
    values = np.zeros((len(cells), len(columns)))
    for expression in dict.fromkeys(cell.expression for cell in cells):
        places = [place for place, cell in enumerate(cells) if cell.expression is expression]
        rows = expression.rows([cells[place].row for place in places])
        if expression.kind == "log":
            own = rows.toarray().astype(np.float64)
        else:
            linear = in_linear_space(rows, expression).toarray()
            own = np.log1p(linear / np.maximum(linear.sum(1, keepdims=True), 1e-12) * 1e4)
        number = {name: column for column, name in enumerate(expression.genes["index"].tolist())}
        values[places] = own[:, [number[gene] for gene in columns]]
    return values


def genes_of(cells: Sequence[Cell]) -> list[str]:
    """The genes that the matrices of all cells have, in the first one's order."""
    names = [expression.genes["index"].tolist() for expression in dict.fromkeys(cell.expression for cell in cells)]
    shared = set(names[0]).intersection(*names[1:])
    return [name for name in dict.fromkeys(names[0]) if name in shared]


def ranks(values: Array) -> Array:
    """Rank of each gene within its cell, as a share, ties in the middle; 0 where it is not expressed."""
    return np.where(values > 0, rankdata(values, axis=1) / values.shape[1], 0.0)


def logistic_regression(train: Array, labels: NDArray[np.int64], test: Array) -> NDArray[np.int64]:
    """Predictions of scikit-learn's logistic regression with its default strength, on features as they are."""
    return LogisticRegression(max_iter=2000).fit(train, labels).predict(test)


def regression_from_scores(
    train: Array, labels: NDArray[np.int64], prior: Array, test: Array, test_prior: Array
) -> NDArray[np.int64]:
    """Logistic regression that starts from scores which are known without labels, instead of from nothing.

    The logit of a type is its given score plus a linear function of the features, learned with the loss and penalty of
    scikit-learn's logistic regression (the sum over cells, and half the squared weights; the intercept is free). With
    few labels the scores decide, with many the features do.

    Args:
        train: (cells, features).
        labels: of these cells: column of `prior`.
        prior: (cells, types) logits.
        test: (others, features), to be typed among the types that `labels` name.
        test_prior: (others, types).
    """
    known, targets = np.unique(labels, return_inverse=True)
    truth = np.eye(len(known))[targets]
    offset = prior[:, known]
    inputs = np.concatenate([train, np.ones((len(train), 1))], 1)
    penalised = np.ones((inputs.shape[1], 1))
    penalised[-1] = 0.0

    def objective(flat: Array) -> tuple[float, Array]:
        weights = flat.reshape(inputs.shape[1], len(known))
        logits = offset + inputs @ weights
        logits -= logsumexp(logits, axis=1, keepdims=True)
        slope = inputs.T @ (np.exp(logits) - truth) + penalised * weights
        return float(0.5 * (penalised * weights**2).sum() - (truth * logits).sum()), slope.ravel()

    start = np.zeros(inputs.shape[1] * len(known))
    weights = minimize(objective, start, jac=True, method="L-BFGS-B").x.reshape(inputs.shape[1], len(known))
    outside = np.concatenate([test, np.ones((len(test), 1))], 1)
    return known[(test_prior[:, known] + outside @ weights).argmax(1)]


def marker_scores(cells: Sequence[Cell], types: Sequence[CellType]) -> Array:
    """(cells, types): mean over a type's markers of the gene's z-score over these cells; -inf without known markers.

    It sees all cells at once, as the z-scores need them.
    """
    values = log_expression(cells)
    scores = (values - values.mean(0)) / np.maximum(values.std(0), 1e-6)
    place = {name: number for number, name in enumerate(genes_of(cells))}
    columns = []
    for kind in types:
        known = [place[gene] for gene in kind.markers if gene in place]
        columns.append(scores[:, known].mean(1) if known else np.full(len(cells), -np.inf))
    return np.stack(columns, 1)


def classic_features(samples: Sequence[Sample]) -> Array:
    """`log_expression` of cells for a classifier, over the genes that their matrices share."""
    return log_expression([sample.modalities["cell"] for sample in samples])
