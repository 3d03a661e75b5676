"""The classic baseline of charts: histograms of oriented gradients and a small thumbnail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage.feature import hog

from mmpt.encoders.image_processor import read_image
from mmpt.source import Sample

SIZE, THUMBNAIL = 64, 8


def classic_features(samples: Sequence[Sample]) -> NDArray[np.float32]:
    """Gradients and grey values of charts for a classifier: (samples, 1828).

    9 orientations in cells of 8 x 8 pixels, blocks of 2 x 2 cells, of pictures of 64 x 64 (1764), and 8 x 8 grey
    values; charts are padded to a square as for the encoder.
    """
    rows = []
    for sample in samples:
        picture = ImageOps.pad(read_image(sample.modalities["chart"]), (SIZE, SIZE), color="white").convert("L")
        pixels = np.asarray(picture, dtype=np.float32) / 255
        gradients = hog(pixels, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2))
        grey = np.asarray(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX), dtype=np.float32).ravel() / 255
        rows.append(np.concatenate([gradients, grey]))
    return np.stack(rows).astype(np.float32)
