"""Small AnnData for the tests of the cell modality."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

GENES = [f"GENE{i}" for i in range(30)]
TYPES = ["B", "NK", "Platelet"]


def counts(cells: int = 24, genes: int = 30, seed: int = 0) -> np.ndarray:
    """Counts in which each type expresses ten genes of its own more than the others."""
    generator = np.random.default_rng(seed)
    rate = np.full((cells, genes), 0.4)
    for cell in range(cells):
        own = cell % 3
        rate[cell, 10 * own : 10 * own + 10] = 4.0
    table = generator.poisson(rate).astype(np.float32)
    table[:, 0] += 1  # no cell is empty
    return table


def adata(cells: int = 24, seed: int = 0, genes: list[str] | None = None, **obs: list[str]) -> anndata.AnnData:
    """Raw counts with a type for each cell."""
    names = genes or GENES
    frame = pd.DataFrame(
        {"cell_type": [TYPES[i % 3] for i in range(cells)], **obs}, index=[f"c{i}" for i in range(cells)]
    )
    return anndata.AnnData(
        sparse.csr_matrix(counts(cells, len(names), seed)), obs=frame, var=pd.DataFrame(index=list(names))
    )
