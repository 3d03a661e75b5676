"""The architecture recipe: pretrain on networks and texts, then search, reason, find clones, answer and estimate cost.

    python recipes/architecture/run.py [--smoke | --demo] [--output RUN] [--seed N] [...options of mmpt fit]

The test families are fold SEED of five: whole source files of timm and torchvision that training never saw.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import f1_score, r2_score, roc_auc_score
from torch import Tensor

from mmpt.data import MultimodalData
from mmpt.datasets.architecture import ModelZoo
from mmpt.datasets.architecture_baselines import (
    bag_of_types,
    jaccard,
    judge_statements,
    spectrum,
    text_scores_by_module_names,
    text_scores_by_ridge,
)
from mmpt.datasets.architecture_drawing import draw
from mmpt.datasets.architecture_generated import GeneratedNetworks
from mmpt.datasets.architecture_statements import questions
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.evaluation.projection import two_dimensional
from mmpt.evaluation.retrieval import RetrievalResult, retrieval
from mmpt.finetuning import rebuilt
from mmpt.model import TEXT, MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, recipe_main, start
from mmpt.report import ExampleRow, write_embeddings, write_examples
from mmpt.source import Sample, Split
from mmpt.training import train

HERE = Path(__file__).parent
DEMO = ["--trainer.max_steps", "300"]
SMOKE = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]
GRAPHS = "architecture"


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Pretrain, evaluate, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    model, data = stages.run("pretraining", pretrain, options)
    zoo, statements, asked = (data.sources[name] for name in ("zoo", "statements", "questions"))
    metrics = stages.run("search among unseen families", search, model, zoo)
    metrics |= stages.run("is the statement true", reasoning, model, statements)
    metrics |= stages.run("clones", clones, model, statements)
    metrics |= stages.run("questions", answers, model, asked)
    metrics |= stages.run("cost of unseen families", cost, model, zoo)
    stages.run("examples and map", illustrate, model, zoo, options)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(options.output, metrics, console, data)
    return metrics


def pretrain(options: RecipeOptions) -> tuple[MultimodalModel, MultimodalData]:
    """`mmpt fit` with pretrain.yaml, on the fold of families that belongs to the seed."""
    config = yaml.safe_load((HERE / "pretrain.yaml").read_text(encoding="utf-8"))
    size = {"limit": 40} if options.smoke else {}
    _set(config, "ModelZoo", {"fold": options.seed % 5} | size)
    _set(config, "GeneratedNetworks", {"count": 40} if options.smoke else {})
    path = options.output / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    seeds = ["--seed_everything", str(options.seed), "--data.seed", str(options.seed)]
    extra = SMOKE if options.smoke else DEMO if options.demo else []
    command = [
        "fit",
        "--config",
        str(path),
        "--output",
        str(options.output),
        *seeds,
    ]
    finished = train([*command, *extra, *options.overrides])
    model = finished.model.model.eval()
    return model, finished.datamodule.attach(model.processors)


def _set(config: Any, name: str, arguments: dict[str, Any]) -> None:
    """Change arguments of every class of this name in a configuration."""
    if isinstance(config, dict):
        if str(config.get("class_path", "")).endswith(f".{name}"):
            config["init_args"] = config.get("init_args", {}) | arguments
        for value in config.values():
            _set(value, name, arguments)


def samples(source: Any, split: Split) -> list[Sample]:
    """All samples of a split."""
    part = source.split(split)
    return [part[index] for index in range(len(part))]


def _column(rows: Sequence[Sample], name: str) -> list[Any]:
    return [row.modalities[name] for row in rows]


def search(model: MultimodalModel, zoo: ModelZoo) -> dict[str, float]:
    """Docstrings of models of unseen families, without names, both ways; models with one docstring are all right."""
    tests = samples(zoo, "test")
    graphs, texts = _column(tests, GRAPHS), _column(tests, TEXT)
    candidates = list(dict.fromkeys(texts))
    right = torch.tensor([[text == candidate for candidate in candidates] for text in texts])
    trained = [row for part in ("train", "validation") for row in samples(zoo, part)]
    described = {
        entry.name: entry.text for part in ("train", "validation") for entry in zoo.entries(part) if entry.text
    }
    known = [row for row in trained if row.name in described]
    scores = {
        "": _cosines(model, graphs, candidates),
        "_untrained": _cosines(rebuilt(model).eval(), graphs, candidates),
        "_bag_of_types": torch.from_numpy(
            text_scores_by_ridge(_column(known, GRAPHS), [described[r.name] for r in known], graphs, candidates)
        ),
        "_module_names": torch.from_numpy(text_scores_by_module_names(graphs, candidates)),
    }
    metrics: dict[str, float] = {"search/models": len(graphs), "search/texts": len(candidates)}
    for suffix, matrix in scores.items():
        metrics |= _search_metrics("search/network_to_text", ranked(matrix, right), suffix)
        metrics |= _search_metrics("search/text_to_network", ranked(matrix.T, right.T), suffix)
    return metrics


def _cosines(model: MultimodalModel, graphs: Sequence[Any], texts: Sequence[str]) -> Tensor:
    return model.embed(GRAPHS, graphs) @ model.embed(TEXT, texts).T


def ranked(scores: Tensor, right: Tensor) -> RetrievalResult:
    """Ranks by a (queries, candidates) matrix of scores."""
    # the cosine of a row of scores with a unit vector is the score, up to a factor of the row
    return retrieval(scores.float() + 1e-9, torch.eye(scores.shape[1]), right, ks=(1, 5))


def _search_metrics(prefix: str, result: RetrievalResult, suffix: str) -> dict[str, float]:
    found = {f"{prefix}/R@{k}{suffix}": value for k, value in result.recall.items()}
    if not suffix:
        found |= {f"{prefix}/R@{k}_chance": value for k, value in result.chance.items()}
    return found | {f"{prefix}/mean_reciprocal_rank{suffix}": result.mean_reciprocal_rank}


def reasoning(model: MultimodalModel, source: GeneratedNetworks) -> dict[str, float]:
    """Is a statement true of a network whose combination of layers is new; a cosine above .5 is yes."""
    tests = samples(source, "test")
    label = np.array([row.labels["match"] for row in tests])
    hard = np.array([row.labels["hard"] for row in tests], dtype=bool)
    cosine = (model.embed(GRAPHS, _column(tests, GRAPHS)) * model.embed(TEXT, _column(tests, TEXT))).sum(1).numpy()
    torch.manual_seed(0)  # the training statements that the baseline sees: three rounds, as many as fit in memory
    known = [row for _ in range(3) for row in samples(source, "train")]
    judged = judge_statements(
        _column(known, GRAPHS),
        _column(known, TEXT),
        [int(row.labels["match"]) for row in known],
        _column(tests, GRAPHS),
        _column(tests, TEXT),
    )
    found = {"": cosine > 0.5, "_bag_of_types": judged > 0, "_always_yes": np.ones_like(hard)}
    metrics: dict[str, float] = {"reasoning/statements": len(tests)}
    for part, rows in (("all", np.ones_like(hard)), ("easy", ~hard), ("hard", hard)):
        for suffix, says in found.items():
            metrics[f"reasoning/{part}/accuracy{suffix}"] = float((says[rows] == label[rows]).mean())
        for suffix, says in found.items():
            metrics[f"reasoning/{part}/f1{suffix}"] = float(f1_score(label[rows], says[rows], zero_division=0))
    metrics["reasoning/all/auroc"] = _auroc(label, cosine)
    return metrics


def _auroc(label: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(label, score)) if 0 < label.mean() < 1 else float("nan")


def clones(model: MultimodalModel, source: GeneratedNetworks) -> dict[str, float]:
    """Which of two networks is a given one with half as many channels again, and which another one.

    The other network has the same number of cells where there is one. With text: a true statement about the first
    network is given, and the score is the mean of its cosines with both networks.
    """
    networks = source.networks("test")
    draw = random.Random(0)
    pairs: list[tuple[ArchitectureGraph, ArchitectureGraph, int]] = []
    for number, network in enumerate(networks):
        others = [n for i, n in enumerate(networks) if i != number]
        alike = [n for n in others if len(n.recipe.cells) == len(network.recipe.cells)] or others
        pairs += [(network.graph, network.clone, 1), (network.graph, draw.choice(alike).graph, 0)]
    label = np.array([same for _, _, same in pairs])
    first, second = [graph for graph, _, _ in pairs], [graph for _, graph, _ in pairs]
    a, b = model.embed(GRAPHS, first), model.embed(GRAPHS, second)
    fresh = rebuilt(model).eval()
    shapes = {id(g): spectrum(g) for g in [*first, *second]}
    scores = {
        "": (a * b).sum(1).numpy(),
        "_untrained": (fresh.embed(GRAPHS, first) * fresh.embed(GRAPHS, second)).sum(1).numpy(),
        "_jaccard": np.array([jaccard(x, y) for x, y, _ in pairs]),
        "_jaccard_of_types": np.array([jaccard(x, y, shapes=False) for x, y, _ in pairs]),
        "_spectrum": np.array([-np.abs(shapes[id(x)] - shapes[id(y)]).sum() for x, y, _ in pairs]),
    }
    metrics: dict[str, float] = {"clones/pairs": len(pairs)}
    metrics |= {f"clones/auroc{suffix}": _auroc(label, score) for suffix, score in scores.items()}
    said: dict[str, str] = {}
    for row in samples(source, "test"):
        if row.labels["match"]:
            said.setdefault(row.modalities[GRAPHS].name, row.modalities[TEXT])
    texts = model.embed(TEXT, [said[graph.name] for graph in first])
    both = ((texts * a).sum(1) + (texts * b).sum(1)) / 2
    return metrics | {"clones_with_text/auroc": _auroc(label, both.numpy())}


def answers(model: MultimodalModel, source: GeneratedNetworks) -> dict[str, float]:
    """Questions about networks with combinations of layers that training never saw; the whole answer must be right."""
    common: dict[str, Counter[str]] = {}
    for network in source.networks("train"):
        for question in questions(network.graph):
            common.setdefault(question.text, Counter())[question.answer] += 1
    asked = [(n.graph, question) for n in source.networks("test") for question in questions(n.graph)]
    asked = random.Random(0).sample(asked, min(400, len(asked)))
    written: list[str] = []
    for at in range(0, len(asked), 64):
        part = asked[at : at + 64]
        graphs: dict[str, Any] = {GRAPHS: [graph for graph, _ in part]}
        written += model.generate([q.text for _, q in part], max_new_tokens=16, **graphs)
    right: dict[str, list[tuple[bool, bool]]] = {}
    for (_, question), text in zip(asked, written, strict=True):
        usual = common.get(question.text, Counter()).most_common(1)
        fits = _plain(text).removeprefix(_plain(question.text)) == _plain(question.answer)
        right.setdefault(question.kind, []).append((fits, bool(usual) and usual[0][0] == question.answer))
    every = [pair for pairs in right.values() for pair in pairs]
    metrics = {"questions/accuracy": _share(every, 0), "questions/accuracy_most_frequent": _share(every, 1)}
    for kind, pairs in sorted(right.items()):
        metrics[f"questions/{kind.replace(' ', '-')}/accuracy"] = _share(pairs, 0)
        metrics[f"questions/{kind.replace(' ', '-')}/accuracy_most_frequent"] = _share(pairs, 1)
    return metrics


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _share(pairs: Sequence[tuple[bool, bool]], side: int) -> float:
    return sum(pair[side] for pair in pairs) / max(1, len(pairs))


def cost(model: MultimodalModel, zoo: ModelZoo) -> dict[str, float]:
    """Multiply-adds of models of unseen families, ridge regression on frozen embeddings against parameters alone."""
    train_rows, test_rows = samples(zoo, "train"), samples(zoo, "test")
    train_y, test_y = (
        np.log([max(1, graph.macs) for graph in _column(rows, GRAPHS)]) for rows in (train_rows, test_rows)
    )

    def features(rows: list[Sample], kind: str) -> np.ndarray:
        graphs = _column(rows, GRAPHS)
        if kind == "_parameters":
            return np.log([[max(1, graph.parameters)] for graph in graphs])
        if kind == "_bag_of_types":
            return bag_of_types(graphs)
        embedded = model.embed(GRAPHS, graphs).numpy()
        if not kind:
            return embedded
        return np.concatenate([embedded, np.log([[max(1, graph.parameters)] for graph in graphs])], 1)

    metrics = {}
    for kind in ("", "_parameters", "_bag_of_types", "_embedding_and_parameters"):
        train_x, test_x = features(train_rows, kind), features(test_rows, kind)
        mean, scale = train_x.mean(0), train_x.std(0) + 1e-6
        ridge = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit((train_x - mean) / scale, train_y)
        predicted = ridge.predict((test_x - mean) / scale)
        metrics[f"cost/spearman{kind}"] = float(spearmanr(predicted, test_y).statistic)
        metrics[f"cost/r2{kind}"] = float(r2_score(test_y, predicted))
    return metrics


def illustrate(model: MultimodalModel, zoo: ModelZoo, options: RecipeOptions) -> None:
    """Models found for descriptions, and a map of the test networks by family."""
    tests = samples(zoo, "test")
    vectors = model.embed(GRAPHS, _column(tests, GRAPHS))
    queries = list(dict.fromkeys(_column(tests, TEXT)))
    chosen = random.Random(0).sample(queries, min(12, len(queries)))
    rows: list[ExampleRow] = []
    for text, scores in zip(chosen, model.embed(TEXT, chosen) @ vectors.T, strict=True):
        best = scores.topk(min(3, len(tests)))
        rows.append(
            {
                "query": {"text": text},
                "results": [
                    {
                        "text": tests[i].name,
                        "image": draw(tests[i].modalities[GRAPHS]),
                        "score": float(s),
                        "correct": tests[i].modalities[TEXT] == text,
                    }
                    for s, i in zip(best.values, best.indices.tolist(), strict=True)
                ],
            }
        )
    write_examples(options.output, "Models of unseen families found for descriptions", rows)
    families = {entry.name: entry.family for entry in zoo.entries("test")}
    if len(tests) > 3:
        points = two_dimensional(vectors, options.seed, "pca" if len(tests) < 40 else "tsne")
        names = [families.get(row.name, row.name) for row in tests]
        write_embeddings(options.output, points, names, ["network"] * len(tests))


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
