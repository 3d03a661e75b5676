"""Two dimensions of an embedding space, for a map that people look at."""

from __future__ import annotations

from typing import Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from mmpt.errors import DataError
from mmpt.evaluation.checks import Array, embeddings_of

TSNE_LIMIT = 2000
"""Most points for t-SNE: beyond, it takes minutes and the map shows clumps that are its own."""


def two_dimensional(embeddings: Array, seed: int = 0, method: Literal["pca", "tsne"] = "pca") -> np.ndarray:
    """Project embeddings to the plane.

    PCA is linear: distances in the map are distances in the space, as far as two directions hold them. t-SNE (van der
    Maaten & Hinton 2008; cosine distance here) shows who is whose neighbour; sizes of clusters and the
    distances between them mean nothing.

    Args:
        embeddings: (n, d).
        seed: of t-SNE, and of the randomised solver that PCA takes for large inputs.
        method: `pca` or `tsne`.

    Returns:
        float32 (n, 2). With a single example or dimension the missing axes are 0.

    Raises:
        DataError: values that are not finite, or a number of points that t-SNE can't place.
    """
    values = embeddings_of(embeddings, "embeddings").cpu().numpy()
    n, d = values.shape
    if method == "tsne":
        if not 4 <= n <= TSNE_LIMIT or d < 2:
            raise DataError(
                f"t-SNE was asked for {n} points of {d} dimensions; expected 4 to {TSNE_LIMIT} points of at least 2: "
                'draw a sample of them, or take method="pca"'
            )
        perplexity = min(30.0, (n - 1) / 3.0)
        projected = TSNE(perplexity=perplexity, metric="cosine", init="pca", random_state=seed).fit_transform(values)
        return np.asarray(projected, dtype=np.float32)
    points = np.zeros((n, 2), dtype=np.float32)
    if n > 1:
        axes = min(2, d)
        points[:, :axes] = PCA(n_components=axes, random_state=seed).fit_transform(values)
    return points
