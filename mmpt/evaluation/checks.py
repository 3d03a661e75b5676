"""Checks at the door of every evaluation function: what is not finite or does not match never becomes a number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmpt.errors import DataError

Array = Tensor | np.ndarray
"""What evaluation functions read: torch tensors on any device, or numpy arrays."""


def embeddings_of(values: Array, what: str) -> Tensor:
    """The embeddings as float32 (n, d).

    Args:
        values: (n, d) of any floating type.
        what: how the error calls them.

    Raises:
        DataError: not two axes, no rows, or a value that is NaN or infinite (comparisons with NaN are False, so
            such a row would count as perfectly ranked).
    """
    tensor = torch.as_tensor(values).detach().float()
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise DataError(f"{what} have the shape {tuple(tensor.shape)}; expected (examples, dimensions), none of them 0")
    finite = torch.isfinite(tensor).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise DataError(
            f"{int((~finite).sum())} of {len(tensor)} {what} are NaN or infinite, the first one in row {first}; "
            "the model that gave them has diverged, or its input was damaged"
        )
    return tensor


def labels_of(values: Array, what: str, count: int, classes: int | None = None) -> Tensor:
    """The labels as long (n,).

    Args:
        values: integers (n,).
        what: how the error calls them.
        count: how many there must be.
        classes: labels lie in [0, classes); None leaves them open.

    Raises:
        DataError: another number of labels, labels that are not integers, or labels outside the range.
    """
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim != 1 or len(tensor) != count:
        raise DataError(f"{what} have the shape {tuple(tensor.shape)}; expected ({count},), one per example")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise DataError(f"{what} are {tensor.dtype}; expected integers that number the classes")
    if classes is not None and (int(tensor.min()) < 0 or int(tensor.max()) >= classes):
        raise DataError(
            f"{what} run from {int(tensor.min())} to {int(tensor.max())}; expected 0 to {classes - 1}, "
            f"because there are {classes} to choose from"
        )
    return tensor.long()


def same_width(first: Tensor, second: Tensor, what: str) -> None:
    """Refuse embeddings of different spaces.

    Raises:
        DataError: the last axes differ.
    """
    if first.shape[1] != second.shape[1]:
        raise DataError(f"{what} have {first.shape[1]} and {second.shape[1]} dimensions; expected one embedding space")
