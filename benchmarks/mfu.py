"""Share of the machine's measured matrix-multiply peak that a masked language modelling step of mmpt reaches."""

from __future__ import annotations

import statistics
import time

import torch
from bert import VOCABULARY, both, padded
from measure import heading, quiet, table
from torch.nn import functional as F

WIDTH, DEPTH, BATCH, LENGTH = 256, 4, 16, 128


def peak(size: int = 1024) -> float:
    """Floating-point operations a second of one large product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / clock(lambda: a @ b)


def clock(run) -> float:
    run()
    laps = []
    for _ in range(5):
        began = time.perf_counter()
        run()
        laps.append(time.perf_counter() - began)
    return statistics.median(laps)


def main() -> None:
    quiet()
    heading()
    _, text = both(WIDTH, DEPTH)
    ids, mask = padded([LENGTH] * BATCH)
    predicted = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15

    def step() -> None:
        tokens = text(text.embed(ids.masked_fill(predicted, 4), mask))
        F.cross_entropy(text.lm_logits(tokens.values[predicted]), ids[predicted]).backward()

    tokens = BATCH * LENGTH
    layers = 2 * DEPTH * (12 * WIDTH**2 + 2 * LENGTH * WIDTH) * tokens
    logits = 2 * (WIDTH**2 + WIDTH * VOCABULARY) * int(predicted.sum())
    operations = 3 * (layers + logits)  # backward is twice the forward pass
    rows = []
    for number in range(3):
        best, taken = peak(), clock(step)
        rows.append([number, best / 1e9, operations / taken / 1e9, f"{operations / taken / best:.0%}"])
    table(
        f"mfu: BERT of width {WIDTH}, {DEPTH} layers, batch {BATCH} x {LENGTH}",
        ["round", "peak GFLOP/s", "step GFLOP/s", "share"],
        rows,
    )


if __name__ == "__main__":
    main()
