"""Small pieces for the tests of symbolic music."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmpt.encoders.midi_notes import Notes, from_array

WORKED = [(0, 1, 60, 64), (1, 1.5, 64, 80), (4, 8, 67, 100)]
"""Start, end (quarter notes), pitch, velocity: three notes whose words are known by hand."""


def piece(count: int = 40, seed: int = 0, low: int = 50, high: int = 80) -> Notes:
    """Random notes on the grid of sixteenths, distinct in (start, pitch)."""
    generator = np.random.default_rng(seed)
    cells = generator.choice(count * 2 * (high - low), count, replace=False)
    start, pitch = cells // (high - low) / 4, low + cells % (high - low)
    length = generator.integers(1, 9, count) / 4
    velocity = generator.integers(8, 120, count)
    return from_array(np.stack([start, start + length, pitch, velocity], 1))


def write_piece(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A piece as a MIDI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    piece(count, seed).write(path)
    return path


def header(division: int = 480, tracks: int = 1, kind: int = 1) -> bytes:
    """The header chunk of a MIDI file."""
    return b"MThd\x00\x00\x00\x06" + b"".join(number.to_bytes(2, "big") for number in (kind, tracks, division))


def track(events: bytes) -> bytes:
    """A track chunk that ends properly."""
    body = events + b"\x00\xff\x2f\x00"
    return b"MTrk" + len(body).to_bytes(4, "big") + body
