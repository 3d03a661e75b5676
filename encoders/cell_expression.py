"""Gene expression of many cells as people hold it (AnnData, h5ad), checked once at the door.

| values in the matrix                          | `kind`     | what ranks are made from |
|-----------------------------------------------|------------|--------------------------|
| whole numbers                                 | `"counts"` | the value                |
| fractions below 20: log1p of normalised counts | `"log"`    | expm1 of the value       |
| other fractions (counts per million)          | `"linear"` | the value                |
| negative: z-scored                            | refused    | ranks can't be recovered |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anndata
import h5py
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmpt.errors import DataError

Kind = Literal["counts", "log", "linear"]

LOOK_AT = 512
"""Cells, spread over the matrix, that decide what kind of numbers it holds."""

LOG_LIMIT = 20.0
"""log1p of counts per ten thousand ends at 9.2; no logarithm of counts reaches 20."""

COUNT_LAYERS = ("counts", "raw_counts", "raw")
"""Layers that by convention hold raw counts."""

GENE_COLUMNS = (
    "ensembl_id", "gene_ids", "gene_id", "feature_id", "feature_name", "gene_symbols", "gene_symbol", "gene_name",
)  # fmt: skip
"""Columns of `var` in which other names of the genes are looked for."""


@dataclass(eq=False, repr=False)
class Expression:
    """A matrix of cells and genes, in memory or on disk.

    Attributes:
        matrix: (cells, genes) CSR, or the `StoredMatrix` that reads rows of a file.
        genes: name of the naming -> one name per gene: `index` (var_names) and the columns of `GENE_COLUMNS` there are.
        cells: name of each cell.
        kind: see the module's table.
        origin: names the matrix to a person.
    """

    matrix: sparse.csr_matrix | StoredMatrix
    genes: dict[str, NDArray[np.str_]]
    cells: NDArray[np.str_]
    kind: Kind
    origin: str

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __repr__(self) -> str:
        return f"Expression({self.origin}, {len(self)} cells)"

    def rows(self, index: Sequence[int] | NDArray[np.int64]) -> sparse.csr_matrix:
        """The expression of some cells: CSR (len(index), genes), in that order."""
        return self.matrix[np.asarray(index)]

    def expressed(self) -> NDArray[np.int64] | None:
        """How many values are stored of each cell; None where that is known only from reading them all."""
        if isinstance(self.matrix, StoredMatrix):
            return self.matrix.row_counts()
        return np.diff(self.matrix.indptr)


class Cell(NamedTuple):
    """One cell of a matrix; a batch of them is read in one operation.

    Attributes:
        expression: the matrix.
        row: which of its cells.
    """

    expression: Expression
    row: int


@dataclass(eq=False)
class StoredMatrix:
    """A matrix inside an h5ad file of which only the rows asked for are read.

    Every process opens the file for itself: HDF5 handles don't survive a fork.

    Attributes:
        path: the h5ad file.
        key: the matrix in it: `X`, `raw/X` or `layers/NAME`.
    """

    path: str
    key: str
    _open: tuple[int, Any] | None = field(default=None, repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(cells, genes)."""
        rows, columns = self._matrix().shape
        return int(rows), int(columns)

    def __getitem__(self, index: NDArray[np.int64]) -> sparse.csr_matrix:
        order, back = np.unique(index, return_inverse=True)  # HDF5 wants rising indices without repeats
        return sparse.csr_matrix(self._matrix()[order])[back]

    def row_counts(self) -> NDArray[np.int64] | None:
        """Stored values of each row; None for dense and column-wise matrices."""
        with h5py.File(self.path, "r") as file:
            node = file[self.key]
            if not isinstance(node, h5py.Group) or node.attrs.get("encoding-type") != "csr_matrix":
                return None
            return np.diff(node["indptr"][:])

    def _matrix(self) -> Any:
        if self._open is None or self._open[0] != os.getpid():
            node = h5py.File(self.path, "r")[self.key]
            stored = anndata.io.sparse_dataset(node) if isinstance(node, h5py.Group) else node
            self._open = os.getpid(), stored
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "key": self.key, "_open": None}


def expression_of(adata: anndata.AnnData, layer: str | None = None, origin: str = "AnnData") -> Expression:
    """The expression in an AnnData object.

    Args:
        adata: cells by genes.
        layer: `"X"`, `"raw"` (adata.raw.X) or the name of a layer. None takes raw counts where they conventionally lie
            (layers `counts`, `raw_counts`, `raw`), else adata.raw, else X: the first that can be used.
        origin: names it in errors.

    Raises:
        DataError: scaled values, a layer that does not exist, or no cells or genes.
    """
    keys = _candidates(layer, list(adata.layers), adata.raw is not None, origin)
    refused = []
    for key in keys:
        raw = key == "raw/X"
        matrix = adata.raw.X if raw else adata.X if key == "X" else adata.layers[key.removeprefix("layers/")]
        if matrix is None:
            continue
        rows = sparse.csr_matrix(matrix)
        kind = _kind_of(rows[_spread(rows.shape[0])])
        if kind is not None:
            return _checked(
                Expression(rows, _gene_names(adata.raw.var if raw else adata.var), _names(adata.obs), kind, origin)
            )
        refused.append(key)
    raise _scaled(origin, refused, keys)


def stored_expression(path: Path, layer: str | None = None) -> Expression:
    """The expression in an h5ad file, of which only the cells asked for are read.

    Args:
        path: the file.
        layer: as for `expression_of`.

    Raises:
        DataError: as for `expression_of`, or a file that is no h5ad.
    """
    with h5py.File(path, "r") as file:
        if "obs" not in file or "var" not in file:
            raise DataError(f"{path} is no h5ad: it has no obs and var. Convert with mmpt.datasets.cell_files.to_h5ad")
        if "encoding-type" not in file["obs"].attrs:
            raise DataError(
                f"{path} was written by anndata before 0.7; read it into memory (backed: false), or write it anew"
            )
        keys = _candidates(layer, list(file.get("layers", ())), "raw" in file, str(path))
        keys = [key for key in keys if key in file]
        cells = _names(anndata.io.read_elem(file["obs"]))
        refused = []
        for key in keys:
            matrix = StoredMatrix(str(path), key)
            kind = _kind_of(matrix[_spread(matrix.shape[0])])
            if kind is not None:
                var = anndata.io.read_elem(file["raw/var" if key == "raw/X" else "var"])
                return _checked(Expression(matrix, _gene_names(var), cells, kind, str(path)))
            refused.append(key)
    raise _scaled(str(path), refused, keys)


def _candidates(layer: str | None, layers: Sequence[str], raw: bool, origin: str) -> list[str]:
    if layer is None:
        return [f"layers/{name}" for name in COUNT_LAYERS if name in layers] + (["raw/X"] if raw else []) + ["X"]
    if layer == "X" or (layer == "raw" and raw and "raw" not in layers):
        return ["X" if layer == "X" else "raw/X"]
    if layer not in layers:
        there = ", ".join(["X", *(["raw"] if raw else []), *layers])
        raise DataError(f"{origin} has no layer {layer!r}; it has {there}")
    return [f"layers/{layer}"]


def _scaled(origin: str, refused: Sequence[str], looked_at: Sequence[str]) -> DataError:
    return DataError(
        f"{origin}: {', '.join(refused) or 'no matrix'} of {', '.join(looked_at)} holds negative values, so it is "
        "scaled (z-scored, scanpy.pp.scale) and the order of the genes within a cell is lost. Either (1) name the raw "
        "counts or the log-normalised values with `layer`, or (2) keep them before scaling: adata.raw = adata, or "
        "adata.layers['counts'] = adata.X.copy()"
    )


def _spread(count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, max(count - 1, 0), min(LOOK_AT, count)).astype(np.int64))


def _kind_of(rows: sparse.csr_matrix) -> Kind | None:
    """None for z-scored values: negative ones in more than a few cells."""
    negative = np.unique(rows.nonzero()[0][rows.data[rows.data != 0] < 0]) if rows.nnz else np.array([])
    if len(negative) > 0.05 * rows.shape[0] + 1:
        return None
    values = rows.data[np.isfinite(rows.data)]
    if np.array_equal(values, np.rint(values)):
        return "counts"
    return "log" if values.max() < LOG_LIMIT else "linear"


def _checked(expression: Expression) -> Expression:
    cells, genes = expression.matrix.shape
    if not cells or not genes:
        raise DataError(f"{expression.origin} has {cells} cells and {genes} genes; expected some of both")
    return expression


def _names(frame: Any) -> NDArray[np.str_]:
    return np.asarray(frame.index.astype(str), dtype=str)


def _gene_names(var: Any) -> dict[str, NDArray[np.str_]]:
    columns = {name: np.asarray(var[name].astype(str), dtype=str) for name in GENE_COLUMNS if name in var.columns}
    return {"index": _names(var), **columns}
