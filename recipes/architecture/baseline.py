"""The classic baseline of neural architectures: bags of operators and widths, without the number of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmpt.datasets.architecture_baselines import bag_of_types
from mmpt.encoders.architecture_graph import vocabulary
from mmpt.source import Sample


def classic_features(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """`bag_of_types` of networks for a classifier.

    The number of parameters is left out: by default the class is made of it.
    """
    graphs = [sample.modalities["architecture"] for sample in samples]
    return np.delete(bag_of_types(graphs), len(vocabulary("mmpt").numbers), axis=1)
