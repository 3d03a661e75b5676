"""Which genes an encoder knows, and their typical expression: computed from cells, or in Geneformer's format."""

from __future__ import annotations

import io
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from mmpt.config import FOLDER, Configurable
from mmpt.encoders.cell_expression import Cell, Expression
from mmpt.errors import ConfigError, DataError
from mmpt.source import Source

PAD, MASK = 0, 1
FIRST_GENE = 2
"""Ids of the special tokens in Geneformer's order; `<cls>` comes last."""

TARGET_SUM = 10_000.0
TABLE = "genes.tsv"
MAX_CELLS = 100_000
"""Medians are taken over so many cells at most, spread evenly over the training split."""


class GeneVocabulary(Configurable):
    """The genes that have a token, and the median that their expression is divided by.

    Ids: `<pad>` 0, `<mask>` 1, the genes from 2 on, `<cls>` last (Geneformer 0.0.1).

    Args:
        cells: computed from the training split of this dataset: every gene expressed there has a token, in
            alphabetical order.
        path: read from a table `gene, median[, symbol]` (.tsv, as a saved model has), or from Geneformer's token
            dictionary (.pkl), which then needs `medians`. Pickles are read with plain dictionaries, strings and numbers
            only; code in them is not run.
        medians: Geneformer's pickle of gene -> median.
        symbols: Geneformer's pickle of symbol -> Ensembl id, so that data with symbols can be read.
        genes: keep only these genes: a file with one name a line. For two studies of which each measured other genes.

    Raises:
        ConfigError: neither or both of `cells` and `path`.
        DataError: files that are absent, damaged, or disagree.
    """

    def __init__(
        self,
        cells: Source | None = None,
        path: str | None = None,
        medians: str | None = None,
        symbols: str | None = None,
        genes: str | None = None,
    ) -> None:
        if (cells is None) == (path is None):
            raise ConfigError("a gene vocabulary is made from `cells` (a dataset) or from `path` (a file): give one")
        if cells is not None:
            names, values = medians_of(cells)
            aliases: dict[str, str] = {}
        else:
            names, values, aliases = _read(Path(str(path)).expanduser(), medians, symbols)
        if genes is not None:
            wanted = set(_lines(Path(genes).expanduser()))
            keep = np.array([name in wanted for name in names], dtype=bool)
            if not keep.any():
                raise DataError(f"none of the {len(wanted)} genes of {genes} is among the {len(names)} of the data")
            names, values = [name for name, kept in zip(names, keep, strict=True) if kept], values[keep]
        self.genes: list[str] = names
        self.medians: NDArray[np.float64] = values
        self.aliases = aliases
        self._symbols = {name: alias for alias, name in aliases.items()}
        self._ids = {name: number + FIRST_GENE for number, name in enumerate(names)}
        self._ids |= {alias: self._ids[name] for alias, name in aliases.items() if name in self._ids}

    def __len__(self) -> int:
        """Number of tokens, the three special ones included."""
        return len(self.genes) + 3

    @property
    def cls(self) -> int:
        """Id of the token in front of every cell."""
        return len(self.genes) + FIRST_GENE

    def name(self, token: int) -> str:
        """The gene of a token, by its symbol where that is known."""
        gene = self.genes[token - FIRST_GENE]
        return self._symbols.get(gene, gene)

    def ids(self, names: Sequence[str] | NDArray[np.str_]) -> NDArray[np.int64]:
        """The token of each gene, -1 for unknown ones; a version behind an Ensembl id (`.12`) is ignored."""
        found = (self._ids.get(_plain(name), -1) for name in names)
        return np.fromiter(found, dtype=np.int64, count=len(names))

    def columns(self, expression: Expression) -> NDArray[np.int64]:
        """The token of each column of a matrix (genes,), by the naming that knows most of its genes.

        Raises:
            DataError: no gene is known; the message says whether the matrix is transposed or of another species.
        """
        namings = {naming: self.ids(names) for naming, names in expression.genes.items()}
        best = max(namings, key=lambda naming: int((namings[naming] >= 0).sum()))
        if (namings[best] >= 0).any():
            return namings[best]
        names = expression.genes["index"]
        shown = ", ".join(names[:3])
        if (self.ids(expression.cells) >= 0).mean() > 0.1:
            raise DataError(
                f"{expression.origin}: the cells are named like genes ({', '.join(expression.cells[:3])}), so the "
                "matrix is transposed; give adata.T, cells in rows"
            )
        species = _species(names)
        if species != _species(self.genes) or (self.ids(np.char.upper(names)) >= 0).mean() > 0.1:
            raise DataError(
                f"{expression.origin}: genes such as {shown} are of another species than the model's "
                f"({', '.join(self.genes[:3])}); map them to their orthologues first"
            )
        raise DataError(
            f"{expression.origin}: none of its {len(names)} genes ({shown}, ...) is among the {len(self.genes)} of the "
            f"model ({', '.join(self.genes[:3])}, ...). Name them by the same kind of id in var_names or in one of the "
            "columns ensembl_id, gene_ids, feature_name, gene_symbols"
        )

    def config(self, folder: Path | None = None) -> dict[str, Any]:
        """The configuration; with a folder, the table is written there and named from there."""
        if folder is None:
            return super().config(folder)
        rows = zip(self.genes, self.medians.tolist(), strict=True)
        lines = [f"{gene}\t{median!r}\t{self._symbols.get(gene, '')}" for gene, median in rows]
        (folder / TABLE).write_text("\n".join(["gene\tmedian\tsymbol", *lines, ""]), encoding="utf-8")
        cls = type(self)
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": {"path": f"{FOLDER}/{TABLE}"}}


def in_linear_space(rows: sparse.csr_matrix, expression: Expression) -> sparse.csr_matrix:
    """Counts, or what is proportional to them within a cell, in double precision; explicit zeros are gone."""
    data = rows.data.astype(np.float64)
    linear = sparse.csr_matrix(
        (np.expm1(data) if expression.kind == "log" else data, rows.indices, rows.indptr), shape=rows.shape
    )
    linear.eliminate_zeros()
    return linear


def medians_of(source: Source) -> tuple[list[str], NDArray[np.float64]]:
    """Genes that the training split of a dataset expresses, in alphabetical order, and their non-zero medians.

    The median is over the cells that express the gene, of count / total of the cell * 10,000, where the total is over
    all genes of the matrix.

    Raises:
        DataError: samples without a cell, or no expression at all.
    """
    samples = source.split("train")
    chosen = np.unique(np.linspace(0, max(len(samples) - 1, 0), min(len(samples), MAX_CELLS)).astype(int))
    rows: dict[Expression, list[int]] = defaultdict(list)
    for number in chosen:
        cell = samples[int(number)].modalities.get("cell")
        if not isinstance(cell, Cell):
            raise DataError(f"{type(source).__name__} gives no cells, so no gene medians can be computed from it")
        rows[cell.expression].append(cell.row)
    values: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    for expression, numbers in rows.items():
        linear = in_linear_space(expression.rows(numbers), expression)
        linear.data[~np.isfinite(linear.data) | (linear.data < 0)] = 0.0
        totals = np.asarray(linear.sum(1)).ravel()
        scale = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
        columns = sparse.csc_matrix(sparse.diags(scale) @ linear)
        columns.eliminate_zeros()
        for column, name in enumerate(expression.genes["index"]):
            part = columns.data[columns.indptr[column] : columns.indptr[column + 1]]
            if len(part):
                values[_plain(name)].append(part)
    if not values:
        raise DataError(f"the training split of {type(source).__name__} ({len(samples)} cells) expresses no gene")
    genes = sorted(values)
    return genes, np.array([np.median(np.concatenate(values[gene])) for gene in genes])


def _plain(name: str) -> str:
    """An Ensembl id without its version, any other name as it is."""
    return name.partition(".")[0] if name.startswith("ENS") else str(name)


def _species(names: Sequence[str] | NDArray[np.str_]) -> str:
    """The commonest prefix of Ensembl ids (`ENSG`, `ENSMUSG`); empty for symbols."""
    found = Counter(match[1] for name in names if (match := re.match(r"(ENS[A-Z]*G)\d", name)))
    return found.most_common(1)[0][0] if found else ""


def _read(
    path: Path, medians: str | None, symbols: str | None
) -> tuple[list[str], NDArray[np.float64], dict[str, str]]:
    if path.suffix != ".pkl":
        return _read_table(path)
    if medians is None:
        raise ConfigError(f"{path} is a token dictionary; give Geneformer's pickle of medians too, as `medians`")
    tokens, values = read_pickle(path), read_pickle(Path(medians).expanduser())
    genes = sorted((gene for gene in tokens if not gene.startswith("<")), key=lambda gene: tokens[gene])
    numbers = [tokens[gene] for gene in genes]
    if numbers != list(range(FIRST_GENE, FIRST_GENE + len(genes))):
        raise DataError(
            f"{path}: the ids of the genes are not {FIRST_GENE}, {FIRST_GENE + 1}, ... as in Geneformer 0.0.1"
        )
    missing = [gene for gene in genes if gene not in values]
    if missing:
        raise DataError(f"{medians} has no median for {len(missing)} genes of {path}, such as {missing[0]}")
    names = read_pickle(Path(symbols).expanduser()) if symbols is not None else {}
    return genes, np.array([float(values[gene]) for gene in genes]), {str(k): str(v) for k, v in names.items()}


def _read_table(path: Path) -> tuple[list[str], NDArray[np.float64], dict[str, str]]:
    lines = _lines(path)
    if not lines or lines[0].split("\t")[:2] != ["gene", "median"]:
        raise DataError(f"{path}: the first line must be `gene<tab>median`, with an optional third column `symbol`")
    genes: list[str] = []
    values: list[float] = []
    aliases: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        gene, median, symbol = (*line.split("\t"), "", "")[:3]
        try:
            value = float(median)
        except ValueError:
            value = -1.0
        if not gene or not 0 < value < float("inf"):
            raise DataError(f"{path}, line {number}: {line[:60]!r}; expected a gene and a positive median")
        genes.append(gene)
        values.append(value)
        if symbol:
            aliases[symbol] = gene
    if len(set(genes)) != len(genes):
        raise DataError(f"{path} names a gene twice: {Counter(genes).most_common(1)[0][0]}")
    return genes, np.array(values), aliases


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable UTF-8 text file: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Refuses everything but numpy's scalars; dictionaries, strings and numbers need no class."""

    allowed = {("numpy", "dtype"), ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a plain value")
        return super().find_class(module, name)


def read_pickle(path: Path) -> Mapping[str, Any]:
    """A pickled dictionary of strings and numbers; nothing in the file is run.

    Raises:
        DataError: anything else.
    """
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(f"{path} can't be read as a dictionary of plain values: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a dictionary from gene to number")
    return content
