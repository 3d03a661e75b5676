"""The default pieces: part of the corpus that comes with music21, converted once and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from mmpt.config import Configurable
from mmpt.encoders.midi_notes import Notes
from mmpt.errors import ConfigError, DataError
from mmpt.files import cache_folder, hash_fraction, write_cache

STYLES: dict[str, tuple[str, ...]] = {
    "Bach chorale": ("bach/*.mxl",),
    "Palestrina mass": ("palestrina/*.krn",),
    "Trecento": ("trecento/*.xml",),
    "Monteverdi madrigal": ("monteverdi/*.mxl",),
    "German folk song": ("essenFolksong/erk10.abc", "essenFolksong/boehme10.abc", "essenFolksong/altdeu10.abc"),
    "Chinese folk song": ("essenFolksong/han1.abc", "essenFolksong/han2.abc"),
}
"""Style -> files of the corpus. Files of tunes (.abc) hold many pieces each.

Irish tunes (O'Neill, Ryan, Aird) are left out: many are in the Nottingham collection too, which people test on.
"""

TICKS = 480
FORMAT = 3


class CorpusPiece(NamedTuple):
    """A piece of the corpus.

    Attributes:
        name: file, and number within a file of tunes.
        style: a key of `STYLES`.
        work: pieces of one work are never divided between splits; the movements of a mass are one work.
        notes: all at velocity 64 and program 0, which the corpus does not know.
    """

    name: str
    style: str
    work: str
    notes: Notes


class Corpus(Configurable):
    """Pieces of several styles.

    Args:
        pieces_per_style: the most pieces of a style; which ones is decided by a hash of their names.
        styles: which; None is all of `STYLES`.

    Raises:
        ConfigError: an unknown style, or no pieces.
    """

    def __init__(self, pieces_per_style: int = 60, styles: Sequence[str] | None = None) -> None:
        unknown = set(styles or ()) - set(STYLES)
        if unknown or pieces_per_style < 1:
            raise ConfigError(
                f"pieces_per_style={pieces_per_style}, unknown styles {sorted(unknown)}; expected at least 1 and "
                f"some of {', '.join(STYLES)}"
            )
        self.pieces_per_style = pieces_per_style
        self.styles = list(STYLES if styles is None else styles)

    def pieces(self) -> tuple[list[CorpusPiece], list[dict[str, str]]]:
        """The pieces, from the cache or converted now (one or two minutes), and what could not be converted.

        Raises:
            DataError: music21 is not installed, or the cache can't be written.
        """
        try:
            release = version("music21")
        except PackageNotFoundError as error:
            raise DataError(
                "the default pieces come with music21, which is not installed. Either (1) pip install 'mmpt[midi]', or "
                "(2) give a folder of MIDI files with --data.path"
            ) from error
        asked = json.dumps([FORMAT, release, self.pieces_per_style, [(style, STYLES[style]) for style in self.styles]])
        kept = cache_folder() / "midi" / f"music21-{hashlib.sha256(asked.encode()).hexdigest()[:24]}.npz"
        if kept.is_file():
            try:
                return load_pieces(kept)
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                kept.unlink()  # damaged: make it again
        pieces, skipped = self._convert()
        write_cache(kept, lambda file: save_pieces(file, pieces, skipped))
        return pieces, skipped

    def _convert(self) -> tuple[list[CorpusPiece], list[dict[str, str]]]:
        import music21

        root = Path(music21.corpus.__file__).parent
        chosen = [
            (style, name)
            for style in self.styles
            for name in sorted(_names(root, STYLES[style]), key=hash_fraction)[: self.pieces_per_style]
        ]
        pieces: list[CorpusPiece] = []
        skipped: list[dict[str, str]] = []
        for style, name in track(chosen, description="reading music21's corpus (once)"):
            file, _, number = name.partition("#")
            try:
                tune: dict[str, Any] = {"number": int(number)} if number else {}
                stream = music21.converter.parse(str(root / file), forceSource=True, **tune)
                notes = from_music21(stream)
            except Exception as error:  # music21 raises nearly anything for a damaged piece
                problem = f"music21 can't read it ({type(error).__name__}: {error})"
                skipped.append({"sample": name, "problem": problem[:300], "expected": "a score"})
                continue
            if len(notes):
                pieces.append(CorpusPiece(name, style, _work(name), notes))
        return pieces, skipped


def _names(root: Path, patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            name = path.relative_to(root).as_posix()
            if path.suffix == ".abc":
                content = path.read_text(encoding="utf-8", errors="replace")
                yield from (f"{name}#{number}" for number in re.findall(r"^X:\s*(\d+)", content, re.MULTILINE))
            else:
                yield name


def _work(name: str) -> str:
    """`palestrina/Kyrie_12.krn`, `palestrina/Agnus_II_12.krn` and `palestrina/Credo_12_i.krn` belong to mass 12."""
    mass = re.fullmatch(r"palestrina/\D*?_?0*(\d+)(?:_?[a-zA-Z]+)*\.krn", name)
    if mass:
        return f"palestrina/{mass[1]}"
    return "palestrina/unnumbered" if name.startswith("palestrina/") else name


def from_music21(stream: Any) -> Notes:
    """The notes of a music21 stream: ties joined, grace notes left out, one track for each part."""
    parts = list(getattr(stream, "parts", [])) or [stream]
    rows: list[tuple[float, float, int, int]] = []
    for number, part in enumerate(parts):
        for element in part.stripTies().flatten().notes:
            if element.quarterLength > 0:
                begin, end = float(element.offset), float(element.offset + element.quarterLength)
                rows += [(begin, end, int(pitch.midi), number) for pitch in getattr(element, "pitches", ())]
    signatures = {
        float(s.offset): (s.numerator, s.denominator)
        for s in parts[0].flatten().getElementsByClass("TimeSignature")
        if s.numerator and s.denominator
    }
    table = np.array(rows, np.float64).reshape(-1, 4)
    ticks = np.rint(table[:, :2] * TICKS).astype(np.int64)
    pitch, number = table[:, 2:].astype(np.int64).T
    order = np.lexsort((number, pitch, ticks[:, 0]))
    zeros = np.zeros(len(table), np.int64)
    return Notes(
        ticks[:, 0], np.maximum(ticks[:, 1], ticks[:, 0] + 1), pitch, zeros + 64, zeros, number, TICKS,
        signatures=np.array([(round(at * TICKS), *s) for at, s in sorted(signatures.items())], np.int64).reshape(-1, 3),
    ).take(order)  # fmt: skip


def save_pieces(file: Any, pieces: Sequence[CorpusPiece], skipped: Sequence[Mapping[str, str]]) -> None:
    """Write pieces as plain arrays, one behind the other."""
    notes = [np.stack([p.notes.start, p.notes.end, p.notes.pitch, p.notes.track], 1) for p in pieces]
    facts = {"pieces": [(p.name, p.style, p.work) for p in pieces], "skipped": list(skipped)}
    np.savez_compressed(
        file,
        notes=np.concatenate(notes) if notes else np.zeros((0, 4), np.int64),
        signatures=np.concatenate([p.notes.signatures for p in pieces]) if notes else np.zeros((0, 3), np.int64),
        counts=np.array([(len(p.notes), len(p.notes.signatures)) for p in pieces]).reshape(-1, 2),
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
    )


def load_pieces(path: Path) -> tuple[list[CorpusPiece], list[dict[str, str]]]:
    """What `save_pieces` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        notes, signatures, counts = arrays["notes"], arrays["signatures"], arrays["counts"]
        facts = json.loads(arrays["facts"].tobytes())
    ends = counts.cumsum(0)
    pieces = []
    for (name, style, work), (count, metres), (end, metre_end) in zip(facts["pieces"], counts, ends, strict=True):
        start, stop, pitch, track_number = notes[end - count : end].T
        zeros = np.zeros(count, np.int64)
        own = Notes(
            start, stop, pitch, zeros + 64, zeros, track_number, TICKS,
            signatures=signatures[metre_end - metres : metre_end],
        )  # fmt: skip
        pieces.append(CorpusPiece(name, style, work, own))
    return pieces, facts["skipped"]
