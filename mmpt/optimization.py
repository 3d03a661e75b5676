"""Optimiser parameter groups and the learning-rate schedule that every training here uses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from torch import nn

from mmpt.errors import ConfigError

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(
    module: nn.Module, weight_decay: float, lr: float | None = None, lr_factors: Mapping[str, float] | None = None
) -> list[dict]:
    """Two groups: weight matrices with decay; norms, biases, embeddings and scalars (logit_scale) without.

    Frozen parameters are in neither. With `lr_factors` there are two groups for each factor.

    Args:
        module: whose parameters.
        weight_decay: of the first group.
        lr: the learning rate that the factors multiply; needed with them.
        lr_factors: beginning of parameter names -> factor; the longest that fits counts, 1 where none does.

    Raises:
        ConfigError: a beginning that no trained parameter has.
    """
    exempt = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, (*NORMS, nn.Embedding))
        for parameter in part.parameters(recurse=False)
    }
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    decayed = {id(p) for p in trained.values() if p.ndim >= 2 and id(p) not in exempt}
    factors = {name: _factor(name, lr_factors or {}) for name in trained}
    unused = [start for start in lr_factors or {} if not any(name.startswith(start) for name in trained)]
    if unused:
        raise ConfigError(f"lr_factors names {unused[0]!r}, but no trained parameter's name begins so")
    groups = []
    for factor in dict.fromkeys(factors.values()):
        own = [p for name, p in trained.items() if factors[name] == factor]
        rate = {} if lr is None or not lr_factors else {"lr": lr * factor}
        groups.append({"params": [p for p in own if id(p) in decayed], "weight_decay": weight_decay, **rate})
        groups.append({"params": [p for p in own if id(p) not in decayed], "weight_decay": 0.0, **rate})
    return groups


def _factor(name: str, factors: Mapping[str, float]) -> float:
    fitting = [start for start in factors if name.startswith(start)]
    return factors[max(fitting, key=len)] if fitting else 1.0


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
