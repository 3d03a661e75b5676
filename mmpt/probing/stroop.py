"""Stroop probing: the option that fits best changes the sentence's embedding least.

Alper, Fiman and Averbuch-Elor, "Is BERT Blind? Exploring the Effect of Vision-and-Language Pretraining on Visual
Language Understanding", CVPR 2023, arXiv 2303.12513.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mmpt.errors import ConfigError
from mmpt.probing.embedders import Embedder, Pooling
from mmpt.probing.task import MASK, Item, Task


@dataclass(frozen=True)
class StroopSettings:
    """What changes the result of a probe, and therefore stands in every report.

    Attributes:
        pooling: how a text becomes a vector; None is the encoder's own.
        neutral: what stands in the place of MASK in the base sentence. Blanks around it are kept.
        attention_mask: False pads the sentences of an item to the longest of them and lets the encoder see the padding,
            as the released code does for text-only encoders: then scores depend on which options are asked together.
        normalize: compare by the cosine; False by the dot product.
    """

    pooling: Pooling | None = None
    neutral: str = ""
    attention_mask: bool = True
    normalize: bool = True


PRESETS = {"released": StroopSettings("pooler", "", attention_mask=False)}
"""`released`: what the released code does with text-only encoders (its class TEXT_SP)."""


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """Scores of one encoder on one task.

    Attributes:
        model: the encoder's name.
        probe: "stroop" or "masked-lm".
        settings: of the probe, with the pooling that was used.
        task: what was asked.
        scores: one array for each prompt: (items, options), or (items,) for ratings.
    """

    model: str
    probe: str
    settings: dict[str, Any]
    task: Task
    scores: tuple[np.ndarray, ...]

    @property
    def predictions(self) -> np.ndarray:
        """Number of the option with the highest score, the first of equals: (prompts, items)."""
        return np.stack([scores.argmax(1) for scores in self.scores])

    @property
    def correct(self) -> np.ndarray:
        """Whether each prediction is right: bool (prompts, items)."""
        return self.predictions == self.task.answers


class StroopProbe:
    """Scores options by the similarity of the sentence with the option to the sentence without.

    Args:
        encoder: a frozen text encoder.
        settings: see `StroopSettings`.

    Raises:
        ConfigError: a pooling that the encoder can't do.
    """

    def __init__(self, encoder: Embedder, settings: StroopSettings | None = None) -> None:
        self.encoder = encoder
        self.settings = settings or StroopSettings()
        self.pooling = encoder.check(self.settings.pooling)

    def score(self, base: str, sentences: Sequence[str]) -> np.ndarray:
        """Similarity of each sentence to the base sentence: float64 (sentences,)."""
        return self._scores([(base, tuple(sentences))])[0]

    def score_from_options(self, sentence: str, options: Sequence[str]) -> np.ndarray:
        """Similarity of the sentence with each option in the place of MASK to the one with the neutral text.

        Raises:
            ConfigError: (a ValueError) no MASK in the sentence.
        """
        return self._scores([self._fill(sentence, options)])[0]

    def run(self, task: Task, progress: Callable[[int], Any] | None = None) -> ProbeResult:
        """Score all items under all prompts, in one go.

        Args:
            task: what to ask.
            progress: called with the number of texts that are done; see `count`.
        """
        sets = [
            self._fill(task.sentence(item, prompt), candidates(task, item))
            for prompt in task.prompts
            for item in task.items
        ]
        flat = np.stack(self._scores(sets, progress))  # (prompts * items, options)
        scores = flat.reshape(len(task.prompts), len(task.items), -1)
        if task.kind == "rating":
            scores = scores[:, :, 0]
        settings = asdict(self.settings) | {"pooling": self.pooling}
        return ProbeResult(self.encoder.name, "stroop", settings, task, tuple(scores))

    def _fill(self, sentence: str, options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        if MASK not in sentence:
            raise ConfigError(f"{sentence!r} has no {MASK}; expected the slot where the options go")
        return sentence.replace(MASK, self.settings.neutral), tuple(sentence.replace(MASK, o) for o in options)

    def _scores(
        self, sets: Sequence[tuple[str, tuple[str, ...]]], progress: Callable[[int], Any] | None = None
    ) -> list[np.ndarray]:
        texts = [text for base, sentences in sets for text in (base, *sentences)]
        sizes = [1 + len(sentences) for _, sentences in sets]
        groups = None if self.settings.attention_mask else np.repeat(np.arange(len(sets)), sizes).tolist()
        vectors = self.encoder.embed(texts, self.pooling, groups, progress).double()
        if self.settings.normalize:
            vectors = F.normalize(vectors, dim=1)
        similarity = [part[1:] @ part[0] for part in torch.split(vectors, sizes)]
        return [part.numpy() for part in similarity]


def candidates(task: Task, item: Item) -> tuple[str, ...]:
    """What takes the place of MASK: the options, or the item itself for a rating."""
    return tuple(item.slots.values())[:1] if task.kind == "rating" else item.options


def count(task: Task) -> int:
    """How many texts a probe reads for a task, base sentences included."""
    return sum(1 + len(candidates(task, item)) for item in task.items) * len(task.prompts)
