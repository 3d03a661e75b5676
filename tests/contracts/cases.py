"""What the contract suite runs over. A later modality joins by adding one `EncoderCase` here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from shapes import PointsEncoder
from torch import Tensor

from mmpt.encoder import Encoder, Inputs
from mmpt.encoders.image import ImageEncoder
from mmpt.encoders.image_chart import ChartEncoder
from mmpt.heads import (
    CaptioningHead,
    ContrastiveHead,
    GroupContrastiveHead,
    Head,
    MaskedHead,
    MatchingHead,
)
from mmpt.masking import Exact, MaskingPolicy
from mmpt.text import TextEncoder, TextTransformer
from mmpt.tokenization import train_wordpiece

TEXTS = ["a red circle", "a blue square on the left", "nothing", "a very small green dot beside a large grey one"]


@dataclass(frozen=True)
class EncoderCase:
    """One encoder under the contract.

    Attributes:
        name: shown by pytest.
        make: builds a small encoder with random weights.
        samples: four raw samples, of different lengths where the modality has lengths.
        bad: a raw sample that must be refused.
        alter: (inputs, bool (batch, length)) -> inputs whose content at these units is another one.
        policy: hides units in the way that this encoder is used with.
        drops: hidden units are left out of the tokens.
    """

    name: str
    make: Callable[[], Encoder]
    samples: Callable[[], Sequence[Any]]
    bad: Any
    alter: Callable[[Inputs, Tensor], Inputs]
    policy: MaskingPolicy
    drops: bool = False

    def __str__(self) -> str:
        return self.name


def text_transformer(width: int = 32, **options: Any) -> TextTransformer:
    """A small text transformer with random weights."""
    return TextTransformer(train_wordpiece(TEXTS, 80), width=width, depth=1, heads=4, max_length=64, **options)


def _pictures() -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(torch.randint(0, 256, (20 + 9 * i, 40, 3), generator=generator, dtype=torch.uint8).numpy())
        for i in range(4)
    ]


def _other_pixels(inputs: Inputs, units: Tensor, patch: int, prefix: int) -> Inputs:
    pixels = inputs["pixels"].clone()
    side = pixels.shape[-1] // patch
    grid = units[:, prefix:].view(-1, 1, side, side)
    grid = grid.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return {**inputs, "pixels": torch.where(grid, -pixels + 0.7, pixels)}


def _vit(hide: str) -> Callable[[], Encoder]:
    options = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return lambda: ImageEncoder("vit_tiny_patch16_224", 32, backbone_args=options, hide=hide, decoder_width=32)


def _other_ids(inputs: Inputs, units: Tensor) -> Inputs:
    ids = inputs["ids"]
    return {**inputs, "ids": torch.where(units, 5 + (ids + 3) % 20, ids)}


def _points() -> list[list[list[float]]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3 + 2 * i, 2, generator=generator).tolist() for i in range(4)]


ENCODERS = [
    EncoderCase("text", lambda: TextEncoder(text_transformer()), lambda: TEXTS, 7, _other_ids, Exact(0.4, 0.8, 0.1)),
    EncoderCase(
        "image-vit-vector",
        _vit("vector"),
        _pictures,
        "absent.png",
        lambda inputs, units: _other_pixels(inputs, units, 8, 1),
        Exact(0.6, 1.0, 0.0),
    ),
    EncoderCase(
        "image-vit-drop",
        _vit("drop"),
        _pictures,
        "absent.png",
        lambda inputs, units: _other_pixels(inputs, units, 8, 1),
        Exact(0.75, 1.0, 0.0),
        drops=True,
    ),
    EncoderCase(
        "image-resnet",
        lambda: ImageEncoder("resnet10t", 64, backbone_args={"channels": (16, 16, 32, 32)}),
        _pictures,
        "absent.png",
        lambda inputs, units: _other_pixels(inputs, units, 32, 0),
        Exact(0.5, 1.0, 0.0),
    ),
    EncoderCase(
        "chart",
        lambda: ChartEncoder(
            size=32, backbone_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}, hide="vector"
        ),
        lambda: [None, *_pictures()[1:]],
        "absent.png",
        lambda inputs, units: _other_pixels(inputs, units, 8, 1),
        Exact(0.6, 1.0, 0.0),
    ),
    EncoderCase(
        "points (outside mmpt)",
        PointsEncoder,
        _points,
        [[float("nan"), 0.0]],
        lambda inputs, units: {**inputs, "points": torch.where(units[..., None], 9.0, inputs["points"])},
        Exact(0.4, 0.8, 0.1),
    ),
]

HEADS: list[tuple[str, Callable[[str], Head]]] = [
    ("softmax contrastive", lambda modality: ContrastiveHead(modality)),
    ("sigmoid contrastive", lambda modality: ContrastiveHead(modality, loss="sigmoid")),
    ("two passes", lambda modality: ContrastiveHead(modality, modality)),
    ("groups", lambda modality: GroupContrastiveHead(modality)),
    ("masked", lambda modality: MaskedHead(modality, Exact(0.5, 1.0, 0.0))),
    ("matching", lambda modality: MatchingHead(modality)),
    ("captioning", lambda modality: CaptioningHead(modality)),
]
