"""Neural architectures as a modality: graph attention over operators and the shapes of their weights (ArchBERT)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from mmpt.encoder import MASK, RANDOM, Corruption, Encoder, Inputs, Part, Processor
from mmpt.encoders.architecture_graph import (
    CHANNELS,
    KERNELS,
    SUMMARY,
    ArchitectureGraph,
    condensed,
    contracted,
    module_words,
    read_graph,
    shape_features,
    summary,
    vocabulary,
    words_of,
)
from mmpt.encoders.architecture_names import named_graph
from mmpt.encoders.architecture_trace import trace
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.naming import NAMED_STD, named_vectors
from mmpt.tokens import Tokens, concatenate, full

Arrays = tuple[Tensor, Tensor, Tensor, Tensor]
Attend = Literal["successors", "predecessors", "both"]
NAMED = 3.0
"""Weight of what modules are called beside what is counted: counts tell families apart that training saw, new ones are
found better by names."""

WORD_DROPOUT = 0.3
"""Share of the words of a network's names that a training batch doesn't see."""

FORMS = "a network (nn.Module), its graph, a name of timm or torchvision/NAME, or a path of .onnx or .json"


class ArchitectureProcessor(Processor):
    """Networks -> types, shapes and edges.

    A sample is an `ArchitectureGraph` (for a network with unusual inputs: `trace(network, inputs)`), an `nn.Module`
    that takes one picture of 3 x 224 x 224, the name of a model (`"resnet50"` of timm, `"torchvision/resnet50"`), or
    the path of an ONNX file or of a graph in JSON.

    Gives `types` long (batch, n), `shapes` long (batch, n, 4) as `shape_features`, `edges` bool (batch, n, n), True at
    [b, i, j] where data flows from i to j, and `mask` bool (batch, n), True where a node is real. With `summary` also
    `summary` float (batch, SUMMARY), see `architecture_graph.summary`, with `names` also `names` float (batch, names).

    Args:
        max_nodes: larger graphs are condensed to this number (see `architecture_graph.condensed`).
        vocabulary: "mmpt" or "archbert_v1" (the released numbers; operators that it lacks are taken out).
        summary: also count what the whole graph holds, before it is condensed; ArchBERT has nothing of the kind.
        names: size of a vector for what the network's modules are called (`architecture_graph.module_words`), the sum
            of a fixed one for each word (`mmpt.naming`); 0 is none. In training some words are left out at random.
    """

    def __init__(
        self,
        max_nodes: int = 512,
        vocabulary: Literal["mmpt", "archbert_v1"] = "mmpt",
        summary: bool = False,
        names: int = 0,
    ) -> None:
        if max_nodes < 2:
            raise ConfigError(f"max_nodes is {max_nodes}; expected 2 or more")
        if names and not summary:
            raise ConfigError("names are added to the summary; set summary: true")
        self.max_nodes, self.vocabulary, self.summary, self.names = max_nodes, vocabulary, summary, names

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """See `Processor`."""
        read = [self._row(index, sample) for index, sample in enumerate(samples)]
        rows = [arrays for _, arrays in read]
        length = max(len(types) for types, _, _, _ in rows)
        pad = vocabulary(self.vocabulary).pad
        types = torch.full((len(rows), length), pad)
        shapes = torch.zeros(len(rows), length, 4, dtype=torch.long)
        edges = torch.zeros(len(rows), length, length, dtype=torch.bool)
        for row, (own_types, own_shapes, own_edges, _) in enumerate(rows):
            types[row, : len(own_types)] = own_types
            shapes[row, : len(own_types)] = own_shapes
            edges[row, own_edges[0], own_edges[1]] = True
        inputs = {"types": types, "shapes": shapes, "edges": edges, "mask": types != pad}
        if self.summary:
            inputs["summary"] = torch.stack([counts for *_, counts in rows])
        if self.names:
            inputs["names"] = torch.stack([self._named(graph, training) for graph, _ in read])
        return inputs

    def _named(self, graph: ArchitectureGraph, training: bool) -> Tensor:
        """The sum over the words of the modules' names, scaled to about 1 a coordinate: (names,)."""
        vectors = _words(graph, self.names)
        if training:
            vectors = vectors[torch.rand(len(vectors)) >= WORD_DROPOUT]
        return vectors.sum(0) / (NAMED_STD * max(1, len(vectors)) ** 0.5)

    def _row(self, index: int, sample: Any) -> tuple[ArchitectureGraph, Arrays]:
        try:
            graph = graph_of(sample)
            return graph, _arrays(graph, self.max_nodes, self.vocabulary)
        except DataError as error:
            raise SampleError(_label(sample), str(error), FORMS, index) from error


@lru_cache(maxsize=8192)
def _arrays(graph: ArchitectureGraph, max_nodes: int, name: str) -> Arrays:
    """Types (n,), shapes (n, 4), edges (2, m) and summary of a graph; a graph is seen once in every epoch."""
    known = vocabulary(name)
    counts = summary(graph)
    if known.unknown is None:
        graph = contracted(graph, lambda kind: kind not in known.numbers)
    graph = condensed(graph, max_nodes)
    types = torch.tensor([known.numbers.get(kind, known.unknown) for kind in graph.types])
    edges = torch.tensor(graph.edges, dtype=torch.long).view(-1, 2).T
    return types, shape_features(graph.shapes), edges, counts


@lru_cache(maxsize=8192)
def _words(graph: ArchitectureGraph, width: int) -> Tensor:
    """A vector for each word in the names of a graph's modules: (words, width)."""
    return named_vectors(module_words(graph), width)


def graph_of(sample: Any) -> ArchitectureGraph:
    """The graph of a sample in any of the forms of `ArchitectureProcessor`.

    Raises:
        DataError: another form, an unknown name, a file that can't be read, or a network that can't be traced.
    """
    if isinstance(sample, ArchitectureGraph):
        return sample
    if isinstance(sample, nn.Module):
        return trace(sample)
    if isinstance(sample, str | Path):
        suffix = Path(sample).suffix.lower()
        if suffix == ".json":
            return read_graph(Path(sample))
        if suffix == ".onnx":
            from mmpt.encoders.architecture_onnx import read_onnx

            return read_onnx(Path(sample))
        return named_graph(str(sample))
    raise DataError(f"{type(sample).__name__} is no network; expected {FORMS}")


def _label(sample: Any) -> str:
    if isinstance(sample, ArchitectureGraph):
        return sample.name or "graph"
    return type(sample).__name__ if isinstance(sample, nn.Module) else str(sample)


class GraphAttention(nn.Module):
    """Dense graph attention (GAT, arXiv 1710.10903): e_ij = LeakyReLU(a1 . W h_i + a2 . W h_j), softmax over j, ELU.

    Args:
        width: of the input.
        output: of each head.
        heads: their outputs are concatenated.
    """

    def __init__(self, width: int, output: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, heads * output, bias=False)
        self.own = nn.Parameter(torch.empty(heads, output))
        self.other = nn.Parameter(torch.empty(heads, output))
        for weight in (self.value.weight, self.own, self.other):
            nn.init.xavier_uniform_(weight, gain=1.414)

    def forward(self, nodes: Tensor, allowed: Tensor, mask: Tensor) -> Tensor:
        """Attend.

        Args:
            nodes: (batch, n, width).
            allowed: bool (batch, n, n), True at [b, i, j] where node i sees node j; a node that sees none sees all
                evenly.
            mask: bool (batch, n), True where a node is real; others are never seen.

        Returns:
            (batch, n, heads * output).
        """
        values = self.value(nodes).unflatten(-1, (self.heads, -1))  # (batch, n, heads, output)
        own = (values * self.own).sum(-1).transpose(1, 2)  # (batch, heads, n)
        other = (values * self.other).sum(-1).transpose(1, 2)
        scores = F.leaky_relu(own.unsqueeze(-1) + other.unsqueeze(-2), 0.2)  # (batch, heads, n, n)
        scores = scores.float().masked_fill(~allowed.unsqueeze(1), -1e9)  # finite: where all are, all are seen evenly
        weights = scores.masked_fill(~mask[:, None, None], float("-inf")).softmax(-1).to(values.dtype)
        return F.elu((weights @ values.transpose(1, 2)).transpose(1, 2).flatten(2))


class Standardize(nn.BatchNorm1d):
    """Features less their mean, divided by their spread, both over all training batches so far, within -4 to 4.

    In training as in evaluation: batches of different sources differ in their means, which a batch norm would take away
    in training alone.

    Args:
        size: number of features.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-3, momentum=None, affine=False)

    def forward(self, features: Tensor) -> Tensor:
        """(batch, size) -> (batch, size)."""
        if self.training and len(features) > 1:
            with torch.no_grad():
                super().forward(features)  # moves mean and spread
        scaled = F.batch_norm(features, self.running_mean, self.running_var, eps=self.eps)
        return scaled.clamp(-4.0, 4.0)


class ArchitectureEncoder(Encoder):
    """Type and shape embeddings of nodes, then graph attention in two steps (ArchBERT, arXiv 2310.17737).

    Use it with `through_text: true`: its nodes then run through the text transformer as the paper has it, and masked
    node types are predicted behind it. Differences from the released code: padding is never attended to; a node sees
    its successors, its predecessors and itself (`attend: both`), where the released code has successors only.

    Where the processor gives a summary of the whole graph (ArchBERT has none), it becomes a token in front of the
    nodes, after graph attention; pooling "first" then takes it. A mean over nodes can't count; condensed graphs lack
    repetitions. While node types are hidden so is the summary, which would give them away. Where the processor gives
    names too, they are added to that token; with `shared_names` of the model and no projections, words that name layers
    start where these do.

    Args:
        width: size of the tokens; a multiple of 4, and with masked nodes the width of the text transformer.
        heads: of the first graph attention.
        attend: which neighbours a node sees. Without any it sees all nodes evenly, as the released code has it.
        dropout: of node embeddings in training; the released code has none.
        processor: None is `ArchitectureProcessor()`.

    Raises:
        ConfigError: a width that 4 does not divide, or an unknown `attend`.
    """

    operators: Tensor

    def __init__(
        self,
        width: int = 768,
        heads: int = 4,
        attend: Attend = "both",
        dropout: float = 0.0,
        processor: ArchitectureProcessor | None = None,
    ) -> None:
        super().__init__()
        if width % 4:
            raise ConfigError(f"width is {width}; four shape embeddings must share it evenly")
        if attend not in ("successors", "predecessors", "both"):
            raise ConfigError(f"attend={attend!r} is unknown; choose 'successors', 'predecessors' or 'both'")
        self.width, self.attend = width, attend
        self.processor: ArchitectureProcessor = processor or ArchitectureProcessor()
        known = vocabulary(self.processor.vocabulary)
        self.hidden = known.hidden
        self.register_buffer("operators", torch.tensor(sorted(set(known.numbers.values()))), persistent=False)
        self.types = nn.Embedding(known.size, width)
        self.channels = nn.Embedding(len(CHANNELS) + 1, width // 4)
        self.kernels = nn.Embedding(len(KERNELS) + 1, width // 4)
        for table in (self.types, self.channels, self.kernels):
            nn.init.normal_(table.weight, std=0.5)
        self.dropout = nn.Dropout(dropout)
        self.neighbours = GraphAttention(width, width, heads)
        self.neighbours_again = GraphAttention(heads * width, width)
        self.norm = nn.LayerNorm(width)
        self.summarize: nn.Module | None = None
        if self.processor.summary:
            self.summarize = nn.Sequential(
                Standardize(SUMMARY), nn.Linear(SUMMARY, 4 * width), nn.GELU(), nn.Dropout(dropout),
                nn.Linear(4 * width, width), nn.LayerNorm(width),
            )  # fmt: skip
            self.hidden_summary = nn.Parameter(torch.zeros(width))
        self.naming: nn.Linear | None = None
        if self.processor.names:
            if self.processor.names != width:
                raise ConfigError(f"names is {self.processor.names}; make it the width, {width}")
            self.naming = nn.Linear(width, width, bias=False)
            nn.init.eye_(self.naming.weight)
        self.predictor = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), nn.Linear(width, known.size)
        )

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """See `Encoder`. Only the types of hidden nodes are hidden; their shapes and edges stay visible."""
        types = inputs["types"]
        if corruption is not None:
            action = corruption.action if self.summarize is None else corruption.action[:, 1:]
            drawn = torch.randint(len(self.operators), types.shape, device=types.device)
            types = torch.where(action == RANDOM, self.operators[drawn], types)
            types = torch.where(action == MASK, self.hidden, types)
        shapes = inputs["shapes"]
        sizes = torch.cat([self.channels(shapes[..., :2]), self.kernels(shapes[..., 2:])], 2).flatten(2)
        nodes = self.dropout(self.types(types) + sizes)
        allowed, mask = self.allowed(inputs["edges"]), inputs["mask"]
        nodes = self.neighbours_again(self.neighbours(nodes, allowed, mask), allowed, mask)
        tokens = Tokens(self.norm(nodes), mask)
        if self.summarize is None:
            return tokens
        front = self.summarize(inputs["summary"]) if corruption is None else self.hidden_summary.expand(len(mask), -1)
        if self.naming is not None and corruption is None:
            front = front + NAMED * self.naming(inputs["names"])
        return concatenate(full(front.unsqueeze(1)), tokens)

    def allowed(self, edges: Tensor) -> Tensor:
        """Which nodes see which: bool (batch, n, n), True at [b, i, j] where node i sees node j."""
        if self.attend == "both":
            return edges | edges.transpose(1, 2) | torch.eye(edges.shape[1], dtype=torch.bool, device=edges.device)
        return edges if self.attend == "successors" else edges.transpose(1, 2)

    def units(self, inputs: Inputs) -> Tensor:
        """See `Encoder`; a summary in front is none."""
        return inputs["mask"] if self.summarize is None else F.pad(inputs["mask"], (1, 0), value=False)

    def unit_names(self) -> list[str]:
        """Words in the names of timm's and torchvision's classes, which names of modules are made of."""
        if self.naming is None:
            return []
        libraries = (timm.layers, timm.models, torchvision.ops, torchvision.models)
        classes = [name for library in libraries for name, value in vars(library).items() if isinstance(value, type)]
        return sorted({word for name in classes for word in words_of(name)})

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        """Scores of the operators: (predicted nodes, vocabulary)."""
        return self.predictor(tokens.values[corruption.predicted])

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        """Mean cross-entropy of the node types."""
        predicted = corruption.predicted if self.summarize is None else corruption.predicted[:, 1:]
        targets = inputs["types"][predicted]
        count = max(1, len(targets))
        loss = F.cross_entropy(predictions.float(), targets, reduction="sum") / count
        right = (predictions.argmax(-1) == targets).sum() / count
        return Part(loss, {"accuracy": right.detach()})
