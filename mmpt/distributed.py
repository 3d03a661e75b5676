"""Several processes: features of all of them with gradient, and parameters that are divided between them."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from mmpt.blocks import repeated_blocks


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


def pad_to_longest(rows: Tensor) -> Tensor:
    """Pad (n, length, ...) with zeros to the greatest length of all processes."""
    if world_size() == 1:
        return rows
    length = torch.tensor(rows.shape[1], device=rows.device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    missing = int(length) - rows.shape[1]
    return F.pad(rows, (*[0, 0] * (rows.ndim - 2), 0, missing)) if missing else rows


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimiser state over processes (FSDP2), each layer of a stack by itself.

    Args:
        module: its forward pass is the whole step.
        mesh: one-dimensional, over the processes.
    """
    for layer in repeated_blocks(module):
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


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
