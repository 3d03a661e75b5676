"""Vectors that depend on names alone, so that units of two modalities with one name start as one vector."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NAMED_STD = 0.1
"""Larger than the 0.02 of other vectors: what a unit is called shall outweigh where it stands, at first."""


def named_vectors(names: Sequence[str], width: int) -> Tensor:
    """A fixed random vector for each name: normal with standard deviation `NAMED_STD`.

    Case plays no role. A name of several parts (`HLA-DRA`) is the sum of its parts' vectors, scaled to the same
    length: so it meets the sum over its word pieces, which a tokenizer divides at punctuation.

    Args:
        names: in any order; equal names give equal vectors, in every process and on every machine.
        width: size of the vectors.

    Returns:
        float32 (names, width), on the CPU.
    """
    parts = [parts_of(name) for name in names]
    known: dict[str, np.ndarray] = {}
    for part in {part for several in parts for part in several}:
        seed = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        known[part] = np.random.default_rng(seed).standard_normal(width)
    rows = [sum(known[part] for part in several) / len(several) ** 0.5 for several in parts]
    return torch.from_numpy(NAMED_STD * np.asarray(rows, dtype=np.float32).reshape(len(names), width))


def parts_of(name: str) -> list[str]:
    """Words and punctuation of a name, in small letters: `HLA-DRA` is hla, -, dra."""
    return re.findall(r"\w+|[^\w\s]", name.lower()) or [name]
