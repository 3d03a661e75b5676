"""A modality that lives outside mmpt: short sequences of 2-d points, to prove that nothing else needs to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmpt.encoder import KEEP, MASK, RANDOM, Corruption, Encoder, Inputs, Part, Processor
from mmpt.errors import SampleError
from mmpt.source import Examples, Sample, Source, Split
from mmpt.tokens import Tokens
from mmpt.transformer import Transformer

NAMES = ["circle", "line", "spiral", "zigzag"]


class PointsProcessor(Processor):
    """Lists of (x, y) -> {"points": float (batch, length, 2), "mask": bool (batch, length)}."""

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        rows = []
        for index, sample in enumerate(samples):
            points = torch.as_tensor(sample, dtype=torch.float32)
            if points.ndim != 2 or points.shape[1] != 2 or not torch.isfinite(points).all():
                raise SampleError(repr(sample), "not a list of finite points", "numbers (length, 2)", index)
            rows.append(points + (0.02 * torch.randn(points.shape) if training else 0))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in rows], True)
        return {"points": nn.utils.rnn.pad_sequence(rows, True), "mask": mask}


class PointsEncoder(Encoder):
    """A point is a unit.

    Args:
        width: of the tokens.
        depth: layers.
        dropout: of the transformer.
    """

    def __init__(self, width: int = 32, depth: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.width = width
        self.processor = PointsProcessor()
        self.input = nn.Linear(2, width)
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = Transformer(width, depth, 4, max_length=32, dropout=dropout)
        self.output = nn.Linear(width, 2)

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        values = self.input(inputs["points"])
        if corruption is not None:
            other = self.input(torch.rand_like(inputs["points"]))
            action = corruption.action.unsqueeze(-1)
            values = torch.where(action == MASK, self.hidden, torch.where(action == RANDOM, other, values))
        return self.transformer(Tokens(values, inputs["mask"]))

    def units(self, inputs: Inputs) -> Tensor:
        return inputs["mask"]

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        return self.output(tokens.values[corruption.predicted])

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        target = inputs["points"][corruption.predicted]
        loss = ((predictions - target) ** 2).sum() / max(1, target.numel())
        return Part(loss, {"rmse": loss.detach().sqrt()})


def draw(name: str, length: int, generator: torch.Generator) -> Tensor:
    """Points of a figure at a random place and size: (length, 2)."""
    t = torch.linspace(0, 1, length)
    turn = 2 * torch.pi * (t + torch.rand(1, generator=generator))
    shape = {
        "circle": torch.stack([turn.cos(), turn.sin()], 1),
        "line": torch.stack([t, t], 1),
        "spiral": torch.stack([t * (2 * turn).cos(), t * (2 * turn).sin()], 1),
        "zigzag": torch.stack([t, (torch.arange(length) % 2).float()], 1),
    }[name]
    return shape + 0.2 * torch.randn(2, generator=generator)


class PointsSource(Source):
    """Drawn figures with their names.

    Args:
        path: not used; everything is drawn.
        size: samples in the training split.
    """

    def __init__(self, path: str | None = None, size: int = 64) -> None:
        self.path = path
        self.size = size

    def split(self, name: Split) -> Examples:
        size = self.size if name == "train" else 16
        generator = torch.Generator().manual_seed(["train", "validation", "test"].index(name))
        samples = []
        for number in range(size):
            label = number % len(NAMES)
            points = draw(NAMES[label], 5 + number % 7, generator).tolist()
            labels = {"class": label, "group": label}
            samples.append(Sample({"points": points, "text": f"a {NAMES[label]}"}, f"{name}-{number}", labels))
        return samples

    def label_names(self, label: str) -> Sequence[str]:
        return NAMES if label == "class" else ()


__all__ = ["KEEP", "NAMES", "PointsEncoder", "PointsProcessor", "PointsSource", "draw"]
