"""Pictures in any form and format -> a batch of normalised pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from mmpt.encoder import Inputs, Processor
from mmpt.encoders.image_augmentation import ImageAugmentation
from mmpt.errors import ConfigError, SampleError

READABLE = "a PIL image, the path of an image file, or a uint8 array (height, width) or (height, width, 3 or 4)"


def read_image(sample: Any, *, max_pixels: int = 64_000_000, index: int = 0, opacity: bool = False) -> Image.Image:
    """Read one picture as RGB: upright (EXIF), transparent parts white, first frame of an animation, 16 bits as 8.

    Args:
        sample: PIL image, path, or uint8 array (height, width[, 1, 3 or 4]).
        max_pixels: larger pictures are refused on the strength of their header, before they are decoded.
        index: position of the sample, for the error.
        opacity: read as RGBA instead.

    Raises:
        SampleError: not a readable picture.
    """
    name = _name_of(sample, index)
    try:
        image = _opened(sample, name, index)
        width, height = image.size
        if not 0 < width * height <= max_pixels:
            raise SampleError(name, f"{width} x {height} pixels", f"1 to {max_pixels} pixels (max_pixels)", index)
        image = _upright_8_bit(image, name, index)
    except SampleError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        problem = f"can't be decoded ({type(error).__name__}: {error})"
        raise SampleError(name, problem, "a whole image file (JPEG, PNG, WebP, GIF, TIFF, BMP)", index) from error
    if opacity:
        return image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _name_of(sample: Any, index: int) -> str:
    if isinstance(sample, str | Path):
        return str(sample)
    return str(getattr(sample, "filename", "") or f"image {index} of the batch")


def _opened(sample: Any, name: str, index: int) -> Image.Image:
    if isinstance(sample, Image.Image):
        return sample
    if isinstance(sample, str | Path):
        path = Path(sample)
        if not path.is_file():
            raise SampleError(name, "is a folder" if path.is_dir() else "does not exist", "an image file", index)
        if path.stat().st_size == 0:
            raise SampleError(name, "is empty (0 bytes)", "an image file", index)
        return Image.open(path)
    if isinstance(sample, np.ndarray):
        channels = sample.shape[2] if sample.ndim == 3 else 1
        if sample.dtype != np.uint8 or sample.ndim not in (2, 3) or channels not in (1, 3, 4):
            raise SampleError(name, f"a {sample.dtype} array of shape {sample.shape}", READABLE, index)
        return Image.fromarray(sample[..., 0] if sample.ndim == 3 and channels == 1 else sample)
    raise SampleError(name, f"is a {type(sample).__name__}", READABLE, index)


def _upright_8_bit(image: Image.Image, name: str, index: int) -> Image.Image:
    """The decoded picture as RGB, or RGBA if it has transparent parts."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        limit = 1.0 if image.mode.startswith("F") else 65535.0
        if not (values.min() >= 0 and values.max() <= limit):
            problem = f"{image.mode} pixels from {values.min():g} to {values.max():g}"
            raise SampleError(name, problem, f"values from 0 to {limit:g} (16-bit integers, or floats up to 1)", index)
        image = Image.fromarray(np.rint(values * (255 / limit)).astype(np.uint8))
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


class ImageProcessor(Processor):
    """Pictures -> normalised pixels.

    Evaluation, and training without augmentation, resize the shorter side and take the centre (timm's evaluation
    transform). Training uses `augmentation`.

    Args:
        size: height and width of the result.
        mean: mean of each channel, in units of 0 to 1, that is subtracted.
        std: standard deviation of each channel that is divided by.
        crop_fraction: part of the shorter side that the centre crop keeps (timm's `crop_pct`).
        augmentation: how training pictures are changed; None leaves them alone.
        interpolation: `"bicubic"`, `"bilinear"`, `"lanczos"` or `"nearest"`.
        max_pixels: pictures with more pixels are refused before they are decoded.
    """

    def __init__(
        self,
        size: int = 64,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        crop_fraction: float = 1.0,
        augmentation: ImageAugmentation | None = None,
        interpolation: str = "bicubic",
        max_pixels: int = 64_000_000,
    ) -> None:
        if not 0 < crop_fraction <= 1:
            raise ConfigError(f"crop_fraction is {crop_fraction}; expected above 0 and at most 1")
        if size < 1 or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                f"size {size}, mean {mean}, std {std}: expected a size above 0, 3 means and 3 positive stds"
            )
        self.size = size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.max_pixels = max_pixels
        self.augmentation = augmentation
        self._evaluation_transform = create_transform(
            size, is_training=False, crop_pct=crop_fraction, interpolation=interpolation, normalize=False
        )

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """Read, resize and normalise.

        Args:
            samples: PIL images, paths, or uint8 arrays (height, width[, channels]).
            training: apply the augmentation.

        Returns:
            `pixels`: float32 (batch, 3, size, size).

        Raises:
            SampleError: a picture that can't be read.
        """
        augmentation = self.augmentation if training else None
        opacity = augmentation is not None and augmentation.reads_opacity
        images = [self._read(sample, index, opacity) for index, sample in enumerate(samples)]
        if augmentation is not None:
            pixels = augmentation(images, self.size)
        else:
            pixels = torch.stack([self._evaluation_transform(image) for image in images])  # uint8
        mean = torch.tensor(self.mean).view(3, 1, 1)
        std = torch.tensor(self.std).view(3, 1, 1)
        return {"pixels": pixels.to(torch.float32).sub_(255 * mean).div_(255 * std)}

    def _read(self, sample: Any, index: int, opacity: bool) -> Image.Image:
        image = read_image(sample, max_pixels=self.max_pixels, index=index, opacity=opacity)
        # the shorter side is scaled to `size`, so a long thin strip would grow out of all proportion
        resized = max(image.size) * self.size**2 / min(image.size)
        if resized > self.max_pixels:
            problem = f"{image.width} x {image.height} pixels is too elongated to bring its shorter side to {self.size}"
            raise SampleError(_name_of(sample, index), problem, f"at most {self.max_pixels} pixels then", index)
        return image
