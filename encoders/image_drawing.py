"""Drawings that fill their frame in a fixed way: emoji, glyphs, diagrams, icons."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmpt.encoders.image import ImageEncoder
from mmpt.encoders.image_processor import ImageProcessor


class PlaceProjection(nn.Module):
    """A linear map for each place, and beside it, on request, a random one that is never trained.

    Args:
        places: number of places.
        in_width: size of the vectors that come in.
        out_width: size of the vectors that the trained maps give.
        dropout: on what the trained maps read.
        fixed_in: how many of the last numbers that come in the random maps read.
        fixed_width: size of the vectors that the random maps give.
    """

    fixed: Tensor

    def __init__(
        self, places: int, in_width: int, out_width: int, dropout: float, fixed_in: int = 0, fixed_width: int = 0
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.empty(places, in_width, out_width).normal_(std=in_width**-0.5))
        self.register_buffer("fixed", torch.randn(places, fixed_in, fixed_width) * max(fixed_in, 1) ** -0.5)

    def forward(self, values: Tensor) -> Tensor:
        """(batch, places, in_width) -> (batch, places, out_width + fixed_width)."""
        trained = torch.einsum("bpi,pio->bpo", self.dropout(values), self.weight)
        read = values[..., values.shape[2] - self.fixed.shape[1] :]
        return torch.cat([trained, torch.einsum("bpi,pio->bpo", read, self.fixed.to(read.dtype))], 2)


class DrawingEncoder(ImageEncoder):
    """`gradient_resnet`, with a linear map of its own for each place of the feature map.

    The mean over places then still knows what was where, as a flattened map would. It can't be masked.

    Args:
        size: height and width of the pictures.
        place_width: size of the vectors that the maps of the places give.
        fixed_width: beside each place's vector, so many numbers from a random linear map of the coarse gradients and
            colours, which nothing trains. They keep the similarity of pictures that these see, however far training
            drifts.
        dropout: on what the maps read.
        channels: of the stages, see `mmpt.encoders.image_gradients.GradientResNet`.
        out: the last stage is reduced to this many channels.
        orientations: number of orientations of the gradients.
        processor: preprocessing; by default `ImageProcessor(size)`.

    Raises:
        ConfigError: a size that is not a multiple of 16.
    """

    def __init__(
        self,
        size: int = 48,
        place_width: int = 512,
        fixed_width: int = 0,
        dropout: float = 0.0,
        channels: tuple[int, int, int] = (32, 128, 256),
        out: int = 48,
        orientations: int = 8,
        processor: ImageProcessor | None = None,
    ) -> None:
        network = {"channels": channels, "out": out, "orientations": orientations}
        super().__init__("gradient_resnet", size, backbone_args=network, hide=None, processor=processor)
        read = self.backbone.fixed_features if fixed_width else 0
        self.places = PlaceProjection(self.columns**2, self.width, place_width, dropout, read, fixed_width)
        self.width = place_width + fixed_width

    def _features(self, pixels: Tensor) -> Tensor:
        return self.places(super()._features(pixels))
