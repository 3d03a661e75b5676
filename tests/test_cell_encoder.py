"""Rank-value tokens, gene vocabularies and the cell encoder."""

import pickle
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, adata
from scipy import sparse

from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.encoders.cell import Cell, CellEncoder, CellProcessor, GeneVocabulary, GeneWarning, expression_of
from mmpt.encoders.cell_processor import rank_tokens, rank_values
from mmpt.encoders.cell_vocabulary import medians_of, read_pickle
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.masking import Uniform
from mmpt.model import Modality, MultimodalModel
from mmpt.source import Sample, Source
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece


class OneStudy(Source):
    """All cells of an AnnData in the training split."""

    def __init__(self, data) -> None:
        self.expression = expression_of(data)

    def split(self, name):
        rows = range(len(self.expression)) if name == "train" else []
        return [Sample({"cell": Cell(self.expression, row)}, str(row)) for row in rows]


def table(tmp_path, rows: dict[str, float], symbols: dict[str, str] | None = None) -> str:
    lines = [f"{gene}\t{median}\t{(symbols or {}).get(gene, '')}" for gene, median in rows.items()]
    path = tmp_path / "genes.tsv"
    path.write_text("gene\tmedian\tsymbol\n" + "\n".join(lines), encoding="utf-8")
    return str(path)


def tokens_of(values, medians, ids, limit=2047):
    """The spec's worked examples: tokens of one cell with given ids."""
    row = sparse.csr_matrix(np.array([values], dtype=np.float64))
    spread = np.ones(max(ids) + 1)
    spread[np.array(ids) - 2] = medians
    tokens, lengths = rank_tokens(row, np.array(ids), spread, limit)
    return tokens[0, : lengths[0]].tolist()


def one(values, genes, **layers) -> anndata.AnnData:
    return anndata.AnnData(
        np.array([values], dtype=np.float32), obs=pd.DataFrame(index=["only"]), var=pd.DataFrame(index=genes)
    )


def test_the_worked_example_of_rank_values():
    values = rank_values(np.array([3.0, 1.0, 0.0, 6.0]), np.array(10.0), np.array([2.0, 0.5, 4.0, 1.0]))
    assert values.tolist() == [1500.0, 2000.0, 0.0, 6000.0]
    assert tokens_of([3, 1, 0, 6], [2, 0.5, 4, 1], [10, 11, 12, 13]) == [13, 11, 10]
    assert tokens_of([21, 7, 0, 42], [2, 0.5, 4, 1], [10, 11, 12, 13]) == [13, 11, 10]


def test_ties_stand_in_the_order_of_their_ids():
    assert tokens_of([2, 2, 4], [1, 1, 2], [7, 5, 6]) == [5, 6, 7]


def test_log_normalised_data_give_the_tokens_of_their_counts(tmp_path):
    genes = ["A", "B", "C", "D"]
    processor = CellProcessor(GeneVocabulary(path=table(tmp_path, {"A": 2, "B": 0.5, "C": 4, "D": 1})))
    values = np.array([3.0, 1.0, 0.0, 6.0])
    ids = [processor(one(v, genes))["ids"][0].tolist() for v in (values, 7 * values, np.log1p(values / 10 * 1e4))]
    assert ids[0] == [6, 5, 3, 2]  # <cls>, D, B, A
    assert ids[1] == ids[0]
    assert ids[2] == ids[0]


def test_expression_is_told_in_units_of_the_cells_mean(tmp_path):
    genes = ["A", "X", "B", "C", "D"]
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 2, "B": 0.5, "C": 4, "D": 1}))
    values = np.array([3.0, 40.0, 1.0, 0.0, 6.0])  # X is unknown, and counts in the total
    logs = np.log1p(np.array([6.0, 1.0, 3.0]) / 50 * 1e4)  # D, B, A
    expected = [1.0, *(logs / logs.mean())]
    logged = one(np.log1p(values / 50 * 1e4), genes)
    for data in (one(values, genes), one(7 * values, genes), logged, logged[:, ["A", "B", "C", "D"]].copy()):
        inputs = CellProcessor(vocabulary, expression=True)(data)
        assert inputs["ids"][0].tolist() == [6, 5, 3, 2]
        assert inputs["weights"][0].tolist() == pytest.approx(expected, rel=1e-6)
    short = CellProcessor(vocabulary, max_length=3, expression=True)(one(values, genes))
    assert short["weights"][0].tolist() == pytest.approx([1.0, *(logs[:2] / logs[:2].mean())], rel=1e-6)


def test_genes_that_are_dropped_count_in_the_total_all_the_same(tmp_path, monkeypatch):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1, "B": 1, "C": 1}))
    processor = CellProcessor(vocabulary, gene_dropout=0.5, expression=True)
    kept = sparse.csr_matrix(np.array([[4.0, 1.0, 0.0]]))
    monkeypatch.setattr(processor, "_drop_genes", lambda rows: kept)
    weights = processor(one([4.0, 1.0, 5.0], ["A", "B", "C"]), training=True)["weights"][0]
    logs = np.log1p(np.array([4.0, 1.0]) / 10 * 1e4)
    assert weights.tolist() == pytest.approx([1.0, *(logs / logs.mean())], rel=1e-6)


def test_expression_of_several_matrices_is_padded_with_zeros(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 2, "B": 0.5}))
    one_gene, two = expression_of(one([5.0], ["A"])), expression_of(one([1.0, 1.0], ["B", "A"]))
    inputs = CellProcessor(vocabulary, expression=True)([Cell(two, 0), Cell(one_gene, 0), Cell(two, 0)])
    assert inputs["weights"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1]]
    assert "weights" not in CellProcessor(vocabulary)([Cell(two, 0)])


def test_expression_of_genes_that_stand_twice_is_that_of_their_sum(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1, "B": 1, "C": 1}))
    processor = CellProcessor(vocabulary, expression=True)
    with pytest.warns(GeneWarning):
        twice = processor(one([1.0, 3.0, 2.0, 4.0], ["C", "A", "B", "C"]))
    once = processor(one([3.0, 2.0, 5.0], ["A", "B", "C"]))
    assert twice["ids"].tolist() == once["ids"].tolist()
    torch.testing.assert_close(twice["weights"], once["weights"])


def test_a_cell_without_a_known_gene_has_no_expression_but_finite(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1}))
    data = anndata.AnnData(np.array([[1.0, 2.0], [0.0, 3.0]], dtype=np.float32), var=pd.DataFrame(index=["A", "X"]))
    with pytest.warns(GeneWarning):
        assert CellProcessor(vocabulary, expression=True)(data)["weights"].tolist() == [[1, 1], [1, 0]]


def test_what_is_hidden_does_not_show_its_expression():
    data = adata()
    encoder = CellEncoder(GeneVocabulary(cells=OneStudy(data)), width=8, depth=0, expression=True, dropout=0.0)
    inputs = encoder.processor(data)
    action = torch.full(inputs["ids"].shape, KEEP)
    action[:, 1], action[:, 2] = MASK, RANDOM
    corruption = Corruption(action, action != KEEP)
    other = inputs["weights"].clone()
    other[:, 1:3] *= 5
    tokens = []
    for weights in (inputs["weights"], other):
        torch.manual_seed(0)
        tokens.append(encoder(inputs | {"weights": weights}, corruption).values)
    assert torch.equal(*tokens)


def test_expression_scales_the_vectors_of_genes():
    data = adata()
    vocabulary = GeneVocabulary(cells=OneStudy(data))
    encoder = CellEncoder(vocabulary, width=8, depth=0, expression=True, final_norm=False, dropout=0.0)
    inputs = encoder.processor(data)
    tokens = encoder(inputs).values - encoder(inputs | {"weights": torch.zeros_like(inputs["weights"])}).values
    expected = encoder.gene(inputs["ids"]) * inputs["weights"].unsqueeze(-1)
    torch.testing.assert_close(tokens, expected, atol=1e-6, rtol=0)


def test_a_long_cell_keeps_its_top_genes_behind_cls(tmp_path):
    names = [f"G{i:04d}" for i in range(3000)]
    processor = CellProcessor(GeneVocabulary(path=table(tmp_path, dict.fromkeys(names, 1.0))))
    inputs = processor(one(np.arange(3000, 0, -1), names))
    assert inputs["ids"].shape == (1, 2048)
    assert inputs["ids"][0, 0] == processor.vocabulary.cls == 3002
    assert inputs["ids"][0, 1:].tolist() == list(range(2, 2049))


def test_a_batch_equals_a_sort_of_each_cell_by_itself():
    generator = np.random.default_rng(0)
    dense = generator.poisson(0.7, (300, 60)).astype(np.float64)
    dense[17] = 0
    medians = generator.choice([0.5, 1.0, 2.0, 3.0], 60)  # many ties
    columns = generator.permutation(60) + 2
    columns[[3, 30]] = -1
    tokens, lengths = rank_tokens(sparse.csr_matrix(dense), columns, medians, 20)
    for row in range(300):
        known = [(-dense[row, i] / medians[columns[i] - 2], columns[i]) for i in range(60) if columns[i] >= 0]
        expected = [token for value, token in sorted(known) if value < 0][:20]
        assert tokens[row, : lengths[row]].tolist() == expected
        assert not tokens[row, lengths[row] :].any()


def test_medians_are_over_cells_that_express_the_gene():
    data = anndata.AnnData(
        sparse.csr_matrix(np.array([[1, 9, 0], [3, 7, 0], [0, 10, 0]], dtype=np.float32)),
        var=pd.DataFrame(index=["X", "Y", "Z"]),
    )
    genes, medians = medians_of(OneStudy(data))
    assert genes == ["X", "Y"]  # Z is never expressed
    np.testing.assert_allclose(medians, [2000, 9000])


def test_ids_follow_geneformer(tmp_path):
    tokens = {"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2, "ENSG00000000005": 3, "<cls>": 4}
    medians = {"ENSG00000000003": np.float64(2.001186), "ENSG00000000005": 1}
    paths = {}
    for name, content in (("tokens", tokens), ("medians", medians), ("symbols", {"TSPAN6": "ENSG00000000003"})):
        paths[name] = str(tmp_path / f"{name}.pkl")
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    vocabulary = GeneVocabulary(path=paths["tokens"], medians=paths["medians"], symbols=paths["symbols"])
    assert (len(vocabulary), vocabulary.cls) == (5, 4)
    assert vocabulary.ids(["ENSG00000000005.7", "TSPAN6", "ACTB"]).tolist() == [3, 2, -1]
    assert vocabulary.medians[0] == 2.001186


def test_a_pickle_with_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(DataError, match="not a plain value"):
        read_pickle(tmp_path / "evil.pkl")
    assert not (tmp_path / "written").exists()


def test_a_saved_vocabulary_is_read_back_exactly(tmp_path):
    made = GeneVocabulary(cells=OneStudy(adata()))
    config = made.config(tmp_path)
    again = GeneVocabulary(path=config["init_args"]["path"].replace("${folder}", str(tmp_path)))
    assert again.genes == made.genes
    assert np.array_equal(again.medians, made.medians)


def test_rows_of_several_matrices_keep_their_order():
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    processor = CellProcessor(vocabulary)
    first, second = expression_of(adata(seed=1)), expression_of(adata(seed=2))
    mixed = processor([Cell(first, 3), Cell(second, 0), Cell(first, 1), adata(seed=2)[5]])
    alone = [processor([cell]) for cell in (Cell(first, 3), Cell(second, 0), Cell(first, 1), Cell(second, 5))]
    for row, single in enumerate(alone):
        length = int(single["mask"].sum())
        assert mixed["ids"][row, :length].tolist() == single["ids"][0].tolist()
        assert int(mixed["mask"][row].sum()) == length


def test_anndata_is_a_batch_of_its_cells():
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    whole = CellProcessor(vocabulary)(adata())
    assert len(whole["ids"]) == 24
    parts = CellProcessor(vocabulary)([Cell(expression_of(adata()), row) for row in range(24)])
    assert torch.equal(whole["ids"], parts["ids"])


def test_ensembl_ids_may_stand_in_a_column(tmp_path):
    ids = [f"ENSG{i:011d}" for i in range(30)]
    vocabulary = GeneVocabulary(path=table(tmp_path, dict.fromkeys(ids, 1.0)))
    data = adata()
    data.var["gene_ids"] = [f"{name}.3" for name in ids]
    assert CellProcessor(vocabulary)(data)["mask"].sum() > 100


def test_unknown_genes_are_counted_and_named(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, dict.fromkeys(GENES[:28], 1.0)))
    with pytest.warns(GeneWarning, match="2 of 30 genes are unknown.*GENE28, GENE29"):
        CellProcessor(vocabulary)(adata())


def test_genes_that_stand_twice_are_summed_and_named(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1.0, "B": 1.0}))
    with pytest.warns(GeneWarning, match="more than once and are summed: A"):
        inputs = CellProcessor(vocabulary)(one([2, 3, 2], ["A", "B", "A"]))
    assert inputs["ids"][0].tolist() == [4, 2, 3]  # A has 4, B has 3


def test_a_cell_without_a_known_gene_is_cls_alone(tmp_path):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1.0}))
    data = anndata.AnnData(np.array([[0, 5], [2, 1]], dtype=np.float32), var=pd.DataFrame(index=["A", "other"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = CellProcessor(vocabulary)(data)
    assert inputs["mask"].sum(1).tolist() == [1, 2]
    encoder = CellEncoder(vocabulary, width=16, depth=1, max_length=8)
    assert torch.isfinite(encoder(inputs).values[inputs["mask"]]).all()


@pytest.mark.parametrize(
    ("values", "problem"),
    [([0, 0], "no expressed gene"), ([1, np.nan], "non-finite"), ([1, -1], "negative")],
)
def test_a_bad_cell_is_named(tmp_path, values, problem):
    vocabulary = GeneVocabulary(path=table(tmp_path, {"A": 1.0, "B": 1.0}))
    table_ = np.tile(np.array([[2.0, 3.0]], dtype=np.float32), (40, 1))
    table_[7] = values
    data = anndata.AnnData(sparse.csr_matrix(table_), var=pd.DataFrame(index=["A", "B"]))
    with pytest.raises(SampleError, match=problem) as error:
        CellProcessor(vocabulary)(data)
    assert error.value.index == 7
    assert error.value.sample == "7"


def test_scaled_values_are_refused_with_the_way_out():
    data = adata()
    data.X = (data.X.toarray() - 1.0) / 2.0
    with pytest.raises(DataError, match=r"scaled .*adata\.raw = adata"):
        expression_of(data)


def test_raw_counts_elsewhere_are_found():
    data = adata()
    kept = data.X.copy()
    data.layers["counts"] = kept
    data.X = (kept.toarray() - 1.0) / 2.0
    found = expression_of(data)
    assert found.kind == "counts"
    assert (found.rows([0]) != kept[[0]]).nnz == 0
    data.raw = adata(seed=5)
    del data.layers["counts"]
    assert (expression_of(data).rows([0]) != adata(seed=5).X[[0]]).nnz == 0
    with pytest.raises(DataError, match="has no layer 'spliced'; it has X, raw"):
        expression_of(data, "spliced")


def test_kinds_of_values_are_told_apart():
    data = adata()
    linear = data.X.toarray() * 17.3
    for matrix, kind in ((data.X, "counts"), (np.log1p(linear), "log"), (linear, "linear")):
        data.X = matrix
        assert expression_of(data).kind == kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.T, "transposed; give adata.T"),
        (lambda d: renamed(d, [f"ENSMUSG{i:011d}" for i in range(30)]), "another species"),
        (lambda d: renamed(d, [name.capitalize() for name in GENES]), "another species"),
        (lambda d: renamed(d, [f"probe {i}" for i in range(30)]), "none of its 30 genes"),
    ],
)
def test_data_that_share_no_gene_say_why(tmp_path, change, message):
    vocabulary = GeneVocabulary(path=table(tmp_path, dict.fromkeys(GENES, 1.0)))
    with pytest.raises(DataError, match=message):
        CellProcessor(vocabulary)(change(adata()))


def renamed(data, genes):
    return anndata.AnnData(data.X, obs=data.obs, var=pd.DataFrame(index=genes))


def test_gene_dropout_leaves_a_part_of_the_genes_in_their_order():
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    processor = CellProcessor(vocabulary, gene_dropout=0.5)
    whole, torn = processor(adata()), processor(adata(), training=True)
    shares = torn["mask"].sum(1) / whole["mask"].sum(1)
    assert 0.6 < float(shares.mean()) < 0.95
    for row in range(24):
        left = [token for token in whole["ids"][row].tolist() if token in torn["ids"][row].tolist()]
        assert torn["ids"][row][torn["mask"][row]].tolist() == left[: int(torn["mask"][row].sum())]


def test_masks_hit_genes_at_the_rate_of_bert_and_no_special_token():
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    encoder = CellEncoder(vocabulary, width=16, depth=1, max_length=64)
    ids = torch.full((100, 101), 5)
    ids[:, 0] = vocabulary.cls
    inputs = {"ids": ids, "mask": torch.ones(100, 101, dtype=torch.bool)}
    corruption = Uniform()(encoder.units(inputs), generator=torch.Generator().manual_seed(0))
    assert abs(int(corruption.predicted.sum()) - 1500) < 107
    assert not corruption.predicted[:, 0].any()


def test_random_genes_are_never_special(monkeypatch):
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    encoder = CellEncoder(vocabulary, width=16, depth=0, max_length=200)
    inputs = {"ids": torch.full((50, 100), 5), "mask": torch.ones(50, 100, dtype=torch.bool)}
    action = torch.full((50, 100), RANDOM, dtype=torch.uint8)
    seen = []
    encoder.gene.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    encoder(inputs, Corruption(action, action == RANDOM))
    assert seen[0].min() == 2
    assert seen[0].max() == vocabulary.cls - 1
    for kind, expected in ((MASK, 1), (KEEP, 5)):
        encoder(inputs, Corruption(torch.full_like(action, kind), action == RANDOM))
        assert (seen[-1] == expected).all()


def test_a_gene_and_its_word_start_as_one_vector_and_other_words_as_small_ones():
    tokenizer = train_wordpiece([*GENES, *GENES, "kills cells", "kills cells"], 400)
    text = TextTransformer(tokenizer, width=64, depth=1, heads=4)
    vocabulary = GeneVocabulary(cells=OneStudy(adata()))
    encoder = CellEncoder(vocabulary, width=64, depth=1, max_length=64, named_genes=True)
    assert len(encoder.unit_names()) == len(GENES)
    MultimodalModel(text, {"cell": Modality(encoder)}, shared_names=True)
    word, other = tokenizer.convert_tokens_to_ids(["gene7", "kills"])
    assert tokenizer.unk_token_id not in (word, other)
    torch.testing.assert_close(text.word.weight[word], encoder.gene.weight[vocabulary.ids(["GENE7"])[0]])
    assert text.word.weight[word].norm() > 3 * text.word.weight[other].norm()
    assert text.word.weight[other].any()
    assert not text.word.weight[tokenizer.pad_token_id].any()
    assert not encoder.gene.weight[0].any()


def test_words_start_by_themselves_where_names_are_not_shared():
    tokenizer = train_wordpiece([*GENES, *GENES], 400)
    encoder = CellEncoder(GeneVocabulary(cells=OneStudy(adata())), width=64, depth=1, max_length=64, named_genes=True)
    text = TextTransformer(tokenizer, width=64, depth=1, heads=4)
    MultimodalModel(text, {"cell": Modality(encoder)})
    assert text.word.weight.norm(dim=1).max() < 0.05 * 64**0.5


def test_a_vocabulary_has_one_origin():
    with pytest.raises(ConfigError, match="give one"):
        GeneVocabulary()
