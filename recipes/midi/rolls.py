"""Piano rolls."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle
from PIL import Image

from mmpt.encoders.midi_notes import Notes

CONTEXT, MARKED = "#6b7a8f", "#d1495b"


def new_notes(written: Notes, context: Notes) -> Notes:
    """The notes of `written` whose start and pitch no note of `context` has; both on the same grid."""
    return written.take(~np.isin(written.start * 128 + written.pitch, context.start * 128 + context.pitch))


def piano_roll(notes: Notes, marked: Notes | None = None, window: tuple[float, float] | None = None) -> Image.Image:
    """Notes as bars over time.

    Args:
        notes: drawn in grey.
        marked: drawn in red above them.
        window: first and last quarter note to show.
    """
    figure, axes = pyplot.subplots(figsize=(7.2, 2.4), dpi=100)
    for part, colour in ((notes, CONTEXT), (marked, MARKED)):
        if part is not None:
            begin, end = part.start / part.ticks_per_quarter, part.end / part.ticks_per_quarter
            boxes = [Rectangle((b, p - 0.4), e - b, 0.8) for b, e, p in zip(begin, end, part.pitch, strict=True)]
            axes.add_collection(PatchCollection(boxes, facecolor=colour, edgecolor="white", linewidth=0.4))
    pitches = np.concatenate([part.pitch for part in (notes, marked) if part is not None])
    axes.set_ylim(pitches.min(initial=60) - 2, pitches.max(initial=60) + 2)
    axes.set_xlim(*(window or (0, max(notes.quarters, 1))))
    axes.set_xlabel("quarter notes")
    axes.set_ylabel("MIDI pitch")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    pyplot.close(figure)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
