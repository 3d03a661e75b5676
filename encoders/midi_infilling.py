"""Infilling: notes of a bar (or any others) are hidden and written anew, the surest ones first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_notes import Array, Notes
from mmpt.errors import DataError
from mmpt.model import evaluating

KNOWN = ("bar", "instrument", "time_signature", "tempo")
"""Fields that infilling takes from the hidden note."""


def bar_of(words: Array, encoder: MidiEncoder) -> Array:
    """The number of the bar of each word, from 0: (n,)."""
    if encoder.tokenizer.fields[0].values == 2:  # compound words: 0 begins a bar
        return np.cumsum(words[:, 0] == 0) - 1
    return words[:, 0] + 256 * np.concatenate([[0], np.cumsum(np.diff(words[:, 0]) < 0)])


def infill_bar(encoder: MidiEncoder, notes: Notes, bar: int, rounds: int = 8) -> tuple[Notes, Notes, Notes]:
    """Write the notes of one bar anew.

    Args:
        encoder: pretrained with a masked head.
        notes: a piece; an excerpt around the bar is read, as long as the encoder takes.
        bar: number of the bar, from 0.
        rounds: see `infill`.

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
    written = infill(encoder, words, hidden, rounds)
    decode = encoder.tokenizer.decode
    return decode(words), decode(words[~hidden]), decode(written)


def infill(
    encoder: MidiEncoder, words: Array, hidden: NDArray[np.bool_], rounds: int = 8, keep: Sequence[str] = KNOWN
) -> Array:
    """Predict hidden words in several rounds (mask-predict, arXiv 1904.09324): each keeps the surest ones.

    Args:
        encoder: pretrained with a masked head.
        words: (n, fields), as the encoder's tokenizer gives them.
        hidden: bool (n,): words to be written anew. Their number stays.
        rounds: how often the encoder is asked; the share of the words that are fixed grows evenly.
        keep: fields that stay as they are.

    Returns:
        (n, fields), with ordinary values only.
    """
    current = torch.from_numpy(words.copy()).unsqueeze(0)
    open_rows = torch.from_numpy(hidden.copy())
    total = int(open_rows.sum())
    kept = [encoder.tokenizer.field(name) for name in keep]
    places = [place for place in range(len(encoder.values)) if place not in kept]
    masks = torch.tensor(encoder.values) + 1
    device = next(encoder.parameters()).device
    with evaluating(encoder), torch.no_grad():
        for turn in range(1, rounds + 1):
            if not open_rows.any():
                break
            question = current.clone()
            for place in places:
                question[0, open_rows, place] = masks[place]
            inputs = {
                "words": question.to(device),
                "mask": torch.ones_like(question[..., 0], dtype=torch.bool).to(device),
            }
            logits = encoder.field_logits(encoder(inputs).values[0]).float().cpu()
            sure = torch.zeros(len(words))
            for place, scores in enumerate(logits.split(encoder.sizes, 1)):
                if place in places:
                    best = scores[:, : encoder.values[place]].log_softmax(1).max(1)
                    sure += best.values
                    current[0, open_rows, place] = best.indices[open_rows]
            fixed = -(-total * turn // rounds) - (total - int(open_rows.sum()))
            order = sure.masked_fill(~open_rows, float("-inf")).argsort(descending=True)
            open_rows[order[:fixed]] = False
    return current[0].numpy()
