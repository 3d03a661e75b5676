"""Neural architectures as graphs: operators with the shapes of their weights, joined by the flow of data.

A graph never holds the values of weights: two trained copies of a network have the same graph.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmpt.errors import ConfigError, DataError

PAD, HIDDEN, UNKNOWN = "pad_token", "mask_token", "unknown_op"

RELEASED: dict[str, int] = {
    name: number
    for number, name in enumerate(
        [
            "max_pool",
            "avg_pool",
            "sep_conv",
            "dil_conv",
            "conv",
            "msa",
            "cse",
            "sum",
            "concat",
            "input",
            "bias",
            "bn",
            "ln",
            "pos_enc",
            "glob_avg",
            "attn_conv",
            "expand",
            "permute",
            "gelu",
            "bmm",
            "slice",
            "reshape",
            "reshapealias",
            "softmax",
            "view",
            "split",
            "mm",
            "select",
            "t",
            "unsafeview",
            "transpose",
            "div",
            "relu",
            "upsamplebilinear2d",
            "hardswish",
            "hardsigmoid",
            "sigmoid",
            "unsqueeze",
            "embedding",
        ]
    )
} | {"gn": 40, "conv1d": 41, "dropout": 42, "tanh": 43, "identity": 47, "unfold": 49, "avgpool1d": 50, "droppath": 77}
"""Numbers of the operators in ArchBERT's released code (arXiv 2310.17737); 84 is padding, 85 the mask, others are
classes of an old version of transformers."""

EXTRA = [
    "silu",
    "relu6",
    "elu",
    "leaky_relu",
    "mish",
    "softplus",
    "mul",
    "scaled_dot_product",
    "roll",
    "unbind",
    "stack",
    "sub",
    "squeeze",
    "pad",
    "index",
    "upsamplenearest2d",
    "conv3d",
    "conv_transpose",
    "rnn",
    "rms_norm",
    "l2_norm",
    "arithmetic",
    "reduce",
    "compare",
]
"""Operators of today's networks for which the released list has no name."""


@dataclass(frozen=True)
class Vocabulary:
    """Numbers of operators.

    Attributes:
        numbers: operator -> number.
        size: number of embeddings.
        pad: number of padding.
        hidden: number that stands for a hidden operator.
    """

    numbers: Mapping[str, int]
    size: int
    pad: int
    hidden: int

    @property
    def unknown(self) -> int | None:
        """Number of operators without a name, where the vocabulary has one."""
        return self.numbers.get(UNKNOWN)


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary "mmpt" (all operators below, and one for unknown ones) or "archbert_v1" (86 numbers).

    Raises:
        ConfigError: another name.
    """
    if name == "archbert_v1":
        return Vocabulary(RELEASED, 86, 84, 85)
    if name != "mmpt":
        raise ConfigError(f"vocabulary {name!r} is unknown; choose 'mmpt' or 'archbert_v1'")
    names = [*RELEASED, *EXTRA, UNKNOWN]
    return Vocabulary({n: i for i, n in enumerate(names)}, len(names) + 2, len(names), len(names) + 1)


Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ArchitectureGraph:
    """A network. Two graphs are the same if types, shapes and edges are; `==` asks for the same object.

    Attributes:
        types: operator of each node, in the order of execution.
        shapes: shape of each node's weight, () where it has none; pooling carries (1, 1, height, width).
        edges: (from, to), the flow of data; from < to.
        name: of the network.
        parameters: number of trainable numbers of the network.
        macs: multiplications and additions of one forward pass, in pairs, of layers and matrix products.
        modules: class name -> how many modules of it the network has.
        unknown: operators without a name in `types` (they are "unknown_op" there) -> how many.
        removed: operators that `condensed` took out -> how many.
    """

    types: tuple[str, ...]
    shapes: tuple[Shape, ...]
    edges: tuple[tuple[int, int], ...]
    name: str = ""
    parameters: int = 0
    macs: int = 0
    modules: Mapping[str, int] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.types)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, origin: str = "the graph") -> ArchitectureGraph:
        """Read what `to_json` wrote, or a graph by hand with `types`, `shapes` and `edges`.

        Raises:
            DataError: not JSON, lengths that don't agree, or edges that are no edges of a graph without cycles.
        """
        try:
            found = json.loads(text)
            types = tuple(str(t) for t in found.pop("types"))
            shapes = tuple(tuple(int(n) for n in shape or ()) for shape in found.pop("shapes"))
            edges = tuple((int(a), int(b)) for a, b in found.pop("edges"))
            graph = cls(types, shapes, edges, **found)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin} can't be read: {error!r}; expected JSON with types, shapes and edges") from error
        if len(types) != len(shapes) or not types:
            raise DataError(f"{origin} has {len(types)} types and {len(shapes)} shapes; expected equal numbers")
        if any(not 0 <= a < b < len(types) for a, b in edges):
            raise DataError(f"{origin} has an edge outside 0 <= from < to < {len(types)}; sort its nodes by data flow")
        return graph


def read_graph(path: Path) -> ArchitectureGraph:
    """A graph that was written as JSON."""
    try:
        return ArchitectureGraph.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}") from error


# Shapes as numbers

CHANNELS = (1, 3, 8, 10, *range(16, 57, 8), *range(64, 4081, 16), *range(4096, 8193, 32))
KERNELS = (1, 3, 5, 7, 9, 11, 14, 16)


def _nearest(values: Sequence[int], exceptions: Mapping[int, int]) -> Tensor:
    """Number of the nearest value for 0..last, of two equally near ones the smaller."""
    points = torch.arange(values[-1] + 1)
    upper = torch.searchsorted(torch.tensor(values), points).clamp(1, len(values) - 1)
    low, high = torch.tensor(values)[upper - 1], torch.tensor(values)[upper]
    index = torch.where(points - low <= high - points, upper - 1, upper)
    for value, target in exceptions.items():
        index[value] = values.index(target)
    return index


CHANNEL_INDEX = _nearest(CHANNELS, dict.fromkeys(range(4, 8), 8))
KERNEL_INDEX = _nearest(KERNELS, {2: 3})


def shape_features(shapes: Sequence[Shape]) -> Tensor:
    """Numbers of out channels, in channels, kernel height and width.

    Shapes with fewer than four sizes are filled up with 1; of a 3-d kernel the last two sizes count.

    Args:
        shapes: of weights, () for none.

    Returns:
        long (n, 4): rows of the table of 391 channel counts (391: no shape) and of 8 kernel sizes (8: no shape).
    """
    rows = [(*s[:2], *s[-2:])[:4] if len(s) > 4 else (*s, *(1,) * (4 - len(s))) for s in shapes]
    sizes = torch.tensor(rows, dtype=torch.long).view(-1, 4)
    channels = CHANNEL_INDEX[sizes[:, :2].clamp(max=CHANNELS[-1])]
    kernels = KERNEL_INDEX[sizes[:, 2:].clamp(max=KERNELS[-1])]
    features = torch.cat([channels, kernels], 1)
    without = torch.tensor([not s for s in shapes], dtype=torch.bool)
    features[without] = torch.tensor([len(CHANNELS), len(CHANNELS), len(KERNELS), len(KERNELS)])
    return features


# The whole graph in numbers

_CONVOLUTIONS = ("conv", "sep_conv", "dil_conv")
_STATISTICS = 6
SUMMARY = len({*RELEASED, *EXTRA, UNKNOWN}) + 2 * len(_CONVOLUTIONS) * len(KERNELS) + 1 + _STATISTICS
"""Length of a summary."""


def summary(graph: ArchitectureGraph) -> Tensor:
    """What a network holds, without what is joined with what.

    Numbers of nodes of each operator; of convolutions of each kind by kernel height, then by width (the nearest of
    `KERNELS`); of linear layers; parameters, nodes, greatest and mean width, greatest and mean kernel.

    Returns:
        float (SUMMARY,): log(1 + n) of each.
    """
    numbers = vocabulary("mmpt").numbers
    kinds = torch.zeros(len(numbers))
    for kind, count in Counter(graph.types).items():
        kinds[numbers.get(kind, numbers[UNKNOWN])] += count
    kernels = torch.zeros(len(_CONVOLUTIONS), 2, len(KERNELS))
    linear = 0
    for kind, shape in zip(graph.types, graph.shapes, strict=True):
        if kind in _CONVOLUTIONS and len(shape) == 4:
            for axis in (0, 1):
                size = min(shape[2 + axis], KERNELS[-1])
                kernels[_CONVOLUTIONS.index(kind), axis, int(KERNEL_INDEX[size])] += 1
        linear += kind == "conv" and len(shape) == 2
    weights = [shape for shape in graph.shapes if len(shape) in (2, 4)]
    widths = [shape[0] for shape in weights] or [0]
    sides = [shape[-1] for shape in weights if len(shape) == 4] or [1]
    statistics = [
        graph.parameters, len(graph), max(widths), sum(widths) / len(widths), max(sides), sum(sides) / len(sides),
    ]  # fmt: skip
    return torch.log1p(torch.cat([kinds, kernels.flatten(), torch.tensor([float(linear), *map(float, statistics)])]))


def module_words(graph: ArchitectureGraph) -> list[str]:
    """The words in the class names of a network's modules, in small letters: `SqueezeExcite` has squeeze and excite.

    Classes of torch.nn are left out: what they do stands in the graph, and nearly every network has them. So are
    private ones (`_Cell`), whose names are not meant to be read.
    """
    own = set(graph.modules) - set(vars(torch.nn))
    return sorted({word for name in own if not name.startswith("_") for word in words_of(name)})


def words_of(name: str) -> list[str]:
    """`ConvNormAct2d` is conv, norm, act; `SEModule` is se, module. Single letters are none."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) if len(word) > 1]


# Coarser graphs

STRUCTURE = frozenset(
    [
        "view",
        "reshape",
        "reshapealias",
        "unsafeview",
        "permute",
        "transpose",
        "t",
        "squeeze",
        "unsqueeze",
        "slice",
        "select",
        "split",
        "unbind",
        "expand",
        "index",
        "roll",
        "pad",
        "stack",
        "identity",
        "arithmetic",
        "compare",
        "reduce",
        "div",
        "sub",
        "dropout",
        "droppath",
    ]
)
ACTIVATIONS = frozenset(
    [
        "relu",
        "relu6",
        "gelu",
        "silu",
        "elu",
        "leaky_relu",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "sigmoid",
        "tanh",
        "softmax",
        "mul",
        "cse",
    ]
)
NORMS = frozenset({"bn", "ln", "gn", "rms_norm", "l2_norm"})


def without(graph: ArchitectureGraph, gone: Collection[int]) -> ArchitectureGraph:
    """The graph without some nodes; what was before one is joined with what was behind it.

    Args:
        graph: any.
        gone: numbers of nodes.
    """
    before: dict[int, list[int]] = {}
    for a, b in graph.edges:
        before.setdefault(b, []).append(a)
    origins: list[set[int]] = []  # of each node: the kept nodes whose data it passes on
    place: dict[int, int] = {}
    edges: list[tuple[int, int]] = []
    for node in range(len(graph)):
        sources = set().union(*(origins[a] for a in before.get(node, ())))
        if node in gone:
            origins.append(sources)
        else:
            place[node] = len(place)
            edges += sorted((place[a], place[node]) for a in sources)
            origins.append({node})
    return replace(
        graph,
        types=tuple(graph.types[n] for n in place),
        shapes=tuple(graph.shapes[n] for n in place),
        edges=tuple(edges),
        removed=dict(Counter(graph.removed) + Counter(graph.types[n] for n in gone)),
    )


def contracted(graph: ArchitectureGraph, drop: Callable[[str], bool]) -> ArchitectureGraph:
    """The graph `without` the operators that `drop` is true for."""
    return without(graph, {node for node, kind in enumerate(graph.types) if drop(kind)})


def condensed(graph: ArchitectureGraph, limit: int) -> ArchitectureGraph:
    """A graph of at most `limit` nodes: what says least about the network goes first, never its end.

    Reshaping goes first, then biases, unknown operators, activations and gates, norms, and last the repetitions of
    blocks that occur most often, in the end also those of other widths. `removed` counts them.

    Raises:
        DataError: the network has more kinds of layers than that.
    """
    for kinds in (STRUCTURE, {"bias"}, {UNKNOWN}, ACTIVATIONS, NORMS):
        if len(graph) <= limit:
            return graph
        graph = contracted(graph, lambda kind, kinds=kinds: kind in kinds)  # type: ignore[misc]
    for reach in (2, 1, 0, None):
        while len(graph) > limit and (gone := repetitions(graph, len(graph) - limit, reach)):
            graph = without(graph, gone)
    if len(graph) > limit:
        raise DataError(
            f"{graph.name or 'the network'} has {len(graph)} kinds of layers; expected at most {limit}. "
            "Raise max_nodes (and the text transformer's max_length)"
        )
    return graph


def repetitions(graph: ArchitectureGraph, count: int, reach: int | None) -> set[int]:
    """At most `count` nodes that are like others; of each kind one stays.

    The kinds that occur most often lose most, their last ones first; the last layer of the network stays.

    Args:
        graph: any.
        count: how many are wanted.
        reach: nodes are of one kind if types, shapes and neighbours up to so many steps around are equal; None: if
            types and kernels are.
    """
    around: list[list[int]] = [[] for _ in graph.types]
    for a, b in graph.edges:
        around[a].append(b)
        around[b].append(a)
    shapes = graph.shapes if reach is not None else [shape[2:] for shape in graph.shapes]
    labels: list[object] = list(zip(graph.types, shapes, strict=True))
    labels[-1] = "end"
    for _ in range(reach or 0):
        numbers = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        own = [numbers[label] for label in labels]
        labels = [(own[node], tuple(sorted(own[n] for n in near))) for node, near in enumerate(around)]
    members: dict[object, list[int]] = {}
    for node, label in enumerate(labels):
        members.setdefault(label, []).append(node)
    kept = max(len(nodes) for nodes in members.values())
    gone: list[int] = []
    while len(gone) < count and kept > 1:
        kept -= 1
        gone += [nodes[kept] for nodes in members.values() if len(nodes) > kept]
    return set(gone[:count])
