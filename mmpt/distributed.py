"""Features of every process, with gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def world_size() -> int:
    """Number of processes that train together; 1 outside distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in rank order, and the place of this process's rows among them.

    The gradient of every process's loss flows back to the rows it came from. With losses that are means over local
    rows and gradients averaged over processes (DDP), the result equals one process with the whole batch.

    Args:
        rows: (n, ...), the same n on every process.
    """
    if world_size() == 1:
        return rows, 0
    parts = all_gather(rows.contiguous())
    return torch.cat(list(parts)), dist.get_rank() * len(rows)
