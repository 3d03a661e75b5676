"""Cells -> rank-value tokens (Geneformer, Theodoris et al. 2023; LangCell, arXiv 2405.06708)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from mmpt.encoder import Inputs, Processor
from mmpt.encoders.cell_expression import Cell, Expression, expression_of
from mmpt.encoders.cell_vocabulary import FIRST_GENE, PAD, TARGET_SUM, GeneVocabulary, in_linear_space
from mmpt.errors import ConfigError, SampleError

TOKEN_BITS = 20
"""Low bits of a sort key that hold the token: up to a million genes."""

TOKEN = np.uint64(2**TOKEN_BITS - 1)
EMPTY = ~TOKEN
"""The key of no gene: behind all others, with the token `PAD`, which is 0."""

CHUNK = 256
"""Cells that are sorted at once: their tables stay in the cache."""

Ranked = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]

READABLE = "an AnnData object, or a list of cells: rows of one, or what mmpt.datasets.cell gives"


class GeneWarning(UserWarning):
    """Genes of a dataset that the model does not know, or that stand in it twice."""


def rank_values(
    counts: NDArray[np.float64], totals: NDArray[np.float64], medians: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What genes are ranked by: count / total of the cell * 10,000 / median of the gene (any shapes that broadcast)."""
    return counts / medians * (TARGET_SUM / totals)


def rank_tokens(
    rows: sparse.csr_matrix, columns: NDArray[np.int64], medians: NDArray[np.float64], limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The genes of each cell, the highest expression relative to its median first.

    The total of a cell scales all its values alike, so it plays no role here. Genes whose values agree in 32 bits of
    their mantissa are tied and stand in the order of their tokens; the released code leaves the order of ties open.

    Args:
        rows: CSR (cells, genes), not negative, in linear space.
        columns: token of each gene, -1 where it has none; no token twice.
        medians: median of each gene, over the tokens from `FIRST_GENE` on.
        limit: keep so many genes of a cell.

    Returns:
        long (cells, width) tokens, padded with `PAD`, and long (cells,) numbers of tokens.
    """
    if not rows.data.all():
        rows = rows.copy()
        rows.eliminate_zeros()
    # Unknown genes get the median infinity, so that their value is 0 and their key `EMPTY`.
    median = np.full(len(columns), np.inf)
    median[columns >= 0] = medians[columns[columns >= 0] - FIRST_GENE]
    token = np.maximum(columns, 0).astype(np.uint64)
    spans = np.diff(rows.indptr)
    result = np.full((rows.shape[0], min(int(spans.max(initial=0)), limit)), PAD, dtype=np.int64)
    lengths = np.zeros(rows.shape[0], dtype=np.int64)
    for first in range(0, rows.shape[0], CHUNK):
        part = spans[first : first + CHUNK]
        begin, end = rows.indptr[first], rows.indptr[first + len(part)]
        index = rows.indices[begin:end]
        values = rows.data[begin:end] / median.take(index)
        # One integer holds value and token, so that a plain sort of integers, which is fast, does it all: the bits of a
        # positive double are ordered as the double, and inverted they are ordered the other way. Zeros come last.
        keys = np.invert(values.view(np.uint64))
        keys &= EMPTY
        keys |= token.take(index)
        inside = np.arange(part.max(initial=0)) < part[:, None]  # (cells, widest)
        table = np.full(inside.shape, EMPTY, dtype=np.uint64)
        table[inside] = keys
        table.sort(axis=1)
        table = table[:, :limit]
        np.bitwise_and(table, TOKEN, out=result[first : first + len(part), : table.shape[1]], casting="unsafe")
        lengths[first : first + len(part)] = np.count_nonzero(table < EMPTY, axis=1)
    return result[:, : lengths.max(initial=0)], lengths


def expression_weights(
    logs: sparse.csr_matrix, columns: NDArray[np.int64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The log expression of the genes of each cell, in units of its mean over these genes.

    Args:
        logs: CSR (cells, genes), log-normalised.
        columns: token of each gene, -1 where it has none.
        tokens: (cells, width), as `rank_tokens` gives them.
        lengths: (cells,) numbers of tokens.

    Returns:
        (cells, width): mean 1 over the tokens of a cell, 0 where there are none.
    """
    column = np.zeros(columns.max(initial=0) + 1, dtype=np.int64)
    column[columns[columns >= 0]] = np.flatnonzero(columns >= 0)
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    cells, _ = np.nonzero(inside)
    weights = np.zeros(tokens.shape, dtype=np.float32)
    weights[inside] = np.asarray(logs[cells, column[tokens[inside]]]).ravel()
    return weights * (lengths / np.maximum(weights.sum(1), 1e-12))[:, None].astype(np.float32)


class CellProcessor(Processor):
    """Cells -> the tokens of their genes, most characteristic first, behind `<cls>`.

    | key     | shape                 | meaning                                                             |
    |---------|-----------------------|---------------------------------------------------------------------|
    | ids     | long (batch, length)  | `<cls>`, then genes by rank; `<pad>` behind them                    |
    | mask    | bool (batch, length)  | True where real                                                     |
    | weights | float (batch, length) | with `expression`: see `expression_weights`; 1 for `<cls>`          |

    Args:
        vocabulary: which genes have a token, and their medians.
        max_length: most tokens of a cell, `<cls>` included; 2,048 in the paper.
        gene_dropout: in training, each cell loses a random share of its genes between 0 and this number, so that the
            encoder copes with studies that measured other genes.
        expression: also tell how much of each gene there is, which ranks relative to medians leave out: log1p of counts
            per ten thousand; log-normalised data are taken as they are.
    """

    def __init__(
        self,
        vocabulary: GeneVocabulary,
        max_length: int = 2048,
        gene_dropout: float = 0.0,
        expression: bool = False,
    ) -> None:
        if max_length < 2 or not 0 <= gene_dropout < 1:
            raise ConfigError(
                f"max_length is {max_length}, gene_dropout {gene_dropout}; expected at least 2, and a share below 1"
            )
        if len(vocabulary) >= 2**TOKEN_BITS:
            raise ConfigError(f"{len(vocabulary)} genes are too many; expected fewer than {2**TOKEN_BITS}")
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.gene_dropout = gene_dropout
        self.expression = expression
        self._last: tuple[Any, NDArray[np.int64]] | None = None

    def __call__(self, samples: anndata.AnnData | Sequence[Any], *, training: bool = False) -> Inputs:
        """Tokenize cells.

        Args:
            samples: AnnData (all its cells), or a list of `Cell` or of one-row AnnData.
            training: apply the gene dropout.

        Raises:
            SampleError: a cell without expression, or with negative or non-finite values.
            DataError: no gene of the data is known.
        """
        tokens, lengths, weights = self.tokenize(samples, training)
        width = int(lengths.max(initial=0)) + 1
        ids = np.concatenate([np.full((len(tokens), 1), self.vocabulary.cls), tokens[:, : width - 1]], 1)
        mask = np.arange(width) <= lengths[:, None]
        inputs = {"ids": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}
        if self.expression:
            weights = np.concatenate([np.ones((len(tokens), 1), dtype=np.float32), weights[:, : width - 1]], 1)
            inputs["weights"] = torch.from_numpy(weights)
        return inputs

    def store(self, samples: Sequence[Any], key: str, vectors: Tensor) -> None:
        """Write embeddings to `obsm[key]`: `sc.pp.neighbors(adata, use_rep=key)` reads them there.

        Raises:
            ConfigError: the samples are no AnnData.
        """
        if not isinstance(samples, anndata.AnnData):
            raise ConfigError(f"store={key!r}: only AnnData has an obsm, got {type(samples).__name__}")
        samples.obsm[key] = vectors.cpu().numpy()

    def table(self, samples: Sequence[Any], labels: Sequence[str], scores: Tensor) -> Any:
        """For AnnData a DataFrame with `obs_names` and one column for each label; else the tensor."""
        if not isinstance(samples, anndata.AnnData):
            return scores
        return pd.DataFrame(scores.cpu().numpy(), index=samples.obs_names, columns=list(labels))

    def tokenize(self, samples: anndata.AnnData | Sequence[Any], training: bool = False) -> Ranked:
        """The genes of each cell without `<cls>`: see `rank_tokens` and, with `expression`, `expression_weights`."""
        parts, order = _by_matrix(samples)
        results = [self._tokens(expression, rows, places, training) for expression, rows, places in parts]
        if len(results) == 1 and order is None:
            return results[0]
        width = max((tokens.shape[1] for tokens, _, _ in results), default=0)
        tokens = _stacked([tokens for tokens, _, _ in results], width, np.int64)
        weights = _stacked([weights for _, _, weights in results], width, np.float32)
        lengths = np.concatenate([length for _, length, _ in results] or [np.zeros(0, dtype=np.int64)])
        return tokens[order], lengths[order], weights[order]

    def _tokens(
        self, expression: Expression, rows: NDArray[np.int64] | None, places: NDArray[np.int64], training: bool
    ) -> Ranked:
        matrix = expression.rows(np.arange(len(expression)) if rows is None else rows)
        names = expression.cells if rows is None else expression.cells[rows]
        _check_values(matrix, names, places)
        linear = in_linear_space(matrix, expression)
        columns = self._columns(expression)
        linear, columns = _without_twins(linear, columns)
        totals = np.full(linear.shape[0], TARGET_SUM) if expression.kind == "log" else np.asarray(linear.sum(1)).ravel()
        if training and self.gene_dropout:
            linear = self._drop_genes(linear)
        tokens, lengths = rank_tokens(linear, columns, self.vocabulary.medians, self.max_length - 1)
        if not self.expression:
            return tokens, lengths, np.zeros(tokens.shape, dtype=np.float32)
        logs = linear.copy()
        logs.data = np.log1p(logs.data * np.repeat(TARGET_SUM / totals, np.diff(logs.indptr)))
        logs.sort_indices()  # else looking up a gene goes through its whole cell
        return tokens, lengths, expression_weights(logs, columns, tokens, lengths)

    def _drop_genes(self, rows: sparse.csr_matrix) -> sparse.csr_matrix:
        share = np.repeat(torch.rand(rows.shape[0]).numpy() * self.gene_dropout, np.diff(rows.indptr))
        kept = rows.data * (torch.rand(rows.nnz).numpy() >= share)
        return sparse.csr_matrix((kept, rows.indices, rows.indptr), shape=rows.shape)

    def _columns(self, expression: Expression) -> NDArray[np.int64]:
        """The token of each column; looked up once for neighbouring batches of one matrix."""
        names = expression.genes["index"]
        if self._last is None or self._last[0] is not names:
            columns = self.vocabulary.columns(expression)
            _report(expression, columns)
            self._last = names, columns
        return self._last[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


def _stacked(tables: list[NDArray[Any]], width: int, kind: type[np.generic]) -> NDArray[Any]:
    """Tables below each other, padded with zeros (`PAD`) to one width."""
    padded = [np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables]
    return np.concatenate(padded) if padded else np.zeros((0, width), dtype=kind)


def _by_matrix(
    samples: anndata.AnnData | Sequence[Any],
) -> tuple[list[tuple[Expression, NDArray[np.int64] | None, NDArray[np.int64]]], NDArray[np.int64] | None]:
    """Samples by matrix: (matrix, its rows or None for all, places in the batch); and how to undo the order."""
    if isinstance(samples, anndata.AnnData):
        expression = expression_of(samples)
        return [(expression, None, np.arange(len(expression)))], None
    rows: dict[int, list[int]] = {}
    places: dict[int, list[int]] = {}
    matrices: dict[int, Expression] = {}
    for place, sample in enumerate(samples):
        cell = _cell(sample, place)
        key = id(cell.expression)
        matrices[key] = cell.expression
        rows.setdefault(key, []).append(cell.row)
        places.setdefault(key, []).append(place)
    parts = [(matrices[key], np.array(rows[key]), np.array(places[key])) for key in matrices]
    if len(parts) == 1:
        return list(parts), None
    order = np.argsort(np.concatenate([places for *_, places in parts])) if parts else np.zeros(0, dtype=np.int64)
    return list(parts), order


def _cell(sample: Any, place: int) -> Cell:
    if isinstance(sample, Cell):
        return sample
    if isinstance(sample, anndata.AnnData) and len(sample) == 1:
        return Cell(expression_of(sample), 0)
    what = f"{len(sample)} cells" if isinstance(sample, anndata.AnnData) else f"a {type(sample).__name__}"
    raise SampleError(f"cell {place} of the batch", f"is {what}", READABLE, place)


def usable(cells: Sequence[Cell]) -> NDArray[np.bool_]:
    """Which cells can be tokenized: (cells,) False for those that `CellProcessor` refuses."""
    fine = np.ones(len(cells), dtype=bool)
    for expression in dict.fromkeys(cell.expression for cell in cells):
        places = np.array([place for place, cell in enumerate(cells) if cell.expression is expression])
        bad, empty = _problems(expression.rows([cells[place].row for place in places]))
        fine[places] = ~(bad | empty)
    return fine


def _check_values(rows: sparse.csr_matrix, names: NDArray[np.str_], places: NDArray[np.int64]) -> None:
    """Refuse the first cell with values that are not finite, negative, or all zero."""
    bad, empty = _problems(rows)
    for row in np.flatnonzero(bad | empty):
        problem = "has negative or non-finite expression" if bad[row] else "has no expressed gene"
        raise SampleError(names[row], problem, "counts or log-normalised values of at least one gene", int(places[row]))


def _problems(rows: sparse.csr_matrix) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which cells have values that are negative or not finite, and which have none: both (cells,)."""
    sound = np.isfinite(rows.data) & (rows.data >= 0)
    cell_of = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    bad = np.zeros(rows.shape[0], dtype=bool)
    bad[cell_of[~sound]] = True
    return bad, np.bincount(cell_of[sound & (rows.data > 0)], minlength=rows.shape[0]) == 0


def _without_twins(rows: sparse.csr_matrix, columns: NDArray[np.int64]) -> tuple[sparse.csr_matrix, NDArray[np.int64]]:
    """Sum columns of the same token."""
    known = columns[columns >= 0]
    if len(np.unique(known)) == len(known):
        return rows, columns
    tokens, place = np.unique(columns, return_inverse=True)
    ones = sparse.csr_matrix(
        (np.ones(len(columns)), (np.arange(len(columns)), place)), shape=(len(columns), len(tokens))
    )
    return sparse.csr_matrix(rows @ ones), tokens


def _report(expression: Expression, columns: NDArray[np.int64]) -> None:
    names = expression.genes["index"]
    unknown = names[columns < 0]
    if len(unknown):
        shown = ", ".join(unknown[:10]) + (", ..." if len(unknown) > 10 else "")
        warnings.warn(
            f"{expression.origin}: {len(unknown)} of {len(names)} genes are unknown to the model and left out: {shown}",
            GeneWarning,
            stacklevel=2,
        )
    known = columns[columns >= 0]
    tokens, times = np.unique(known, return_counts=True)
    if (times > 1).any():
        twins = names[np.isin(columns, tokens[times > 1])]
        warnings.warn(
            f"{expression.origin}: {int((times > 1).sum())} genes stand there more than once and are summed: "
            f"{', '.join(sorted(set(twins))[:10])}",
            GeneWarning,
            stacklevel=2,
        )
