"""Infilling: notes of a bar (or any others) are hidden and drawn, and redrawn given each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_notes import DRUMS, Array, Notes
from mmpt.encoders.midi_tokens import POSITIONS, signature_of
from mmpt.errors import ConfigError, DataError
from mmpt.model import evaluating

KNOWN = ("bar", "instrument", "time_signature", "tempo")
"""Fields that infilling takes from the hidden note."""


def bar_of(words: Array, encoder: MidiEncoder) -> Array:
    """The number of the bar of each word, from 0: (n,)."""
    if encoder.tokenizer.fields[0].values == 2:  # compound words: 0 begins a bar
        return np.cumsum(words[:, 0] == 0) - 1
    return words[:, 0] + 256 * np.concatenate([[0], np.cumsum(np.diff(words[:, 0]) < 0)])


def infill_bar(
    encoder: MidiEncoder, notes: Notes, bar: int, temperature: float = 0.7, seed: int = 0
) -> tuple[Notes, Notes, Notes]:
    """Write the notes of one bar anew.

    Args:
        encoder: pretrained with a masked head.
        notes: a piece; an excerpt around the bar is read, as long as the encoder takes.
        bar: number of the bar, from 0.
        temperature: see `infill`.
        seed: see `infill`.

    Returns:
        The excerpt as the encoding has it, the same without the bar's notes, and with the new ones.

    Raises:
        DataError: no note begins in that bar.
    """
    encoded = encoder.tokenizer.encode(notes).words
    bars = bar_of(encoded, encoder)
    inside = np.flatnonzero(bars == bar)
    if not len(inside):
        raise DataError(f"no note begins in bar {bar}; the piece has notes in the bars {bars.min()} to {bars.max()}")
    room = encoder.max_length - encoder.tokenizer.ends
    first = max(0, min(int(inside.mean()) - room // 2, len(encoded) - room))
    words = encoded[first : first + room].copy()
    if encoder.tokenizer.fields[0].values > 2:
        words[:, 0] = np.minimum(bars[first : first + room] - bars[first], encoder.values[0] - 1)
    hidden = bars[first : first + room] == bar
    written = infill(encoder, words, hidden, temperature, seed)
    decode = encoder.tokenizer.decode
    return decode(words), decode(words[~hidden]), decode(written)


def infill(
    encoder: MidiEncoder,
    words: Array,
    hidden: NDArray[np.bool_],
    temperature: float = 0.7,
    seed: int = 0,
    passes: int = 8,
    keep: Sequence[str] = KNOWN,
) -> Array:
    """Draw hidden words, then redraw a third of them at a time given all others (Gibbs sampling), several times over.

    Redrawn notes stay between their neighbours in the order of a bar (position, pitch). Writing the surest words first,
    as mask-predict does with text, puts all notes of a bar on its most frequent place.

    Args:
        encoder: pretrained with a masked head.
        words: (n, fields), as the encoder's tokenizer gives them.
        hidden: bool (n,): words to be written anew. Their number stays.
        temperature: logits are divided by it; below 1 the likely values become likelier.
        seed: of the draws.
        passes: how often each word is redrawn.
        keep: fields that stay as they are.

    Returns:
        (n, fields), with ordinary values only.

    Raises:
        ConfigError: a temperature of 0 or less.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")
    generator = torch.Generator().manual_seed(seed)
    draft = _Draft(encoder, words, hidden, keep, generator)
    rows = torch.from_numpy(np.flatnonzero(hidden))
    device = next(encoder.parameters()).device
    rounds = [rows] if len(rows) else []
    for _ in range(passes if len(rows) else 0):
        rounds += [part for part in rows[torch.randperm(len(rows), generator=generator)].chunk(3) if len(part)]
    with evaluating(encoder), torch.no_grad():
        for turn, asked in enumerate(rounds):
            inputs = {
                "words": draft.question(asked).unsqueeze(0).to(device),
                "mask": torch.ones(1, len(words), dtype=torch.bool, device=device),
            }
            logits = encoder.field_logits(encoder(inputs).values[0, asked.to(device)]).float().cpu() / temperature
            chosen = set(asked.tolist())
            for row, scores in sorted(zip(asked.tolist(), logits, strict=True), key=lambda pair: pair[0]):
                draft.write(row, scores.split(encoder.sizes), chosen, first=turn == 0)
            if turn == 0:
                draft.sort_runs()
    return draft.words.numpy()


class _Draft:
    """Words as they stand so far."""

    def __init__(
        self,
        encoder: MidiEncoder,
        words: Array,
        hidden: NDArray[np.bool_],
        keep: Sequence[str],
        generator: torch.Generator,
    ) -> None:
        places = {name: place for place, name in enumerate(field.name for field in encoder.tokenizer.fields)}
        self.position, self.pitch = places["position"], places["pitch"]
        self.instrument, self.signature = places.get("instrument"), places.get("time_signature")
        self.values = encoder.values
        self.open = [place for name, place in places.items() if name not in keep]
        self.words = torch.from_numpy(words.copy())
        self.bars, self.hidden, self.generator = bar_of(words, encoder), hidden, generator

    def question(self, asked: Tensor) -> Tensor:
        """The words with MASK in place of those that are asked for.

        Fields that are kept are hidden too: words with MASK in some fields only never came up in pretraining.
        """
        words = self.words.clone()
        words[asked] = torch.tensor(self.values) + 1
        return words

    def write(self, row: int, logits: Sequence[Tensor], asked: set[int], first: bool) -> None:
        """Draw one word from the logits of its fields.

        Position and pitch are drawn together, between the neighbours. Those are the words before and behind that are
        not asked for and, but for the first time, those before that were written just now.
        """
        bar = np.flatnonzero(self.bars == self.bars[row]).tolist()
        before = [other for other in bar if other < row and not (first and other in asked)]
        behind = [other for other in bar if other > row and other not in asked]
        pitches = self.values[self.pitch]
        position, pitch = torch.arange(self.values[self.position]).unsqueeze(1), torch.arange(pitches)
        place = position * pitches + pitch
        allowed = (position < self._steps(row)) & self._playable(row, pitch)
        low = self._place(before[-1]) if before else -1
        high = self._place(behind[0]) if behind else self.values[self.position] * pitches
        between = allowed & (place > low) & (place < high)
        if not between.any():  # no room: on a place that is taken
            between = allowed & (position == self.words[(before or behind)[-1 if before else 0], self.position])
        scores = logits[self.position][: len(position)].unsqueeze(1) + logits[self.pitch][:pitches]
        drawn = self._draw(scores.masked_fill(~between, float("-inf")).flatten())
        for field in self.open:
            if field == self.position:
                self.words[row, field] = drawn // pitches
            elif field == self.pitch:
                self.words[row, field] = drawn % pitches
            else:
                self.words[row, field] = self._draw(logits[field][: self.values[field]])

    def sort_runs(self) -> None:
        """Put the positions of neighbouring hidden words of a bar in order."""
        begins = np.flatnonzero(self.hidden & ~np.append(False, self.hidden[:-1] & (self.bars[1:] == self.bars[:-1])))
        for begin in begins.tolist():
            end = begin + 1
            while end < len(self.hidden) and self.hidden[end] and self.bars[end] == self.bars[begin]:
                end += 1
            self.words[begin:end, self.position] = self.words[begin:end, self.position].sort().values

    def _draw(self, logits: Tensor) -> int:
        return int(torch.multinomial(logits.softmax(0), 1, generator=self.generator))

    def _place(self, row: int) -> int:
        return int(self.words[row, self.position]) * self.values[self.pitch] + int(self.words[row, self.pitch])

    def _playable(self, row: int, pitch: Tensor) -> Tensor:
        """Pitches of drums for drums, the others for other instruments."""
        if self.instrument is None:
            return torch.ones_like(pitch, dtype=torch.bool)
        return (pitch >= DRUMS) == (int(self.words[row, self.instrument]) == DRUMS)

    def _steps(self, row: int) -> int:
        """Positions of the bar."""
        if self.signature is None:
            return self.values[self.position]
        numerator, denominator = signature_of(int(self.words[row, self.signature]))
        return min(self.values[self.position], numerator * 4 * POSITIONS // denominator)
