"""The chart modality: pictures of charts at their own shape, or none at all where the data stand in the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch import Tensor

from mmpt.encoder import Corruption, Inputs
from mmpt.encoders.image import ImageEncoder
from mmpt.encoders.image_processor import ImageProcessor
from mmpt.tokens import Tokens

SMALLEST_SCALE = 0.85
"""In training a picture takes at least this share of the width and height."""


class ChartProcessor(ImageProcessor):
    """Pictures of charts -> normalised pixels; nothing is cut off, what is not square gets white margins.

    In training a picture is drawn a little smaller at some place of the white ground, with its colours exchanged: what
    it says stays the same, and charts that were drawn by others differ in just that.

    | key     | shape                         | meaning                                              |
    |---------|-------------------------------|------------------------------------------------------|
    | pixels  | float (batch, 3, size, size)  | normalised; zeros where there is no picture          |
    | present | bool (batch,)                 | False for a sample that is None: no picture is shown |

    Args:
        size: height and width of the result.
        mean: of each channel, in units of 0 to 1.
        std: of each channel.
        max_pixels: larger pictures are refused before they are decoded.
    """

    def __init__(
        self,
        size: int = 224,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        max_pixels: int = 64_000_000,
    ) -> None:
        super().__init__(size, mean, std, max_pixels=max_pixels)

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """Read, pad and normalise.

        Args:
            samples: PIL images, paths, uint8 arrays (height, width[, channels]), or None for no picture.
            training: vary place, size and colours; a flipped or cut chart would show other data.

        Raises:
            SampleError: a picture that can't be read.
        """
        pixels = torch.ones(len(samples), 3, self.size, self.size)
        present = torch.tensor([sample is not None for sample in samples], dtype=torch.bool)
        for index, sample in enumerate(samples):
            if sample is not None:
                image = ImageOps.pad(self._read(sample, index, False), (self.size, self.size), color="white")
                pixels[index] = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        if training:
            pixels = varied(pixels)
        mean, std = torch.tensor(self.mean).view(3, 1, 1), torch.tensor(self.std).view(3, 1, 1)
        return {"pixels": (pixels - mean) / std * present.view(-1, 1, 1, 1), "present": present}


def varied(pictures: Tensor) -> Tensor:
    """Pictures a little smaller, somewhere on white, with their colours exchanged, greyer and lighter.

    Args:
        pictures: (batch, 3, height, width), in 0 to 1.
    """
    count = len(pictures)
    shrink = torch.empty(count).uniform_(1.0, 1 / SMALLEST_SCALE)
    moves = torch.zeros(count, 2, 3)
    moves[:, 0, 0] = moves[:, 1, 1] = shrink
    moves[:, :, 2] = torch.empty(count, 2).uniform_(-1.0, 1.0) * (shrink - 1).unsqueeze(1)  # no part leaves the picture
    grid = F.affine_grid(moves, list(pictures.shape), align_corners=False)
    ink = F.grid_sample(1 - pictures, grid, align_corners=False)  # what is outside has none
    ink = ink[torch.arange(count).unsqueeze(1), torch.rand(count, 3).argsort(1)]
    grey = ink.mean(1, keepdim=True)
    colour, strength = torch.rand(count, 1, 1, 1), torch.empty(count, 1, 1, 1).uniform_(0.7, 1.0)
    return 1 - strength * (grey + colour * (ink - grey))


class ChartEncoder(ImageEncoder):
    """Any timm model as an encoder of charts; see `mmpt.encoders.image.ImageEncoder`.

    Rows without a picture are not computed and have no real tokens, so no gradient comes from them.

    Args:
        backbone: name of a timm model.
        size: height and width of the pictures.
        pretrained: a local weights file of this model.
        backbone_args: further arguments of the timm model.
        hide: how masked units are hidden; None leaves the parts for reconstruction out.
        processor: preprocessing; by default `ChartProcessor(size)`.
        drop_path: stochastic depth rate of the backbone.

    Raises:
        ConfigError: see `ImageEncoder`.
        CheckpointError: see there.
    """

    def __init__(
        self,
        backbone: str = "vit_tiny_patch16_224",
        size: int = 224,
        pretrained: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        hide: Literal["vector"] | None = None,
        processor: ChartProcessor | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            backbone,
            size,
            pretrained,
            backbone_args,
            hide=hide,
            processor=processor or ChartProcessor(size),
            drop_path=drop_path,
        )

    def units(self, inputs: Inputs) -> Tensor:
        """Every patch of a picture that is there: bool (batch, prefix + patches)."""
        return super().units(inputs) & inputs["present"].unsqueeze(1)

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode charts; see `ImageEncoder.forward`.

        Returns:
            (batch, prefix + patches, width); all padding in rows without a picture.
        """
        present = inputs["present"]
        if torch.compiler.is_exporting():  # a graph has no rows that depend on values: all are computed, some not used
            tokens = super().forward(inputs, corruption)
            mask = tokens.mask & present.unsqueeze(1)
            return Tokens(tokens.values.masked_fill(~mask.unsqueeze(-1), 0.0), mask)
        if present.is_meta or bool(present.all()):  # the meta device has shapes only
            return super().forward(inputs, corruption)
        rows = present.nonzero().squeeze(1)
        length = self.prefix + self.columns**2
        values = inputs["pixels"].new_zeros(len(present), length, self.width)
        if len(rows):
            chosen = {name: value[rows] for name, value in inputs.items()}
            hidden = (
                None
                if corruption is None
                else corruption._replace(action=corruption.action[rows], predicted=corruption.predicted[rows])
            )
            encoded = super().forward(chosen, hidden).values
            values = values.to(encoded.dtype).index_copy(0, rows, encoded)
        return Tokens(values, present.unsqueeze(1).expand(-1, length))
