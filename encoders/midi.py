"""Symbolic music: MidiBERT-Piano (arXiv 2107.05223) and Adversarial-MidiBERT (arXiv 2407.08306).

A unit is a note: a compound word of several fields, whose embeddings are concatenated. A hidden note is hidden in all
its fields, and every field is predicted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpt.encoder import IGNORED, MASK, RANDOM, Corruption, Encoder, Inputs, Part, Processor, UnitLosses
from mmpt.encoders.midi_notes import DRUMS, PART, Notes, read_notes
from mmpt.encoders.midi_tokens import MidiTokenizer, Octuple, transposition_range, velocity_class
from mmpt.errors import ConfigError, SampleError
from mmpt.text import TruncationWarning
from mmpt.tokens import Tokens
from mmpt.transformer import Transformer

VELOCITY = "velocity"
"""The note label that every piece has: MidiBERT's six velocity classes."""

GIVEN_AWAY = {VELOCITY: (VELOCITY,), PART: ("instrument",)}
"""Note label -> fields that would give it away."""


class MidiProcessor(Processor):
    """Pieces -> compound words, padded to the longest piece of the batch.

    A sample is a path, the bytes of a MIDI file, a symusic score, `Notes` or a plain array; see
    `mmpt.encoders.midi_notes.read_notes`. Longer pieces lose their end (with a warning); sources cut pieces into
    excerpts.

    | key            | shape                        | meaning                                                      |
    |----------------|------------------------------|--------------------------------------------------------------|
    | words          | long (batch, length, fields) | field values; the PAD word where there is no note            |
    | mask           | bool (batch, length)         | True where real, the word that ends a piece included         |
    | label/velocity | long (batch, length)         | velocity class, `IGNORED` where there is no note             |
    | label/NAME     | long (batch, length)         | other labels of the notes, `IGNORED` where there is none     |

    Args:
        tokenizer: the encoding.
        max_length: most words of a piece, the one that ends it included.
        transpose: in training, shift each piece by a random interval below an octave; drums stay.
    """

    def __init__(self, tokenizer: MidiTokenizer | None = None, max_length: int = 512, transpose: bool = False) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}; a piece needs at least 2 words")
        self.tokenizer = tokenizer or Octuple()
        self.max_length = max_length
        self.transpose = transpose

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """Encode a batch of pieces.

        Raises:
            SampleError: a piece that can't be read, or without a note that the encoding has.
        """
        words: list[Tensor] = []
        labels: list[dict[str, Tensor]] = []
        for index, sample in enumerate(samples):
            try:
                notes = read_notes(sample)
                if training and self.transpose:
                    notes = _transposed(notes)
                row, row_labels = self._encode(notes)
            except SampleError as error:
                raise SampleError(error.sample, error.problem, error.expected, index) from error
            words.append(row)
            labels.append(row_labels)
        return self._padded(words, labels)

    def _encode(self, notes: Notes) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = self.tokenizer.encode(notes)
        table, order = encoded.words, encoded.notes
        if not len(table):
            raise SampleError("piece", f"none of its {len(notes)} notes is in the vocabulary", "a note that is")
        room = self.max_length - self.tokenizer.ends
        if len(table) > room:
            # The same message every time: Python's warning filter shows it once.
            warnings.warn(
                f"pieces of more than {room} notes lose their end; cut them into excerpts or raise max_length",
                TruncationWarning,
                stacklevel=3,
            )
            table, order = table[:room], order[:room]
        labels = {VELOCITY: velocity_class(notes.velocity[order])}
        for name, values in notes.labels.items():
            labels[name] = np.where(values[order] < 0, IGNORED, values[order])
        if self.tokenizer.ends:
            table = np.concatenate([table, self.tokenizer.end[None]])
        return torch.from_numpy(table), {name: torch.from_numpy(values) for name, values in labels.items()}

    def _padded(self, words: list[Tensor], labels: list[dict[str, Tensor]]) -> Inputs:
        pad = torch.from_numpy(self.tokenizer.pad)
        length = max((len(row) for row in words), default=0)
        table = pad.expand(len(words), length, len(pad)).clone()
        mask = torch.zeros(len(words), length, dtype=torch.bool)
        names = sorted({VELOCITY}.union(*labels))
        tagged = {name: torch.full((len(words), length), IGNORED) for name in names}
        for number, (row, row_labels) in enumerate(zip(words, labels, strict=True)):
            table[number, : len(row)] = row
            mask[number, : len(row)] = True
            for name, values in row_labels.items():
                tagged[name][number, : len(values)] = values
        return {"words": table, "mask": mask, **{f"label/{name}": values for name, values in tagged.items()}}


def _transposed(notes: Notes) -> Notes:
    """Shifted by an interval from torch's generator, the same for all notes but drums."""
    melodic = notes.program != DRUMS
    if not melodic.any():
        return notes
    low, high = transposition_range(notes.pitch[melodic])
    shift = int(torch.randint(low, high + 1, ()))
    return replace(notes, pitch=notes.pitch + shift * melodic)


class MidiEncoder(Encoder):
    """A transformer over compound words, with learned vectors for the distance of notes (relative_key_query).

    The sizes of the papers are `MidiEncoder(CompoundWords())` and `MidiEncoder(Octuple(), max_length=1024)`, both with
    the other defaults. The constant token-type vector of the released code is the bias of the input layer here.

    Args:
        tokenizer: the encoding.
        width: size of the tokens.
        depth: layers.
        heads: attention heads.
        feedforward: hidden size of the feed-forward blocks; 4 * `width` by default.
        field_width: size of the embedding of one field.
        max_length: longest piece, in words.
        norm: "post" (BERT) or "pre" (trains without long warm-up).
        dropout: of the input, every part's output and the attention probabilities.
        loss_weights: how the fields share the loss: by the size of their vocabularies (MidiBERT) or equally.
        initialization: "bert" draws matrices with standard deviation 0.02, which suits its width of 768; "fan_in" with
            one over the root of their inputs and clearly different distances, with which narrow models learn to look at
            neighbouring notes within a few hundred steps.
        transpose: see `MidiProcessor`.
        packing: see `mmpt.transformer.Transformer`.
    """

    def __init__(
        self,
        tokenizer: MidiTokenizer | None = None,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        feedforward: int | None = None,
        field_width: int = 256,
        max_length: int = 512,
        norm: Literal["pre", "post"] = "post",
        dropout: float = 0.1,
        loss_weights: Literal["vocabulary", "equal"] = "vocabulary",
        initialization: Literal["bert", "fan_in"] = "bert",
        transpose: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        if initialization not in ("bert", "fan_in"):
            raise ConfigError(f"initialization is {initialization!r}; choose 'bert' or 'fan_in'")
        if loss_weights not in ("vocabulary", "equal"):
            raise ConfigError(f"loss_weights is {loss_weights!r}; choose 'vocabulary' or 'equal'")
        tokenizer = tokenizer or Octuple()
        self.tokenizer = tokenizer
        self.width = width
        self.max_length = max_length
        self.processor = MidiProcessor(tokenizer, max_length, transpose)
        self.sizes = [field.size for field in tokenizer.fields]
        self.values = [field.values for field in tokenizer.fields]
        # One table for all fields: the rows of a field begin where those of the field before it end.
        self.embedding = nn.Embedding(sum(self.sizes), field_width)
        self.input = nn.Linear(len(self.sizes) * field_width, width)
        self.transformer = Transformer(
            width,
            depth,
            heads,
            feedforward,
            norm,
            "relative_key_query",
            max_length,
            input_norm=norm == "post",
            dropout=dropout,
            attention_dropout=dropout,
            norm_eps=1e-12 if norm == "post" else 1e-5,
            packing=packing,
        )
        self.output = nn.Linear(width, sum(self.sizes))
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.input.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.output.bias)
        if initialization == "fan_in":
            self._initialize_by_inputs()
        shares = [size if loss_weights == "vocabulary" else 1 for size in self.sizes]
        self.field_shares = [share / sum(shares) for share in shares]

    def _initialize_by_inputs(self) -> None:
        for name, weight in self.transformer.named_parameters():
            if name.endswith("distance"):
                nn.init.normal_(weight, std=0.5)
            elif weight.ndim == 2:
                writes = name.endswith(("attention.output.weight", "contract.weight"))  # into the residual stream
                nn.init.normal_(weight, std=(0.5 if writes else 1.0) * weight.shape[1] ** -0.5)

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode notes.

        A hidden note becomes the MASK word; a random one gets ordinary values, drawn for each field by itself.
        """
        words = inputs["words"]
        if corruption is not None:
            words = self._corrupt(words, corruption.action.unsqueeze(-1))
        starts = np.cumsum([0, *self.sizes[:-1]])
        rows = words + torch.tensor(starts, device=words.device)
        embedded = self.embedding(rows) * math.sqrt(self.embedding.embedding_dim)
        return self.transformer(Tokens(self.input(embedded.flatten(2)), inputs["mask"]))

    def _corrupt(self, words: Tensor, action: Tensor) -> Tensor:
        values = torch.tensor(self.values, device=words.device)
        # 62 bits modulo a small number: the draw differs from a uniform one by less than 1e-15
        random = torch.randint(2**62, words.shape, device=words.device) % values
        words = torch.where(action == MASK, values + 1, words)
        return torch.where(action == RANDOM, random, words)

    def units(self, inputs: Inputs) -> Tensor:
        """Notes; neither padding nor the word that ends a piece: bool (batch, length)."""
        return inputs["mask"] & (inputs["words"][..., 0] < self.values[0])

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        """Logits of all fields side by side, at the predicted notes only: (predicted, sum of the field sizes)."""
        return self.output(tokens.values[corruption.predicted])

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        """Weighted sum over the fields of the mean cross-entropy; loss and accuracy of each field beside it."""
        found = self.unit_losses(predictions, inputs, corruption)
        count = max(len(predictions), 1)
        losses = found.losses.sum(0) / count
        loss = weighted_loss(losses, self.field_shares)
        logs: dict[str, Tensor] = {}
        for field, accuracy, part in zip(
            self.tokenizer.fields, found.correct.sum(0) / count, losses.detach(), strict=True
        ):
            logs[f"accuracy_{field.name}"] = accuracy
            logs[f"nll_{field.name}"] = part
        return Part(loss, logs)

    def unit_losses(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> UnitLosses:
        """Cross-entropy of each field of each predicted note: (predicted, fields)."""
        targets = inputs["words"][corruption.predicted]
        losses, correct = [], []
        for logits, target in zip(predictions.float().split(self.sizes, 1), targets.unbind(1), strict=True):
            losses.append(functional.cross_entropy(logits, target, reduction="none"))
            correct.append(logits.detach().argmax(1) == target)
        return UnitLosses(torch.stack(losses, 1), torch.stack(correct, 1))

    def unit_labels(self, inputs: Inputs, label: str) -> tuple[Inputs, Tensor]:
        """Labels of the notes: `velocity`, `part` where the source names parts, and any other that the notes carry.

        For `velocity` the Velocity field is hidden, which would fix the label; for `part` the Instrument field.
        """
        key = f"label/{label}"
        if key not in inputs:
            known = ", ".join(name.removeprefix("label/") for name in inputs if name.startswith("label/"))
            raise ConfigError(f"these notes have no label {label!r}; they have {known}")
        return {**inputs, "words": self.without(inputs, GIVEN_AWAY.get(label, ()))}, inputs[key]

    def without(self, inputs: Inputs, fields: Sequence[str]) -> Tensor:
        """The words with MASK in some fields of every note; names that the encoding lacks are passed over."""
        words, units = inputs["words"].clone(), self.units(inputs)
        for name in fields:
            place = self.tokenizer.field(name)
            if place is not None:
                words[..., place] = torch.where(units, self.values[place] + 1, words[..., place])
        return words


def weighted_loss(losses: Tensor, shares: Sequence[float]) -> Tensor:
    """Sum of the fields' losses (fields,) times their shares."""
    return (losses * torch.tensor(shares, device=losses.device, dtype=losses.dtype)).sum()
