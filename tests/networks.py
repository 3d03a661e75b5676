"""A small network, and when two graphs are the same."""

import torch
from torch import nn

from mmpt.encoders.architecture_graph import ArchitectureGraph


def small_network(channels: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


PICTURE = (torch.empty(1, 3, 32, 32),)


def same(a: ArchitectureGraph, b: ArchitectureGraph) -> bool:
    return (a.types, a.shapes, a.edges) == (b.types, b.shapes, b.edges)
