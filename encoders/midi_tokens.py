"""Compound words: each note is one position of several fields. Both published encodings, with their inverses."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmpt.config import Configurable
from mmpt.encoders.midi_notes import DRUMS, Array, Notes
from mmpt.errors import SampleError


class Field(NamedTuple):
    """One field of a word.

    Attributes:
        name: lower case.
        values: number of ordinary values, 0..values - 1. PAD is `values`, MASK is `values + 1`.
        size: with the special values.
    """

    name: str
    values: int
    size: int


class Words(NamedTuple):
    """An encoded piece.

    Attributes:
        words: int64 (n, fields).
        notes: int64 (n,): place of each word's note in the notes that were encoded.
        folded: how many notes were moved by octaves into the range of pitches.
        dropped: how many were left out.
    """

    words: Array
    notes: Array
    folded: int = 0
    dropped: int = 0


class MidiTokenizer(Configurable, ABC):
    """Notes to compound words and back.

    Attributes:
        fields: of a word, in order.
        ends: whether a word marks the end of a piece.
    """

    fields: tuple[Field, ...]
    ends: bool

    @property
    def pad(self) -> Array:
        """(fields,) the word of padding."""
        return np.array([field.values for field in self.fields])

    @property
    def mask(self) -> Array:
        """(fields,) the word that hides a note."""
        return self.pad + 1

    @property
    def end(self) -> Array:
        """(fields,) the word after the last note, where there is one."""
        return self.pad + 3

    def field(self, name: str) -> int | None:
        """The place of a field in a word; None where words have no such field."""
        return next((place for place, field in enumerate(self.fields) if field.name == name), None)

    @abstractmethod
    def encode(self, notes: Notes) -> Words:
        """The words of a piece, without the one that ends it."""

    @abstractmethod
    def decode(self, words: ArrayLike) -> Notes:
        """The notes of (n, fields) words on the encoding's grid; words with a special value are left out."""

    def _ordinary(self, words: ArrayLike) -> Array:
        table = np.asarray(words, np.int64).reshape(-1, len(self.fields))
        return table[(table < self.pad).all(1) & (table >= 0).all(1)]


STEP, BAR, SHORTEST = 120, 1920, 60
"""Ticks of a grid step, of a 4/4 bar and of the shortest duration, at 480 ticks per quarter."""
CP_TICKS, CP_LOWEST, CP_PITCHES = 480, 22, 86


class CompoundWords(MidiTokenizer):
    """The simplified Compound Word encoding of MidiBERT-Piano (arXiv 2107.05223): bar, position, pitch, duration.

    Sixteenth notes of 4/4 bars. Velocity, instrument, tempo and metre are not part of it, and all tracks are merged.
    Drums are left out, as their keys are no pitches. Bars without notes leave no trace, so decoding closes such gaps.
    Times are rescaled to 480 ticks per quarter first; the released code assumes that the file has them.

    Args:
        out_of_range: notes outside the keys 22..107, which the released code stops at, are moved by octaves ("fold") or
            left out ("drop").
        released_grid: end the grid of onsets before the last onset like the released code, which moves the last notes
            by a step, for its checkpoints.
    """

    fields = (Field("bar", 2, 4), Field("position", 16, 18), Field("pitch", 86, 88), Field("duration", 64, 66))
    ends = False

    def __init__(self, out_of_range: Literal["fold", "drop"] = "fold", released_grid: bool = False) -> None:
        self.out_of_range = out_of_range
        self.released_grid = released_grid

    def encode(self, notes: Notes) -> Words:
        """See `MidiTokenizer`. Rows are [bar, position, pitch, duration]; bar 0 begins a new bar, 1 continues it."""
        outside = (notes.pitch < CP_LOWEST) | (notes.pitch >= CP_LOWEST + CP_PITCHES)
        drums = notes.program == DRUMS
        kept = np.flatnonzero(~drums & ~outside if self.out_of_range == "drop" else ~drums)
        chosen = notes.take(kept)
        scale = CP_TICKS / notes.ticks_per_quarter
        step = np.ceil(chosen.start * scale / STEP - 0.5).astype(np.int64)  # the nearest, ties to the earlier one
        if self.released_grid and len(step):
            step = np.minimum(step, max(int(np.ceil(chosen.start.max() * scale / STEP)) - 1, 0))
        pitch = chosen.pitch - CP_LOWEST
        pitch = np.where(pitch < 0, pitch % 12, pitch)
        high = pitch >= CP_PITCHES
        pitch = np.where(high, CP_PITCHES - 12 + (pitch - CP_PITCHES) % 12, pitch)
        duration = np.ceil((chosen.end - chosen.start) * scale / SHORTEST - 0.5).astype(np.int64) - 1
        order = np.lexsort((chosen.track, chosen.pitch, step))
        step = step[order]
        bar = step // (BAR // STEP)
        new = np.ones(len(bar), bool)
        new[1:] = bar[1:] != bar[:-1]
        words = np.stack(
            [1 - new.astype(np.int64), step % (BAR // STEP), pitch[order], np.clip(duration, 0, 63)[order]], 1
        )
        return Words(words, kept[order], int(outside[kept].sum()), len(notes) - len(kept))

    def decode(self, words: ArrayLike) -> Notes:
        """See `MidiTokenizer`: piano at velocity 64, 120 quarter notes a minute."""
        table = self._ordinary(words)
        bar = np.maximum(np.cumsum(table[:, 0] == 0) - 1, 0)
        start = bar * BAR + table[:, 1] * STEP
        zeros = np.zeros_like(start)
        return Notes(
            start, start + (table[:, 3] + 1) * SHORTEST, table[:, 2] + CP_LOWEST, zeros + 64, zeros, zeros, CP_TICKS,
            np.array([[0.0, 120.0]]), np.array([[0, 4, 4]]),
        )  # fmt: skip


POSITIONS, BARS, HALVINGS = 16, 256, 7
"""Grid steps of a quarter note, bars before their numbers start again, and denominators 1, 2, ..., 64."""


class Octuple(MidiTokenizer):
    """The Octuple encoding of MusicBERT (arXiv 2106.05630) as Adversarial-MidiBERT (arXiv 2407.08306) uses it.

    Bar, position, instrument, pitch, duration, velocity, time signature, tempo: 16 positions for each quarter note and
    a new bar at each change of the time signature. Differs from the released code in that drums are instrument 128 with
    pitches from 128, not ids beyond the vocabulary. Pieces of more than 256 bars begin again at bar 0.
    """

    fields = (
        Field("bar", BARS, 262), Field("position", 128, 134), Field("instrument", 129, 135), Field("pitch", 256, 262),
        Field("duration", 128, 134), Field("velocity", 32, 38), Field("time_signature", 254, 260),
        Field("tempo", 49, 55),
    )  # fmt: skip
    ends = True

    def encode(self, notes: Notes) -> Words:
        """See `MidiTokenizer`. Words are sorted.

        Raises:
            SampleError: a time signature whose denominator is not 1, 2, 4, ..., 64.
        """
        scale = POSITIONS / notes.ticks_per_quarter
        start = np.rint(notes.start * scale).astype(np.int64)  # halves to even
        length = np.rint(notes.end * scale).astype(np.int64) - start
        signatures = _signatures(notes)
        since = np.rint(signatures[:, 0] * scale).astype(np.int64)
        steps = signatures[:, 1] * 4 * POSITIONS // signatures[:, 2]  # of one bar
        spans = np.diff(since, append=since[-1])
        first_bar = np.concatenate([[0], np.cumsum(-(-spans // steps))[:-1]])
        place = np.searchsorted(since, start, side="right") - 1
        bar, position = np.divmod(start - since[place], steps[place])
        bar += first_bar[place]
        codes = np.array([signature_code(n, d) for _, n, d in signatures.tolist()])
        tempos = tempo_code(np.concatenate([[120.0], notes.tempos[:, 1]]))
        tempo_place = np.searchsorted(np.rint(notes.tempos[:, 0] * scale), start, side="right")
        drums = notes.program == DRUMS
        table = np.stack(
            [
                bar,
                position,
                notes.program,
                notes.pitch + 128 * drums,
                duration_code(length),
                np.clip(notes.velocity, 0, 127) // 4,
                codes[place],
                tempos[tempo_place],
            ],
            1,
        )
        order = np.lexsort((notes.track, *table.T[::-1]))
        table = table[order]
        table[:, 0] %= BARS
        return Words(table, order)

    def decode(self, words: ArrayLike) -> Notes:
        """See `MidiTokenizer`. 16 ticks per quarter; a bar has the time signature of its first word."""
        table = self._ordinary(words)
        if not len(table):
            empty = np.zeros(0, np.int64)
            return Notes(empty, empty, empty, empty, empty, empty, POSITIONS)
        restarts = np.concatenate([[0], np.cumsum(np.diff(table[:, 0]) < -BARS // 2)])
        table = table[np.lexsort((table[:, 1], table[:, 0], restarts))]
        bar = table[:, 0] + np.sort(restarts) * BARS
        bars, first = np.unique(bar, return_index=True)
        own = np.array([signature_of(code) for code in table[first, 6].tolist()])
        filled = own[np.maximum(np.searchsorted(bars, np.arange(bars[-1] + 1), side="right") - 1, 0)]
        ends = np.cumsum(filled[:, 0] * 4 * POSITIONS // filled[:, 1])
        begins = np.concatenate([[0], ends[:-1]])
        start = begins[bar] + table[:, 1]
        drums = table[:, 2] == DRUMS
        changed = np.ones(len(filled), bool)
        changed[1:] = (filled[1:] != filled[:-1]).any(1)
        tempo_changes = np.concatenate([[True], table[1:, 7] != table[:-1, 7]])
        return Notes(
            start,
            start + np.maximum(duration_steps(table[:, 4]), 1),
            np.where(table[:, 3] >= 128, table[:, 3] - 128, table[:, 3]),
            np.clip(table[:, 5] * 4 + 2, 1, 127),
            np.where(drums | (table[:, 3] >= 128), DRUMS, table[:, 2]),
            table[:, 2].copy(),
            POSITIONS,
            np.stack([start[tempo_changes], tempo_of(table[tempo_changes, 7])], 1).astype(np.float64),
            np.concatenate([begins[changed][:, None], filled[changed]], 1),
        )


def duration_code(steps: NDArray[np.int64]) -> Array:
    """Steps of 1/16 quarter to codes 0..127: 16 codes in each of 8 blocks, each block twice as coarse."""
    bounded = np.clip(steps, 0, POSITIONS * (2**8 - 1) - 1)
    block = np.log2(bounded // POSITIONS + 1).astype(np.int64)
    code = POSITIONS * block + (bounded - POSITIONS * (2**block - 1)) // 2**block
    return np.where(steps > bounded, 127, code)


def duration_steps(code: NDArray[np.int64]) -> Array:
    """The shortest duration with this code."""
    block, inside = np.divmod(code, POSITIONS)
    return POSITIONS * (2**block - 1) + inside * 2**block


def tempo_code(per_minute: ArrayLike) -> Array:
    """Quarter notes per minute to codes 0..48: twelve for each doubling from 16."""
    return np.rint(12 * np.log2(np.clip(per_minute, 16, 256) / 16)).astype(np.int64)


def tempo_of(code: ArrayLike) -> NDArray[np.float64]:
    """Quarter notes per minute of a code."""
    return 16 * 2 ** (np.asarray(code, np.float64) / 12)


def signature_code(numerator: int, denominator: int) -> int:
    """The code of a time signature: 2 * 2^i - 2 + numerator - 1 for the denominator 2^i."""
    return 2 * denominator - 2 + numerator - 1


def signature_of(code: int) -> tuple[int, int]:
    """Numerator and denominator of a code."""
    halvings = (code + 2).bit_length() - 2
    return code + 3 - 2 ** (halvings + 1), 2**halvings


def _signatures(notes: Notes) -> Array:
    """(tick, numerator, denominator) from tick 0 on, within the vocabulary, one for each grid step."""
    rows = notes.signatures.tolist()
    if not rows or rows[0][0] > 0:
        rows = [[0, 4, 4], *rows]
    last_of_step = {round(tick * POSITIONS / notes.ticks_per_quarter): (tick, n, d) for tick, n, d in rows}
    return np.array([(tick, *reduced_signature(n, d)) for tick, n, d in last_of_step.values()], np.int64)


def reduced_signature(numerator: int, denominator: int) -> tuple[int, int]:
    """A time signature within the vocabulary: bars of at most two whole notes.

    Longer bars are divided by the smallest factor of their numerator until they fit: 12/4 becomes 6/4. For primes that
    is a poor rule (5/2 becomes 1/2), so each kind of change gives a warning.

    Raises:
        SampleError: a denominator other than 1, 2, 4, ..., 64.
    """
    if denominator not in (2**power for power in range(HALVINGS)) or numerator < 1:
        raise SampleError(
            "score", f"time signature {numerator}/{denominator}", "a denominator of 1, 2, 4, 8, 16, 32 or 64"
        )
    reduced = numerator
    while reduced > 2 * denominator:
        reduced //= next(factor for factor in range(2, reduced + 1) if reduced % factor == 0)
    if reduced != numerator:
        warnings.warn(
            f"time signature {numerator}/{denominator} is read as {reduced}/{denominator}: the Octuple vocabulary has "
            "bars of at most two whole notes",
            stacklevel=2,
        )
    return reduced, denominator


VELOCITY_EDGES = (32, 48, 64, 80, 96)
"""Lower ends of MidiBERT's velocity classes 1..5; class 0 is below the first."""

VELOCITY_CLASSES = ("below 32", "32-47", "48-63", "64-79", "80-95", "96 and more")


def velocity_class(velocity: ArrayLike) -> Array:
    """MidiBERT's six velocity classes, counted from 0 (1 to 6 in the released code)."""
    return np.searchsorted(VELOCITY_EDGES, np.asarray(velocity), side="right").astype(np.int64)


def transposition_range(pitch: ArrayLike) -> tuple[int, int]:
    """The lowest and highest shift in semitones that keeps all pitches within 0..127 and below an octave."""
    keys = np.asarray(pitch)
    low, high = int(keys.min(initial=127)), int(keys.max(initial=0))
    return max(-low, -11), min(127 - high, 11)
