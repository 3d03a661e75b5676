"""Tasks with a label: classes, several labels at once, a label of each unit, a number."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import Tensor, nn

from mmpt.config import from_config, to_config
from mmpt.encoder import IGNORED, KEEP, Corruption, Inputs
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.evaluation.calibration import calibration
from mmpt.evaluation.intervals import macro_f1, macro_recall
from mmpt.evaluation.record import Evaluation, class_tables, classified, joined
from mmpt.features import Features
from mmpt.heads.head import HeadOutput
from mmpt.model import MultimodalModel
from mmpt.source import Source
from mmpt.task_heads import PooledHead, TaskHead, UnitHead
from mmpt.tasks.task import Task, TaskOptions

READ = 64
"""Samples that are read at once to count the labels of their units."""


MASKED_BATCHES = 0.5
"""Share of the training batches that `masking` touches.

A model pretrained on hidden units leans on seeing some: tuned on nothing else, it is thrown off by the whole samples
that it sees in use.
"""


class LabelTask(Task):
    """Scores of labels from the tokens of one modality's encoder.

    Args:
        model: see `Task`.
        options: see `Task`.

    Raises:
        ConfigError: a head for units where samples are labelled, or the reverse.
    """

    per_unit = False
    fewest_labels = 2
    class_weight: Tensor

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        super().__init__(model, options)
        self.head: TaskHead = options.head or (UnitHead() if self.per_unit else PooledHead())
        if self.head.per_unit != self.per_unit:
            kind = "each unit" if self.head.per_unit else "whole samples"
            raise ConfigError(f"the head {type(self.head).__name__} scores {kind}, which is not {self.name}")
        self.width = model.pooled_width(self.modality)
        encoder = model.modality(self.modality).encoder
        self._processor, self._unit_labels = encoder.processor, encoder.unit_labels
        self.label_names: list[str] = []
        self.notes: list[tuple[Tensor, Tensor, list[str]]] = []

    def trained(self, model: MultimodalModel) -> list[nn.Module]:
        """The encoder, and the text transformer where the modality goes through it."""
        tower = model.modality(self.modality)
        return [tower, model.text] if tower.through_text else [tower]

    def build(self, names: Sequence[str]) -> None:
        """Make the layers, once the labels are known."""
        self.label_names = list(names)
        self.head.build(self.width, self.outputs)
        self.register_buffer("class_weight", torch.ones(self.outputs))

    @property
    def outputs(self) -> int:
        """Number of scores."""
        return len(self.label_names)

    def prepare(self, sources: Sequence[Source], training: bool) -> None:
        """Read the label set: the names that the sources give, or the values that occur in training."""
        names = [name for source in sources for name in source.label_names(self.label)]
        if not names and not training and self.label_names:
            return  # data without labels, to predict them
        if not names:
            values = sorted({value for source in sources for value in source.label_values(self.label, "train")})
            names = [str(number) for number in range(int(values[-1]) + 1)] if values else []
        if len(names) < self.fewest_labels:
            raise DataError(
                f"the data has {len(names)} values of the label {self.label!r}; {self.name} needs at least "
                f"{self.fewest_labels}. Sources say their labels with `label_names`; for own files without labels give "
                "a table of them (mmpt.labels.Labelled)"
            )
        if not self.label_names:
            self.build(names)
        elif list(names) != self.label_names:
            raise DataError(f"the data's labels {names[:5]}... are not those of the folder: {self.label_names[:5]}...")
        if training and self.options.class_weights != "none":
            self.class_weight = self._weights(sources).to(self.class_weight)

    def _weights(self, sources: Sequence[Source]) -> Tensor:
        given = self.options.class_weights
        if isinstance(given, list):
            if len(given) != self.outputs:
                raise ConfigError(f"class_weights has {len(given)} numbers for {self.outputs} labels")
            return torch.tensor(given)
        return self.balanced(self.values(sources))

    def values(self, sources: Sequence[Source]) -> np.ndarray:
        """The labels of the training split."""
        return np.array([value for source in sources for value in source.label_values(self.label, "train")])

    def balanced(self, values: np.ndarray) -> Tensor:
        """Weights that make up for unequal frequencies, of the labels of the training split."""
        raise ConfigError(f"{self.name} takes no balanced class weights; give none, or a number for each label")

    def scores(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Scores (batch, [length,] outputs), and what they are compared with."""
        tower = features.model.modality(self.modality)
        inputs, targets = features.inputs(self.modality), features.label(self.label)
        if self.per_unit:
            inputs, targets = tower.encoder.unit_labels(inputs, self.label)
        corruption = None
        if self.training and self.options.masking is not None and float(torch.rand(())) < MASKED_BATCHES:
            encoder = tower.encoder
            corruption = self.options.masking(encoder.units(inputs), encoder.groups(inputs), encoder.max_units(inputs))
            if self.per_unit and targets is not None:
                targets = targets.masked_fill(corruption.action != KEEP, IGNORED)
        return self.logits(features.model, inputs, corruption), targets

    def logits(self, model: MultimodalModel, inputs: Inputs, corruption: Corruption | None = None) -> Tensor:
        """Scores of processed inputs, for tagging those of `Encoder.unit_labels`: (batch, [length,] outputs)."""
        tower = model.modality(self.modality)
        tokens = tower.encoder(inputs, corruption)
        if tower.through_text:
            tokens = model.contextualize(self.modality, tokens)
        return self.head(tokens, tower.pool)

    def example(self, model: MultimodalModel, inputs: Inputs) -> Inputs:
        """What `logits` reads, of what the processor gives: without what would tell the labels of units."""
        return model.modality(self.modality).encoder.unit_labels(inputs, self.label)[0] if self.per_unit else inputs

    def answers(self, scores: Tensor) -> Tensor:
        """Scores as they are handed to other programs: logits."""
        return scores

    def loss(self, scores: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean over what has a label; 0 where nothing has one. Weighted by class, if that was chosen."""
        scores, targets = scores.flatten(0, -2).float(), targets.flatten()
        real = targets != IGNORED
        losses = F.cross_entropy(
            scores, targets, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
        )
        weight = self.class_weight[targets.clamp(min=0)] * real
        if self.options.focal:
            chance = scores.softmax(-1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
            losses = losses * (1 - chance) ** self.options.focal
        return (losses * weight).sum() / weight.sum().clamp(min=1e-12)

    def targets(self, found: Tensor | None) -> Tensor:
        """The targets, if there are any.

        Raises:
            DataError: samples without the label.
        """
        if found is None:
            raise DataError(f"the data has samples without the label {self.label!r}")
        return found

    def forward(self, features: Features) -> HeadOutput:
        """See `Task`."""
        scores, targets = self.scores(features)
        return HeadOutput(self.loss(scores, self.targets(targets), self.options.label_smoothing), {})

    def evaluate(self, features: Features) -> dict[str, Tensor]:
        """See `Task`."""
        scores, found = self.scores(features)
        targets = self.targets(found)
        self.note(scores.detach(), targets, features.batch.names)
        return {"loss": self.loss(scores, targets)}

    def note(self, scores: Tensor, targets: Tensor, names: list[str]) -> None:
        """Keep what `finish` needs, on the CPU."""
        self.notes.append((scores.float().cpu(), targets.cpu(), names))

    def facts(self) -> dict[str, Any]:
        """See `Task`."""
        return {"label_names": self.label_names, "head": to_config(self.head)}

    def restore(self, facts: dict[str, Any], trust: Sequence[str]) -> None:
        """See `Task`."""
        self.head = from_config(facts["head"], trust=list(trust))
        self.build(facts["label_names"])


class Classification(LabelTask):
    """One class for each sample."""

    name, monitor = "classification", "accuracy"

    def balanced(self, values: np.ndarray) -> Tensor:
        """See `LabelTask`."""
        counts = np.bincount(values.astype(int), minlength=self.outputs)
        return torch.from_numpy(len(values) / (self.outputs * np.maximum(counts, 1)))

    def note(self, scores: Tensor, targets: Tensor, names: list[str]) -> None:
        """Confidence, answer and target of each example: three numbers, however many classes there are."""
        confidence, answer = scores.flatten(0, -2).float().softmax(-1).max(-1)
        targets = targets.flatten()
        real = targets != IGNORED
        each = names if not self.per_unit else [name for name in names for _ in range(scores.shape[1])]
        kept = [name for name, keep in zip(each, real.tolist(), strict=True) if keep]
        rows = torch.stack([confidence[real], answer[real].float(), targets[real].float()], 1)
        self.notes.append((rows.cpu(), rows.new_zeros(0), kept))

    def finish(self) -> Evaluation:
        """Accuracy, macro F1, balanced accuracy, calibration, and the tables of classes."""
        rows, names = joined([note[0] for note in self.notes]), [name for note in self.notes for name in note[2]]
        self.notes.clear()
        if not len(rows):
            return Evaluation()
        confidence, answers, targets = rows[:, 0], rows[:, 1].astype(int), rows[:, 2].astype(int)
        correct = answers == targets
        found = classified(targets, answers, self.label_names, names, macro_f1=macro_f1, balanced_accuracy=macro_recall)
        present = [row for row in found.classes if row.support]
        calibrated = calibration(confidence, correct)
        metrics = {
            "accuracy": float(correct.mean()),
            "accuracy_majority": max(row.support for row in present) / len(targets),
            "macro_f1": float(f1_score(targets, answers, average="macro", zero_division=0.0)),
            "balanced_accuracy": float(np.mean([row.recall for row in present])),
            "balanced_accuracy_majority": 1 / len(present),
            "ece": calibrated.ece,
        }
        return replace(found, metrics=metrics, calibration=calibrated)

    def predict(self, features: Features) -> dict[str, Any]:
        """The most probable label and its probability."""
        probability, index = self.scores(features)[0].float().softmax(-1).max(-1)
        return {"label": [self.label_names[i] for i in index.tolist()], "probability": probability.tolist()}


class Tagging(Classification):
    """A class for each unit of a sample; hidden units are left out of the training loss."""

    name = "tagging"
    per_unit = True

    def values(self, sources: Sequence[Source]) -> np.ndarray:
        """The labels of all units of the training split, which is read once for them."""
        found: list[Tensor] = []
        for samples in (source.split("train") for source in sources):
            for start in range(0, len(samples), READ):
                chosen = []
                for index in range(start, min(start + READ, len(samples))):
                    with suppress(SampleError):  # listed in the run's report when it is trained on
                        chosen.append(samples[index].modalities[self.modality])
                if chosen:
                    labels = self._unit_labels(self._processor(chosen), self.label)[1]
                    found.append(labels[labels != IGNORED])
        return torch.cat(found).numpy() if found else np.zeros(0, dtype=int)

    def weight(self, features: Features) -> int:
        """Units that have a label."""
        encoder = features.model.modality(self.modality).encoder
        return max(1, int((encoder.unit_labels(features.inputs(self.modality), self.label)[1] != IGNORED).sum()))

    def predict(self, features: Features) -> dict[str, Any]:
        """Lists of labels and probabilities, unit by unit."""
        probability, index = self.scores(features)[0].float().softmax(-1).max(-1)
        units = features.model.modality(self.modality).encoder.units(features.inputs(self.modality))
        labels = [[self.label_names[i] for i in row[real].tolist()] for row, real in zip(index, units, strict=True)]
        shares = [row[real].tolist() for row, real in zip(probability, units, strict=True)]
        return {"label": labels, "probability": shares}


class MultiLabel(LabelTask):
    """Any number of labels for each sample; the data gives a 0 or 1 for each of the label names."""

    name, monitor = "multilabel", "macro_f1"
    fewest_labels = 1

    def balanced(self, values: np.ndarray) -> Tensor:
        """Negatives for each positive of a label, the weight of its positives."""
        positives = values.reshape(-1, self.outputs).sum(0)
        return torch.from_numpy((len(values) - positives) / np.maximum(positives, 1))

    def loss(self, scores: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean binary cross-entropy over samples and labels, positives weighted by class."""
        if targets.shape != scores.shape:
            raise DataError(
                f"the label {self.label!r} has the shape {tuple(targets.shape)}; multilabel needs a 0 or 1 for each of "
                f"the {self.outputs} labels"
            )
        wanted = targets.float() * (1 - label_smoothing) + 0.5 * label_smoothing
        losses = F.binary_cross_entropy_with_logits(
            scores.float(), wanted, pos_weight=self.class_weight.float(), reduction="none"
        )
        if self.options.focal:
            miss = (torch.sigmoid(scores.float()) - targets.float()).abs()
            losses = losses * miss**self.options.focal
        return losses.mean()

    def finish(self) -> Evaluation:
        """Macro and micro F1 at 0.5, mean average precision, exact matches."""
        scores, targets = joined([note[0] for note in self.notes]), joined([note[1] for note in self.notes])
        names = [name for note in self.notes for name in note[2]]
        self.notes.clear()
        if not len(scores):
            return Evaluation()
        answers = scores > 0
        known = targets.any(0)
        shares = targets.mean(0)
        metrics = {
            "macro_f1": float(f1_score(targets, answers, average="macro", zero_division=0.0)),
            "micro_f1": float(f1_score(targets, answers, average="micro", zero_division=0.0)),
            "exact_match": float((answers == targets).all(1).mean()),
            "exact_match_majority": float((targets == (shares > 0.5)).all(1).mean()),
        }
        if known.any():
            metrics["average_precision"] = float(
                average_precision_score(targets[:, known], scores[:, known], average="macro")
            )
            metrics["average_precision_chance"] = float(shares[known].mean())
        classes, _ = class_tables(targets.astype(int), answers.astype(int), self.label_names)
        return Evaluation(metrics, {"exact_match": (answers == targets).all(1).astype(float)}, names, {}, classes)

    def predict(self, features: Features) -> dict[str, Any]:
        """The labels of more than even probability, separated by semicolons, and the probability of each label."""
        chances = torch.sigmoid(self.scores(features)[0].float())
        labels = [";".join(self.label_names[i] for i in (row > 0.5).nonzero().flatten().tolist()) for row in chances]
        return {"label": labels, **{f"p({name})": chances[:, i].tolist() for i, name in enumerate(self.label_names)}}


class Regression(LabelTask):
    """A number for each sample. The loss is the squared error of numbers standardised on the training split."""

    name, monitor = "regression", "mae"
    mean: Tensor
    spread: Tensor

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        if options.class_weights != "none" or options.focal or options.label_smoothing:
            raise ConfigError("regression has no classes; leave out class_weights, focal and label_smoothing")
        super().__init__(model, options)

    def build(self, names: Sequence[str]) -> None:
        """See `LabelTask`."""
        self.label_names = list(names)
        self.head.build(self.width, 1)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("spread", torch.ones(()))

    def prepare(self, sources: Sequence[Source], training: bool) -> None:
        """Read mean and spread of the training split."""
        if not training and self.label_names:
            return
        values = np.array([v for source in sources for v in source.label_values(self.label, "train")], dtype=float)
        if len(values) < 2 or not np.isfinite(values).all() or values.std() == 0:
            raise DataError(
                f"the label {self.label!r} has {len(np.unique(values))} different values in {len(values)} training "
                "samples; regression needs at least two, all finite"
            )
        if not self.label_names:
            self.build([self.label])
            self.mean.fill_(float(values.mean()))
            self.spread.fill_(float(values.std()))

    def loss(self, scores: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error of standardised numbers."""
        return F.mse_loss(scores.squeeze(-1).float(), (targets.float() - self.mean) / self.spread)

    def note(self, scores: Tensor, targets: Tensor, names: list[str]) -> None:
        """Numbers in the unit of the data."""
        self.notes.append((self.numbers(scores).cpu(), targets.cpu(), names))

    def numbers(self, scores: Tensor) -> Tensor:
        """Scores (batch, 1) -> numbers in the unit of the data, (batch,)."""
        return scores.squeeze(-1).float() * self.spread + self.mean

    def answers(self, scores: Tensor) -> Tensor:
        """Numbers in the unit of the data."""
        return self.numbers(scores)

    def finish(self) -> Evaluation:
        """Mean absolute error, root mean squared error, R², beside always answering the training mean."""
        found, targets = joined([note[0] for note in self.notes]), joined([note[1] for note in self.notes])
        names = [name for note in self.notes for name in note[2]]
        self.notes.clear()
        if not len(found):
            return Evaluation()
        errors, plain = np.abs(found - targets), np.abs(targets - float(self.mean))
        metrics = {
            "mae": float(errors.mean()),
            "mae_mean": float(plain.mean()),
            "rmse": float(np.sqrt((errors**2).mean())),
            "rmse_mean": float(np.sqrt((plain**2).mean())),
        }
        if len(targets) > 1 and targets.std() > 0:
            metrics["r2"] = float(r2_score(targets, found))
            metrics["r2_mean"] = float(r2_score(targets, np.full_like(targets, float(self.mean))))
        return Evaluation(metrics, {"mae": errors}, names)

    def predict(self, features: Features) -> dict[str, Any]:
        """The number."""
        return {self.label: self.numbers(self.scores(features)[0]).tolist()}
