"""Sentences about cells: definitions of types, metadata, and the genes that a cell expresses most."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmpt.errors import DataError
from mmpt.files import read_table

DEFAULT_DEFINITIONS = Path(__file__).parent / "cell_types.tsv"
"""Types of blood cells, described for mmpt."""

CELL_TYPE = "cell_type"

ASPECTS = {
    CELL_TYPE: "cell type",
    "tissue": "tissue",
    "development_stage": "development stage",
    "disease": "disease",
    "sex": "sex",
    "self_reported_ethnicity": "ethnicity",
    "assay": "assay",
    "suspension_type": "suspension",
}
"""The eight aspects of a description, by the columns that CELLxGENE gives them, and their names in the text."""


@dataclass(frozen=True)
class CellType:
    """What is known of a cell type.

    Attributes:
        name: its common name.
        aliases: other names, as data sets label it.
        definition: one or two sentences; may be empty.
        markers: genes that it is known by.
    """

    name: str
    aliases: tuple[str, ...] = ()
    definition: str = ""
    markers: tuple[str, ...] = ()


class Definitions:
    """A table of cell types, looked up by any of their names, in any case.

    Args:
        path: a .tsv, .csv or .jsonl with the columns `name` and `definition`, and if it has them `aliases` (divided by
            semicolons) and `markers` (divided by blanks). The Cell Ontology's names and definitions have this form.

    Raises:
        DataError: no such columns, or one name for two types.
    """

    def __init__(self, path: str | Path = DEFAULT_DEFINITIONS) -> None:
        self.path = str(path)
        table = read_table(Path(path).expanduser())
        columns = {name: table.column(None, [name], name) for name in ("name", "definition", "aliases", "markers")}
        if columns["name"] is None or columns["definition"] is None:
            raise DataError(f"{path} lacks a column `name` or `definition`; expected one row for each cell type")
        self.types: list[CellType] = []
        self._by_name: dict[str, CellType] = {}
        for row in table.rows:
            values = {key: str(row.get(column) or "").strip() if column else "" for key, column in columns.items()}
            aliases = tuple(part.strip() for part in values["aliases"].split(";") if part.strip())
            known = CellType(values["name"], aliases, values["definition"], tuple(values["markers"].split()))
            self.types.append(known)
            for name in (known.name, *aliases):
                if self._by_name.setdefault(name.casefold(), known) is not known:
                    raise DataError(f"{path}: {name!r} is the name of two types; a name must mean one")

    def find(self, label: str) -> CellType:
        """The type with this name or alias; a type without definition where there is none."""
        return self._by_name.get(label.strip().casefold(), CellType(label.strip()))

    def describe(self, label: str) -> str:
        """The whole text of a type, as zero-shot scoring reads it."""
        return type_text(self.find(label))


def type_text(kind: CellType, random_part: random.Random | None = None) -> str:
    """The text of a type: `cell type: name. definition genes: A, B.`.

    Args:
        kind: the type.
        random_part: draws which parts appear and in which order the markers stand, so that a text transformer which
            sees few types can't learn their texts by heart; None gives everything.
    """
    markers = list(kind.markers)
    name, definition = f"cell type: {kind.name.lower()}.", kind.definition
    if random_part is not None:
        markers = random_part.sample(markers, random_part.randint((len(markers) + 1) // 2, len(markers)))
        if markers and definition and random_part.random() < 0.5:
            name, definition = random_part.choice([(name, ""), ("", definition), ("", "")])
    listed = f"{GENES} {', '.join(markers)}." if markers else ""
    return " ".join(part for part in (name, definition, listed) if part)


GENES = "genes:"


def compose(aspects: Mapping[str, str], definitions: Definitions, random_part: random.Random | None = None) -> str:
    """The description of a cell: its type with its definition, then the other aspects that are known.

    Args:
        aspects: column name -> value; missing and empty ones are left out.
        definitions: of the types.
        random_part: see `type_text`.
    """
    parts = [type_text(definitions.find(aspects[CELL_TYPE]), random_part)] if aspects.get(CELL_TYPE) else []
    parts += [f"{title}: {aspects[key]}." for key, title in ASPECTS.items() if key != CELL_TYPE and aspects.get(key)]
    return " ".join(parts)


def gene_sentence(genes: Sequence[str], count: int, among: int, random_part: random.Random | None = None) -> str:
    """`genes: A, B, C.`: what a cell expresses most, relative to other cells (Cell2Sentence, Levine et al. 2023).

    Args:
        genes: in order of their rank value.
        count: how many are named.
        among: of so many first ones they are drawn, in order; without `random_part` the first `count` are named.
        random_part: draws them.
    """
    first = list(genes[:among])
    if random_part is not None and len(first) > count:
        first = [first[i] for i in sorted(random_part.sample(range(len(first)), count))]
    return f"{GENES} {', '.join(first[:count])}."
