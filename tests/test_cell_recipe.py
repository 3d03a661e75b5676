"""The baselines that the cell recipe is compared with."""

import importlib.util

import anndata
import numpy as np
import pandas as pd
import pytest
from cells import adata
from scipy import sparse

from mmpt.catalogue import recipes_folder
from mmpt.datasets.cell_annotation import cells_of
from mmpt.datasets.cell_text import CellType


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("cell_baseline", recipes_folder() / "cell" / "baseline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def study(values, genes) -> anndata.AnnData:
    return anndata.AnnData(sparse.csr_matrix(np.array(values, dtype=np.float32)), var=pd.DataFrame(index=genes))


def test_log_expression_is_log1p_of_counts_per_ten_thousand(baseline):
    counted = cells_of(study([[1, 3, 0], [0, 0, 5]], ["A", "B", "C"]))
    expected = np.log1p([[2500, 7500, 0], [0, 0, 10000]])
    np.testing.assert_allclose(baseline.log_expression(counted), expected)
    np.testing.assert_allclose(baseline.log_expression(counted, ["C", "A"]), expected[:, [2, 0]])
    logged = cells_of(study(expected, ["A", "B", "C"]))
    np.testing.assert_allclose(baseline.log_expression(logged), expected, rtol=1e-6)


def test_two_studies_are_compared_over_their_shared_genes(baseline):
    first = cells_of(study([[1, 1, 2]], ["A", "B", "C"]))
    second = cells_of(study([[4, 4]], ["C", "A"]))
    values = baseline.log_expression([*first, *second])
    assert baseline.genes_of([*first, *second]) == ["A", "C"]
    np.testing.assert_allclose(values, np.log1p([[2500, 5000], [5000, 5000]]))


def test_ranks_leave_out_what_is_not_expressed(baseline):
    np.testing.assert_allclose(baseline.ranks(np.array([[0.0, 3.0, 1.0, 3.0]])), [[0, 0.875, 0.5, 0.875]])


def test_markers_find_the_types_that_were_drawn(baseline):
    data = adata(60)
    kinds = [CellType(name, markers=tuple(f"GENE{10 * i + j}" for j in range(10))) for i, name in enumerate("abc")]
    scores = baseline.marker_scores(cells_of(data), [*kinds, CellType("unmarked"), CellType("alien", markers=("X",))])
    assert (scores.argmax(1) == np.arange(60) % 3).mean() > 0.95
    assert np.isneginf(scores[:, 3:]).all()
