"""Model zoos with descriptions: the networks of timm and torchvision, or your own."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import EnumMeta
from functools import cache
from pathlib import Path
from typing import Any, get_args

import timm
import torch
import torchvision
from rich.progress import track
from timm.models import model_entrypoint

from mmpt.datasets.architecture_statements import description, template_texts
from mmpt.encoders.architecture import graph_of
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.encoders.architecture_names import TORCHVISION, zoo_names
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.files import contained, hash_fraction, read_table
from mmpt.source import Examples, Sample, Source, Split

GENERIC = frozenset(
    [
        "base",
        "tiny",
        "small",
        "large",
        "huge",
        "giant",
        "nano",
        "micro",
        "mini",
        "pico",
        "femto",
        "atto",
        "xs",
        "xxs",
        "patch",
        "window",
        "medium",
        "deep",
        "wide",
        "res",
        "test",
        "net",
        "model",
        "vision",
        "transformer",
        "image",
        "for",
        "with",
        "the",
        "and",
        "pool",
        "patch",
        "mixer",
        "former",
        "conv",
        "relpos",
        "attention",
        "token",
        "mlp",
    ]
)
"""Words of model and file names that say something about a network, or nothing about which family it is of."""

SIZES = (10e6, 30e6, 100e6)
"""Parameters that divide the sizes of `class`."""


@dataclass(frozen=True)
class Entry:
    """A model of a zoo.

    Attributes:
        name: as `named_graph` takes it.
        family: the file that defines it.
        text: its description without names of models and families; may be empty.
    """

    name: str
    family: str
    text: str


class ModelZoo(Source):
    """Networks with descriptions, split by the file that defines them, so that no sibling of a test model is seen.

    Descriptions are docstrings, without the names of models and families, which would give the answer away.
    In training a model's text is its docstring or, for a share of the draws and where it has none, facts read from its
    graph. In the other splits it is the docstring, and only models that have one are there.

    Samples hold `architecture` (a graph) and `text`. Labels: `group`, the number of the docstring: models with one
    docstring are positives of each other; `class`, the size by parameters.

    `path` is your own table (.csv, .tsv, .jsonl) with a column `network` (a name of timm, `torchvision/NAME`, or the
    path of an .onnx or .json file below the table's folder), a column `text`, one `class`, or both, and if you like
    `family`, which is never divided between splits. `path` may also be a folder of .onnx and .json files, or one such
    file.

    Args:
        fold: which part of the families is the test split; the next one is the validation split.
        folds: number of parts.
        facts: in training, the share of texts that are facts read from the graph.
        limit: at most this many models (evenly over the zoo), for a short trial.
        path: see above; None is the zoo.

    Raises:
        ConfigError: a fold outside the folds, or a share outside 0 to 1.
    """

    def __init__(
        self,
        fold: int = 0,
        folds: int = 5,
        facts: float = 0.3,
        limit: int | None = None,
        path: str | None = None,
    ) -> None:
        if folds < 3 or not 0 <= fold < folds:
            raise ConfigError(f"fold is {fold} of {folds}; expected 3 or more folds, and 0 <= fold < folds")
        if not 0 <= facts <= 1:
            raise ConfigError(f"facts is {facts}; expected a share from 0 to 1")
        self.fold, self.folds, self.facts, self.limit, self.path = fold, folds, facts, limit, path

    def split(self, name: Split) -> Examples:
        """See `Source`."""
        if self.path is not None:
            return _Own(own_networks(Path(self.path)), name, self.fold, self.folds)
        return _Zoo(self.entries(name), self.facts if name == "train" else 0.0, training=name == "train")

    def lengths(self, name: Split) -> Sequence[int] | None:
        """Nodes of each network; None for your own, which are read one by one."""
        if self.path is not None:
            return None
        entries = self.entries(name)
        graphs = _graphs(tuple(entry.name for entry in entries))
        return [len(graphs[e.name].types) if e.name in graphs else 1 for e in entries]

    def everything(self) -> Examples:
        """All models, also those without a description."""
        if self.path is not None:
            return _Own(own_networks(Path(self.path)), None, self.fold, self.folds)
        return _Zoo(self._limited(), 0.0, training=False)

    def entries(self, name: Split) -> list[Entry]:
        """The models of one split."""
        folds = family_folds(self.folds)
        wanted = {"test": {self.fold}, "validation": {(self.fold + 1) % self.folds}}
        parts = wanted.get(name, set(range(self.folds)) - wanted["test"] - wanted["validation"])
        return [e for e in self._limited() if folds[e.family] in parts and (e.text or name == "train")]

    def _limited(self) -> Sequence[Entry]:
        every = zoo()
        return every if self.limit is None else every[:: max(1, len(every) // self.limit)]

    def label_names(self, label: str) -> Sequence[str]:
        """For `class` the sizes, or what the `class` column of your own table names."""
        if label != "class":
            return ()
        if self.path is not None:
            return own_classes(own_networks(Path(self.path)))
        return ["under 10 M", "10 to 30 M", "30 to 100 M", "over 100 M"]

    def texts(self) -> Sequence[str]:
        """Docstrings of the training split, and what is said and asked about graphs in general."""
        if self.path is not None:
            rows = _Own(own_networks(Path(self.path)), "train", self.fold, self.folds).rows
            return [*(row.text for row in rows if row.text), *template_texts()]
        return [*(entry.text for entry in self.entries("train") if entry.text), *template_texts()]


def family_folds(folds: int) -> dict[str, int]:
    """Which fold each family is in; folds have about equal numbers of described models."""
    sizes: dict[str, int] = {}
    for entry in zoo():
        sizes[entry.family] = sizes.get(entry.family, 0) + bool(entry.text)
    filled = [0] * folds
    found: dict[str, int] = {}
    for family in sorted(sizes, key=lambda f: (-sizes[f], hash_fraction(f))):
        smallest = min(range(folds), key=lambda f: (filled[f], hash_fraction(f"{family} {f}")))
        found[family] = smallest
        filled[smallest] += sizes[family]
    return found


class _Zoo:
    def __init__(self, entries: Sequence[Entry], facts: float, training: bool) -> None:
        self.entries, self.facts, self.training = entries, facts, training
        self.groups: dict[str, int] = {}
        for entry in zoo():
            self.groups.setdefault(entry.text or entry.name, len(self.groups))
        self._graphs = _graphs(tuple(entry.name for entry in entries))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        """A model; in training its text is drawn from torch's generator."""
        entry = self.entries[index]
        graph = self._graphs.get(entry.name) or _graph(entry.name)
        text = entry.text
        if self.training:
            draw = random.Random(int(torch.randint(2**31, ())))
            if not text or draw.random() < self.facts:
                text = description(graph, draw)
        size = sum(graph.parameters > limit for limit in SIZES)
        modalities = {"architecture": graph, "text": text} if text else {"architecture": graph}
        return Sample(modalities, entry.name, {"group": self.groups[entry.text or entry.name], "class": size})


def _graph(name: str) -> ArchitectureGraph:
    try:
        return graph_of(name)
    except DataError as error:
        raise SampleError(name, str(error), "a network that can be traced on the meta device") from error


@cache
def _graphs(names: tuple[str, ...]) -> dict[str, ArchitectureGraph]:
    """All graphs, with a progress bar: traced the first time, which takes minutes for all. Failures are left out."""
    found = {}
    for name in track(names, description="graphs of the model zoo"):
        try:
            found[name] = graph_of(name)
        except DataError:
            continue  # reported when the sample is read
    return found


@cache
def zoo() -> tuple[Entry, ...]:
    """The models of timm and torchvision, with texts from their code."""
    names = zoo_names()
    families: dict[str, set[str]] = {}
    origin = {name: _origin(name) for name in names}
    for name in names:
        families.setdefault(origin[name][0], set()).update(family_words(name, origin[name][0]))
    entries = []
    for name in names:
        family, docstring = origin[name]
        entries.append(Entry(name, family, without_names(docstring, families[family])))
    return tuple(entries)


def _origin(name: str) -> tuple[str, str]:
    """File and docstring of a model."""
    if not name.startswith(TORCHVISION):
        function = model_entrypoint(name)
        return function.__module__.rpartition(".")[2], inspect.getdoc(function) or ""
    builder: Any = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
    text = (inspect.getdoc(builder) or "").split("Args:")[0]
    weights = inspect.signature(builder).parameters.get("weights")
    if weights is not None:
        kinds: list[Any] = [kind for kind in get_args(weights.annotation) if isinstance(kind, EnumMeta)]
        notes = [entry.meta.get("_docs", "") for kind in kinds for entry in kind]
        text += " " + " ".join(notes[:1])
    return builder.__module__.rpartition(".")[2], text


def family_words(name: str, file: str) -> set[str]:
    """The words of a model's name that tell its family: of `seresnext50_32x4d` in resnet.py these two."""
    parts = name.rpartition("/")[2].lower().split("_")[:2] + file.split("_")
    words = {re.sub(r"[^a-z]", "", part) for part in parts}
    return {word for word in words if len(word) > 2 and word not in GENERIC} | {file.replace("_", "")}


def without_names(text: str, names: set[str]) -> str:
    """A text without addresses and without words that are, or hold, a name of the family.

    Args:
        text: a docstring.
        names: of the family, in small letters without digits.
    """
    text = re.sub(r"https?://\S+|:?`?arxiv\S*|<[^>]*>|:\w+:", " ", text, flags=re.IGNORECASE)
    kept = []
    for word in text.replace("`", " ").split():
        letters = re.sub(r"[^a-z]", "", word.lower())
        if any(letters.startswith(name) or (len(name) > 3 and name in letters) for name in names):
            continue
        kept.append(word)
    sentence = re.sub(r"\s+", " ", " ".join(kept)).strip(" .,:-@")
    return sentence[:400] if re.search(r"[A-Za-z]{2,}", sentence) else ""


# Your own networks


@dataclass(frozen=True)
class Own:
    """A row of the user's table, or a file of the user's folder."""

    network: str
    text: str | None
    family: str
    style: str | None = None


def own_networks(path: Path) -> list[Own]:
    """The networks that a table lists, or the .onnx and .json files of a folder.

    Raises:
        DataError: nothing there, or a table without a `network` column.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".onnx", ".json"))
        if not files:
            raise DataError(f"{path} holds no .onnx or .json file")
        return [Own(str(file), None, file.stem) for file in files]
    if path.suffix.lower() in (".onnx", ".json"):
        return [Own(str(path), None, path.stem)]
    if not path.exists() and path.suffix == "":
        names = [str(path)] if timm.is_model(str(path)) else timm.list_models(str(path))
        if names:
            return [Own(name, None, name) for name in names]
    table = read_table(path)
    network = table.column(None, ("network", "model", "architecture", "name"), "network")
    if network is None:
        raise DataError(f"{path} has no column network; its columns are {', '.join(table.columns)}")
    text = table.column(None, ("text", "description", "caption"), "text")
    family = table.column(None, ("family", "file"), "family")
    style = table.column(None, ("class", "label", "category"), "class")
    rows = []
    for row in table.rows:
        value = str(row[network])
        if Path(value).suffix.lower() in (".onnx", ".json"):
            value = str(contained(path.parent, value))
        told, kin, own = (str(row[column] or "").strip() if column else "" for column in (text, family, style))
        rows.append(Own(value, told or None, kin or value, own or None))
    return rows


class _Own:
    def __init__(self, rows: Sequence[Own], split: Split | None, fold: int, folds: int) -> None:
        parts = {"test": {fold}, "validation": {(fold + 1) % folds}}
        self.groups = {row.text: i for i, row in enumerate(rows) if row.text}
        self.classes = own_classes(rows)

        def wanted(row: Own) -> bool:
            if split is None:
                return True
            part = int(hash_fraction(row.family) * folds)
            chosen = parts.get(split, set(range(folds)) - parts["test"] - parts["validation"])
            return part in chosen and (row.text is not None or row.style is not None)

        self.rows = [row for row in rows if wanted(row)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        graph = _graph(row.network)
        modalities: dict[str, object] = {"architecture": graph}
        labels: dict[str, int | float] = {}
        if row.text is not None:
            modalities["text"], labels["group"] = row.text, self.groups[row.text]
        if row.style is not None:
            labels["class"] = self.classes.index(row.style)
        return Sample(modalities, row.network, labels)


def own_classes(rows: Sequence[Own]) -> list[str]:
    """The classes of the user's table, sorted."""
    return sorted({row.style for row in rows if row.style is not None})
