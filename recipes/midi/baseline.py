"""Simple baselines: histograms of a piece, features of a note, and guesses of a field from the note before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mmpt.encoders.midi_notes import Notes
from mmpt.source import Sample

Floats = NDArray[np.float64]


def piece_features(notes: Notes) -> Floats:
    """Histograms of pitch classes, intervals of the highest notes, durations, onset gaps, chord sizes and places."""
    quarter = notes.ticks_per_quarter
    onsets, first = np.unique(notes.start, return_index=True)
    top = notes.pitch[np.append(first[1:], len(notes)) - 1]  # notes are sorted by start, then pitch
    edges = np.array([0, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1, 1.6, 2.1, 3.1, 4.1, np.inf])
    parts = [
        np.bincount(notes.pitch % 12, minlength=12),
        np.bincount(np.clip(np.diff(top), -12, 12) + 12, minlength=25),
        np.histogram((notes.end - notes.start) / quarter, edges)[0],
        np.histogram(np.diff(onsets) / quarter, edges)[0],
        np.bincount(np.clip(np.diff(np.append(first, len(notes))), 1, 8), minlength=9),
        np.bincount(np.rint(notes.start % quarter * 12 / quarter).astype(int) % 12, minlength=12),
    ]
    shares = [part / max(part.sum(), 1) for part in parts]
    return np.concatenate([*shares, [notes.pitch.mean() / 12, notes.pitch.std() / 12, len(notes) / 100]])


def note_features(notes: Notes, velocity: bool) -> Floats:
    """(n, features): pitch, place in the chord, distances in it, duration, gaps, place in beat and bar, velocity."""
    quarter = notes.ticks_per_quarter
    _, first, chord, size = np.unique(notes.start, return_index=True, return_inverse=True, return_counts=True)
    rank = np.arange(len(notes)) - first[chord]
    onset = np.unique(notes.start)
    gap = np.diff(onset, prepend=onset[0], append=onset[-1]) / quarter
    columns = [
        notes.pitch,
        rank,
        size[chord] - 1 - rank,
        size[chord],
        notes.pitch - notes.pitch[first[chord]],
        notes.pitch[(first + size - 1)[chord]] - notes.pitch,
        notes.pitch - notes.pitch.mean(),
        (notes.end - notes.start) / quarter,
        gap[chord],
        gap[chord + 1],
        notes.start % quarter / quarter,
        notes.start % (4 * quarter) / quarter,
    ]
    if velocity:
        columns.append(notes.velocity)
    return np.stack([np.asarray(column, np.float64) for column in columns], 1)


def highest_note(notes: Notes) -> NDArray[np.bool_]:
    """Whether each note is the highest of those that begin with it."""
    _, first, size = np.unique(notes.start, return_index=True, return_counts=True)
    found = np.zeros(len(notes), bool)
    found[first + size - 1] = True
    return found


def fitted_predictions(
    x: Floats, y: NDArray[np.int64], test: Floats, most: int = 100_000, seed: int = 0
) -> dict[str, NDArray[np.int64]]:
    """Predictions of a logistic regression and of gradient boosting, fitted on at most `most` rows."""
    chosen = np.random.default_rng(seed).permutation(len(x))[:most]
    models = {
        "features": make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        "boosting": HistGradientBoostingClassifier(max_iter=100, random_state=seed),
    }
    return {name: model.fit(x[chosen], y[chosen]).predict(test) for name, model in models.items()}


class FieldGuesses:
    """Guesses of a word's fields: the most frequent value, and the most frequent one after the previous note's value.

    Args:
        rows: (n, fields) words of each training excerpt.
        values: number of ordinary values of each field.
    """

    def __init__(self, rows: Sequence[NDArray[np.int64]], values: Sequence[int]) -> None:
        self.values = values
        self.counts = [np.zeros((count, count)) for count in values]
        for words in rows:
            for place, table in enumerate(self.counts):
                np.add.at(table, (words[:-1, place], words[1:, place]), 1)

    def most_frequent(self, place: int) -> int:
        """The most frequent value of a field."""
        return int(self.counts[place].sum(0).argmax())

    def after(self, place: int, previous: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most frequent value of a field behind each of these values; the most frequent one behind a new value."""
        table = self.counts[place]
        return np.where(table.sum(1) > 0, table.argmax(1), self.most_frequent(place))[previous]


def classic_features(samples: Sequence[Sample]) -> Floats:
    """`piece_features` of excerpts for a classifier."""
    return np.stack([piece_features(sample.modalities["midi"]) for sample in samples])
