"""Random changes of training pictures, applied by `mmpt.encoders.image.ImageProcessor`."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F

from mmpt.config import Configurable
from mmpt.errors import ConfigError


class ImageAugmentation(Configurable, ABC):
    """Pictures of any size -> one batch of randomly changed pictures of the encoder's size.

    Every draw comes from torch's global generator, so that a batch is augmented alike whichever worker prepares it.

    Attributes:
        reads_opacity: pictures come as RGBA; otherwise as RGB with white behind transparent parts.
    """

    reads_opacity: bool = False

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image], size: int) -> Tensor:
        """Change a batch.

        Args:
            images: RGB pictures, or RGBA (`reads_opacity`).
            size: height and width of the result in pixels.

        Returns:
            uint8 (batch, 3, size, size).
        """


@contextmanager
def python_random_from_torch() -> Iterator[None]:
    """Let `random` and `numpy.random` follow torch's global generator inside the block, and put them back after it.

    timm draws from the two; the data module seeds torch alone.
    """
    seed = int(torch.randint(0, 2**31 - 1, ()))
    before, numpy_before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numpy_before)


class StandardAugmentation(ImageAugmentation):
    """timm's training transform for photographs: random resized crop, flip, colour jitter, optional RandAugment.

    Args:
        scale: the smallest and largest part of the area that a crop keeps. (0.08, 1) is usual for supervised training
            on ImageNet, (0.9, 1) for contrastive pretraining on captions (OpenCLIP), (0.2, 1) for MAE.
        ratio: the smallest and largest width/height of a crop before it is made square.
        horizontal_flip: probability. Use 0 where captions say left and right, or pictures show letters.
        color_jitter: strength of the change of brightness, contrast and saturation; 0 for none.
        auto_augment: a policy in timm's notation, e.g. `"rand-m9-mstd0.5"`; replaces `color_jitter`.
        interpolation: `"bicubic"`, `"bilinear"` or `"random"` (one of the two for each picture).
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.3, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        interpolation: str = "bicubic",
    ) -> None:
        self.scale = scale
        self.ratio = ratio
        self.horizontal_flip = horizontal_flip
        self.color_jitter = color_jitter
        self.auto_augment = auto_augment
        self.interpolation = interpolation
        self._transforms: dict[int, Callable[[Image.Image], Tensor]] = {}

    def __call__(self, images: Sequence[Image.Image], size: int) -> Tensor:
        """Change each picture on its own; see `ImageAugmentation`."""
        if size not in self._transforms:
            self._transforms[size] = create_transform(
                size,
                is_training=True,
                scale=self.scale,
                ratio=self.ratio,
                hflip=self.horizontal_flip,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                interpolation=self.interpolation,
                normalize=False,
            )
        with python_random_from_torch():
            return torch.stack([self._transforms[size](image) for image in images])


class StyleAugmentation(ImageAugmentation):
    """Changes that keep what a drawing shows and destroy the hand that drew it.

    For drawings on transparent ground that must be recognised in an art style that was never seen. It varies position,
    proportion and bend; line weight and outlines; colours, contrast, texture and ground, for the whole batch at once.

    Args:
        geometry: strength of rotation, scaling, shear, shift and elastic bending; 0 for none.
        color: strength of the change of colours, brightness and contrast; 0 for none.
        line: probability that lines get thinner or thicker, or edges an outline.
        sketch: probability that only the edges are left, as dark lines on white.
        texture: probability of a random kernel close to the identity (blur, sharpening, grain), and, at a quarter of
            it, of few levels of brightness.
        horizontal_flip: probability of a mirror image.
        background: probability of a coloured ground instead of white, where the picture is transparent.
        cutout: probability that a square is covered.

    Raises:
        ConfigError: a negative strength, or a probability outside 0 to 1.
    """

    reads_opacity = True

    def __init__(
        self,
        geometry: float = 1.0,
        color: float = 1.0,
        line: float = 0.4,
        sketch: float = 0.12,
        texture: float = 0.35,
        horizontal_flip: float = 0.1,
        background: float = 0.15,
        cutout: float = 0.2,
    ) -> None:
        probabilities = (line, sketch, texture, horizontal_flip, background, cutout)
        if min(geometry, color, *probabilities) < 0 or max(probabilities) > 1:
            raise ConfigError(
                f"geometry {geometry}, color {color}, probabilities {probabilities}; expected strengths from 0 and "
                "probabilities from 0 to 1"
            )
        self.geometry = geometry
        self.color = color
        self.line = line
        self.sketch = sketch
        self.texture = texture
        self.horizontal_flip = horizontal_flip
        self.background = background
        self.cutout = cutout

    def __call__(self, images: Sequence[Image.Image], size: int) -> Tensor:
        """Change a batch; pictures that are not square are cropped in the centre first."""
        pixels = _stack(images, size).to(torch.float32) / 255  # (batch, 4, height, width)
        opacity = pixels[:, 3:]
        pixels = torch.cat([pixels[:, :3] * opacity, opacity], 1)  # so that what is transparent has no colour
        pixels = _some(pixels, self.horizontal_flip, lambda x: x.flip(3))
        pixels = _warp(pixels, size, self.geometry)
        ground = _some(torch.ones(len(pixels), 3, 1, 1), self.background, torch.rand_like)
        pixels = pixels[:, :3] + ground * (1 - pixels[:, 3:].clamp(0, 1))
        pixels = _some(pixels, self.line * 0.4, lambda x: F.max_pool2d(x, 3, 1, 1))  # dark lines become thinner
        pixels = _some(pixels, self.line * 0.3, lambda x: -F.max_pool2d(-x, 3, 1, 1))  # and thicker
        if self.color > 0:
            pixels = _recolor(pixels, self.color)
        pixels = _some(pixels, self.sketch, lambda x: (1 - 1.5 * edges(x)).clamp(0, 1).expand_as(x))
        pixels = _some(pixels, self.line * 0.5, lambda x: (x - 0.7 * edges(x)).clamp(0, 1))
        pixels = _some(pixels, self.texture, _random_kernel)
        pixels = _some(pixels, self.texture / 4, lambda x: (x * 3).round() / 3)
        pixels = _some(pixels, self.cutout, _cover)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def _stack(images: Sequence[Image.Image], size: int) -> Tensor:
    """uint8 (batch, 4, side, side): as they are if all are alike and not much larger than needed, else scaled."""
    side = images[0].width
    if side > 2 * size or any(image.size != (side, side) for image in images):
        side = size + size // 8
        images = [ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def _uniform(count: int, low: float, high: float) -> Tensor:
    return torch.empty(count).uniform_(low, high)


def _some(values: Tensor, probability: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change a random part of the batch."""
    chosen = (torch.rand(len(values)) < probability).nonzero().squeeze(1)
    return values.index_copy(0, chosen, change(values[chosen])) if len(chosen) else values


def _warp(pixels: Tensor, size: int, strength: float) -> Tensor:
    """Random affine map and a smooth random displacement, sampled at (size, size); transparent beyond the edges."""
    batch = len(pixels)
    angle = _uniform(batch, -0.26, 0.26) * strength
    scale = torch.exp(_uniform(batch, -0.18, 0.25) * strength)
    aspect = torch.exp(_uniform(batch, -0.18, 0.18) * strength)
    shear = _uniform(batch, -0.15, 0.15) * strength
    shift = torch.empty(2, batch).uniform_(-0.12, 0.12) * strength
    sine, cosine = angle.sin(), angle.cos()
    across = torch.stack([cosine * scale, (shear - sine) * scale * aspect, shift[0]], 1)
    down = torch.stack([sine * scale, cosine * scale * aspect, shift[1]], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), [batch, 1, size, size], align_corners=False)
    bend = torch.randn(batch, 2, 4, 4) * _uniform(batch, 0, 0.09).view(-1, 1, 1, 1) * strength
    bend = F.interpolate(bend, size=(size, size), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    return F.grid_sample(pixels, grid + bend, align_corners=False)


def _recolor(pixels: Tensor, strength: float) -> Tensor:
    """Mix channels a little (white stays white), then change gamma, saturation and lightness; rarely swap or invert."""
    batch = len(pixels)
    mix = torch.eye(3) + torch.randn(batch, 3, 3) * 0.08 * strength
    pixels = torch.einsum("bij,bjhw->bihw", mix / mix.sum(2, keepdim=True).clamp(min=0.3), pixels).clamp(0, 1)
    gamma = torch.exp(_uniform(batch, -0.35, 0.35) * strength).view(-1, 1, 1, 1)
    pixels = (pixels + 1e-4) ** gamma
    grey = (pixels * torch.tensor([0.3, 0.59, 0.11]).view(3, 1, 1)).sum(1, keepdim=True)
    saturation = torch.exp(_uniform(batch, -0.5, 0.35) * strength).view(-1, 1, 1, 1)
    pixels = grey + (pixels - grey) * _some(saturation, 0.1 * min(strength, 1.0), torch.zeros_like)
    pixels = _some(pixels, 0.05 * min(strength, 1.0), _swap_channels)
    pixels = 1 - (1 - pixels) * torch.exp(_uniform(batch, -0.35, 0.1) * strength).view(-1, 1, 1, 1)
    return _some(pixels, 0.04 * min(strength, 1.0), lambda x: 1 - x)


def _swap_channels(pixels: Tensor) -> Tensor:
    order = torch.rand(len(pixels), 3).argsort(1)
    return pixels[torch.arange(len(pixels)).unsqueeze(1), order]


def edges(pixels: Tensor) -> Tensor:
    """Length of the Sobel gradient, the greatest of the channels: (batch, channels, h, w) -> (batch, 1, h, w)."""
    batch, channels, height, width = pixels.shape
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 4
    kernels = torch.stack([across, across.T]).unsqueeze(1)  # (2, 1, 3, 3)
    padded = F.pad(pixels.reshape(batch * channels, 1, height, width), (1, 1, 1, 1), mode="replicate")
    length = F.conv2d(padded, kernels).square().sum(1).sqrt()
    return length.view(batch, channels, height, width).amax(1, keepdim=True)


def _random_kernel(pixels: Tensor) -> Tensor:
    """Filter each picture with a 3 x 3 kernel of its own, between sharpening and blur, that sums to one."""
    batch, channels, height, width = pixels.shape
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1.0
    noise = torch.randn(batch, 3, 3) * 0.12
    blur = _uniform(batch, -0.35, 0.8).view(-1, 1, 1)
    kernels = identity * (1 - blur) + blur / 9 + noise - noise.mean((1, 2), keepdim=True)
    kernels = kernels.repeat_interleave(channels, 0).unsqueeze(1)  # (batch * channels, 1, 3, 3)
    padded = F.pad(pixels.reshape(1, batch * channels, height, width), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, kernels, groups=batch * channels).view_as(pixels).clamp(0, 1)


def _cover(pixels: Tensor) -> Tensor:
    """Cover a square of up to two fifths of the side with one colour."""
    batch, _, height, width = pixels.shape
    row, column = torch.rand(batch, 1, 1) * height, torch.rand(batch, 1, 1) * width
    radius = _uniform(batch, 0.08, 0.2).view(-1, 1, 1) * height
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    covered = ((rows - row).abs() < radius) & ((columns - column).abs() < radius)
    return torch.where(covered.unsqueeze(1), torch.rand(batch, 3, 1, 1), pixels)
