"""The contract of a dataset: a Source gives splits of Samples, whatever lies on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, Protocol

from mmpt.config import Configurable
from mmpt.errors import SampleError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Sample:
    """One raw example, before any processor.

    Attributes:
        modalities: modality name -> raw sample, in a form that the modality's processor accepts
            (`{"image": "cat.png", "text": "a cat"}`).
        name: what names the example to a person in lists and errors: a path, a row, an id.
        labels: integer or float facts about it, or a list of 0 and 1 with an entry for each label name. `group` marks
            examples that are positives of each other (two pictures of one thing, two cells with one description): equal
            numbers, same group.
    """

    modalities: Mapping[str, Any]
    name: str
    labels: Mapping[str, Any] = field(default_factory=dict)


class Examples(Protocol):
    """A map-style collection of samples (a list of `Sample` is one)."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Sample:
        """The sample at `index`; reads lazily, so it may raise `SampleError`."""


class Concatenation:
    """Several collections as one.

    Args:
        parts: in order.
    """

    def __init__(self, parts: Sequence[Examples]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


class Source(Configurable, ABC):
    """A dataset: the project's default data, or the user's own.

    Constructing a source does no input or output; `split` does.

    Attributes:
        path: the user's own data; None is the default data of the domain. The data module overwrites it with
            `--data.path`.
    """

    path: str | None = None

    @abstractmethod
    def split(self, name: Split) -> Examples:
        """The samples of one split. Splits of a source never share a group, figure, speaker or other origin.

        Raises:
            DataError: the data as a whole can't be used (empty folder, missing columns, unknown format).
        """

    def lengths(self, name: Split) -> Sequence[int] | None:
        """How long each sample of a split is, in the order of `split`, for batches of similar lengths.

        Any number that grows with the tokens of a sample will do: characters, notes, samples of sound, expressed genes.
        It should cost far less than reading the samples. None where that is not known.
        """
        return None

    def everything(self) -> Examples:
        """All samples in order, for embedding them; they may lack what only training needs (a caption)."""
        splits: tuple[Split, ...] = ("train", "validation", "test")
        return Concatenation([self.split(name) for name in splits])

    def label_names(self, label: str) -> Sequence[str]:
        """The names of an integer label's values, in order; empty where the label has none."""
        return ()

    def label_places(self, label: str, name: Split) -> Sequence[tuple[int, Any]]:
        """Place in a split and value of a label, of the samples that have it; those that can't be read are left out.

        Every sample is read, unless a source knows more.
        """
        samples = self.split(name)
        found: list[tuple[int, Any]] = []
        for index in range(len(samples)):
            try:
                labels = samples[index].labels
            except SampleError:
                continue
            if label in labels:
                found.append((index, labels[label]))
        return found

    def label_values(self, label: str, name: Split) -> Sequence[Any]:
        """The values of `label_places`."""
        return [value for _, value in self.label_places(label, name)]

    def texts(self) -> Sequence[str]:
        """The texts of the training split, for training a tokenizer or listing retrieval candidates."""
        samples = self.split("train")
        return [str(s.modalities["text"]) for s in (samples[i] for i in range(len(samples))) if "text" in s.modalities]


class Around(Source):
    """A source that changes what another one gives; the user's data go to the inner one."""

    source: Source

    @property
    def path(self) -> str | None:
        """The inner source's path."""
        return self.source.path

    @path.setter
    def path(self, value: str | None) -> None:
        self.source.path = value


class WholeSource(Around):
    """A source all of whose splits are all of its samples, for predictions.

    Args:
        source: gives them.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def split(self, name: Split) -> Examples:
        """All samples in order."""
        return self.source.everything()
