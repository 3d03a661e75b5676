"""Low-rank adapters on any part of a model, through peft; and which layers a part consists of."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmpt.config import Configurable
from mmpt.errors import ConfigError

ADAPTED = (nn.Linear, nn.Conv1d, nn.Conv2d)


class LoRA(Configurable):
    """Low-rank adaptation (Hu et al., arXiv 2106.09685), or DoRA (arXiv 2402.09353), of a tower's linear layers.

    Args:
        rank: of the added matrices.
        alpha: the added matrices are scaled by alpha / rank.
        dropout: on their input.
        dora: learn magnitude and direction apart (DoRA).
        targets: ends of the names of the layers that are adapted, e.g. ["query", "value"]; None is every linear and
            convolutional layer without groups and dilation.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        dora: bool = False,
        targets: list[str] | None = None,
    ) -> None:
        self.rank, self.alpha, self.dropout, self.dora, self.targets = rank, alpha, dropout, dora, targets

    def inject(self, part: nn.Module) -> None:
        """Put adapters into a part of a model, in place; of its parameters only theirs are trained afterwards.

        Raises:
            ConfigError: nothing to adapt.
        """
        names = [
            name
            for name, layer in part.named_modules()
            if isinstance(layer, ADAPTED)
            and getattr(layer, "groups", 1) == 1
            and set(getattr(layer, "dilation", (1,))) == {1}  # peft's matrices for convolutions are never dilated
            and (self.targets is None or any(name == t or name.endswith(f".{t}") for t in self.targets))
        ]
        if not names:
            raise ConfigError(
                f"no layer of {type(part).__name__} can be adapted; targets is {self.targets}, its linear layers are "
                f"{[n for n, m in part.named_modules() if isinstance(m, ADAPTED)][:8]}"
            )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            use_dora=self.dora,
            target_modules=names,
        )
        inject_adapter_in_model(config, part)


def has_adaptable_layers(part: nn.Module) -> bool:
    """Whether there is a layer inside of a part that adapters can be put into."""
    return any(isinstance(layer, ADAPTED) for layer in part.modules() if layer is not part)


def merged(module: nn.Module) -> nn.Module:
    """A copy in which the adapters are added into the weights, with the parameter names of a model without any."""
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, layer.get_base_layer())
    return module


def blocks(part: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, from the input to the output; empty where it has none.

    They are the children of the list or sequence of modules that holds the most parameters, the outermost of several:
    the layers of a transformer, the stages of a convolutional network.
    """

    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    stacks = [m for m in part.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and size(m)]
    if not stacks:
        return []
    return [child for child in max(stacks, key=size).children() if size(child)]  # max keeps the first, the outermost


def depths(parts: Sequence[nn.Module]) -> dict[int, int]:
    """How far from the input each parameter of a chain of parts lies: id of the parameter -> 0, 1, 2, ....

    In each part, what was made before its blocks (embeddings) comes first, then block after block, then the rest.
    """
    found: dict[int, int] = {}
    depth = 0
    for part in parts:
        chain = blocks(part)
        inside = {id(p): number for number, block in enumerate(chain) for p in block.parameters()}
        seen = False
        for parameter in part.parameters():
            if id(parameter) in found:
                continue
            if id(parameter) in inside:
                seen = True
                found[id(parameter)] = depth + 1 + inside[id(parameter)]
            else:
                found[id(parameter)] = depth + (len(chain) + 1 if seen else 0)
        depth += len(chain) + 2
    return found
