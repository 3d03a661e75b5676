"""Optimiser parameter groups and the learning-rate schedule that every training here uses."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: weight matrices with decay; norms, biases, embeddings and scalars (logit_scale) without.

    Frozen parameters are in neither.
    """
    exempt = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, (*NORMS, nn.Embedding))
        for parameter in part.parameters(recurse=False)
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in exempt]
    kept = {id(p) for p in decayed}
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in kept], "weight_decay": 0.0},
    ]


def warmup_cosine(step: int, warmup: int, total: int, final: float = 0.0) -> float:
    """Factor on the learning rate: linear from 1/warmup to 1, then half a cosine down to `final` at `total` steps."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def interpolate(points: float | Iterable[tuple[int, float]], step: int) -> float:
    """A constant, or the value at `step` of the line through (step, value) points; flat outside them."""
    if isinstance(points, int | float):
        return float(points)
    ordered = sorted(((int(at), float(value)) for at, value in points), key=lambda point: point[0])
    before = ordered[0]
    for after in ordered:
        if step <= after[0]:
            if after[0] == before[0]:
                return after[1]
            share = (step - before[0]) / (after[0] - before[0])
            return before[1] + max(0.0, share) * (after[1] - before[1])
        before = after
    return before[1]
