"""Which genes are characteristic of a cell's surroundings: markers without labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from mmpt.encoders.cell_expression import Cell
from mmpt.encoders.cell_processor import usable
from mmpt.encoders.cell_vocabulary import TARGET_SUM, in_linear_space

COMPONENTS = 20
"""Principal components in which neighbours are looked for."""

CHUNK = 512
"""Cells at a time where a table of all genes is made."""


def neighbourhood_genes(cells: Sequence[Cell], neighbours: int, among: int) -> list[list[str]]:
    """The genes that a cell and its nearest neighbours express more than the other cells do, the first one most.

    A single cell shows but a part of its genes (dropout); with its neighbours it shows what one knows its type by.
    Neighbours are nearest in the first principal components of log1p(counts per ten thousand). Genes are ordered by
    (mean of the neighbourhood - mean of all) / (standard deviation of all + s0), where s0, the median of the standard
    deviations, keeps genes of a single cell from the top (as in SAM, Tusher et al. 2001).

    Args:
        cells: of one matrix or several; genes are joined by name.
        neighbours: size of a neighbourhood, the cell included; 1 is the cell by itself.
        among: how many genes of each cell; fewer where fewer stand out.

    Returns:
        For each cell names of genes; none for a cell without expression or with values that can't be used.
    """
    sound = np.flatnonzero(usable(cells))
    found: list[list[str]] = [[] for _ in cells]
    if len(sound) < 2:
        return found
    values, names = _log_expression([cells[place] for place in sound.tolist()])
    mean = np.asarray(values.mean(0)).ravel()
    deviation = np.sqrt(np.maximum(np.asarray(values.multiply(values).mean(0)).ravel() - mean**2, 0))
    spread = deviation + np.median(deviation[deviation > 0]) if deviation.any() else np.ones_like(deviation)
    averaging = _averaging(values, neighbours)
    for first in range(0, len(sound), CHUNK):
        score = ((averaging[first : first + CHUNK] @ values).toarray() - mean) / spread
        order = np.argsort(-score, axis=1, kind="stable")[:, :among]
        for place, own, row in zip(sound[first : first + CHUNK], order, score, strict=True):
            found[place] = names[own[row[own] > 0]].tolist()
    return found


def _log_expression(cells: Sequence[Cell]) -> tuple[sparse.csr_matrix, NDArray[np.str_]]:
    """log1p of counts per ten thousand over all genes that any of the matrices has: (cells, genes), and their names."""
    matrices = dict.fromkeys(cell.expression for cell in cells)
    names, numbers = np.unique(np.concatenate([m.genes["index"] for m in matrices]), return_inverse=True)
    parts, places, start = [], [], 0
    for matrix in matrices:
        columns = numbers[start : start + len(matrix.genes["index"])]
        start += len(columns)
        own = [place for place, cell in enumerate(cells) if cell.expression is matrix]
        rows = in_linear_space(matrix.rows([cells[place].row for place in own]), matrix).tocoo()
        total = np.asarray(rows.sum(1)).ravel()
        # coordinates that come twice, genes of one name, are summed
        joined = sparse.csr_matrix((rows.data, (rows.row, columns[rows.col])), shape=(len(own), len(names)))
        joined.data *= np.repeat(TARGET_SUM / total, np.diff(joined.indptr))
        parts.append(joined.log1p())
        places += own
    return sparse.vstack(parts, format="csr")[np.argsort(places)], names


def _averaging(values: sparse.csr_matrix, neighbours: int) -> sparse.csr_matrix:
    """(cells, cells): each row takes the mean over the cell's neighbourhood."""
    count = min(neighbours, values.shape[0])
    if count == 1:
        return sparse.identity(values.shape[0], format="csr")
    components = min(COMPONENTS, *(side - 1 for side in values.shape))
    if components < 1:
        places = values.toarray()
    else:
        places = PCA(components, svd_solver="arpack", random_state=0).fit_transform(values)
    graph = NearestNeighbors(n_neighbors=count).fit(places).kneighbors_graph(places)
    return sparse.csr_matrix(graph / count)
