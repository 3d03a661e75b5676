"""The baselines that the cell recipe is compared with, and its few-shot tuning."""

import importlib.util

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, TYPES, adata
from scipy import sparse

from mmpt import Modality, MultimodalModel
from mmpt.catalogue import recipes_folder
from mmpt.datasets.cell import Cells
from mmpt.datasets.cell_annotation import cells_of
from mmpt.datasets.cell_text import CellType
from mmpt.encoders.cell import CellEncoder, GeneVocabulary
from mmpt.evaluation.matching import match_probabilities
from mmpt.heads import MatchingHead
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece


def part_of_recipe(name):
    spec = importlib.util.spec_from_file_location(f"cell_{name}", recipes_folder() / "cell" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def baseline():
    return part_of_recipe("baseline")


@pytest.fixture(scope="module")
def few_shot():
    return part_of_recipe("few_shot")


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


def test_regression_from_scores_lies_between_the_scores_and_logistic_regression(baseline):
    generator = np.random.default_rng(0)
    centres, labels = generator.normal(size=(4, 20)), generator.integers(0, 4, 200)
    values = centres[labels] + 2 * generator.normal(size=(200, 20))
    train, test = values[:60], values[60:]
    plain = baseline.logistic_regression(train, labels[:60], test)
    none = np.zeros((200, 4))
    assert (baseline.regression_from_scores(train, labels[:60], none[:60], test, none[60:]) == plain).all()
    certain = 1000.0 * np.eye(4)[labels]
    found = baseline.regression_from_scores(train, labels[:60], certain[:60], test, certain[60:])
    assert (found == labels[60:]).all()
    hint = 2.0 * np.eye(4)[labels]
    helped = baseline.regression_from_scores(train[:8], labels[:8], hint[:8], test, hint[60:])
    assert (helped == labels[60:]).mean() > (
        baseline.logistic_regression(train[:8], labels[:8], test) == labels[60:]
    ).mean()


def test_regression_from_scores_answers_with_types_that_have_labels(baseline):
    values, scores = np.eye(3)[[0, 2, 0, 2]], np.tile([0.0, 50.0, 0.0], (4, 1))
    found = baseline.regression_from_scores(values, np.array([0, 2, 0, 2]), scores, values, scores)
    np.testing.assert_array_equal(found, [0, 2, 0, 2])


def test_the_few_shot_loss_is_the_sum_of_two_cross_entropies(few_shot):
    cosines, labels = torch.tensor([[0.8, 0.6]]), torch.tensor([0])
    logits = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])  # log-odds 2 and -1
    similar = np.log(1 + np.exp(-0.2 / 0.05))
    assert float(few_shot.few_shot_loss(cosines, logits, labels)) == pytest.approx(
        similar + np.log(1 + np.exp(-3)), rel=1e-5
    )
    p = 1 / (1 + np.exp([-2.0, 1.0]))
    released = similar + np.log(1 + np.exp(p[1] - p[0]))
    assert float(few_shot.few_shot_loss(cosines, logits, labels, matching="released")) == pytest.approx(
        released, rel=1e-5
    )


def test_few_shot_tuning_learns_the_cells_that_it_is_given(few_shot, tmp_path):
    torch.manual_seed(0)
    data = adata(12)
    data.write_h5ad(tmp_path / "cells.h5ad")
    text = TextTransformer(train_wordpiece([*TYPES, *GENES] * 2, 300), 32, 1, 4, cross_attention=True)
    vocabulary = GeneVocabulary(cells=Cells(str(tmp_path / "cells.h5ad"), validation_fraction=0, test_fraction=0))
    encoder = CellEncoder(vocabulary, width=32, depth=1, max_length=40)
    model = MultimodalModel(text, {"cell": Modality(encoder)}, embed_dim=16, fusion="cross_attention")
    head = MatchingHead("cell")
    head.bind(model)
    cells, labels = cells_of(data), [i % 3 for i in range(12)]

    def loss() -> float:
        words = model.process("text", TYPES)
        with torch.no_grad():
            encoded = model.modality("cell").encoder(model.process("cell", cells))
            pairs = few_shot.pair_logits(model, head, model.connect("cell", encoded), words)
            cosines = model.embed("cell", cells) @ model.embed("text", TYPES).T
        np.testing.assert_allclose(
            pairs.softmax(-1)[..., 1].numpy(), match_probabilities(model, head, cells, TYPES).numpy(), rtol=1e-4
        )
        return float(few_shot.few_shot_loss(cosines, pairs, torch.tensor(labels)))

    model.eval()
    before = loss()
    few_shot.tune(model, head, cells, labels, TYPES, epochs=20, lr=3e-3)
    assert loss() < 0.3 * before
