"""Generated networks with statements and questions: cells of parallel layers, in the manner of DARTS and AutoNet."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from mmpt.datasets.architecture_statements import (
    CAPTION,
    Question,
    Statement,
    caption,
    facts,
    questions,
    statement,
    vocabulary_of,
)
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.encoders.architecture_trace import VERSION, trace
from mmpt.errors import ConfigError
from mmpt.files import cache_folder, hash_fraction, write_cache
from mmpt.source import Sample, Source, Split

LAYERS = [
    "conv1",
    "conv3",
    "conv5",
    "conv7",
    "conv1x7",
    "sep3",
    "sep5",
    "dil3",
    "dil5",
    "max",
    "avg",
    "attention",
    "se",
]
WIDTHS = (16, 24, 32, 48, 64)
NORMS = {"batch": "bn", "layer": "ln", "group": "gn"}
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "hardswish": nn.Hardswish}


@dataclass(frozen=True)
class Recipe:
    """What a generated network is built from.

    Attributes:
        stem: kernel of the first convolution.
        channels: of the first cell; each later stage has twice as many.
        cells: for each cell the layers that run in parallel and are added up.
        halve: numbers of the cells behind which the map is halved and the channels doubled.
        norm: kind of normalisation.
        activation: kind of activation.
        dense: linear layers at the end.
    """

    stem: int
    channels: int
    cells: tuple[tuple[str, ...], ...]
    halve: tuple[int, ...]
    norm: str
    activation: str
    dense: int

    @property
    def combination(self) -> str:
        """Which kinds of layers it is made of; networks are split by this, so that no combination is in two splits."""
        return " ".join([*sorted({layer for cell in self.cells for layer in cell}), self.norm, self.activation])


def draw_recipe(draw: random.Random, max_cells: int = 6) -> Recipe:
    """A random recipe."""
    kinds = draw.sample(LAYERS, draw.randint(1, 4))
    cells = tuple(
        tuple(draw.choice(kinds) for _ in range(draw.randint(1, 3))) for _ in range(draw.randint(2, max_cells))
    )
    halve = tuple(sorted(draw.sample(range(len(cells)), min(2, len(cells) - 1))))
    return Recipe(
        draw.choice((3, 5, 7)),
        draw.choice(WIDTHS),
        cells,
        halve,
        draw.choice(list(NORMS)),
        draw.choice(list(ACTIVATIONS)),
        draw.randint(1, 2),
    )


class _ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Attention(nn.Module):
    def __init__(self, channels: int, products: bool) -> None:
        super().__init__()
        self.entry, self.exit, self.products = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
            products,
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = self.entry(tokens).chunk(3, -1)
        if self.products:
            tokens = (query @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1) @ value
        else:
            tokens = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.exit(tokens).transpose(1, 2).reshape(x.shape)


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class _Cell(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for branch in self.branches:
            total = total + branch(x)
        return total


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def build_network(recipe: Recipe, rewritten: bool = False) -> nn.Module:
    """The network of a recipe for pictures (batch, 3, 32, 32) and 10 classes.

    Args:
        recipe: of the network.
        rewritten: write the same network in another way: biases in front of norms, dropout and identities between
            cells, attention as matrix products, a mean in place of the last pooling and its flattening.
    """

    def norm(channels: int) -> nn.Module:
        if recipe.norm == "batch":
            return nn.BatchNorm2d(channels)
        return _ChannelNorm(channels) if recipe.norm == "layer" else nn.GroupNorm(4, channels)

    def layer(kind: str, channels: int) -> nn.Module:
        def conv(kernel: int | tuple[int, int], groups: int = 1, dilation: int = 1) -> nn.Conv2d:
            sizes = (kernel, kernel) if isinstance(kernel, int) else kernel
            padding = (dilation * (sizes[0] // 2), dilation * (sizes[1] // 2))
            return nn.Conv2d(channels, channels, sizes, 1, padding, dilation, groups, bias=rewritten)

        if kind in ("max", "avg"):
            return nn.MaxPool2d(3, 1, 1) if kind == "max" else nn.AvgPool2d(3, 1, 1)
        if kind == "attention":
            return _Attention(channels, rewritten)
        if kind == "se":
            return _SqueezeExcite(channels)
        kernel = int(kind[-1])
        if kind == "conv1x7":
            parts: list[nn.Module] = [conv((1, 7)), conv((7, 1))]
        elif kind.startswith("conv"):
            parts = [conv(kernel)]
        else:
            parts = [conv(kernel, channels, 2 if kind.startswith("dil") else 1), conv(1)]
        return nn.Sequential(*parts, norm(channels), ACTIVATIONS[recipe.activation]())

    channels = recipe.channels
    parts: list[nn.Module] = [
        nn.Conv2d(3, channels, recipe.stem, 1, recipe.stem // 2, bias=rewritten),
        norm(channels),
        ACTIVATIONS[recipe.activation](),
    ]
    for number, cell in enumerate(recipe.cells):
        parts.append(_Cell([layer(kind, channels) for kind in cell]))
        parts += [nn.Dropout(0.1), nn.Identity()] if rewritten else []
        if number in recipe.halve:
            parts += [nn.Conv2d(channels, 2 * channels, 1, 2, bias=rewritten), norm(2 * channels)]
            channels *= 2
    parts += [_Mean()] if rewritten else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    parts += [nn.Linear(channels, channels), ACTIVATIONS[recipe.activation]()] * (recipe.dense - 1)
    return nn.Sequential(*parts, nn.Linear(channels, 10))


def varied(recipe: Recipe, draw: random.Random) -> Recipe:
    """The same network with other widths, and its parallel layers in another order."""
    cells = tuple(tuple(draw.sample(cell, len(cell))) for cell in recipe.cells)
    return replace(recipe, channels=draw.choice([width for width in WIDTHS if width != recipe.channels]), cells=cells)


def changed(recipe: Recipe, draw: random.Random) -> Recipe:
    """Another network that is nearly the same: one layer is of another kind or kernel, or there is one more cell."""
    place = draw.randrange(len(recipe.cells))
    cell = recipe.cells[place]
    if draw.random() < 0.25:
        halve = tuple(number + (number >= place) for number in recipe.halve)
        return replace(recipe, cells=(*recipe.cells[:place], cell, *recipe.cells[place:]), halve=halve)
    branch = draw.randrange(len(cell))
    alike = [kind for kind in LAYERS if kind[:-1] == cell[branch][:-1] and kind[-1].isdigit() and kind != cell[branch]]
    others = [kind for kind in LAYERS if kind != cell[branch]]
    kind = draw.choice(alike if alike and draw.random() < 0.5 else others)
    cell = (*cell[:branch], kind, *cell[branch + 1 :])
    return replace(recipe, cells=(*recipe.cells[:place], cell, *recipe.cells[place + 1 :]))


def graph_of_recipe(recipe: Recipe, rewritten: bool = False) -> ArchitectureGraph:
    """The graph of a recipe's network, which is never built on real memory."""
    with torch.device("meta"):
        network = build_network(recipe, rewritten)
    name = hashlib.blake2b(json.dumps(asdict(recipe)).encode(), digest_size=5).hexdigest()
    return trace(network, (torch.empty(1, 3, 32, 32),), name=f"generated-{name}")


@dataclass(frozen=True)
class Generated:
    """A generated network."""

    recipe: Recipe
    graph: ArchitectureGraph


@cache
def generated(count: int, max_cells: int, seed: int) -> tuple[Generated, ...]:
    """Different networks, the same ones for equal arguments."""
    draw = random.Random(seed)
    recipes = list(dict.fromkeys(draw_recipe(draw, max_cells) for _ in range(2 * count)))[:count]
    return tuple(map(Generated, recipes, graphs_of_recipes(recipes)))


def graphs_of_recipes(recipes: Sequence[Recipe], rewritten: bool = False) -> list[ArchitectureGraph]:
    """Graphs of several recipes, traced once and kept in the cache."""
    key = f"{recipes}{rewritten}{VERSION}{torch.__version__}"
    digest = hashlib.blake2b(key.encode(), digest_size=10).hexdigest()
    path = cache_folder() / "architecture" / f"generated-{digest}.jsonl"
    if path.is_file():
        return [ArchitectureGraph.from_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    graphs = [graph_of_recipe(recipe, rewritten) for recipe in track(recipes, description="generating networks")]
    write_cache(path, lambda file: file.write("\n".join(g.to_json() for g in graphs).encode()))
    return graphs


class Pair(NamedTuple):
    """Two networks.

    Attributes:
        first: a generated network.
        second: the same one or another, `varied` and rewritten in either case.
        same: whether it is the same.
        near: whether it is the same or `changed` in one place.
        text: a statement that is true of the first and, where there is one, not of its changed copy.
    """

    first: ArchitectureGraph
    second: ArchitectureGraph
    same: bool
    near: bool
    text: str


def clone_pairs(networks: Sequence[Generated], seed: int = 0) -> list[Pair]:
    """For each network its clone, its changed copy, and the clone of another one of as many cells where there is one.

    Clones and copies differ from the first network in widths, in the order of parallel layers and in the way they are
    written (`build_network`), so that only what is computed tells clones from other networks.
    """
    draw = random.Random(seed)
    same = [varied(network.recipe, draw) for network in networks]
    other = [varied(changed(network.recipe, draw), draw) for network in networks]
    graphs = graphs_of_recipes([*same, *other], rewritten=True)
    clones, copies = graphs[: len(networks)], graphs[len(networks) :]
    pairs: list[Pair] = []
    for number, network in enumerate(networks):
        own = facts(network.graph)
        text = draw.choice(sorted(own - facts(copies[number])) or sorted(own))
        rest = [i for i in range(len(networks)) if i != number]
        alike = [i for i in rest if len(networks[i].recipe.cells) == len(network.recipe.cells)] or rest
        pairs += [
            Pair(network.graph, clones[number], True, True, text),
            Pair(network.graph, copies[number], False, True, text),
            Pair(network.graph, clones[draw.choice(alike)], False, False, text),
        ]
    return pairs


class GeneratedNetworks(Source):
    """Generated networks with a statement that is true or false, or with a question and its answer.

    Samples hold `architecture` and `text`; a question and its answer are divided by the separator, as `AnsweringHead`
    takes them, and one of a network's questions is for its caption. With statements, labels are `match` (1: true),
    `hard` (about number, kernel, order or size, not only about which layers there are) and `network`, its number. In
    training each network appears `per_network` times, each time with a new statement: true and false, easy and hard
    ones equally often. The other splits have fixed ones. Labels `facts` and `fact` say what else is true of a network
    and which of it a statement says, for `SimilarityHead` to compare all pairs of a batch.

    Args:
        count: networks.
        max_cells: the most cells of one.
        per_network: samples of each network.
        about: "statements" or "questions".
        seed: of the networks and of the fixed statements.
        separator: between question and answer; the [SEP] of the tokenizer.

    Raises:
        ConfigError: counts below 1.
    """

    def __init__(
        self,
        count: int = 1000,
        max_cells: int = 6,
        per_network: int = 4,
        about: Literal["statements", "questions"] = "statements",
        seed: int = 0,
        separator: str = "[SEP]",
    ) -> None:
        if min(count, max_cells - 1, per_network) < 1:
            raise ConfigError(
                f"count={count}, max_cells={max_cells}, per_network={per_network}; expected 1, 2, 1 or more"
            )
        self.count, self.max_cells, self.per_network, self.about, self.seed = count, max_cells, per_network, about, seed
        self.separator = separator

    def networks(self, name: Split) -> list[Generated]:
        """The networks of one split: no combination of layers is in two of them."""
        limits = {"train": (0.0, 0.8), "validation": (0.8, 0.87), "test": (0.87, 1.0)}[name]
        every = generated(self.count, self.max_cells, self.seed)
        return [g for g in every if limits[0] <= hash_fraction(g.recipe.combination) < limits[1]]

    def split(self, name: Split) -> _Statements:
        """See `Source`."""
        names = vocabulary_of([g.graph for g in generated(self.count, self.max_cells, self.seed)])
        known = _Facts([g.graph for g in self.networks("train")]) if self.about == "statements" else None
        return _Statements(self.networks(name), names, self, known, fixed=name != "train")

    def lengths(self, name: Split) -> Sequence[int]:
        """Nodes of each sample's network."""
        return [len(network.graph.types) for network in self.networks(name) for _ in range(self.per_network)]

    def texts(self) -> Sequence[str]:
        """Some thousand texts of the training networks."""
        samples = self.split("train")
        return [str(samples[i].modalities["text"]) for i in range(min(len(samples), 4000))]


class _Facts:
    """What is true of some training network, by number; behind it one fact that holds of none."""

    def __init__(self, graphs: Sequence[ArchitectureGraph]) -> None:
        self.numbers = {text: i for i, text in enumerate(sorted(set().union(*map(facts, graphs))))}
        self.rows: dict[int, list[int]] = {}

    def number(self, said: Statement) -> int:
        """Of a statement; -1 for one about the size, which may be true of other networks too."""
        return -1 if said.kind == "size" else self.numbers.get(said.text, len(self.numbers))

    def of(self, graph: ArchitectureGraph) -> list[int]:
        """For each fact 1 where it holds."""
        row = self.rows.get(id(graph))
        if row is None:
            row = self.rows[id(graph)] = [0] * (len(self.numbers) + 1)
            for text in facts(graph) & self.numbers.keys():
                row[self.numbers[text]] = 1
        return row


class _Statements:
    def __init__(
        self,
        networks: Sequence[Generated],
        names: Sequence[str],
        source: GeneratedNetworks,
        known: _Facts | None,
        fixed: bool,
    ) -> None:
        self.networks, self.names, self.source, self.known, self.fixed = networks, names, source, known, fixed

    def __len__(self) -> int:
        return len(self.networks) * self.source.per_network

    def __getitem__(self, index: int) -> Sample:
        """A statement or question; a new one each time in training, from torch's generator."""
        number, which = divmod(index, self.source.per_network)
        graph = self.networks[number].graph
        seed = f"{self.source.seed} {index}" if self.fixed else str(int(torch.randint(2**31, ())))
        draw = random.Random(seed)
        if self.source.about == "questions":
            question = draw.choice([*questions(graph), Question(CAPTION, caption(graph), "caption")])
            text = f"{question.text}{self.source.separator}{question.answer}"
            return Sample({"architecture": graph, "text": text}, f"{graph.name}: {question.text}", {"network": number})
        said = self._statement(graph, draw, which)
        labels: dict[str, Any] = {"match": int(said.true), "hard": int(said.hard), "network": number}
        if self.known is not None:
            labels |= {"facts": self.known.of(graph), "fact": self.known.number(said)}
        return Sample({"architecture": graph, "text": said.text}, f"{graph.name}: {said.text}", labels)

    def _statement(self, graph: ArchitectureGraph, draw: random.Random, which: int) -> Statement:
        true, hard = which % 2 == 0, which % 4 >= 2
        said = statement(graph, self.names, draw, true, hard) or statement(graph, self.names, draw, True, False)
        assert said is not None  # every network has a layer to speak of
        return said
