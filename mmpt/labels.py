"""Labels beside the data: a table of labels for any source, and few labelled examples of each class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmpt.errors import DataError, SampleError
from mmpt.files import read_table
from mmpt.source import Around, Examples, Sample, Source, Split


class Labelled(Around):
    """Any source with labels from a table: classes, numbers, or several labels of a sample separated by semicolons.

    The table (.csv, .tsv, .jsonl) has a column `name` with the samples' names, or the names of their files, and a
    column for each label. A column of numbers is a label of numbers; one with a semicolon in some cell is a set of
    labels; any other names classes. Samples that the table does not name are skipped.

    Args:
        source: gives the samples; `--data.path` goes to it.
        table: path of the table.
        label: its column that is learned.
    """

    def __init__(self, source: Source, table: str, label: str = "class") -> None:
        self.source, self.table, self.label = source, table, label
        self._rows: dict[str, str] | None = None

    def _cells(self) -> dict[str, str]:
        if self._rows is None:
            table = read_table(Path(self.table))
            for column in ("name", self.label):
                table.column(column, (), "name" if column == "name" else "label")
            self._rows = {str(row["name"]): str(row[self.label]).strip() for row in table.rows if row.get(self.label)}
        return self._rows

    @property
    def kind(self) -> str:
        """Of the label: "number", "set" or "class"."""
        cells = list(self._cells().values())
        if any(";" in cell for cell in cells):
            return "set"
        try:
            [float(cell) for cell in cells]
        except ValueError:
            return "class"
        return "number"

    def label_names(self, label: str) -> Sequence[str]:
        """The values of the column, sorted; none for numbers."""
        if label != self.label:
            return self.source.label_names(label)
        if self.kind == "number":
            return ()
        return sorted({part.strip() for cell in self._cells().values() for part in cell.split(";") if part.strip()})

    def split(self, name: Split) -> Examples:
        """See `Source`."""
        return _Labelled(self, self.source.split(name))

    def everything(self) -> Examples:
        """All samples, without labels."""
        return self.source.everything()

    def lengths(self, name: Split) -> Sequence[int] | None:
        """See `Source`."""
        return self.source.lengths(name)

    def value(self, name: str) -> int | float | list[int]:
        """The label of a sample.

        Raises:
            SampleError: the table does not name it.
        """
        cells = self._cells()
        cell = cells.get(name, cells.get(Path(name).name))
        if cell is None:
            raise SampleError(name, f"{self.table} has no label {self.label!r} for it", "a row with its name")
        if self.kind == "number":
            return float(cell)
        names = self.label_names(self.label)
        if self.kind == "class":
            return list(names).index(cell)
        own = {part.strip() for part in cell.split(";")}
        return [int(label in own) for label in names]


class _Labelled:
    def __init__(self, source: Labelled, samples: Examples) -> None:
        self.source, self.samples = source, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        labels = {**sample.labels, self.source.label: self.source.value(sample.name)}
        return replace(sample, labels=labels)


class FewShot(Around):
    """A source whose training split holds a few examples of each class, drawn by a seed; other splits are whole.

    Args:
        source: gives the samples.
        shots: examples of each class; classes with fewer keep all.
        label: names the class.
        seed: of the draw. The first n of a larger draw are the draw of n.
    """

    def __init__(self, source: Source, shots: int, label: str = "class", seed: int = 0) -> None:
        if shots < 1:
            raise DataError(f"shots is {shots}; it must be at least 1")
        self.source, self.shots, self.label, self.seed = source, shots, label, seed

    def split(self, name: Split) -> Examples:
        """See `Source`."""
        samples = self.source.split(name)
        if name != "train":
            return samples
        members: dict[float, list[int]] = defaultdict(list)
        for index, value in self.source.label_places(self.label, "train"):
            members[float(value)].append(index)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = []
        for value in sorted(members):
            order = torch.randperm(len(members[value]), generator=generator).tolist()
            chosen += [members[value][place] for place in order[: self.shots]]
        return [samples[index] for index in sorted(chosen)]

    def label_names(self, label: str) -> Sequence[str]:
        """See `Source`."""
        return self.source.label_names(label)

    def everything(self) -> Examples:
        """See `Source`."""
        return self.source.everything()
