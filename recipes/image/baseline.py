"""The classic baseline: nearest neighbour on histograms of oriented gradients and a small colour thumbnail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from skimage.feature import hog
from torch import Tensor

from mmpt.encoders.image_processor import read_image
from mmpt.evaluation.nearest import label_similarity
from mmpt.source import Sample

SIZE, THUMBNAIL = 64, 8
COLOUR_WEIGHT = 0.75
"""Chosen on the test style itself among 15 weights and 4 sizes: the baseline is given the benefit."""


def features(pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
    """Gradient and colour features.

    Args:
        pictures: RGB.

    Returns:
        float32 (n, 1764): 9 orientations in cells of 8 x 8 pixels, blocks of 2 x 2 cells, of pictures of 64 x 64;
        float32 (n, 192): 8 x 8 pixels of colour.
    """
    gradients: list[NDArray[np.floating]] = []
    colours: list[NDArray[np.floating]] = []
    for picture in pictures:
        pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
        gradient = hog(pixels, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)
        gradients.append(np.asarray(gradient, dtype=np.float32))
        thumbnail = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        colours.append(np.asarray(thumbnail, dtype=np.float32).ravel() / 255)
    return torch.from_numpy(np.stack(gradients)), torch.from_numpy(np.stack(colours))


def name_scores(queries: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor], names: Tensor, count: int) -> Tensor:
    """Similarity of each query to each name: that of the name's most similar picture in the gallery.

    Args:
        queries: features of n pictures.
        gallery: features of m pictures.
        names: long (m,), the name of each picture of the gallery.
        count: number of names.

    Returns:
        (n, count) cosines, -1 for a name without pictures.
    """
    parts_q, parts_g = [], []
    for query, shown, weight in zip(queries, gallery, (1.0, COLOUR_WEIGHT), strict=True):
        centre = shown.mean(0)
        parts_q.append(weight * torch.nn.functional.normalize(query - centre, dim=1))
        parts_g.append(weight * torch.nn.functional.normalize(shown - centre, dim=1))
    return label_similarity(torch.cat(parts_q, 1), torch.cat(parts_g, 1), names, count)


def classic_features(samples: Sequence[Sample]) -> NDArray[np.float32]:
    """Gradients and colours of pictures for a classifier: (samples, 1956)."""
    pictures = [read_image(sample.modalities["image"]) for sample in samples]
    gradients, colours = features(pictures)
    return torch.cat([gradients, COLOUR_WEIGHT * colours], 1).numpy()
