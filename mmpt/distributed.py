"""Features of every process, with gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


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
    return _AllGather.apply(rows), dist.get_rank() * len(rows)


class _AllGather(torch.autograd.Function):
    """Concatenation over processes; its gradient is the sum over processes, at the own rows."""

    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]
