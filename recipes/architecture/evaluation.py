"""What a pretrained model of networks can do on networks that training never saw, beside simple baselines."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr
from sklearn.linear_model import RidgeCV
from sklearn.metrics import f1_score, r2_score, roc_auc_score
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from mmpt.datasets.architecture import ModelZoo
from mmpt.datasets.architecture_baselines import (
    bag_of_types,
    jaccard,
    judge_statements,
    spectrum,
    text_scores_by_module_names,
    text_scores_by_ridge,
)
from mmpt.datasets.architecture_generated import GeneratedNetworks, clone_pairs
from mmpt.datasets.architecture_statements import CAPTION, caption, questions
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.evaluation.answers import exact_match
from mmpt.evaluation.retrieval import RetrievalResult, retrieval
from mmpt.finetuning import rebuilt
from mmpt.model import TEXT, MultimodalModel
from mmpt.source import Sample, Split

GRAPHS = "architecture"


def samples(source: Any, split: Split) -> list[Sample]:
    """All samples of a split."""
    part = source.split(split)
    return [part[index] for index in range(len(part))]


def column(rows: Sequence[Sample], name: str) -> list[Any]:
    """One modality of some samples."""
    return [row.modalities[name] for row in rows]


# Search


def search(model: MultimodalModel, zoo: ModelZoo, split: Split = "test") -> dict[str, float]:
    """Docstrings of models of unseen families, without names, both ways; models with one docstring are all right.

    `network_to_more_texts`: among the texts of the validation and the test families, none of which training saw.
    """
    graphs, texts = (column(samples(zoo, split), name) for name in (GRAPHS, TEXT))
    others = column(samples(zoo, "validation" if split == "test" else "test"), TEXT)
    own, candidates = len(dict.fromkeys(texts)), list(dict.fromkeys([*texts, *others]))
    right = torch.tensor([[text == candidate for candidate in candidates] for text in texts])
    known = described(zoo)
    scores = {
        "": _cosines(model, graphs, candidates),
        "_untrained": _cosines(rebuilt(model).eval(), graphs, candidates),
        "_bag_of_types": torch.from_numpy(
            text_scores_by_ridge([graph for graph, _ in known], [text for _, text in known], graphs, candidates)
        ),
        "_module_names": torch.from_numpy(text_scores_by_module_names(graphs, candidates)),
    }
    metrics: dict[str, float] = {
        "search/models": len(graphs),
        "search/texts": own,
        "search/more_texts": len(candidates),
    }
    for suffix, matrix in scores.items():
        metrics |= _search_metrics("search/network_to_text", ranked(matrix[:, :own], right[:, :own]), suffix)
        metrics |= _search_metrics("search/text_to_network", ranked(matrix[:, :own].T, right[:, :own].T), suffix)
        metrics |= _search_metrics("search/network_to_more_texts", ranked(matrix, right), suffix)
    return metrics


def described(zoo: ModelZoo) -> list[tuple[ArchitectureGraph, str]]:
    """The training networks that have a docstring."""
    texts = {entry.name: entry.text for entry in zoo.entries("train") if entry.text}
    return [(row.modalities[GRAPHS], texts[row.name]) for row in samples(zoo, "train") if row.name in texts]


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


# Statements


def reasoning(
    model: MultimodalModel, source: GeneratedNetworks, split: Split = "test", threshold: float = 0.0
) -> dict[str, float]:
    """Is a statement true of a network whose combination of layers is new; a cosine above the threshold is yes."""
    tests = samples(source, split)
    label = np.array([row.labels["match"] for row in tests])
    hard = np.array([row.labels["hard"] for row in tests], dtype=bool)
    graphs, texts = column(tests, GRAPHS), column(tests, TEXT)
    cosine = (model.embed(GRAPHS, graphs) * model.embed(TEXT, texts)).sum(1).numpy()
    judged = by_bag_of_types(source, graphs, texts)
    found = {"": cosine > threshold, "_bag_of_types": judged > 0, "_always_yes": np.ones_like(hard)}
    metrics: dict[str, float] = {"reasoning/statements": len(tests)}
    for part, rows in (("all", np.ones_like(hard)), ("easy", ~hard), ("hard", hard)):
        for suffix, says in found.items():
            metrics[f"reasoning/{part}/accuracy{suffix}"] = float((says[rows] == label[rows]).mean())
        for suffix, says in found.items():
            metrics[f"reasoning/{part}/f1{suffix}"] = float(f1_score(label[rows], says[rows], zero_division=0))
        metrics[f"reasoning/{part}/auroc"] = _auroc(label[rows], cosine[rows])
        metrics[f"reasoning/{part}/auroc_bag_of_types"] = _auroc(label[rows], judged[rows])
    return metrics


def by_bag_of_types(
    source: GeneratedNetworks, graphs: Sequence[ArchitectureGraph], texts: Sequence[str], rounds: int = 2
) -> np.ndarray:
    """Log-odds of statements by logistic regression on words and bags of types, fitted to training statements.

    Args:
        source: of the training statements.
        graphs: what the statements are about.
        texts: the statements.
        rounds: how often each training network is seen, with new statements; more take a gigabyte of memory.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        known = [row for _ in range(rounds) for row in samples(source, "train")]
    labels = [int(row.labels["match"]) for row in known]
    return judge_statements(column(known, GRAPHS), column(known, TEXT), labels, graphs, texts)


def _auroc(label: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(label, score)) if 0 < label.mean() < 1 else float("nan")


# Clones


def clones(model: MultimodalModel, source: GeneratedNetworks, split: Split = "test") -> dict[str, float]:
    """Which of two networks is a given one in other widths and another notation, and which another one.

    `near`: the other one is the same but for one layer or cell; `far`: it is any other with as many cells. With text: a
    statement that is true of the first network and, in the near case, not of the other one is given as well, and the
    score is the mean of its cosines with both networks.
    """
    pairs = clone_pairs(source.networks(split))
    first, second = [pair.first for pair in pairs], [pair.second for pair in pairs]
    texts = [pair.text for pair in pairs]
    a, b, said = model.embed(GRAPHS, first), model.embed(GRAPHS, second), model.embed(TEXT, texts)
    fresh = rebuilt(model).eval()
    bands = {id(graph): spectrum(graph) for graph in [*first, *second]}
    alone: dict[str, np.ndarray] = {
        "": (a * b).sum(1).numpy(),
        "_untrained": (fresh.embed(GRAPHS, first) * fresh.embed(GRAPHS, second)).sum(1).numpy(),
        "_spectrum": np.array([-np.abs(bands[id(x)] - bands[id(y)]).sum() for x, y in zip(first, second, strict=True)]),
    }
    for suffix, label in (("_jaccard", "shape"), ("_jaccard_of_types", "type"), ("_jaccard_of_kernels", "kernel")):
        alone[suffix] = np.array([jaccard(x, y, label) for x, y in zip(first, second, strict=True)])  # type: ignore[arg-type]
    odds = by_bag_of_types(source, [*first, *second], [*texts, *texts])
    both = {
        "": ((said * a).sum(1) + (said * b).sum(1)).numpy() / 2,
        "_bag_of_types": (odds[: len(pairs)] + odds[len(pairs) :]) / 2,
        "_jaccard_of_kernels": alone["_jaccard_of_kernels"],
    }
    same, near = np.array([pair.same for pair in pairs]), np.array([pair.near for pair in pairs])
    metrics: dict[str, float] = {"clones/networks": int(same.sum())}
    for prefix, scores in (("clones", alone), ("clones_with_text", both)):
        for part, rows in (("near", near), ("far", same | ~near)):
            for suffix, score in scores.items():
                metrics[f"{prefix}/{part}/auroc{suffix}"] = _auroc(same[rows], score[rows])
    return metrics


# Questions and captions

ROUGE = ("rouge1", "rouge2", "rougeL")


def answers(model: MultimodalModel, source: GeneratedNetworks, split: Split = "test") -> dict[str, float]:
    """Questions about networks with combinations of layers that training never saw; the whole answer must be right."""
    common: dict[str, Counter[str]] = {}
    for network in source.networks("train"):
        for question in questions(network.graph):
            common.setdefault(question.text, Counter())[question.answer] += 1
    asked = [(n.graph, question) for n in source.networks(split) for question in questions(n.graph)]
    asked = random.Random(0).sample(asked, min(400, len(asked)))
    written = _written(model, [graph for graph, _ in asked], [f"{q.text}{source.separator}" for _, q in asked])
    right: dict[str, list[tuple[bool, bool]]] = {}
    for (_, question), text in zip(asked, written, strict=True):
        usual = common.get(question.text, Counter()).most_common(1)
        fits = exact_match(_plain(question.answer), _plain(text))
        right.setdefault(question.kind, []).append((fits, bool(usual) and usual[0][0] == question.answer))
    every = [pair for pairs in right.values() for pair in pairs]
    metrics = {"questions/accuracy": _share(every, 0), "questions/accuracy_most_frequent": _share(every, 1)}
    for kind, pairs in sorted(right.items()):
        metrics[f"questions/{kind.replace(' ', '-')}/accuracy"] = _share(pairs, 0)
        metrics[f"questions/{kind.replace(' ', '-')}/accuracy_most_frequent"] = _share(pairs, 1)
    return metrics


def _written(model: MultimodalModel, graphs: Sequence[Any], prompts: Sequence[str], most: int = 32) -> list[str]:
    written: list[str] = []
    for at in range(0, len(graphs), 64):
        part: dict[str, Any] = {GRAPHS: list(graphs[at : at + 64])}
        written += model.generate(list(prompts[at : at + 64]), max_new_tokens=most, **part)
    return written


def _plain(text: str) -> str:
    """Without blanks, which a tokenizer of words puts around punctuation."""
    return "".join(text.split())


def _share(pairs: Sequence[tuple[bool, bool]], side: int) -> float:
    return sum(pair[side] for pair in pairs) / max(1, len(pairs))


def captions(
    model: MultimodalModel, zoo: ModelZoo, source: GeneratedNetworks, split: Split = "test"
) -> dict[str, float]:
    """ROUGE (F1) of descriptions of unseen networks: docstrings of the zoo, and what generated networks hold most of.

    Baselines: the most frequent caption of training, and that of the training network with the nearest bag of types.
    """
    tests = samples(zoo, split)
    known = [(network.graph, caption(network.graph)) for network in source.networks("train")]
    graphs = [network.graph for network in source.networks(split)]
    metrics = _rouge_beside(
        "captions/zoo", column(tests, TEXT), _written(model, column(tests, GRAPHS), [""] * len(tests)),
        described(zoo), column(tests, GRAPHS),
    )  # fmt: skip
    prompts = [f"{CAPTION}{source.separator}"] * len(graphs)
    return metrics | _rouge_beside(
        "captions/generated", [caption(g) for g in graphs], _written(model, graphs, prompts, 48), known, graphs
    )


def _rouge_beside(
    prefix: str,
    targets: Sequence[str],
    written: Sequence[str],
    known: Sequence[tuple[ArchitectureGraph, str]],
    graphs: Sequence[ArchitectureGraph],
) -> dict[str, float]:
    usual = Counter(text for _, text in known).most_common(1)[0][0]
    bags, own = bag_of_types([graph for graph, _ in known]), bag_of_types(graphs)
    scale = bags.std(0) + 1e-6
    place = [int(np.square((bags - row) / scale).sum(1).argmin()) for row in own]
    found = {"": written, "_most_frequent": [usual] * len(targets), "_nearest": [known[i][1] for i in place]}
    metrics: dict[str, float] = {}
    for suffix, texts in found.items():
        scores = rouge_score(list(texts), list(targets), rouge_keys=("rouge1", "rouge2", "rougeL"))
        metrics |= {
            f"{prefix}/{key}{suffix}": float(scores[f"{key}_fmeasure"]) for key in ("rouge1", "rouge2", "rougeL")
        }
    return metrics


# Cost and accuracy


Target = Callable[[Sample], float]


def cost(model: MultimodalModel, zoo: ModelZoo, split: Split = "test") -> dict[str, float]:
    """Multiply-adds and parameters of models of unseen families (ridge regression on frozen embeddings)."""
    train, test = samples(zoo, "train"), samples(zoo, split)
    macs = _regression("cost/macs", model, train, test, lambda row: np.log(max(1, row.modalities[GRAPHS].macs)))
    size = _regression(
        "cost/parameters", model, train, test, lambda row: np.log(max(1, row.modalities[GRAPHS].parameters))
    )
    return macs | {name: value for name, value in size.items() if not name.endswith("parameters")}


def accuracy(model: MultimodalModel, source: Any, split: Split = "test") -> dict[str, float]:
    """Accuracies of graph neural networks (NAS-Bench-Graph), ridge regression on frozen embeddings."""
    train, test = samples(source, "train"), samples(source, split)
    prefix = f"accuracy/{source.task}"
    return _regression(prefix, model, train, test, lambda row: row.labels["accuracy"])


def _regression(
    prefix: str, model: MultimodalModel, train: Sequence[Sample], test: Sequence[Sample], target: Target
) -> dict[str, float]:
    """Rank correlations and R2 of the model and of what it is compared with."""
    fresh = rebuilt(model).eval()

    def features(rows: Sequence[Sample], kind: str) -> np.ndarray:
        graphs = column(rows, GRAPHS)
        parameters = np.log([[max(1, graph.parameters)] for graph in graphs])
        if kind == "_parameters":
            return parameters
        if kind == "_bag_of_types":
            return bag_of_types(graphs)
        embedded = (fresh if kind == "_untrained" else model).embed(GRAPHS, graphs).numpy()
        return np.concatenate([embedded, parameters], 1) if kind == "_embedding_and_parameters" else embedded

    known, right = np.array([target(row) for row in train]), np.array([target(row) for row in test])
    metrics = {}
    for kind in ("", "_untrained", "_parameters", "_bag_of_types", "_embedding_and_parameters"):
        train_x, test_x = features(train, kind), features(test, kind)
        mean, scale = train_x.mean(0), train_x.std(0) + 1e-6
        ridge = RidgeCV(alphas=np.logspace(-2, 4, 13)).fit((train_x - mean) / scale, known)
        predicted = ridge.predict((test_x - mean) / scale)
        metrics[f"{prefix}/spearman{kind}"] = float(spearmanr(predicted, right).statistic)
        metrics[f"{prefix}/kendall{kind}"] = float(kendalltau(predicted, right).statistic)
        metrics[f"{prefix}/r2{kind}"] = float(r2_score(right, predicted))
    return metrics
