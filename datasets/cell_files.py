"""h5ad files of cells: the default data, reading the user's own, and converting other matrices to h5ad."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from mmpt.encoders.cell_expression import Expression, expression_of, stored_expression
from mmpt.errors import DataError

DEFAULT_FILE = "10x_pbmc68k_reduced.h5ad"
"""700 blood cells of ten types that scanpy 1.11 brings (10x Genomics; Zheng et al. 2017, doi 10.1038/ncomms14049)."""


@dataclass(frozen=True)
class CellFile:
    """Cells of one file.

    Attributes:
        expression: genes of the cells.
        obs: metadata, one row for each cell.
        name: of the file.
    """

    expression: Expression
    obs: pd.DataFrame
    name: str


def default_file() -> Path:
    """Where scanpy keeps the default cells; scanpy itself is not imported.

    Raises:
        DataError: scanpy is missing, or a release that brings other files.
    """
    spec = find_spec("scanpy")
    places = spec.submodule_search_locations if spec is not None else None
    path = Path(next(iter(places or ("",)))) / "datasets" / DEFAULT_FILE
    if not places or not path.is_file():
        raise DataError(
            f'the default cells ({DEFAULT_FILE}) come with scanpy 1.11; run: pip install "mmpt[cell]", or give '
            "your own h5ad with --data.path"
        )
    return path


def read_cells(path: Path, layer: str | None = None, backed: bool = False) -> list[CellFile]:
    """Read an h5ad file, or all of a folder.

    Args:
        path: file or folder.
        layer: which matrix; see `mmpt.encoders.cell_expression.expression_of`.
        backed: leave the expression on the disk and read the cells that are asked for.

    Raises:
        DataError: nothing there, another format, or values from which no ranks can be made.
    """
    files = sorted(path.rglob("*.h5ad")) if path.is_dir() else [path]
    if not files or not path.exists():
        raise DataError(
            f"{path} {'holds no .h5ad file' if path.exists() else 'does not exist'}; expected AnnData (h5ad)"
        )
    return [_read(file, layer, backed) for file in files]


def _read(path: Path, layer: str | None, backed: bool) -> CellFile:
    if path.suffix != ".h5ad":
        raise DataError(
            f"{path}: expected an .h5ad file. mmpt.datasets.cell_files.npz_to_h5ad converts matrices in .npz, "
            "scanpy.read most others"
        )
    try:
        if backed:
            expression = stored_expression(path, layer)
            with h5py.File(path, "r") as file:
                return CellFile(expression, anndata.io.read_elem(file["obs"]), path.name)
        with warnings.catch_warnings():  # remarks on files of old releases, which a reader can't change
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", anndata.OldFormatWarning)
            adata = anndata.read_h5ad(path)
    except DataError:
        raise
    except Exception as error:  # h5py and anndata raise many kinds for damaged files
        raise DataError(f"{path} can't be read as h5ad ({type(error).__name__}: {error})") from error
    return CellFile(expression_of(adata, layer, str(path)), adata.obs, path.name)


def to_h5ad(
    matrix: Any,
    genes: Sequence[str],
    output: str | Path,
    cells: Sequence[str] | None = None,
    obs: Mapping[str, Sequence[Any]] | None = None,
) -> Path:
    """Write any matrix of cells and genes as h5ad.

    Args:
        matrix: (cells, genes), sparse or dense; raw counts or log-normalised values.
        genes: name of each column, symbols or Ensembl ids.
        output: the file to write.
        cells: name of each row; numbered by default.
        obs: further facts, column -> one value for each cell (`{"cell_type": [...]}`).

    Raises:
        DataError: names that don't fit the matrix.
    """
    rows = sparse.csr_matrix(matrix)
    names = [f"cell {i}" for i in range(rows.shape[0])] if cells is None else [str(cell) for cell in cells]
    if rows.shape != (len(names), len(genes)):
        hint = "; it looks transposed, give matrix.T" if rows.shape == (len(genes), len(names)) else ""
        raise DataError(f"the matrix is {rows.shape}, with {len(names)} cells and {len(genes)} genes{hint}")
    wrong = [name for name, values in (obs or {}).items() if len(values) != len(names)]
    if wrong:
        raise DataError(f"the column {wrong[0]!r} of obs has another length than the {len(names)} cells")
    frame = pd.DataFrame({name: np.asarray(values) for name, values in (obs or {}).items()}, index=names)
    adata = anndata.AnnData(rows, obs=frame, var=pd.DataFrame(index=[str(gene) for gene in genes]))
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(output)
    return Path(output)


def npz_to_h5ad(source: str | Path, output: str | Path, cell_type: str = "labels") -> Path:
    """Convert a numpy archive with a CSR matrix: `data`, `indices`, `indptr`, `shape`, `genes`, and perhaps `cells`.

    Further arrays with one value for each cell become columns of obs.

    Args:
        source: the .npz file.
        output: the .h5ad to write.
        cell_type: the array that becomes the column `cell_type`.

    Raises:
        DataError: arrays are missing, or hold Python objects (which are not read, as they could run code).
    """
    try:
        with np.load(source, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        matrix = sparse.csr_matrix((arrays["data"], arrays["indices"], arrays["indptr"]), shape=tuple(arrays["shape"]))
        genes = arrays["genes"]
    except KeyError as error:
        raise DataError(f"{source} has no array {error}; expected data, indices, indptr, shape and genes") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{source} can't be read as a numpy archive of plain arrays: {error}") from error
    used = {"data", "indices", "indptr", "shape", "genes", "cells"}
    further = {name: values for name, values in arrays.items() if name not in used and values.shape == matrix.shape[:1]}
    obs = {"cell_type" if name == cell_type else name: values for name, values in further.items()}
    return to_h5ad(matrix, genes.tolist(), output, cells=arrays.get("cells"), obs=obs)
