"""Random changes of training pictures, applied by `mmpt.encoders.image.ImageProcessor`."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from mmpt.config import Configurable


class ImageAugmentation(Configurable, ABC):
    """Pictures of any size -> one batch of randomly changed pictures of the encoder's size.

    Every draw comes from torch's global generator, so that a batch is augmented alike whichever worker prepares it.
    """

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image], size: int) -> Tensor:
        """Change a batch.

        Args:
            images: RGB pictures.
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
