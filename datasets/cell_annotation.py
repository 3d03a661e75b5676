"""What a scanpy user asks of a model: coordinates in `adata.obsm`, and a table of types for each cell."""

from __future__ import annotations

from collections.abc import Sequence

import anndata
import pandas as pd
from torch import Tensor

from mmpt.datasets.cell_text import Definitions
from mmpt.encoders.cell_expression import Cell, expression_of
from mmpt.evaluation.matching import match_probabilities, mixed_scores
from mmpt.heads.alignment import MatchingHead
from mmpt.model import TEXT, MultimodalModel

CELL = "cell"


def cells_of(adata: anndata.AnnData, layer: str | None = None) -> list[Cell]:
    """All cells of an AnnData object, read and checked once: samples for any function that takes them.

    Args:
        adata: cells by genes.
        layer: which matrix, see `mmpt.encoders.cell_expression.expression_of`.
    """
    expression = expression_of(adata, layer)
    return [Cell(expression, row) for row in range(len(expression))]


def embed_cells(
    model: MultimodalModel,
    adata: anndata.AnnData,
    key: str | None = "X_mmpt",
    layer: str | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Embed all cells, and write the result where scanpy looks for it: `sc.pp.neighbors(adata, use_rep="X_mmpt")`.

    Args:
        model: has the modality `cell`.
        adata: cells by genes.
        key: of `adata.obsm`; None leaves `adata` as it is.
        layer: which matrix.
        batch_size: cells at once.

    Returns:
        (cells, embed_dim), L2-normalised.
    """
    vectors = model.embed(CELL, cells_of(adata, layer), batch_size)
    if key is not None:
        adata.obsm[key] = vectors.cpu().numpy()
    return vectors


def annotate(
    model: MultimodalModel,
    adata: anndata.AnnData,
    labels: Sequence[str],
    definitions: Definitions | None = None,
    head: MatchingHead | None = None,
    share: float = 0.5,
    temperature: float = 0.05,
    layer: str | None = None,
) -> pd.DataFrame:
    """Type cells by descriptions, without training (LangCell's zero-shot annotation).

    Args:
        model: has the modality `cell`.
        adata: cells by genes.
        labels: names of the candidate types, or whole descriptions.
        definitions: names that it knows are replaced by their descriptions; by default mmpt's blood cells.
        head: the matching head of the second stage (`mmpt.checkpoint.load_heads`); without it, similarity alone
            decides.
        share: of the similarity in the score, with a head.
        temperature: of the softmax over similarities.
        layer: which matrix.

    Returns:
        One row for each cell (`adata.obs_names`), one column for each label, rows sum to 1.
        `table.idxmax(axis=1)` is the type.
    """
    known = definitions or Definitions()
    texts = [known.describe(label) if known.find(label).definition else label for label in labels]
    cells = cells_of(adata, layer)
    cosines = model.embed(CELL, cells) @ model.embed(TEXT, texts).T
    if head is None:
        scores = (cosines / temperature).softmax(1)
    else:
        probabilities = match_probabilities(model, head, cells, texts).to(cosines.device)
        scores = mixed_scores(cosines, probabilities, share, temperature)
    return pd.DataFrame(scores.cpu().numpy(), index=adata.obs_names, columns=list(labels))
