"""What the architecture recipe measures, and the variants of its study."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recipe_modules import recipe_modules
from torch import nn

from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.heads import ContrastiveHead, SimilarityHead
from mmpt.source import Sample


@pytest.fixture(scope="module")
def recipe():
    """Modules of the recipe by name."""
    with recipe_modules("architecture") as modules:
        yield modules


def graph(*types: str, parameters: int = 1) -> ArchitectureGraph:
    edges = tuple((i, i + 1) for i in range(len(types) - 1))
    return ArchitectureGraph(types, ((),) * len(types), edges, parameters=parameters)


def test_ranks_follow_the_scores_of_each_row(recipe):
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3]])
    right = torch.tensor([[False, False, True], [False, True, False]])
    result = recipe("evaluation").ranked(scores, right)
    assert result.ranks.tolist() == [2, 1]
    assert result.recall[1] == 0.5


class _Zoo:
    """Networks that hold a number of relu, and what is said of them."""

    texts = {"train": ["red blue", "blue green", "green red"], "test": ["one", "two"], "validation": ["more"]}

    def split(self, name):
        return [
            Sample(
                {"architecture": replace(graph("input", *["relu"] * (n + 1)), modules=("Gate",)), "text": text},
                f"{name}{n}",
            )
            for n, text in enumerate(self.texts[name])
        ]

    def entries(self, name):
        return [SimpleNamespace(name=f"{name}{n}", text=text) for n, text in enumerate(self.texts[name])]


class _Searching(nn.Module):
    """One relu is nearest to "one", two are nearer to "more" than to "two"."""

    def embed(self, name, samples):
        texts = {"one": [1.0, 0.0], "two": [0.6, 0.8], "more": [0.0, 1.0]}
        networks = {2: [1.0, 0.0], 3: [0.3, 0.95]}
        return torch.tensor([texts[s] if name == "text" else networks[len(s)] for s in samples])


def test_search_is_among_own_texts_and_among_those_of_both_unseen_splits(recipe, monkeypatch):
    module = recipe("evaluation")
    monkeypatch.setattr(module, "rebuilt", lambda model: model)
    found = module.search(_Searching(), _Zoo())
    assert (found["search/texts"], found["search/more_texts"]) == (2, 3)
    assert found["search/network_to_text/R@1"] == found["search/text_to_network/R@1"] == 1
    assert found["search/network_to_more_texts/R@1"] == 0.5
    assert found["search/network_to_more_texts/mean_reciprocal_rank"] == pytest.approx(0.75)
    assert found["search/network_to_more_texts/R@1_chance"] == pytest.approx(1 / 3)
    assert module.search(_Searching(), _Zoo(), "validation")["search/more_texts"] == 3


def test_captions_stand_beside_the_most_frequent_and_the_nearest(recipe):
    known = [(graph("input", "relu"), "a b"), (graph("input", "gelu"), "c d"), (graph("input", "silu"), "a b")]
    found = recipe("evaluation")._rouge_beside("x", ["c d"], ["c d e f"], known, [graph("input", "gelu", "gelu")])
    # 2 of 4 written words are right, and 2 of 2 wanted ones written
    assert found["x/rouge1"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["x/rougeL"] == pytest.approx(2 / 3, abs=1e-5)
    assert found["x/rouge1_most_frequent"] == 0
    assert found["x/rouge1_nearest"] == 1


class _Sized(nn.Module):
    """Embeds a network as the number of its nodes."""

    def embed(self, name, graphs):
        return torch.tensor([[float(len(g)), 1.0] for g in graphs])


def test_regression_stands_beside_parameters_and_bags(recipe, monkeypatch):
    module = recipe("evaluation")
    monkeypatch.setattr(module, "rebuilt", lambda model: model)
    rows = [
        Sample({"architecture": graph("input", *["relu"] * n, parameters=100 - n)}, str(n), {"accuracy": float(n)})
        for n in range(1, 30)
    ]
    found = module._regression("x", _Sized(), rows[::2], rows[1::2], lambda row: row.labels["accuracy"])
    assert found["x/spearman"] == found["x/kendall"] == pytest.approx(1)
    assert found["x/r2"] > 0.99
    assert found["x/spearman_parameters"] == pytest.approx(1)  # a falling line is a line
    assert found["x/spearman_bag_of_types"] == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_tests_on_its_own_families(recipe, seed):
    config = recipe("run").configuration(seed)
    assert config["data"]["sources"]["zoo"]["init_args"]["fold"] == seed % 5
    texts = config["model"]["init_args"]["model"]["init_args"]["text"]["init_args"]["tokenizer"]["init_args"]["texts"]
    assert texts["init_args"]["fold"] == seed % 5  # the tokenizer knows no text of the test families either


def test_variants_change_what_they_say(recipe):
    from mmpt.config import from_config

    study = recipe("study")
    built = {}
    for variant in study.VARIANTS:
        config = study.configured(variant, 1, True)
        assert config["data"]["sources"]["zoo"]["init_args"]["fold"] == 1
        arguments = config["model"]["init_args"]
        heads = from_config(arguments["heads"])
        modality = from_config(arguments["model"]["init_args"]["modalities"])["architecture"]
        weights = arguments.get("weights", {})
        built[variant] = (heads, modality, weights)
        assert set(weights) <= set(heads)
    heads, modality, weights = built["main"]
    assert modality.encoder.processor.summary
    assert modality.pooling == "first"
    assert weights["nodes"] > 0 == built["without masked nodes"][2]["nodes"]
    assert not built["without summary"][1].encoder.processor.summary
    assert built["without summary"][1].pooling == "mean"
    assert isinstance(heads["descriptions"], ContrastiveHead)
    assert set(built["search alone"][0]) == {"descriptions"}
    assert not built["search alone"][1].through_text
    paper = built["cosine error"][0]
    assert isinstance(paper["descriptions"], SimilarityHead)
    assert paper["statements"].threshold == 0.5
    assert paper["statements"].temperature is None


def test_what_a_file_has_is_not_run_again(recipe, tmp_path, monkeypatch, capsys):
    study = recipe("study")
    done = []

    def measured(variant, seed, steps, split, smoke):
        done.append((variant, seed, split))
        return {"search": float(seed), "minutes/everything": 0.0}

    monkeypatch.setattr(study, "measured", measured)
    path = tmp_path / "study.jsonl"
    for arguments in (["--seeds", "0"], ["--seeds", "0", "2"], ["--seeds", "0", "--split", "validation"]):
        monkeypatch.setattr(sys, "argv", ["study.py", "--output", str(path), "--parts", "main", *arguments])
        study.main()
    tables = capsys.readouterr().out.split("measurements")
    assert done == [("main", 0, "test"), ("main", 2, "test"), ("main", 0, "validation")]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["metrics"]["search"] for row in rows] == [0.0, 2.0, 0.0]
    assert "1.000" in tables[2]  # the mean of 0 and 2
    assert tables[3].count("search") == 2  # the other split stands by itself
