"""Symbolic music: MidiBERT-Piano (arXiv 2107.05223) and Adversarial-MidiBERT (arXiv 2407.08306).

A unit is a note: a compound word of several fields, whose embeddings are concatenated. A hidden note is hidden in all
its fields, and every field is predicted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpt.encoder import IGNORED, MASK, RANDOM, Corruption, Encoder, Inputs, Part, Processor, UnitLosses
from mmpt.encoders.midi_notes import DRUMS, PART, JoinedNotes, Notes, read_notes
from mmpt.encoders.midi_tokens import MidiTokenizer, Octuple, transposition_range, velocity_class
from mmpt.errors import ConfigError, SampleError
from mmpt.text import TruncationWarning
from mmpt.tokens import Tokens
from mmpt.transformer import Transformer

VELOCITY = "velocity"
"""The note label that every piece has: MidiBERT's six velocity classes."""

GIVEN_AWAY: dict[str, dict[str, int | None]] = {VELOCITY: {VELOCITY: None}, PART: {"instrument": 0}}
"""Note label -> fields that would give it away, and the value that all notes have there instead; None is MASK."""


class MidiProcessor(Processor):
    """Pieces -> compound words, padded to the longest piece of the batch.

    A sample is a path, the bytes of a MIDI file, a symusic score, `Notes` or a plain array (see
    `mmpt.encoders.midi_notes.read_notes`), or `JoinedNotes`. Longer pieces lose their end (with a warning); sources cut
    pieces into excerpts.

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
        released_labels: label -> number of its classes, for labels that are to be numbered as in the released codes,
            with a class for padding (see `released_label_ids`); for comparison with data made by those.
    """

    def __init__(
        self,
        tokenizer: MidiTokenizer | None = None,
        max_length: int = 512,
        transpose: bool = False,
        released_labels: Mapping[str, int] | None = None,
    ) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}; a piece needs at least 2 words")
        self.tokenizer = tokenizer or Octuple()
        self.max_length = max_length
        self.transpose = transpose
        self.released_labels = dict(released_labels or {})

    def __call__(self, samples: Sequence[Any], *, training: bool = False) -> Inputs:
        """Encode a batch of pieces.

        Raises:
            SampleError: a piece that can't be read, or without a note that the encoding has.
        """
        words: list[Tensor] = []
        labels: list[dict[str, Tensor]] = []
        for index, sample in enumerate(samples):
            try:
                row, row_labels = self._sequence(sample, training and self.transpose)
            except SampleError as error:
                raise SampleError(error.sample, error.problem, error.expected, index) from error
            words.append(row)
            labels.append(row_labels)
        return self._padded(words, labels)

    def _sequence(self, sample: Any, transpose: bool) -> tuple[Tensor, dict[str, Tensor]]:
        if not isinstance(sample, JoinedNotes):
            notes = read_notes(sample)
            return self._encode(_transposed(notes) if transpose else notes, True)
        made: list[tuple[Tensor, dict[str, Tensor]]] = []
        for notes, ended in zip(sample.parts, sample.ended, strict=True):
            try:
                made.append(self._encode(_transposed(notes) if transpose else notes, ended))
            except SampleError:  # a part of drums alone, in an encoding without drums
                if not made and notes is sample.parts[-1]:
                    raise
        names = set().union(*(labels for _, labels in made))
        joined: dict[str, list[Tensor]] = {name: [] for name in names}
        for words, labels in made:
            for name in names:
                own = labels.get(name, torch.empty(0, dtype=torch.long))
                joined[name].append(functional.pad(own, (0, len(words) - len(own)), value=IGNORED))
        words = torch.cat([words for words, _ in made])
        return words[: self.max_length], {name: torch.cat(parts)[: self.max_length] for name, parts in joined.items()}

    def _encode(self, notes: Notes, ended: bool) -> tuple[Tensor, dict[str, Tensor]]:
        encoded = self.tokenizer.encode(notes)
        table, order = encoded.words, encoded.notes
        if not len(table):
            raise SampleError("piece", f"none of its {len(notes)} notes is in the vocabulary", "a note that is")
        ends = self.tokenizer.ends and ended
        room = self.max_length - ends
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
        if ends:
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
        for name, classes in self.released_labels.items():
            if name not in tagged:
                raise ConfigError(f"released_labels names {name!r}; these notes have {', '.join(names)}")
            tagged[name] = released_label_ids(tagged[name], classes, self.tokenizer)
        return {"words": table, "mask": mask, **{f"label/{name}": values for name, values in tagged.items()}}


def released_label_ids(labels: Tensor, classes: int, tokenizer: MidiTokenizer) -> Tensor:
    """Labels of notes as the released codes number them, with a class for what has no label.

    MidiBERT (compound words): 0 for padding, then the classes from 1. Adversarial-MidiBERT (Octuple): the classes from
    0, then one for padding.

    Args:
        labels: long, `IGNORED` where there is none.
        classes: number of classes.
        tokenizer: says which layout.
    """
    ignored = labels == IGNORED
    return labels.masked_fill(ignored, classes) if tokenizer.ends else (labels + 1).masked_fill(ignored, 0)


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
            one over the root of their inputs, clearly different distances, and values of a field as points on circles
            of several periods, so that neighbouring values are alike. With it narrow models learn to look at
            neighbouring notes within a few hundred steps.
        tied: predict a field by the similarity to the embeddings of its values, as BERT does with words (MidiBERT has
            separate matrices). Narrow models learn pitch several times faster so.
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
        tied: bool = False,
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
        # Tied, the output layer gives for each field a vector that is compared with the embeddings of its values.
        self.tied = tied
        self.output = nn.Linear(width, len(self.sizes) * field_width if tied else sum(self.sizes), bias=not tied)
        self.output_bias = nn.Parameter(torch.zeros(sum(self.sizes))) if tied else None
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.input.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02)
        nn.init.zeros_(self.input.bias)
        if not tied:
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
        if self.tied:
            nn.init.normal_(self.output.weight, std=self.width**-0.5)
        rows = [_circles(field.values, field.size, self.embedding.embedding_dim) for field in self.tokenizer.fields]
        with torch.no_grad():
            self.embedding.weight.copy_(torch.cat(rows) * self.embedding.embedding_dim**-0.5)

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
        return self.field_logits(tokens.values[corruption.predicted])

    def field_logits(self, values: Tensor) -> Tensor:
        """Logits of all fields side by side: (n, width) -> (n, sum of the field sizes)."""
        found = self.output(values)
        if self.output_bias is None:
            return found
        queries = found.unflatten(-1, (len(self.sizes), -1)).unbind(1)
        tables = self.embedding.weight.split(self.sizes)
        return torch.cat([q @ table.T for q, table in zip(queries, tables, strict=True)], 1) + self.output_bias

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

        For `velocity` the Velocity field is hidden, which would fix the label; for `part` all notes get the same
        instrument, the piano. (MASK in one field of a word never comes up in pretraining, and a pretrained model takes
        such notes for hidden ones; a plain value is the better choice where there is a neutral one.)
        """
        key = f"label/{label}"
        if key not in inputs:
            known = ", ".join(name.removeprefix("label/") for name in inputs if name.startswith("label/"))
            raise ConfigError(f"these notes have no label {label!r}; they have {known}")
        words, units = inputs["words"].clone(), self.units(inputs)
        for name, neutral in GIVEN_AWAY.get(label, {}).items():
            place = self.tokenizer.field(name)
            if place is not None:
                value = self.values[place] + 1 if neutral is None else neutral
                words[..., place] = torch.where(units, value, words[..., place])
        return {**inputs, "words": words}, inputs[key]


def _circles(values: int, size: int, width: int) -> Tensor:
    """Vectors of variance 1 for the values of a field: (size, width).

    Ordinary values lie on circles whose periods go from 2.5 to twice their number; special values are random.
    """
    periods = torch.logspace(math.log10(2.5), math.log10(2 * max(values, 4)), width // 2)
    angles = 2 * math.pi * torch.arange(values).unsqueeze(1) / periods
    rows = torch.randn(size, width)
    rows[:values, : 2 * (width // 2)] = torch.cat([angles.sin(), angles.cos()], 1) * math.sqrt(2)
    return rows


def weighted_loss(losses: Tensor, shares: Sequence[float]) -> Tensor:
    """Sum of the fields' losses (fields,) times their shares."""
    return (losses * torch.tensor(shares, device=losses.device, dtype=losses.dtype)).sum()
