"""Repeated blocks of a network, whoever wrote it: recompute their activations, or compile them.

A large network is a stack of equal blocks, and both savings work best block by block: the memory of one block at a time
in the backward pass, and one compilation for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of every stack within a module, the outermost where stacks are nested.

    A stack is an `nn.ModuleList`, or an `nn.Sequential` of at least two, whose members are all of one class and have
    parts of their own: the layers of transformers of mmpt, timm, transformers and open_clip, the stages of a ResNet.
    """
    members = list(module.children())
    if _is_stack(module, members):
        yield from members
        return
    for member in members:
        yield from repeated_blocks(member)


def _is_stack(module: nn.Module, members: list[nn.Module]) -> bool:
    if not isinstance(module, nn.ModuleList) and not (isinstance(module, nn.Sequential) and len(members) > 1):
        return False
    return len({type(member) for member in members}) == 1 and any(True for _ in members[0].children())


def recompute_activations(module: nn.Module) -> None:
    """Keep only the input of each repeated block, and run the block again in the backward pass (Chen et al. 2016).

    Gradients are the same, dropout included; it costs a second forward pass. Blocks with batch norm are left alone,
    as a second pass would count its batch twice.
    """
    for block in repeated_blocks(module):
        if not any(isinstance(part, _BatchNorm) for part in block.modules()):
            block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_blocks(module: nn.Module) -> None:
    """Compile each repeated block in place with `torch.compile`; the first batches of a run then take longer."""
    for block in repeated_blocks(module):
        block.compile()
