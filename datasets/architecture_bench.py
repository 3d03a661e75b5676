"""NAS-Bench-Graph: graph neural networks with the accuracies that they reached when they were trained."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from numpy import dtype

from mmpt.encoders.architecture_graph import ArchitectureGraph, Shape
from mmpt.errors import ConfigError, DataError
from mmpt.files import hash_fraction
from mmpt.source import Sample, Source, Split

PACKAGE = "nas_bench_graph"
Task = Literal["cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv"]
TASKS = ("cora", "citeseer", "pubmed", "cs", "physics", "photo", "computers", "arxiv")
LINKS = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 1, 3), (0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2),
    (0, 1, 2, 3),
)  # fmt: skip
"""What each of the four operations reads: 0 is the input, n the n-th operation. The first digit of a number."""

OPERATIONS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
"""The operations, the other four digits of a number."""

_WIDTH = 64


class GraphNetworkBench(Source):
    """The 26,206 networks of NAS-Bench-Graph (arXiv 2206.09166) and how well each does on one of eight graphs.

    Needs `pip install nas-bench-graph`; its tables are read without running its code. Samples hold `architecture`, the
    operations written in the vocabulary of operators (a graph convolution is a linear layer and a product with the
    adjacency matrix, see `network_of`). Labels: `accuracy` and `latency` (seconds). Splits go by a hash of the network.

    Args:
        task: the graph that the networks were trained on.
        limit: at most this many networks, those of the smallest hashes.

    Raises:
        ConfigError: another task.
    """

    def __init__(self, task: Task = "cora", limit: int | None = None) -> None:
        if task not in TASKS:
            raise ConfigError(f"task is {task!r}; choose {', '.join(TASKS)}")
        self.task, self.limit = task, limit

    def split(self, name: Split) -> Sequence[Sample]:
        """See `Source`.

        Raises:
            DataError: the package is not installed, or its table can't be read.
        """
        low, high = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}[name]
        table = _table(self.task)
        # two hashes: one thins out evenly over the splits, the other splits
        chosen = sorted(table, key=lambda number: hash_fraction(f"limit {number}"))[: self.limit]
        return [_sample(number, table[number]) for number in chosen if low <= hash_fraction(str(number)) < high]


def _sample(number: int, row: dict[str, Any]) -> Sample:
    graph = network_of(number, int(1e6 * float(row["para"])))
    labels = {"accuracy": float(row["perf"]), "latency": float(row["latency"])}
    return Sample({"architecture": graph}, graph.name, labels)


def network_of(number: int, parameters: int = 0) -> ArchitectureGraph:
    """The graph of a network.

    Each operation is written as its usual formula: `gcn` a linear layer and a product with the adjacency matrix; `gat`
    the same with weights from leaky ReLU and softmax; `gin` the product, the sum with the input, a linear layer;
    `cheb`, `sage`, `graph` and `arma` two linear layers whose outputs are added up, of the input and of the Laplacian's
    product, the mean, the sum or the product over neighbours. Widths are not in the tables; all are 64 here.

    Args:
        number: of the table: a digit for `LINKS`, four for `OPERATIONS`.
        parameters: of the network.

    Raises:
        DataError: a number with other digits.
    """
    digits = [int(digit) for digit in f"{number:05d}"]
    if len(digits) != 5 or max(digits) > 8:
        raise DataError(f"{number} is no network of NAS-Bench-Graph; expected five digits from 0 to 8")
    built = _Built()
    ends = [0]
    links = LINKS[digits[0]]
    for link, digit in zip(links, digits[1:], strict=True):
        ends.append(built.operation(OPERATIONS[digit], ends[link]))
    leaves = [end for place, end in enumerate(ends[1:], 1) if place not in links]
    joined = leaves[0] if len(leaves) == 1 else built.add("concat", *leaves)
    built.linear(joined)
    return ArchitectureGraph(
        tuple(built.types), tuple(built.shapes), tuple(built.edges), f"{PACKAGE}-{number:05d}", parameters
    )


class _Built:
    def __init__(self) -> None:
        self.types: list[str] = ["input"]
        self.shapes: list[Shape] = [()]
        self.edges: list[tuple[int, int]] = []

    def add(self, kind: str, *sources: int, shape: Shape = ()) -> int:
        self.types.append(kind)
        self.shapes.append(shape)
        self.edges += [(source, len(self.types) - 1) for source in dict.fromkeys(sources)]
        return len(self.types) - 1

    def linear(self, source: int) -> int:
        return self.add("conv", source, shape=(_WIDTH, _WIDTH))

    def operation(self, kind: str, source: int) -> int:
        """The last node of an operation."""
        if kind == "skip":
            return self.add("identity", source)
        if kind == "fc":
            return self._bias(self.linear(source))
        if kind == "gcn":
            return self._bias(self.add("mm", self.linear(source)))
        if kind == "gat":
            values = self.linear(source)
            weights = self.add("softmax", self.add("leaky_relu", values))
            return self._bias(self.add("bmm", weights, values))
        if kind == "gin":
            return self._bias(self.linear(self.add("sum", self.add("mm", source), source)))
        if kind == "arma":
            near = self.add("mm", self.linear(source))
            return self.add("relu", self._bias(self.add("sum", near, self.linear(source))))
        near = self.add("mm", source)
        if kind == "cheb":
            near = self.add("sub", source, near)
        elif kind == "sage":
            near = self.add("div", near)
        return self._bias(self.add("sum", self.linear(near), self.linear(source)))

    def _bias(self, source: int) -> int:
        return self.add("bias", source, shape=(_WIDTH,))


@cache
def _table(task: str) -> dict[int, dict[str, Any]]:
    """Number of a network -> its row."""
    package = find_spec(PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise DataError('the tables of NAS-Bench-Graph are not there: pip install "mmpt[architecture]"')
    path = Path(package.submodule_search_locations[0]) / "light" / f"{task}.bench"
    try:
        table: dict[int, dict[str, Any]] = _Numbers(io.BytesIO(path.read_bytes())).load()
    except (OSError, pickle.UnpicklingError, EOFError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    return table


class _Numbers(pickle.Unpickler):
    """Reads numbers and containers, and refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """The two names that a numpy number needs."""
        if (module, name) == ("numpy", "dtype"):
            return dtype
        if (module, name) in (("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar")):
            from numpy._core.multiarray import scalar

            return scalar
        raise pickle.UnpicklingError(f"{module}.{name} is no number")
