"""Graphs of the models of timm and torchvision, by name; each is traced once and kept in the cache."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.encoders.architecture_trace import VERSION, trace
from mmpt.errors import DataError
from mmpt.files import cache_folder, write_cache

TORCHVISION = "torchvision/"


def zoo_names() -> list[str]:
    """All models of timm, and those of torchvision that take one picture or video, in order."""
    skipped = ("quantized", "rcnn", "retinanet", "ssd", "fcos", "raft")  # integers; lists of pictures; pairs
    others = [n for n in torchvision.models.list_models() if not any(part in n for part in skipped)]
    return [*timm.list_models(), *(f"{TORCHVISION}{name}" for name in others)]


def named_graph(name: str) -> ArchitectureGraph:
    """The graph of a model, from the cache where it has been traced before.

    Args:
        name: of timm (`"resnet50"`) or torchvision (`"torchvision/resnet50"`).

    Raises:
        DataError: no such model, or one that can't be traced.
    """
    path = _cached(name)
    if path.is_file():
        try:
            return ArchitectureGraph.from_json(path.read_text(encoding="utf-8"), str(path))
        except (DataError, OSError):
            pass  # damaged: it is made anew
    network, inputs = build(name)
    graph = trace(network, inputs, name=name)
    write_cache(path, lambda file: file.write(graph.to_json().encode()))
    return graph


class EmptyWeights(TorchFunctionMode):
    """Networks that are built within have weights on the meta device: they take no memory and no time to fill.

    Other tensors are real, as constructors may compute with them (the widths of a RegNet). Where both meet in one
    operation, its result is on the meta device too.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Move what weights are made of."""
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.full):
            kwargs["device"] = "meta"
        try:
            return func(*args, **kwargs)
        except RuntimeError:  # e.g. the random rotations of timm's mixed RoPE, times real frequencies
            args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (tuple(args), kwargs))
            return func(*args, **kwargs)


def build(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The model on the meta device, without weights, and an input of its size.

    Raises:
        DataError: no such model.
    """
    with EmptyWeights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith(TORCHVISION):
            return _torchvision(name.removeprefix(TORCHVISION))
        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name}*")[:5])
            raise DataError(f"timm has no model {name!r}" + (f"; it has {close}" if close else ""))
        network = timm.create_model(name)
        size = getattr(network, "default_cfg", {}).get("input_size") or (3, 224, 224)
        return network, (torch.empty(1, *size, device="meta"),)


def _torchvision(name: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    if name not in torchvision.models.list_models():
        raise DataError(f"torchvision has no model {name!r}")
    builder: Any = torchvision.models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if builder.__module__.startswith("torchvision.models.segmentation"):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    network = torchvision.models.get_model(name, **options)
    size = (
        (3, 16, 224, 224)
        if ".video." in builder.__module__
        else (3, 299, 299)
        if "inception" in name
        else (3, 224, 224)
    )
    return network, (torch.empty(1, *size, device="meta"),)


def _cached(name: str) -> Path:
    key = f"{name}\n{torch.__version__}\n{timm.__version__}\n{torchvision.__version__}\n{VERSION}"
    digest = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    return cache_folder() / "architecture" / f"{name.rpartition('/')[2]}-{digest}.json"
