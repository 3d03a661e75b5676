"""What the contract suite runs over. A later modality joins by adding one `EncoderCase` here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cells import GENES, adata
from midi_pieces import piece
from PIL import Image
from shapes import PointsEncoder
from torch import Tensor

from mmpt.encoder import Encoder, Inputs
from mmpt.encoders.architecture import ArchitectureEncoder, ArchitectureProcessor
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.encoders.cell import CellEncoder, GeneVocabulary
from mmpt.encoders.image import ImageEncoder
from mmpt.encoders.image_chart import ChartEncoder
from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_tokens import CompoundWords, MidiTokenizer, Octuple
from mmpt.heads import (
    CaptioningHead,
    ContrastiveHead,
    GroupContrastiveHead,
    Head,
    MaskedHead,
    MatchingHead,
    SimilarityHead,
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


def _networks() -> list[ArchitectureGraph]:
    layers = ("conv", "bn", "relu", "max_pool", "sum")
    types = [("input", *(layers[(i + k) % 5] for k in range(4 + 3 * i))) for i in range(4)]
    shapes = [tuple((8 * (j % 3 + 1), 8, 3, 3) if t == "conv" else () for j, t in enumerate(row)) for row in types]
    edges = [tuple({(max(0, j - 1), j) for j in range(1, len(row))} | {(0, len(row) - 1)}) for row in types]
    return [ArchitectureGraph(*parts) for parts in zip(types, shapes, edges, strict=True)]


def _other_types(inputs: Inputs, units: Tensor) -> Inputs:
    return {**inputs, "types": torch.where(units, (inputs["types"] + 3) % 30, inputs["types"])}


def _points() -> list[list[list[float]]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3 + 2 * i, 2, generator=generator).tolist() for i in range(4)]


def _cell_encoder() -> Encoder:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "genes.tsv"
        path.write_text("gene\tmedian\n" + "".join(f"{gene}\t1.5\n" for gene in GENES), encoding="utf-8")
        return CellEncoder(GeneVocabulary(path=str(path)), width=32, depth=1, max_length=64)


def _other_genes(inputs: Inputs, units: Tensor) -> Inputs:
    return {**inputs, "ids": torch.where(units, 2 + (inputs["ids"] + 5) % len(GENES), inputs["ids"])}


def _midi(tokenizer: MidiTokenizer) -> Callable[[], Encoder]:
    return lambda: MidiEncoder(tokenizer, 32, 2, 4, field_width=8, max_length=64, norm="pre")


def _other_notes(inputs: Inputs, units: Tensor) -> Inputs:
    words = inputs["words"].clone()
    words[..., 1:] = torch.where(units.unsqueeze(-1), (words[..., 1:] + 3) % 16, words[..., 1:])
    return {**inputs, "words": words}


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
        "cell",
        _cell_encoder,
        lambda: [adata(4)[row] for row in range(4)],
        adata(2),
        _other_genes,
        Exact(0.4, 0.8, 0.1),
    ),
    EncoderCase(
        "midi-compound-words",
        _midi(CompoundWords()),
        lambda: [piece(5 + 6 * number, number) for number in range(4)],
        b"MThd and no more",
        _other_notes,
        Exact(0.4, 0.8, 0.1),
    ),
    EncoderCase(
        "midi-octuple",
        _midi(Octuple()),
        lambda: [piece(5 + 6 * number, number) for number in range(4)],
        "absent.mid",
        _other_notes,
        Exact(0.4, 0.8, 0.1),
    ),
    EncoderCase(
        "architecture",
        lambda: ArchitectureEncoder(32, 2, processor=ArchitectureProcessor(24)),
        _networks,
        "absent.json",
        _other_types,
        Exact(0.4, 0.8, 0.1),
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
    ("similarity", lambda modality: SimilarityHead(modality)),
]
