"""`gradient_resnet`: a small residual network on oriented gradients instead of pixels, as a timm model.

What histograms of oriented gradients (Dalal and Triggs, CVPR 2005) get right by hand, a network must otherwise learn
from pixels: that edges matter and how strong or coloured they are matters less. On a few thousand drawings this start
decides how much is learnt in minutes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GradientResNet", "OrientedGradients"]


class OrientedGradients(nn.Module):
    """Strength of the edges of each direction and the colour, in cells; nothing is learnt.

    The gradient of the channel in which it is longest is shared among orientations (opposite directions are one) by the
    square of the cosine, averaged in cells, and divided by the strength in the 3 x 3 cells around.

    Args:
        orientations: number of orientations.
        cell: height and width of a cell in pixels.
    """

    def __init__(self, orientations: int = 8, cell: int = 4) -> None:
        super().__init__()
        self.cell = cell
        self.channels = orientations + 3
        angles = 2 * math.pi * torch.arange(orientations) / orientations
        self.register_buffer("directions", torch.stack([angles.cos(), angles.sin()], 1), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Edges and colour in cells, and in cells of twice the size.

        Args:
            pixels: (batch, 3, height, width).

        Returns:
            float32 (batch, channels, height / cell, width / cell), and half as high and wide.
        """
        with torch.autocast(pixels.device.type, enabled=False):
            pixels = pixels.float()
            padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
            across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
            down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
            square, channel = (across.square() + down.square()).max(1, keepdim=True)
            across, down = across.gather(1, channel), down.gather(1, channel)
            # cosine and sine of twice the angle, so that opposite directions fall together
            double = torch.cat([across.square() - down.square(), 2 * across * down], 1) / (square + 1e-8)
            share = torch.einsum("bdhw,od->bohw", double, self.directions).clamp(min=0)
            edges = F.avg_pool2d((square + 1e-8).sqrt() * share.square(), self.cell)
            colour = F.avg_pool2d(pixels, self.cell)
            return (
                torch.cat([_normalized(edges), colour], 1),
                torch.cat([_normalized(F.avg_pool2d(edges, 2)), F.avg_pool2d(colour, 2)], 1),
            )


def _normalized(edges: Tensor) -> Tensor:
    energy = F.avg_pool2d(edges.square().sum(1, keepdim=True), 3, 1, 1, count_include_pad=False)
    return (edges / (energy + 1e-3).sqrt()).clamp(max=0.6)


class GradientResNet(nn.Module):
    """Three stages of timm's basic residual blocks on `OrientedGradients`, beside them the coarse cells as they are.

    Follows timm's interface as far as encoders use it. One place of the feature map stands for 16 x 16 pixels. The last
    `fixed_features` channels are the coarse cells, standardised, in which nothing is trained.

    Args:
        channels: of the stages.
        layers: blocks of the stages.
        out: the last stage is reduced to this many channels.
        orientations: see `OrientedGradients`.
    """

    def __init__(
        self,
        channels: tuple[int, int, int] = (32, 128, 256),
        layers: tuple[int, int, int] = (1, 1, 1),
        out: int = 48,
        orientations: int = 8,
    ) -> None:
        super().__init__()
        self.gradients = OrientedGradients(orientations)
        inputs = self.gradients.channels
        stem = channels[0]
        self.norm = nn.BatchNorm2d(inputs)
        self.stem = nn.Sequential(nn.Conv2d(inputs, stem, 3, 1, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        network: Any = ResNet(
            BasicBlock,  # type: ignore[arg-type]
            (*layers, 1),
            num_classes=0,
            channels=(*channels, 8),
            stem_width=stem // 2,
            stem_type="deep",
        )
        self.stages = nn.Sequential(network.layer1, network.layer2, network.layer3)
        self.reduce = nn.Sequential(nn.Conv2d(channels[-1], out, 1, bias=False), nn.BatchNorm2d(out))
        self.coarse_norm = nn.BatchNorm2d(4 * inputs, affine=False)
        self.fixed_features = 4 * inputs
        self.num_features = self.head_hidden_size = out + 4 * inputs
        self.feature_info = [{"num_chs": self.num_features, "reduction": 16, "module": "stages"}]

    def forward_features(self, pixels: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, num_features, height / 16, width / 16)."""
        fine, coarse = self.gradients(pixels)
        deep = self.reduce(self.stages(self.stem(self.norm(fine))))
        beside = self.coarse_norm(F.pixel_unshuffle(coarse, 2))  # the four coarse cells of each place
        return torch.cat([deep, beside.to(deep.dtype)], 1)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The features as they are: there is no classifier."""
        return features

    def reset_classifier(self, num_classes: int, global_pool: str = "") -> None:
        """Nothing to reset: there is no classifier."""

    def forward(self, pixels: Tensor) -> Tensor:
        """See `forward_features`."""
        return self.forward_features(pixels)


@register_model
def gradient_resnet(pretrained: bool = False, **arguments: Any) -> GradientResNet:
    """The entry that `timm.create_model("gradient_resnet")` calls; there are no published weights."""
    own = {name: arguments[name] for name in ("channels", "layers", "out", "orientations") if name in arguments}
    return GradientResNet(**own)
