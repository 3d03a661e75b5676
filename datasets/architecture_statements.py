"""Sentences about networks that are true or false by their graph: facts, statements, questions with answers.

ArchBERT's AutoNet templates (arXiv 2310.17737), corrected: what follows what is read from the edges, kernels have a
height and a width, and false statements come in two kinds. Easy ones name a layer that the network lacks, so that a bag
of layers refutes them; hard ones name its own layers with a wrong number, kernel or order.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from mmpt.encoders.architecture_graph import ArchitectureGraph, Shape

PHRASES = {
    "bn": "batch normalization", "ln": "layer normalization", "gn": "group normalization",
    "rms_norm": "rms normalization",
    "relu": "relu", "relu6": "relu6", "gelu": "gelu", "silu": "silu", "elu": "elu", "leaky_relu": "leaky relu",
    "hardswish": "hard swish", "sigmoid": "sigmoid", "hardsigmoid": "hard sigmoid", "tanh": "tanh",
    "softmax": "softmax",
    "max_pool": "max pooling", "avg_pool": "average pooling", "glob_avg": "global average pooling",
    "scaled_dot_product": "self attention", "msa": "self attention", "cse": "squeeze and excitation",
    "sum": "residual addition", "concat": "concatenation", "pos_enc": "position encoding", "rnn": "recurrent layer",
    "upsamplebilinear2d": "bilinear upsampling", "conv_transpose": "transposed convolution", "embedding": "embedding",
}  # fmt: skip
"""What people call operators; operators without a phrase are not talked about."""

CONVOLUTIONS = {"conv": "convolution", "sep_conv": "depthwise convolution", "dil_conv": "dilated depthwise convolution"}

KINDS = {
    "pooling": ("max pooling", "average pooling", "global average pooling"),
    "normalization": ("batch normalization", "layer normalization", "group normalization", "rms normalization"),
    "activation": (
        "relu",
        "relu6",
        "gelu",
        "silu",
        "elu",
        "leaky relu",
        "hard swish",
        "sigmoid",
        "hard sigmoid",
        "tanh",
    ),
}


class Statement(NamedTuple):
    """A sentence about a network.

    Attributes:
        text: the sentence.
        true: whether it holds.
        kind: "presence", "count", "kernel", "order" or "size".
    """

    text: str
    true: bool
    kind: str

    @property
    def hard(self) -> bool:
        """Whether knowing which layers there are is not enough: it is about number, kernel, order or size."""
        return self.kind != "presence"


class Question(NamedTuple):
    """A question and its answer, a comma-separated list in alphabetical order, or "none"."""

    text: str
    answer: str
    kind: str


def layer_name(kind: str, shape: Shape) -> str | None:
    """What people call an operator, for convolutions with the kernel (`3x3 convolution`, `linear layer`)."""
    if kind in CONVOLUTIONS:
        if len(shape) == 2:
            return "linear layer"
        return f"{shape[-2]}x{shape[-1]} {CONVOLUTIONS[kind]}" if len(shape) == 4 else None
    return PHRASES.get(kind)


@lru_cache(maxsize=8192)  # several statements are made about a graph in every epoch
def layers(graph: ArchitectureGraph) -> Counter[str]:
    """How many layers of each name a network has."""
    names = (layer_name(kind, shape) for kind, shape in zip(graph.types, graph.shapes, strict=True))
    return Counter(name for name in names if name)


def description(graph: ArchitectureGraph, draw: random.Random, facts: int = 3) -> str:
    """A true sentence of several facts: layers that are there, with or without their number, and the size."""
    found = layers(graph)
    chosen = draw.sample(sorted(found), min(facts, len(found)))
    parts = [_counted(found[name], name) if draw.random() < 0.5 else name for name in chosen]
    if draw.random() < 0.4:
        parts.append(f"{_millions(graph.parameters)} million parameters")
    return "network with " + ", ".join(parts)


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" + ("s" if count > 1 and name.endswith(("convolution", "layer")) else "")


def _millions(parameters: int) -> str:
    millions = parameters / 1e6
    if millions >= 0.995:
        return f"{millions:.0f}" if millions >= 9.95 else f"{millions:.1f}"
    return f"{millions:.4f}".rstrip("0") if millions < 0.00995 else f"{millions:.2g}"


def vocabulary_of(graphs: Sequence[ArchitectureGraph]) -> list[str]:
    """All layer names of a collection, for easy false statements."""
    return sorted(set().union(*(layers(graph) for graph in graphs)))


def statement(
    graph: ArchitectureGraph, names: Sequence[str], draw: random.Random, true: bool, hard: bool
) -> Statement | None:
    """A statement of the wanted kind.

    Args:
        graph: what it is about.
        names: layer names that easy false statements choose among.
        draw: source of randomness.
        true: whether it should hold.
        hard: about number, kernel, order or size; else about the presence of a layer.

    Returns:
        None where the network offers no such statement (no layer is absent, or nothing has an order).
    """
    found = layers(graph)
    if not hard:
        choices = sorted(found) if true else sorted(set(names) - set(found))
        return Statement(f"the network uses {draw.choice(choices)}", true, "presence") if choices else None
    makers = [_count, _kernel, _order, _size]
    draw.shuffle(makers)
    made = (maker(graph, found, names, draw, true) for maker in makers)
    return next((sentence for sentence in made if sentence is not None), None)


def _count(
    graph: ArchitectureGraph, found: Counter[str], names: Sequence[str], draw: random.Random, true: bool
) -> Statement | None:
    name = draw.choice(sorted(found))
    count = found[name]
    if not true:
        others = [
            n for n in {count // 2, count * 2, count + 3, count - 3, count + 1, count - 1} if n > 0 and n != count
        ]
        count = draw.choice(sorted(others))
    return Statement(f"the network has {count} layers of {name}", true, "count")


def _kernel(
    graph: ArchitectureGraph, found: Counter[str], names: Sequence[str], draw: random.Random, true: bool
) -> Statement | None:
    own = sorted(name for name in found if name.endswith(" convolution"))
    if not own:
        return None
    chosen = draw.choice(own)
    kind = chosen.split(" ", 1)[1]
    if not true:
        others = [n for n in names if n.split(" ", 1)[-1] == kind and n not in found]
        if not others:
            return None
        chosen = draw.choice(others)
    return Statement(f"its {kind} has a kernel of {chosen.split(' ', 1)[0]}", true, "kernel")


def _order(
    graph: ArchitectureGraph, found: Counter[str], names: Sequence[str], draw: random.Random, true: bool
) -> Statement | None:
    pairs = followers(graph)
    if not true:
        pairs = {(b, a) for a, b in pairs if (b, a) not in pairs}
    pairs = {(a, b) for a, b in pairs if a != b}
    if not pairs:
        return None
    before, behind = draw.choice(sorted(pairs))
    return Statement(f"a {before} is followed by {behind}", true, "order")


def _size(
    graph: ArchitectureGraph, found: Counter[str], names: Sequence[str], draw: random.Random, true: bool
) -> Statement | None:
    factor = 1.0 if true else draw.choice((0.2, 0.4, 2.5, 5.0))
    text = f"the network has about {_millions(int(graph.parameters * factor))} million parameters"
    return Statement(text, true, "size")


@lru_cache(maxsize=8192)
def followers(graph: ArchitectureGraph) -> set[tuple[str, str]]:
    """(layer, layer that directly follows it), biases and reshaping left out."""
    names = [layer_name(kind, shape) for kind, shape in zip(graph.types, graph.shapes, strict=True)]
    origins: list[set[str]] = [set() for _ in names]
    before: dict[int, list[int]] = {}
    for a, b in graph.edges:
        before.setdefault(b, []).append(a)
    pairs: set[tuple[str, str]] = set()
    for node, name in enumerate(names):
        sources = set().union(*(origins[a] for a in before.get(node, ())))
        if name is None:
            origins[node] = sources
        else:
            pairs |= {(source, name) for source in sources}
            origins[node] = {name}
    return pairs


def questions(graph: ArchitectureGraph) -> list[Question]:
    """Questions whose answer the graph decides. Where nothing follows in the asked way, the question is not asked."""
    found = layers(graph)
    asked = [
        Question(f"which {kind} is used?", _listed(name for name in names if name in found), kind)
        for kind, names in KINDS.items()
    ]
    kernels = {name.split(" ")[0] for name in found if name.endswith(" convolution")}
    asked.append(Question("which kernel sizes are used?", _listed(kernels), "kernel"))
    behind: Mapping[str, set[str]] = {}
    pairs = followers(graph)
    for kind in ("normalization", "activation"):
        behind = {kind: {b for a, b in pairs if a.endswith(" convolution") and b in KINDS[kind]}}
        if behind[kind]:
            asked.append(Question(f"which {kind} follows a convolution?", _listed(behind[kind]), f"{kind} order"))
    return asked


def facts(graph: ArchitectureGraph) -> set[str]:
    """All that `statement` may truly say about a network's layers: presence, number, kernel and order; no size."""
    found = layers(graph)
    said = {f"the network uses {name}" for name in found}
    said |= {f"the network has {count} layers of {name}" for name, count in found.items()}
    for name in found:
        if name.endswith(" convolution"):
            kernel, kind = name.split(" ", 1)
            said.add(f"its {kind} has a kernel of {kernel}")
    return said | {f"a {before} is followed by {behind}" for before, behind in followers(graph) if before != behind}


CAPTION = "describe the network"
"""The question whose answer is `caption`."""


def caption(graph: ArchitectureGraph, most: int = 4) -> str:
    """The layers that a network has most of with their numbers, in falling order: `6 relu, 5 3x3 convolutions`."""
    ordered = sorted(layers(graph).items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(_counted(count, name) for name, count in ordered[:most]) or "no layer with a name"


def _listed(names: object) -> str:
    return ", ".join(sorted(names)) or "none"  # type: ignore[call-overload]


def template_texts() -> list[str]:
    """Sentences with every template and layer name, for training a tokenizer: no network is needed."""
    sizes = (1, 3, 5, 7)
    kernels = [f"{height}x{width}" for height in sizes for width in sizes]
    names = [*dict.fromkeys(PHRASES.values()), "linear layer"]
    names += [f"{kernel} {kind}" for kernel in kernels for kind in CONVOLUTIONS.values()]
    texts = [f"the network uses {name}" for name in names] + [f"network with {name}" for name in names]
    texts += [f"the network has {3 * i % 128} layers of {name}" for i, name in enumerate(names)]
    texts += [f"a {a} is followed by {b}" for a, b in zip(names, names[7:] + names[:7], strict=True)]
    texts += [f"its {kind} has a kernel of {kernel}" for kind in CONVOLUTIONS.values() for kernel in kernels]
    texts += 2 * [f"the network has {count} layers" for count in range(1, 65)]  # numbers of layers are words
    texts += [f"the network has about {_millions(10**5 * i)} million parameters" for i in range(1, 300, 7)]
    texts += [f"which {kind} is used? {', '.join(answers)}" for kind, answers in KINDS.items()]
    texts += [f"which {kind} follows a convolution? {', '.join(answers)}" for kind, answers in KINDS.items()]
    texts += [f"{3 * i % 128} {name}s" for i, name in enumerate(names) if name.endswith(("convolution", "layer"))]
    return [*texts, f"which kernel sizes are used? {', '.join(kernels)}", CAPTION, "none"]
