"""h5ad files, texts of cells, and what a scanpy user calls."""

import random

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from cells import GENES, TYPES, adata, counts
from scipy import sparse

from mmpt import Modality, MultimodalModel
from mmpt.connectors import LinearConnector
from mmpt.datasets.cell import Cells
from mmpt.datasets.cell_annotation import annotate, cells_of, embed_cells
from mmpt.datasets.cell_files import default_file, npz_to_h5ad, to_h5ad
from mmpt.datasets.cell_neighbours import neighbourhood_genes
from mmpt.datasets.cell_text import ASPECTS, Definitions, compose, gene_sentence, type_text
from mmpt.encoders.cell import CellEncoder, GeneVocabulary
from mmpt.errors import ConfigError, DataError
from mmpt.evaluation.matching import match_probabilities
from mmpt.heads import MatchingHead
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
SPLITS = ("train", "validation", "test")


def written(tmp_path, data=None, name="cells.h5ad") -> str:
    data = adata(60) if data is None else data
    data.write_h5ad(tmp_path / name)
    return str(tmp_path / name)


def listed(examples):
    return [examples[index] for index in range(len(examples))]


def names(source, split):
    return {sample.name for sample in listed(source.split(split))}


def test_the_default_cells_are_the_700_of_scanpy():
    source = Cells()
    parts = [listed(source.split(split)) for split in SPLITS]
    assert sum(len(part) for part in parts) == 700
    assert len(source.label_names("class")) == 10
    assert default_file().name == "10x_pbmc68k_reduced.h5ad"
    assert parts[0][0].modalities["cell"].expression.kind == "log"
    described = {source.definitions.find(name).definition for name in source.label_names("class")}
    assert len(described) == 10  # each type has a definition of its own
    assert "" not in described


def test_splits_are_stratified_disjoint_and_stay_when_cells_are_added(tmp_path):
    small, large = Cells(written(tmp_path)), Cells(written(tmp_path, adata(90), "more.h5ad"))
    parts = [names(small, split) for split in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 60
    for split in SPLITS:
        assert {sample.labels["class"] for sample in listed(small.split(split))} == {0, 1, 2}
    moved = sum(len(names(small, split) - names(large, split)) for split in SPLITS)
    assert moved <= 2  # a stratum's border may move by a cell


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("text", ["type", "genes"])
def test_lengths_are_the_expressed_genes_in_the_order_of_the_split(tmp_path, backed, text):
    data = adata(60)
    source = Cells(written(tmp_path, data), backed=backed, text=text)
    for split in SPLITS:
        cells = [sample.modalities["cell"] for sample in listed(source.split(split))]
        assert source.lengths(split) == [cell.expression.rows([cell.row]).nnz for cell in cells]
    assert len(set(source.lengths("train"))) > 1


def test_a_dense_file_on_the_disk_has_no_lengths(tmp_path):
    data = adata(60)
    data.X = data.X.toarray()
    assert Cells(written(tmp_path, data), backed=True).lengths("train") is None


def test_donors_are_never_divided(tmp_path):
    data = adata(60, donor_id=[f"d{i // 6}" for i in range(60)])
    source = Cells(written(tmp_path, data))
    donors = [{int(name[1:]) // 6 for name in names(source, split)} for split in SPLITS]
    assert all(donors)
    assert sum(map(len, donors)) == len(set().union(*donors))


def test_a_split_column_decides(tmp_path):
    data = adata(60, split=["train"] * 40 + ["validation"] * 5 + ["test"] * 15)
    assert [len(Cells(written(tmp_path, data)).split(split)) for split in SPLITS] == [40, 5, 15]


def test_excluded_types_are_nowhere_in_training(tmp_path):
    path = written(tmp_path)
    source = Cells(path, exclude=["natural killer cell"])  # another name of NK
    kinds = {split: {sample.labels["class"] for sample in listed(source.split(split))} for split in SPLITS}
    number = source.label_names("class").index("NK")
    assert number not in kinds["train"] | kinds["validation"]
    everyone = sum(sample.labels["class"] == number for sample in listed(source.split("test")))
    assert everyone == 20
    assert not any("killer" in text for text in source.texts())
    assert len(Cells(path, text="genes", exclude=["NK"]).split("train")) == len(source.split("train"))
    with pytest.raises(DataError, match="exclude names"):
        Cells(path, exclude=["osteoclast"]).split("train")


def test_excluded_cells_do_not_enter_the_medians(tmp_path):
    data = adata(60)
    lonely = sparse.lil_matrix(data.X)
    lonely[:, 29] = 0
    lonely[1::3, 29] = 50  # only NK express it
    data.X = sparse.csr_matrix(lonely)
    path = written(tmp_path, data)
    assert "GENE29" in GeneVocabulary(cells=Cells(path)).genes
    assert "GENE29" not in GeneVocabulary(cells=Cells(path, exclude=["NK"])).genes


def test_backed_data_give_the_same_cells(tmp_path):
    data = adata(60)
    data.layers["counts"] = data.X.copy()
    data.X = np.log1p(data.X.toarray())
    path = written(tmp_path, data)
    for layer in (None, "X"):
        in_memory, on_disk = Cells(path, layer=layer), Cells(path, layer=layer, backed=True)
        processor = CellEncoder(GeneVocabulary(cells=in_memory), width=16, depth=1).processor
        first = [sample.modalities["cell"] for sample in listed(in_memory.split("train"))]
        second = [sample.modalities["cell"] for sample in listed(on_disk.split("train"))]
        assert first[0].expression.kind == second[0].expression.kind == ("counts" if layer is None else "log")
        assert torch.equal(processor(first[::-1])["ids"], processor(second[::-1])["ids"])
        assert GeneVocabulary(cells=on_disk).genes == processor.vocabulary.genes


def test_a_folder_of_files_is_one_dataset(tmp_path):
    written(tmp_path, adata(30), "a.h5ad")
    written(tmp_path, adata(30, seed=3), "b.h5ad")
    source = Cells(str(tmp_path))
    assert len(source.everything()) == 60
    assert {sample.name.split(":")[0] for sample in listed(source.everything())} == {"a.h5ad", "b.h5ad"}


def test_cells_of_one_description_share_a_group_and_other_facts_are_told(tmp_path):
    data = adata(60, tissue=["blood" if i % 2 else "unknown" for i in range(60)], organ_state=["ill"] * 60)
    source = Cells(written(tmp_path, data), aspects={"disease": "organ_state"}, vary=False)
    samples = listed(source.split("train"))
    texts = {sample.labels["group"]: set() for sample in samples}
    for sample in samples:
        texts[sample.labels["group"]].add(sample.modalities["text"])
    assert all(len(own) == 1 for own in texts.values())
    assert len(texts) == 6
    told = next(iter(t for own in texts.values() for t in own if "tissue" in t))
    assert told.startswith("cell type: ")
    assert told.endswith("tissue: blood. disease: ill.")
    assert "unknown" not in told


def test_cells_without_any_description_are_still_cells(tmp_path):
    data = adata(60)
    del data.obs["cell_type"]
    source = Cells(written(tmp_path, data))
    assert not any("text" in sample.modalities for sample in listed(source.split("train")))
    assert source.label_names("class") == []
    data = adata(60)
    data.obs.loc[data.obs_names[:10], "cell_type"] = np.nan
    assert len(Cells(written(tmp_path, data)).everything()) == 60
    described = Cells(written(tmp_path, data))
    assert sum(len(described.split(split)) for split in SPLITS) == 50


def test_training_texts_vary_and_evaluation_texts_do_not():
    source = Cells()
    first = source.split("train")[0].modalities["text"]
    assert any(source.split("train")[0].modalities["text"] != first for _ in range(10))
    held = source.split("test")
    assert held[0].modalities["text"] == held[0].modalities["text"]


def test_gene_sentences_of_single_cells_name_genes_that_they_express():
    source = Cells(text="genes", neighbours=1)
    sample = source.split("train")[5]
    genes = sample.modalities["text"].removeprefix("genes: ").rstrip(".").split(", ")
    expression = sample.modalities["cell"].expression
    row = expression.rows([sample.modalities["cell"].row]).toarray()[0]
    place = {name: number for number, name in enumerate(expression.genes["index"])}
    assert len(set(genes)) == 12
    assert all(row[place[gene]] > 0 for gene in genes)
    assert sample.labels == {}
    assert len(source.split("test")) == 0 == len(source.everything())
    with pytest.raises(ConfigError, match="neighbours is 0"):
        Cells(neighbours=0)


def test_neighbourhoods_show_the_markers_of_a_type_without_labels():
    cells = cells_of(adata(90))
    found = neighbourhood_genes(cells, 20, 10)
    right = [[gene in GENES[10 * (i % 3) : 10 * (i % 3) + 10] for gene in genes] for i, genes in enumerate(found)]
    assert np.mean([np.mean(row) for row in right]) > 0.98
    alone = neighbourhood_genes(cells, 1, 10)
    own = [[gene in GENES[10 * (i % 3) : 10 * (i % 3) + 10] for gene in genes] for i, genes in enumerate(alone)]
    assert np.mean([np.mean(row) for row in own]) < np.mean([np.mean(row) for row in right])


def test_neighbourhood_scores_are_those_of_a_plain_computation():
    table = np.array([[3, 0, 1], [2, 1, 0], [0, 4, 1], [1, 3, 1]], dtype=np.float32)
    data = anndata.AnnData(sparse.csr_matrix(table), var=pd.DataFrame(index=["A", "B", "C"]))
    log = np.log1p(table / table.sum(1, keepdims=True) * 10_000)
    score = (log - log.mean(0)) / (log.std(0) + np.median(log.std(0)))
    expected = [[name for value, name in sorted(zip(-row, "ABC", strict=True)) if value < 0] for row in score]
    assert neighbourhood_genes(cells_of(data), 1, 3) == expected


def test_neighbourhoods_join_matrices_by_gene_and_leave_out_cells_without_expression():
    first, second = adata(30), adata(30, seed=1)
    second = second[:, ::-1].copy()
    second.X = sparse.csr_matrix(second.X.toarray() * (np.arange(30) != 4)[:, None])
    found = neighbourhood_genes([*cells_of(first), *cells_of(second)], 10, 5)
    assert found[34] == []
    assert all(set(found[i]) <= set(GENES[10 * (i % 3) : 10 * (i % 3) + 10]) for i in (0, 1, 2, 30, 31, 32))


def test_composed_texts():
    known = Definitions()
    assert known.find(" cd19+ b ") is known.find("B cell")
    whole = known.describe("NK")
    assert whole.startswith("cell type: natural killer cell. A cytotoxic lymphocyte")
    assert whole.endswith("KLRB1.") or "genes: GNLY, NKG7" in whole
    assert compose({"cell_type": "martian", "sex": "male"}, known) == "cell type: martian. sex: male."
    assert compose({}, known) == ""
    assert len(ASPECTS) == 8
    torn = {type_text(known.find("NK"), random.Random(i)) for i in range(20)}
    assert len(torn) == 20
    assert gene_sentence(["A", "B", "C"], 2, 3) == "genes: A, B."


def test_own_definitions(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text("id\tname\tdefinition\nCL:1\tmartian\tGreen and small.\n", encoding="utf-8")
    assert Definitions(path).describe("Martian") == "cell type: martian. Green and small."
    path.write_text("name\tdefinition\taliases\na\tx\tb\nb\ty\t\n", encoding="utf-8")
    with pytest.raises(DataError, match="name of two types"):
        Definitions(path)
    path.write_text("title\tdefinition\na\tx\n", encoding="utf-8")
    with pytest.raises(DataError, match="lacks a column"):
        Definitions(path)


def test_a_numpy_archive_becomes_h5ad(tmp_path):
    matrix = sparse.csr_matrix(counts(12))
    arrays = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr, "shape": np.array(matrix.shape)}
    labels = np.array(TYPES * 4)
    np.savez(
        tmp_path / "m.npz", **arrays, genes=np.array(GENES), cells=np.array([f"x{i}" for i in range(12)]), labels=labels
    )
    data = anndata.read_h5ad(npz_to_h5ad(tmp_path / "m.npz", tmp_path / "m.h5ad"))
    assert (matrix != data.X).nnz == 0
    assert data.obs["cell_type"].tolist() == labels.tolist()
    assert (data.obs_names[3], data.var_names[3]) == ("x3", "GENE3")
    np.savez(tmp_path / "bad.npz", data=matrix.data)
    with pytest.raises(DataError, match="no array"):
        npz_to_h5ad(tmp_path / "bad.npz", tmp_path / "bad.h5ad")
    with pytest.raises(DataError, match="transposed"):
        to_h5ad(matrix.T, GENES, tmp_path / "t.h5ad", cells=[f"x{i}" for i in range(12)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: Cells(str(folder / "absent.h5ad")), "does not exist"),
        (lambda folder: Cells(str(folder)), "holds no .h5ad"),
        (lambda folder: Cells(broken(folder)), "can't be read as h5ad"),
        (lambda folder: Cells(broken(folder), backed=True), "can't be read as h5ad"),
        (lambda folder: Cells(written(folder), type_column="kind"), "no cell type column 'kind'; it has cell_type"),
        (lambda folder: Cells(written(folder, adata(60, split=["holdout"] * 60))), "holds 'holdout'"),
    ],
)
def test_data_that_cannot_be_used_say_why(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        make(tmp_path).split("train")


def broken(folder) -> str:
    (folder / "broken.h5ad").write_bytes(b"not hdf5")
    return str(folder / "broken.h5ad")


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        Cells(validation_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ConfigError, match="aspects name"):
        Cells(aspects={"mood": "x"})


@pytest.fixture
def model() -> MultimodalModel:
    torch.manual_seed(0)
    text = TextTransformer(
        train_wordpiece(["cell type: nk b platelet genes", *GENES] * 2, 300), 32, 1, 4, cross_attention=True
    )

    encoder = CellEncoder(GeneVocabulary(cells=_InMemory()), width=32, depth=1, max_length=40)
    cell = Modality(encoder, connector=LinearConnector())
    return MultimodalModel(text, {"cell": cell}, embed_dim=16, fusion="cross_attention").eval()


class _InMemory(Cells):
    def split(self, name):
        from mmpt.source import Sample

        return [Sample({"cell": cell}, "") for cell in cells_of(adata())]


def test_embeddings_are_written_where_scanpy_looks(model):
    data = adata()
    vectors = embed_cells(model, data, batch_size=7)
    assert np.array_equal(data.obsm["X_mmpt"], vectors.numpy())
    torch.testing.assert_close(model.embed("cell", data), vectors)
    assert embed_cells(model, data, key=None).shape == (24, 16)
    assert list(data.obsm) == ["X_mmpt"]


def test_the_model_stores_embeddings_on_request(model):
    data = adata()
    vectors = model.embed("cell", data, store="X_mine")
    assert np.array_equal(data.obsm["X_mine"], vectors.numpy())
    assert list(data.obsm) == ["X_mine"]
    with pytest.raises(ConfigError, match="only AnnData has an obsm, got list"):
        model.embed("cell", cells_of(data), store="X_mine")
    with pytest.raises(ConfigError, match="no place to store"):
        model.embed("text", ["a", "b"], store="X")


def test_annotation_is_a_table_of_cells_and_labels(model):
    data = adata()
    found = annotate(model, data, ["NK", "B", "something else"])
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == ["NK", "B", "something else"]
    assert list(found.index) == list(data.obs_names)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    known = Definitions()
    direct = model.zero_shot("cell", data, [known.describe("NK"), known.describe("B"), "something else"])
    assert isinstance(direct, pd.DataFrame)
    assert list(direct.index) == list(data.obs_names)
    assert (found.to_numpy().argmax(1) == direct.to_numpy().argmax(1)).all()
    torch.testing.assert_close(
        model.zero_shot("cell", cells_of(data), list(direct.columns)), torch.from_numpy(direct.to_numpy())
    )


def test_annotation_mixes_in_the_matching_head(model):
    head = MatchingHead("cell")
    head.bind(model)
    data = adata()
    labels = ["NK", "B"]
    texts = [Definitions().describe(name) for name in labels]
    probabilities = match_probabilities(model, head, cells_of(data), texts)
    expected = probabilities.softmax(1).numpy()
    np.testing.assert_allclose(annotate(model, data, labels, head=head, share=0.0).to_numpy(), expected, rtol=1e-5)
