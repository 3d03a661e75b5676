"""Cells with texts: the default blood cells, or the user's own h5ad."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from mmpt.datasets.cell_files import CellFile, default_file, read_cells
from mmpt.datasets.cell_neighbours import neighbourhood_genes
from mmpt.datasets.cell_text import ASPECTS, CELL_TYPE, DEFAULT_DEFINITIONS, Definitions, compose, gene_sentence
from mmpt.encoders.cell_expression import Cell
from mmpt.errors import ConfigError, DataError
from mmpt.source import Examples, Sample, Source, Split
from mmpt.splits import hash_split

TYPE_COLUMNS = (CELL_TYPE, "celltype", "cell_types", "bulk_labels", "cell_label", "labels", "label", "annotation")
DONOR_COLUMNS = ("donor_id", "donor", "patient", "individual")
NAMED, AMONG = 12, 30
"""A gene sentence names 12 of the 30 most characteristic genes."""


class Cells(Source):
    """Single cells and sentences about them.

    `path` is an h5ad file, or a folder of them; None is scanpy's bundled `pbmc68k_reduced`: 700 blood cells of ten
    types. Genes may be named by symbols or Ensembl ids. The text of a cell is composed of what is known of it: its
    type with the type's definition, and tissue, development stage, disease, sex, ethnicity, assay and suspension
    where obs has such columns. Cells with the same text share the label `group`; the label `class` is the type.

    Splits: a column `split` decides if there is one. Otherwise whole donors are divided where a donor column exists,
    else single cells, stratified by type; a hash of the name decides, so added cells don't move others.

    Args:
        path: see above.
        text: `"type"`: the description. `"genes"`: a sentence that names genes which the cell and its neighbours
            express more than other cells do, drawn anew each time; each cell is then its own group, and there is a
            training split only. Such sentences need no labels, and teach the text side what genes are, so that it can
            read of a type it never saw.
        neighbours: for `text="genes"`: how many cells, with it, speak for a cell; see
            `mmpt.datasets.cell_neighbours`. 1 is the cell by itself.
        layer: which matrix; by default raw counts where they conventionally lie, see
            `mmpt.encoders.cell_expression.expression_of`.
        type_column: column of obs with the type; by default `cell_type`, `bulk_labels` or similar.
        donor_column: column of obs with the donor; by default `donor_id`, `donor` or similar. `""`: there is none.
        definitions: table of types, see `mmpt.datasets.cell_text.Definitions`.
        aspects: columns of obs by what they mean, where they are not named as in CELLxGENE, `{"tissue": "organ"}`.
        exclude: types, by any of their names, that training and validation never see. All their cells are in the test
            split.
        vary: in training, draw which parts of a type's text are shown.
        backed: leave the expression on the disk.
        validation_fraction: part of the cells (or donors) for validation.
        test_fraction: part for the test.
        seed: of the split.

    Raises:
        ConfigError: fractions that leave nothing to train on, unknown aspects, no neighbours.
    """

    def __init__(
        self,
        path: str | None = None,
        text: Literal["type", "genes"] = "type",
        neighbours: int = 20,
        layer: str | None = None,
        type_column: str | None = None,
        donor_column: str | None = None,
        definitions: str = str(DEFAULT_DEFINITIONS),
        aspects: dict[str, str] | None = None,
        exclude: Sequence[str] = (),
        vary: bool = True,
        backed: bool = False,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.25,
        seed: int = 0,
    ) -> None:
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train on"
            )
        if neighbours < 1:
            raise ConfigError(f"neighbours is {neighbours}; expected at least 1, the cell itself")
        unknown = set(aspects or ()) - set(ASPECTS)
        if unknown:
            raise ConfigError(f"aspects name {sorted(unknown)}; the aspects are {', '.join(ASPECTS)}")
        self.path = path
        self.text, self.layer, self.backed, self.vary = text, layer, backed, vary
        self.neighbours = neighbours
        self.type_column, self.donor_column = type_column, donor_column
        self.aspects = dict.fromkeys(ASPECTS) | (aspects or {})
        self.exclude = list(exclude)
        self.definitions_path = definitions
        self.validation_fraction, self.test_fraction, self.seed = validation_fraction, test_fraction, seed
        self._read: tuple[str | None, _Collection] | None = None

    @property
    def definitions(self) -> Definitions:
        """The table of types."""
        return self._collection().definitions

    def split(self, name: Split) -> Examples:
        """The cells of one split, each with the modalities `cell` and, where anything is known of it, `text`.

        Raises:
            DataError: no readable h5ad, columns that are missing, or no cell with a text among others that have one.
        """
        collection = self._collection()
        rows = self._rows(name)
        if self.text == "genes":
            return _Sentences(collection, rows)
        return _Described(collection, rows, self.vary and name == "train")

    def lengths(self, name: Split) -> Sequence[int] | None:
        """Expressed genes of each cell; None where a file holds dense or column-wise values."""
        collection = self._collection()
        counts = [file.expression.expressed() for file in collection.files]
        if any(count is None for count in counts):
            return None
        every = np.concatenate([count for count in counts if count is not None])
        return [int(every[row]) for row in self._rows(name)]

    def _rows(self, name: Split) -> list[int]:
        """Numbers of the cells of a split."""
        collection = self._collection()
        rows = collection.rows(name)
        if self.text == "genes":
            return rows if name == "train" else []
        return [row for row in rows if collection.described[row] or not any(collection.described)]

    def everything(self) -> Examples:
        """All cells in order, for embedding them."""
        if self.text == "genes":
            return []
        collection = self._collection()
        return _Described(collection, list(range(len(collection.cells))), False)

    def label_names(self, label: str) -> Sequence[str]:
        """The types, as the data name them, for the label `class`."""
        return self._collection().types if label == "class" and self.text == "type" else ()

    def texts(self) -> Sequence[str]:
        """What training texts are made of: each description, and each gene twice."""
        collection = self._collection()
        described = {collection.describe(row): None for row in collection.rows("train")}
        genes = [gene for file in collection.files for gene in file.expression.genes["index"].tolist()]
        return [text for text in described if text] * 2 + list(dict.fromkeys(genes)) * 2

    def _collection(self) -> _Collection:
        if self._read is None or self._read[0] != self.path:
            files = read_cells(Path(self.path).expanduser() if self.path else default_file(), self.layer, self.backed)
            self._read = self.path, _Collection(files, self)
        return self._read[1]


@dataclass(frozen=True)
class _Row:
    """What is known of a cell."""

    cell: Cell
    name: str
    aspects: Mapping[str, str]


class _Collection:
    """All cells of a source with their texts, types and splits."""

    def __init__(self, files: Sequence[CellFile], source: Cells) -> None:
        self.files = files
        self.definitions = Definitions(source.definitions_path)
        self.source = source
        self.cells: list[_Row] = []
        donors: list[str] = []
        given: list[str] = []
        for file in files:
            columns = _aspect_columns(file, source)
            donor = _column(file, source.donor_column, DONOR_COLUMNS, "donor")
            split = _column(file, None, ("split",), "split")
            prefix = f"{file.name}:" if len(files) > 1 else ""
            for number, cell in enumerate(file.expression.cells.tolist()):
                aspects = {key: values[number] for key, values in columns.items() if values[number]}
                self.cells.append(_Row(Cell(file.expression, number), f"{prefix}{cell}", aspects))
            donors += donor if donor is not None else [""] * len(file.obs)
            given += split if split is not None else [""] * len(file.obs)
        self.types = sorted({row.aspects[CELL_TYPE] for row in self.cells if CELL_TYPE in row.aspects})
        self.type_number = {name: number for number, name in enumerate(self.types)}
        self.described = [bool(row.aspects) for row in self.cells]
        texts = [self.describe(row) for row in range(len(self.cells))]
        group = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        self.groups = [group[text] for text in texts]
        self.splits = self._assign(donors, given)
        self._genes: dict[int, list[str]] | None = None

    def rows(self, split: Split) -> list[int]:
        """Numbers of a split's cells."""
        return [row for row, own in enumerate(self.splits) if own == split]

    def describe(self, row: int, random_part: random.Random | None = None) -> str:
        """The text of a cell; empty if nothing is known of it."""
        return compose(self.cells[row].aspects, self.definitions, random_part)

    def characteristic_genes(self) -> dict[int, list[str]]:
        """For each training cell, by its number, what it and its neighbours in the training split express most."""
        if self._genes is None:
            rows = self.rows("train")
            genes = neighbourhood_genes([self.cells[row].cell for row in rows], self.source.neighbours, AMONG)
            self._genes = dict(zip(rows, genes, strict=True))
        return self._genes

    def _assign(self, donors: Sequence[str], given: Sequence[str]) -> list[Split]:
        wrong = sorted(set(given) - {"", "train", "validation", "test"})
        if wrong:
            raise DataError(f"the column `split` holds {wrong[0]!r}; expected train, validation or test")
        places = [
            ("", donor) if donor else (row.aspects.get(CELL_TYPE, ""), row.name)
            for row, donor in zip(self.cells, donors, strict=True)
        ]
        source = self.source
        decided = hash_split(set(places), source.validation_fraction, source.test_fraction, source.seed)
        splits: list[Split] = [own or decided[place] for own, place in zip(given, places, strict=True)]  # type: ignore[misc]
        excluded = {self.definitions.find(name).name.casefold() for name in source.exclude}
        found = {self.definitions.find(name).name.casefold() for name in self.types}
        if excluded - found:
            raise DataError(f"exclude names {sorted(excluded - found)}, which no cell is; the types are {self.types}")
        kinds = {name: self.definitions.find(name).name.casefold() in excluded for name in self.types}
        return [
            "test" if kinds.get(row.aspects.get(CELL_TYPE, ""), False) else split
            for row, split in zip(self.cells, splits, strict=True)
        ]


class _Described:
    """Cells with their descriptions."""

    def __init__(self, collection: _Collection, rows: Sequence[int], vary: bool) -> None:
        self.collection, self.chosen, self.vary = collection, rows, vary

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        number = self.chosen[index]
        row = self.collection.cells[number]
        modalities: dict[str, object] = {"cell": row.cell}
        # The data module seeds Python's generator for every sample it reads.
        text = self.collection.describe(number, random.Random(random.getrandbits(32)) if self.vary else None)
        if text:
            modalities["text"] = text
        labels: dict[str, int | float] = {"group": self.collection.groups[number]}
        if CELL_TYPE in row.aspects:
            labels["class"] = self.collection.type_number[row.aspects[CELL_TYPE]]
        return Sample(modalities, row.name, labels)


class _Sentences:
    """Cells with sentences about their genes; each is its own group."""

    def __init__(self, collection: _Collection, rows: Sequence[int]) -> None:
        self.collection, self.chosen = collection, rows
        self.genes = collection.characteristic_genes()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        number = self.chosen[index]
        row = self.collection.cells[number]
        sentence = gene_sentence(self.genes[number], NAMED, AMONG, random.Random(random.getrandbits(32)))
        return Sample({"cell": row.cell, "text": sentence}, row.name)


def _aspect_columns(file: CellFile, source: Cells) -> dict[str, list[str]]:
    """Aspect -> value of each cell, empty where it is unknown."""
    columns = {}
    for key, named in source.aspects.items():
        if key == CELL_TYPE:
            values = _column(file, source.type_column or named, TYPE_COLUMNS, "cell type")
        else:
            values = _column(file, named, (key,), key)
        if values is not None:
            columns[key] = ["" if value.casefold() in ("unknown", "nan", "na") else value for value in values]
    return columns


def _column(file: CellFile, named: str | None, candidates: Sequence[str], role: str) -> list[str] | None:
    """A column of obs as text, missing values empty; None if there is none."""
    if named == "":
        return None
    if named is not None and named not in file.obs:
        raise DataError(
            f"{file.name}: obs has no {role} column {named!r}; it has {', '.join(file.obs.columns) or 'none'}"
        )
    found = named or next((name for name in candidates if name in file.obs), None)
    if found is None:
        return None
    column: pd.Series = file.obs[found]
    return ["" if missing else str(value) for value, missing in zip(column, column.isna(), strict=True)]
