"""What simple methods know about networks: bags of operators, names of modules, overlaps of graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler, normalize

from mmpt.encoders.architecture_graph import ArchitectureGraph, summary, words_of

Floats = NDArray[np.float64]


def bag_of_types(graphs: Sequence[ArchitectureGraph]) -> Floats:
    """Counts of operators, kernels, parameters, nodes and widths, as logarithms: (n, SUMMARY), see `summary`."""
    return np.stack([summary(graph).double().numpy() for graph in graphs])


def text_scores_by_ridge(
    graphs: Sequence[ArchitectureGraph],
    texts: Sequence[str],
    queries: Sequence[ArchitectureGraph],
    candidates: Sequence[str],
    strength: float = 30.0,
) -> Floats:
    """Ridge regression from bags of types to tf-idf vectors of the texts, then cosines: (queries, candidates)."""
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    targets = words.fit_transform(texts).toarray()
    scaler = StandardScaler()
    model = Ridge(alpha=strength).fit(scaler.fit_transform(bag_of_types(graphs)), targets)
    predicted = normalize(model.predict(scaler.transform(bag_of_types(queries))))
    return predicted @ words.transform(candidates).toarray().T


def text_scores_by_module_names(queries: Sequence[ArchitectureGraph], candidates: Sequence[str]) -> Floats:
    """Tf-idf cosines of the words in the class names of a network's modules with texts: (queries, candidates)."""
    names = [" ".join(word for name in graph.modules for word in words_of(name)) for graph in queries]
    words = TfidfVectorizer(sublinear_tf=True).fit(names)
    return words.transform(names).toarray() @ words.transform(candidates).toarray().T


def judge_statements(
    graphs: Sequence[ArchitectureGraph],
    texts: Sequence[str],
    labels: Sequence[int],
    test_graphs: Sequence[ArchitectureGraph],
    test_texts: Sequence[str],
) -> Floats:
    """Logistic regression on the products of a statement's words with the bag of types.

    Returns:
        (tests,) log-odds that the statement is true.
    """
    words = CountVectorizer(binary=True, token_pattern=r"[^\s]+", ngram_range=(1, 2), min_df=5)
    counts = words.fit_transform(texts)
    scaler = StandardScaler()
    bags = scaler.fit_transform(bag_of_types(graphs))
    test_bags = scaler.transform(bag_of_types(test_graphs))
    from scipy.sparse import csr_matrix, hstack

    def crossed(said: csr_matrix, bag: Floats) -> csr_matrix:
        return hstack([said, *(said.multiply(column[:, None]) for column in bag.T)]).tocsr()

    model = LogisticRegression(C=0.3, max_iter=200)
    model.fit(crossed(counts, bags), np.asarray(labels))
    return model.decision_function(crossed(words.transform(test_texts), test_bags))


def jaccard(
    first: ArchitectureGraph, second: ArchitectureGraph, label: Literal["type", "kernel", "shape"] = "shape"
) -> float:
    """Overlap of two networks: the multisets of their labelled nodes and edges.

    Args:
        first: a graph.
        second: another one.
        label: of a node: its type; type and kernel, which widths don't change; or type and whole shape.
    """
    a, b = _labels(first, label), _labels(second, label)
    return (a & b).total() / max(1, (a | b).total())


def _labels(graph: ArchitectureGraph, label: str) -> Counter[object]:
    first = {"type": slice(0), "kernel": slice(2, None), "shape": slice(None)}[label]
    nodes = [(kind, shape[first]) for kind, shape in zip(graph.types, graph.shapes, strict=True)]
    return Counter[object](nodes) + Counter[object]((nodes[a], nodes[b]) for a, b in graph.edges)


def spectrum(graph: ArchitectureGraph, bins: int = 33) -> Floats:
    """Histogram of the eigenvalues of the normalised Laplacian of the undirected graph: (bins,), sums to 1.

    The usual eigenvalues 0, 1 and 2 lie within bins, not on their borders.
    """
    size = len(graph)
    joined = np.zeros((size, size))
    for a, b in graph.edges:
        joined[a, b] = joined[b, a] = 1.0
    scale = 1 / np.sqrt(np.maximum(joined.sum(1), 1.0))
    values = np.linalg.eigvalsh(np.eye(size) - scale[:, None] * joined * scale[None, :])
    return np.histogram(values, bins=bins, range=(-0.03, 2.03))[0] / size
