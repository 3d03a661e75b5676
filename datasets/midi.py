"""Symbolic music with classes and note labels: music21's corpus, or the user's own MIDI files."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mmpt.datasets.midi_corpus import Corpus
from mmpt.encoders.midi_notes import PART, JoinedNotes, Notes, read_notes
from mmpt.encoders.midi_tokens import VELOCITY_CLASSES
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.files import TABLE_SUFFIXES, contained, hash_fraction, read_table
from mmpt.source import Examples, Sample, Source, Split
from mmpt.splits import hash_split

SUFFIXES = (".mid", ".midi")
LARGEST = 64 * 2**20
"""Bytes of the largest member of a zip file that is read; MIDI files are a thousand times smaller."""

SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip

FOLDER = "folder"

VOICES = ("upper voice", "other voices")
"""Values of the label `part` for the default data."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece, read.

    Attributes:
        name: for lists and errors.
        notes: None where it could not be read.
        error: why not.
        style: its class.
        split: as the data say.
        unit: pieces with the same one are never divided between splits.
    """

    name: str
    notes: Notes | None
    error: SampleError | None = None
    style: str | None = None
    split: Split | None = None
    unit: str = ""


class Music(Source):
    """Excerpts of pieces.

    `path` may be

    - None: pieces of several styles, see `mmpt.datasets.midi_corpus.Corpus`;
    - a folder of MIDI files at any depth, or a .zip of one (it is read in place);
    - a table (.csv, .tsv, .jsonl) with a column of paths (`file`, `path`, `midi`) and, if there are, columns `class`
      and `split`. Paths begin at the table's folder, or inside `root`, which may be a .zip file.

    Below `train`, `validation` and `test` folders, or with a `split` column, the data say the splits; otherwise a hash
    of the file's name without folder and suffix does, so that versions of one piece (`melody/jig1.mid` and `jig1.mid`)
    stay together. Splits are by piece: excerpts of one piece are never in two of them. Pieces with the same notes as an
    earlier one are left out, with a warning.

    Each sample has the modalities `midi` (an excerpt) and `text` (the class, or the file's name), the labels `piece`,
    `group` (equal for equal texts) and, where there are classes, `class`. The notes have the label `velocity`, and
    `part` if `parts` are named; for the default data `part` says whether a note is in the upper voice.

    Args:
        path: see above.
        corpus: the default data, used while `path` is None.
        root: where the paths of a table begin.
        classes: where the class of a file comes from: "folder" (the one that it lies in), a regular expression with one
            group that is searched in its path, such as `([a-z]+)[^/]*$` (files in whose path it does not occur are left
            out), or None. A table's `class` column goes first.
        parts: names of tracks. Each note gets the label `part` by the name of its track.
        length: notes of an excerpt. Give the encoder's `max_length`, less 1 for encodings that mark the end of a piece.
        joined: lay the pieces of a split end to end, in an order by a hash of their names, and cut them every `length`
            words, the ones that end pieces included, as both papers do for pretraining; give the encoder's
            `max_length`. Such samples have no class, and bars are counted anew behind a cut.
        shortest: a last excerpt with fewer notes is left out, unless it is the only one.
        time_signature: `numerator/denominator` of all pieces, for files whose own can't be trusted.
        min_pieces: classes with fewer pieces are left out.
        validation_fraction: part of the pieces for validation, where the data don't say.
        test_fraction: part of the pieces for the test, where the data don't say.
        seed: of the split.
        template: the text of a class.

    Raises:
        ConfigError: options that can't work.
    """

    def __init__(
        self,
        path: str | None = None,
        corpus: Corpus | None = None,
        root: str | None = None,
        classes: str | None = FOLDER,
        parts: Sequence[str] = (),
        length: int = 63,
        joined: bool = False,
        shortest: int = 16,
        time_signature: str | None = None,
        min_pieces: int = 1,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        template: str = "{}",
    ) -> None:
        if min(validation_fraction, test_fraction) < 0 or validation_fraction + test_fraction >= 1:
            raise ConfigError(
                f"validation_fraction {validation_fraction} and test_fraction {test_fraction} leave nothing to train on"
            )
        if length < 1 or "{}" not in template:
            raise ConfigError(f"length={length} must be at least 1, and template={template!r} must hold {{}}")
        if joined and length < 2:
            raise ConfigError(
                f"length is {length}; joined pieces need at least 2 words, a note and the end of its piece"
            )
        self.signature = None if time_signature is None else parsed_signature(time_signature)
        if classes not in (None, FOLDER) and re.compile(classes).groups != 1:
            raise ConfigError(f"classes is {classes!r}; expected 'folder', or a regular expression with one group")
        self.path, self.corpus, self.root, self.classes = path, corpus or Corpus(), root, classes
        self.parts, self.length, self.joined, self.shortest = list(parts), length, joined, shortest
        self.min_pieces = min_pieces
        self.validation_fraction, self.test_fraction, self.seed = validation_fraction, test_fraction, seed
        self.template = template
        self._read: tuple[str | None, _Collection] | None = None

    def split(self, name: Split) -> Examples:
        """The excerpts of one split; files that can't be read are among them and raise their error when asked for.

        Raises:
            DataError: nothing readable at `path`.
        """
        collection = self._collection()
        kind = JoinedExcerpts if self.joined else Excerpts
        return kind(collection, [n for n, split in enumerate(collection.splits) if split == name], self)

    def lengths(self, name: Split) -> Sequence[int]:
        """Notes of each excerpt."""
        examples = self.split(name)
        assert isinstance(examples, Excerpts)
        return [last - first for _, first, last in examples.places]

    def label_names(self, label: str) -> Sequence[str]:
        """Names of the values of `class`, `part` and `velocity`."""
        if label == "class":
            return self._collection().classes
        parts = VOICES if self.path is None else self.parts
        return {PART: parts, "velocity": VELOCITY_CLASSES}.get(label, ())

    def label_places(self, label: str, name: Split) -> Sequence[tuple[int, Any]]:
        """See `Source`; classes are known without cutting excerpts."""
        examples = self.split(name)
        if label != "class" or not isinstance(examples, Excerpts):
            return super().label_places(label, name)
        numbers, pieces = self._collection().class_index, self._collection().pieces
        owners = [(index, pieces[number]) for index, (number, _, _) in enumerate(examples.places)]
        return [(i, numbers[p.style]) for i, p in owners if p.notes is not None and p.style is not None]

    def texts(self) -> Sequence[str]:
        """One text for each piece of the training split."""
        collection = self._collection()
        return [text for text, split in zip(collection.texts, collection.splits, strict=True) if split == "train"]

    def _collection(self) -> _Collection:
        if self._read is None or self._read[0] != self.path:
            pieces = self._classes_kept(_without_repetitions(list(self._pieces())))
            if not any(piece.notes is not None for piece in pieces):
                first = next((piece.error for piece in pieces if piece.error), None)
                reason = f"; the first problem: {first}" if first else ""
                raise DataError(f"{self.path} has no MIDI file ({', '.join(SUFFIXES)}) that can be read{reason}")
            self._read = (self.path, _Collection(pieces, self._assign(pieces), self.template))
        return self._read[1]

    def _classes_kept(self, pieces: list[Piece]) -> list[Piece]:
        counts: dict[str | None, int] = {}
        for piece in pieces:
            counts[piece.style] = counts.get(piece.style, 0) + 1
        optional = self.classes in (None, FOLDER)
        return [p for p in pieces if (optional if p.style is None else counts[p.style] >= self.min_pieces)]

    def _assign(self, pieces: Sequence[Piece]) -> list[Split]:
        given = [piece.split for piece in pieces]
        if "validation" in given and "test" in given:
            return [split or "train" for split in given]
        stratum: dict[str, str] = {}
        for piece in pieces:
            stratum.setdefault(piece.unit, piece.style or "")
        undecided = {
            (stratum[p.unit], p.unit) for p, split in zip(pieces, given, strict=True) if split in (None, "train")
        }
        divided = any(split is not None for split in given)
        shares = 0.0 if "validation" in given else self.validation_fraction, 0.0 if divided else self.test_fraction
        decided = hash_split(undecided, *shares, self.seed)
        return [
            split if split in ("validation", "test") else decided[stratum[p.unit], p.unit]
            for p, split in zip(pieces, given, strict=True)
        ]

    def _pieces(self) -> Iterator[Piece]:
        if self.path is None:
            found, skipped = self.corpus.pieces()
            for piece in found:
                notes = self._prepared(piece.notes)
                yield Piece(piece.name, with_voices(notes), None, piece.style, None, piece.work)
            for record in skipped:
                error = SampleError(record["sample"], record["problem"], record["expected"])
                yield Piece(error.sample, None, error)
            return
        place = Path(self.path)
        if not place.exists():
            raise DataError(f"{place} does not exist; expected a folder or .zip of MIDI files, or a table")
        if place.suffix.lower() in TABLE_SUFFIXES:
            yield from self._from_table(place)
            return
        with _Files(place) as files:
            split_folders = _split_folders(files.names())
            for name in files.names():
                split = SPLITS.get(name.split("/")[0].lower()) if split_folders else None
                yield self._piece(files, name, self._class_of(name), split)

    def _from_table(self, path: Path) -> Iterator[Piece]:
        table = read_table(path)
        column = table.column(None, ("file", "path", "filepath", "filename", "midi", "midi_path"), "file")
        if column is None:
            raise DataError(f"{path} has the columns {', '.join(table.columns)}; expected one named file, path or midi")
        style = table.column(None, ("class", "label", "category"), "class")
        split = table.column(None, ("split",), "split")
        with _Files(Path(self.root) if self.root is not None else path.parent) as files:
            for row, line in zip(table.rows, table.lines, strict=True):
                name = str(row.get(column) or "")
                word = str(row.get(split) or "").lower() if split else ""
                if word and word not in SPLITS:
                    raise DataError(f"{path}, line {line}: split {word!r}; expected train, validation or test")
                own = str(row.get(style) or "") or None if style else self._class_of(name)
                yield self._piece(files, name, own, SPLITS.get(word))

    def _class_of(self, name: str) -> str | None:
        if self.classes is None:
            return None
        if self.classes == FOLDER:
            return PurePosixPath(name).parent.name or None
        found = re.search(self.classes, name)
        return found[1] if found else None

    def _piece(self, files: _Files, name: str, style: str | None, split: Split | None) -> Piece:
        unit = PurePosixPath(name).stem
        try:
            notes = self._prepared(read_notes(files.read(name), self.parts))
        except SampleError as error:
            return Piece(name, None, SampleError(name, error.problem, error.expected), style, split, unit)
        return Piece(name, notes, None, style, split, unit)

    def _prepared(self, notes: Notes) -> Notes:
        return notes if self.signature is None else notes.with_signature(*self.signature)


class _Files:
    """MIDI files of a folder or of a zip file, by their paths in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.archive: zipfile.ZipFile | None = None

    def __enter__(self) -> _Files:
        if self.place.is_file():
            try:
                self.archive = zipfile.ZipFile(self.place)
            except (zipfile.BadZipFile, OSError) as error:
                known = f"a folder or a .zip of MIDI files, or a table ({', '.join(TABLE_SUFFIXES)})"
                raise DataError(f"{self.place} is no zip file ({error}); expected {known}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if self.archive is not None:
            self.archive.close()

    def names(self) -> list[str]:
        """All MIDI files, sorted; hidden ones are passed over."""
        if self.archive is not None:
            found = [name for name in self.archive.namelist() if not name.startswith("__MACOSX")]
        else:
            found = [path.relative_to(self.place).as_posix() for path in self.place.rglob("*") if path.is_file()]
        return sorted(n for n in found if n.lower().endswith(SUFFIXES) and not PurePosixPath(n).name.startswith("."))

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            SampleError: it can't be read.
        """
        expected = "a readable MIDI file"
        try:
            if self.archive is None:
                return contained(self.place, name).read_bytes()
            if self.archive.getinfo(name).file_size > LARGEST:
                raise SampleError(name, f"has more than {LARGEST} bytes", expected)
            return self.archive.read(name)
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError) as error:
            raise SampleError(name, f"can't be read ({error})", expected) from error


def parsed_signature(text: str) -> tuple[int, int]:
    """Numerator and denominator of a time signature such as `4/4`.

    Raises:
        ConfigError: no time signature.
    """
    found = re.fullmatch(r"([1-9]\d*)/(1|2|4|8|16|32|64)", text)
    if found is None:
        raise ConfigError(f"time_signature is {text!r}; expected something like 4/4")
    return int(found[1]), int(found[2])


def _split_folders(names: Sequence[str]) -> bool:
    first = {name.split("/")[0].lower() for name in names}
    return "train" in first and first <= SPLITS.keys()


def with_voices(notes: Notes) -> Notes:
    """The label `part` for scores of several parts: 0 in the first one, 1 in all others."""
    several = (notes.track != notes.track[:1]).any()
    return replace(notes, labels={PART: (notes.track > 0).astype(np.int64) if several else notes.track * 0 - 1})


def content_hash(notes: Notes) -> str:
    """Equal for pieces with the same pitches at the same times in 1/16 of a quarter, whatever file they are in."""
    onset = np.rint(notes.start * 16 / notes.ticks_per_quarter).astype(np.int64)
    onset -= onset[:1]  # notes are in the order of their start
    return hashlib.sha256(np.stack([onset, notes.pitch], 1)[np.lexsort((notes.pitch, onset))].tobytes()).hexdigest()


def _without_repetitions(pieces: Sequence[Piece]) -> list[Piece]:
    seen: dict[str, str] = {}
    kept, repeated = [], []
    for piece in pieces:
        key = piece.name if piece.notes is None else content_hash(piece.notes)
        if seen.setdefault(key, piece.name) == piece.name:
            kept.append(piece)
        else:
            repeated.append(f"{piece.name} (as {seen[key]})")
    if repeated:
        shown = ", ".join(repeated[:5]) + (", ..." if len(repeated) > 5 else "")
        warnings.warn(f"{len(repeated)} pieces repeat another one note by note and are left out: {shown}", stacklevel=2)
    return kept


class _Collection:
    """All pieces with their splits, classes and texts."""

    def __init__(self, pieces: Sequence[Piece], splits: Sequence[Split], template: str) -> None:
        self.pieces, self.splits = pieces, splits
        self.classes = sorted({piece.style for piece in pieces if piece.style is not None})
        self.class_index: Mapping[str, int] = {name: number for number, name in enumerate(self.classes)}
        self.texts = [
            template.format(p.style) if p.style else re.sub(r"[\W_]+", " ", PurePosixPath(p.name).stem) for p in pieces
        ]
        numbers: dict[str, int] = {}
        self.groups = [numbers.setdefault(text, len(numbers)) for text in self.texts]


class Excerpts:
    """The excerpts of some pieces as samples.

    Args:
        collection: all pieces.
        chosen: numbers of the pieces.
        source: says how they are cut.
    """

    def __init__(self, collection: _Collection, chosen: Sequence[int], source: Music) -> None:
        self.collection = collection
        self.places: list[tuple[int, int, int]] = []
        for number in chosen:
            notes = collection.pieces[number].notes
            total = 1 if notes is None else len(notes)
            for first in range(0, total, source.length):
                last = min(first + source.length, total)
                if first == 0 or last - first >= source.shortest:
                    self.places.append((number, first, last))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        """The excerpt at `index`.

        Raises:
            SampleError: its piece could not be read.
        """
        number, first, last = self.places[index]
        piece = self.collection.pieces[number]
        if piece.notes is None:
            assert piece.error is not None
            raise piece.error
        labels = {"piece": number, "group": self.collection.groups[number]}
        if piece.style is not None:
            labels["class"] = self.collection.class_index[piece.style]
        excerpt = piece.notes.excerpt(first, last)
        name = f"{piece.name} [{first}:{last}]"
        return Sample({"midi": excerpt, "text": self.collection.texts[number]}, name, labels)


class JoinedExcerpts:
    """Pieces end to end, cut into sequences of equal length, as samples.

    Args:
        collection: all pieces.
        chosen: numbers of the pieces.
        source: says how long a sequence is.
    """

    def __init__(self, collection: _Collection, chosen: Sequence[int], source: Music) -> None:
        self.collection = collection
        self.unreadable = [number for number in chosen if collection.pieces[number].notes is None]
        self.sequences: list[list[tuple[int, int, int]]] = []
        room = 0
        for number in sorted(chosen, key=lambda number: hash_fraction(collection.pieces[number].name)):
            notes = collection.pieces[number].notes
            first, total = 0, 0 if notes is None else len(notes)
            while first < total:
                if not room:
                    self.sequences.append([])
                    room = source.length
                last = min(first + room, total)
                self.sequences[-1].append((number, first, last))
                room -= last - first + (last == total)
                if room < 0:  # no place for the word that ends the piece: its last note opens the next sequence
                    self.sequences[-1].pop()
                    if last - 1 > first:
                        self.sequences[-1].append((number, first, last - 1))
                    last, room = last - 1, 0
                first = last

    def __len__(self) -> int:
        return len(self.sequences) + len(self.unreadable)

    def __getitem__(self, index: int) -> Sample:
        """The sequence at `index`; behind them the pieces that could not be read.

        Raises:
            SampleError: its piece could not be read.
        """
        if index >= len(self.sequences):
            error = self.collection.pieces[self.unreadable[index - len(self.sequences)]].error
            assert error is not None
            raise error
        parts, ended, names = [], [], []
        for number, first, last in self.sequences[index]:
            piece = self.collection.pieces[number]
            assert piece.notes is not None
            parts.append(piece.notes.excerpt(first, last))
            ended.append(last == len(piece.notes))
            names.append(f"{piece.name} [{first}:{last}]")
        number = self.sequences[index][0][0]
        labels = {"piece": number, "group": self.collection.groups[number]}
        joined = JoinedNotes(tuple(parts), tuple(ended))
        return Sample({"midi": joined, "text": self.collection.texts[number]}, " + ".join(names), labels)
