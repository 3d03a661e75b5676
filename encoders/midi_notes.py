"""Notes: a piece as arrays, read from MIDI files, symusic scores or plain note arrays, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import symusic
from numpy.typing import ArrayLike, NDArray

from mmpt.errors import SampleError

Array = NDArray[np.int64]

DRUMS = 128
"""The program number that stands for a drum track; melodic programs are 0..127."""

PART = "part"
"""The name of the note label that says which of the named tracks a note comes from."""

UNLABELLED = -1
"""The value of a note label at a note that has none."""

EXPECTED = "a Standard MIDI File with ticks per quarter note and at least one note"


@dataclass(frozen=True, eq=False)
class Notes:
    """The notes of a piece in the order (start, pitch, track), whatever the order of its tracks.

    Attributes:
        start: int64 (n,), ticks.
        end: int64 (n,), ticks, after `start`.
        pitch: int64 (n,), MIDI key numbers 0..127.
        velocity: int64 (n,), 1..127.
        program: int64 (n,), 0..127, or `DRUMS`.
        track: int64 (n,), number of the track.
        ticks_per_quarter: ticks of a quarter note.
        tempos: float64 (m, 2): tick and quarter notes per minute, by tick; 120 before the first one.
        signatures: int64 (k, 3): tick, numerator and denominator, by tick; 4/4 before the first one.
        labels: name -> int64 (n,): facts about each note, `UNLABELLED` where there is none.
    """

    start: Array
    end: Array
    pitch: Array
    velocity: Array
    program: Array
    track: Array
    ticks_per_quarter: int
    tempos: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 2)))
    signatures: Array = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    labels: Mapping[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.start)

    @property
    def quarters(self) -> float:
        """Length in quarter notes, to the end of the last note."""
        return float(self.end.max(initial=0)) / self.ticks_per_quarter

    def take(self, index: NDArray[Any] | slice) -> Notes:
        """Some of the notes; tempo and metre stay."""
        names = ("start", "end", "pitch", "velocity", "program", "track")
        labels = {name: values[index] for name, values in self.labels.items()}
        return replace(self, **{name: getattr(self, name)[index] for name in names}, labels=labels)

    def with_signature(self, numerator: int, denominator: int) -> Notes:
        """The same notes in one metre throughout, for files whose own time signatures can't be trusted."""
        return replace(self, signatures=np.array([[0, numerator, denominator]], np.int64))

    def excerpt(self, first: int, last: int) -> Notes:
        """Notes `first` to `last` (exclusive); time begins with the bar of the first one."""
        part = self.take(slice(first, last))
        if not len(part):
            return part
        begin = int(part.start[0])
        place = max(int(np.searchsorted(self.signatures[:, 0], begin, side="right")) - 1, 0)
        if len(self.signatures) and self.signatures[place, 0] <= begin:
            since, numerator, denominator = self.signatures[place].tolist()
        else:
            since, numerator, denominator = 0, 4, 4
        ticks = max(self.ticks_per_quarter * 4 * numerator // max(denominator, 1), 1)
        origin = since + (begin - since) // ticks * ticks
        return replace(
            part,
            start=part.start - origin,
            end=part.end - origin,
            tempos=_from(self.tempos, origin),
            signatures=_from(self.signatures, origin),
        )

    def score(self) -> Any:
        """A symusic score with one track for each track number and program; `dump_midi` writes it to a file."""
        score: Any = symusic.Score(self.ticks_per_quarter)
        for tick, tempo in self.tempos:
            score.tempos.append(symusic.Tempo(int(tick), float(tempo)))
        for tick, numerator, denominator in self.signatures.tolist():
            score.time_signatures.append(symusic.TimeSignature(tick, numerator, denominator))
        for track, program in np.unique(np.stack([self.track, self.program], 1), axis=0).tolist():
            chosen = (self.track == track) & (self.program == program)
            drums = program == DRUMS
            part: Any = symusic.Track(f"track {track}", 0 if drums else program, drums)
            part.notes = symusic.Note.from_numpy(
                self.start[chosen].astype(np.int32),
                np.maximum(self.end - self.start, 1)[chosen].astype(np.int32),
                self.pitch[chosen].astype(np.int8),
                self.velocity[chosen].astype(np.int8),
            )
            score.tracks.append(part)
        return score

    def write(self, path: str | Path) -> None:
        """Write a MIDI file."""
        self.score().dump_midi(str(path))


@dataclass(frozen=True, eq=False)
class JoinedNotes:
    """Pieces, or parts of them, laid end to end as one sequence.

    Attributes:
        parts: in order; time begins anew in each.
        ended: whether each part reaches the end of its piece.
    """

    parts: tuple[Notes, ...]
    ended: tuple[bool, ...]


def _from(events: NDArray[Any], origin: int) -> NDArray[Any]:
    """Events (tick, ...) as they stand from `origin` on, which becomes tick 0."""
    place = max(int(np.searchsorted(events[:, 0], origin, side="right")) - 1, 0)
    kept = events[place:].copy()
    kept[:, 0] = np.maximum(kept[:, 0] - origin, 0)
    return kept


def read_notes(source: Any, parts: Sequence[str] = ()) -> Notes:
    """Notes from whatever people hold.

    Args:
        source: the path of a MIDI file, its bytes, a symusic score in ticks, `Notes`, or a plain array: rows of start
            and end in quarter notes, pitch and, if known, velocity and program.
        parts: track names; with them each note gets the label `part`, the place of its track's name in this list.
            Capitals don't matter.

    Raises:
        SampleError: nothing of the kind, a damaged file, SMPTE time, or no notes.
    """
    if isinstance(source, Notes):
        notes = source
    elif isinstance(source, symusic.core.ScoreTick):
        notes = _from_score(source, "score", parts)
    elif isinstance(source, str | Path | bytes):
        notes = _from_file(source, parts)
    else:
        notes = from_array(source)
    if not len(notes):
        raise SampleError(_name(source), "has no notes", EXPECTED)
    return notes


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else f"a {type(source).__name__}"


def _from_file(source: str | Path | bytes, parts: Sequence[str]) -> Notes:
    name = _name(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise SampleError(name, f"can't be read ({error.strerror or error})", EXPECTED) from error
    if not content.startswith(b"MThd") and b"MThd" not in content[:200]:
        raise SampleError(name, "is empty" if not content else "is not a MIDI file", EXPECTED)
    try:
        score = symusic.Score.from_midi(content)
    except Exception as error:  # the parser raises several kinds for damaged files
        raise SampleError(name, f"can't be parsed ({error})", EXPECTED) from error
    return _from_score(score, name, parts)


def _from_score(score: Any, name: str, parts: Sequence[str]) -> Notes:
    if score.tpq <= 0:
        raise SampleError(name, f"has {score.tpq} ticks per quarter note", EXPECTED)
    places = {part.lower(): place for place, part in enumerate(parts)}
    columns: dict[str, list[NDArray[Any]]] = {}
    for number, track in enumerate(score.tracks):
        arrays = track.notes.numpy()
        count = len(arrays["time"])
        facts = {
            "program": DRUMS if track.is_drum else track.program,
            "track": number,
            PART: places.get(track.name.strip().lower(), UNLABELLED),
        }
        for key, values in {**arrays, **{k: np.full(count, v) for k, v in facts.items()}}.items():
            columns.setdefault(key, []).append(values.astype(np.int64))
    joined = {key: np.concatenate(values) for key, values in columns.items()}
    empty = np.zeros(0, np.int64)
    start, pitch = joined.get("time", empty), joined.get("pitch", empty)
    label = {PART: joined.get(PART, empty)} if parts else {}
    signatures = [(s.time, s.numerator, s.denominator) for s in score.time_signatures]
    if any(numerator < 1 or denominator < 1 for _, numerator, denominator in signatures):
        raise SampleError(name, "has a time signature with 0", "a time signature such as 3/4")
    return _sorted(
        Notes(
            start,
            start + np.maximum(joined.get("duration", empty), 1),
            pitch,
            joined.get("velocity", empty),
            joined.get("program", empty),
            joined.get("track", empty),
            score.tpq,
            _by_tick(np.array([(t.time, t.qpm) for t in score.tempos], np.float64).reshape(-1, 2)),
            _by_tick(np.array(signatures, np.int64).reshape(-1, 3)),
            label,
        )
    )


def _by_tick(events: NDArray[Any]) -> NDArray[Any]:
    return events[np.argsort(events[:, 0], kind="stable")]


def _sorted(notes: Notes) -> Notes:
    return notes.take(np.lexsort((notes.track, notes.pitch, notes.start)))


ARRAY_TICKS = 480


def from_array(rows: ArrayLike) -> Notes:
    """Notes from rows of start and end (in quarter notes), pitch and, if known, velocity (64) and program (0).

    Raises:
        SampleError: another shape, or numbers that no note can have.
    """
    expected = "rows of start and end in quarter notes, pitch 0..127 and, if known, velocity 1..127 and program 0..128"
    try:
        table = np.asarray(rows, np.float64)
    except (TypeError, ValueError) as error:
        raise SampleError(f"a {type(rows).__name__}", "is neither MIDI nor an array of numbers", expected) from error
    if table.ndim != 2 or not 3 <= table.shape[1] <= 5:
        raise SampleError("note array", f"has the shape {table.shape}", f"(notes, 3 to 5): {expected}")
    defaults = np.tile([64.0, 0.0], (len(table), 1))
    table = np.concatenate([table, defaults[:, table.shape[1] - 3 :]], 1)
    sound = (table >= [0, 0, 0, 1, 0]) & (table <= [np.inf, np.inf, 127, 127, DRUMS]) & np.isfinite(table)
    wrong = ~sound.all(1) | (table[:, 1] < table[:, 0])
    if wrong.any():
        raise SampleError("note array", f"row {int(wrong.argmax())} is {table[wrong.argmax()].tolist()}", expected)
    ticks = np.rint(table[:, :2] * ARRAY_TICKS).astype(np.int64)
    pitch, velocity, program = np.rint(table[:, 2:]).astype(np.int64).T
    end = np.maximum(ticks[:, 1], ticks[:, 0] + 1)
    return _sorted(Notes(ticks[:, 0], end, pitch, velocity, program, np.zeros(len(table), np.int64), ARRAY_TICKS))
