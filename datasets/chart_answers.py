"""Asking a trained model about charts: read the data, answer, or read first and answer then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmpt.datasets.chart import EXTRACT
from mmpt.errors import DataError
from mmpt.model import MultimodalModel


@dataclass(frozen=True)
class Answered:
    """What a model wrote.

    Attributes:
        answer: to the question.
        data: what it read off the chart first, or was given; None without data prompting.
    """

    answer: str
    data: str | None = None


def extract(
    model: MultimodalModel,
    pictures: Sequence[Any],
    modality: str = "chart",
    separator: str = "[SEP]",
    max_new_tokens: int = 128,
    beams: int = 1,
    batch_size: int = 32,
    prompt: str = EXTRACT,
) -> list[str]:
    """Let a model write the data of charts, as it was trained to (`mmpt.datasets.chart_records.parse` reads it).

    Args:
        model: trained with the layouts "align-json" or "extract-then-answer".
        pictures: one for each chart; None shows none (a blind model).
        modality: the model's name of charts.
        separator: between prompts and answers.
        max_new_tokens: most tokens of a record.
        beams: width of the beam search.
        batch_size: charts at once.
        prompt: what to write; `mmpt.datasets.chart.LIST` asks for the values alone, which `values_of` reads.
    """
    prompts = [f"{prompt}{separator}"] * len(pictures)
    return _generated(model, prompts, pictures, modality, max_new_tokens, beams, batch_size)


def values_of(text: str) -> list[float] | None:
    """The values that a model lists when it is asked to (`LIST`, layout "align-values"); None for another text."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def answer(
    model: MultimodalModel,
    pictures: Sequence[Any],
    questions: Sequence[str],
    data_prompting: bool = False,
    data: Sequence[str] | None = None,
    modality: str = "chart",
    separator: str = "[SEP]",
    max_new_tokens: int = 128,
    beams: int = 1,
    batch_size: int = 32,
) -> list[Answered]:
    """Let a model answer questions about charts.

    Args:
        model: trained with the layouts "qa" or "extract-then-answer".
        pictures: one for each question.
        questions: without "Q:".
        data_prompting: the model first writes the data of the chart, then answers behind them.
        data: put these data before the questions in place of what the model would read: the true ones give the upper
            bound of data prompting.
        modality: the model's name of charts.
        separator: between prompts and answers.
        max_new_tokens: most tokens of data or answer.
        beams: width of the beam search.
        batch_size: charts at once.

    Raises:
        DataError: another number of pictures, questions or data.
    """
    if len({len(pictures), len(questions), len(questions if data is None else data)}) > 1:
        raise DataError(
            f"{len(pictures)} pictures, {len(questions)} questions, data {data and len(data)}; expected equal numbers"
        )
    if data is None and data_prompting:
        data = extract(model, pictures, modality, separator, max_new_tokens, beams, batch_size)
    asked = [f"Q: {question} A:{separator}" for question in questions]
    if data is not None:
        asked = [f"{EXTRACT}{separator}{read}{separator}{turn}" for read, turn in zip(data, asked, strict=True)]
    answers = _generated(model, asked, pictures, modality, max_new_tokens, beams, batch_size)
    return [Answered(text, None if data is None else data[index]) for index, text in enumerate(answers)]


def _generated(
    model: MultimodalModel,
    prompts: Sequence[str],
    pictures: Sequence[Any],
    modality: str,
    max_new_tokens: int,
    beams: int,
    batch_size: int,
) -> list[str]:
    written: list[str] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        shown: dict[str, Any] = {modality: list(pictures[part])}
        written += model.generate(list(prompts[part]), max_new_tokens=max_new_tokens, beams=beams, **shown)
    return written
