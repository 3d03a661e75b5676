"""Pieces per second to compound words, mmpt beside miditok's Octuple and CPWord, from parsed scores.

    python benchmarks/midi_tokenizer.py [FOLDER_OR_ZIP] [--pieces 60] [--rounds 5]

Without data, random pieces of 1,000 notes. All four see the same scores in turn; printed are medians over the rounds,
and the medians of the ratios within a round. The encodings differ: miditok's Octuple has no time signature here and
reads 60 bars by default, which is raised to 256; its CPWord has velocities, and words of its own for bars.
"""

from __future__ import annotations

import argparse
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import symusic
from miditok import CPWord, Octuple, TokenizerConfig

from mmpt.encoders import midi_tokens
from mmpt.encoders.midi_notes import from_array, read_notes


def scores(path: Path | None, count: int) -> list[symusic.Score]:
    if path is None:
        generator = np.random.default_rng(0)
        rows = [np.sort(generator.integers(0, 1600, 1000))[:, None] / 4 + [[0, 0.5]] for _ in range(count)]
        return [
            from_array(
                np.column_stack([r + np.array([0, 0.5]), generator.integers(40, 90, 1000), np.full(1000, 64)])
            ).score()
            for r in rows
        ]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            names = [name for name in sorted(archive.namelist()) if name.endswith(".mid")]
            return [symusic.Score.from_midi(archive.read(name)) for name in names[:count]]
    return [symusic.Score(str(file)) for file in sorted(path.rglob("*.mid"))[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--pieces", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    pieces = scores(options.path, options.pieces)
    notes = sum(len(track.notes) for piece in pieces for track in piece.tracks)
    ours_octuple, ours_cp = midi_tokens.Octuple(), midi_tokens.CompoundWords()
    shared = {"use_tempos": True, "use_programs": True, "use_time_signatures": False}
    octuple = Octuple(TokenizerConfig(**shared, one_token_stream_for_programs=True, max_bar_embedding=256))
    cp = CPWord(TokenizerConfig(use_programs=False))
    ways: dict[str, Callable[[Any], Any]] = {
        "mmpt Octuple": lambda score: ours_octuple.encode(read_notes(score)),
        "miditok Octuple": octuple.encode,
        "mmpt CompoundWords": lambda score: ours_cp.encode(read_notes(score)),
        "miditok CPWord": cp.encode,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, encode in ways.items():
            copies = [piece.copy() for piece in pieces]
            began = time.perf_counter()
            for copy in copies:
                encode(copy)
            seconds[name].append(time.perf_counter() - began)
    print(f"{len(pieces)} pieces, {notes} notes, {options.rounds} rounds")
    for name, times in seconds.items():
        print(f"{name:20} {notes / median(times[1:]) / 1000:10.0f} thousand notes a second")
    for ours, other in (("mmpt Octuple", "miditok Octuple"), ("mmpt CompoundWords", "miditok CPWord")):
        ratios = [b / a for a, b in zip(seconds[ours][1:], seconds[other][1:], strict=True)]
        print(f"{ours} is {median(ratios):.1f} times as fast as {other}")


if __name__ == "__main__":
    main()
