"""What the recipe measures on test pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from baseline import FieldGuesses
from numpy.typing import NDArray
from sklearn.metrics import f1_score, roc_auc_score

from mmpt.batches import hash_seed
from mmpt.data import MultimodalData
from mmpt.encoders.midi import VELOCITY, MidiEncoder
from mmpt.encoders.midi_notes import UNLABELLED, Notes
from mmpt.encoders.midi_tokens import velocity_class
from mmpt.features import Features
from mmpt.heads import AdversarialMaskedHead
from mmpt.masking import Exact
from mmpt.model import MultimodalModel, evaluating

HIDE = Exact(0.15, 1.0, 0.0)
"""Notes hidden at random; all of those that are predicted are hidden."""


def tagging_labels(notes: Notes, label: str) -> NDArray[np.int64]:
    """A label of the notes, `UNLABELLED` where there is none."""
    if label == VELOCITY:
        return velocity_class(notes.velocity)
    return notes.labels.get(label, np.full(len(notes), UNLABELLED))


def recovery(encoder: MidiEncoder, data: MultimodalData, guesses: FieldGuesses, batches: int) -> dict[str, float]:
    """Accuracy and negative log-likelihood of each field at hidden notes of the test split.

    Beside it the most frequent value of the training pieces, and the most frequent one after the value of the note
    before, which the guess is told even where the model is not.
    """
    right, nll = np.zeros(len(encoder.values)), np.zeros(len(encoder.values))
    frequent, after = np.zeros(len(encoder.values)), np.zeros(len(encoder.values))
    total = 0
    with evaluating(encoder), torch.no_grad():
        for number, batch in enumerate(data.loader("test")):
            if number == batches or not batch.inputs:
                break
            inputs = batch.inputs["midi"]
            units = encoder.units(inputs)
            inner = units.clone()
            inner[:, 0] = False  # the first note has none before it
            corruption = HIDE(inner, generator=torch.Generator().manual_seed(hash_seed(number)))
            found = encoder.unit_losses(
                encoder.reconstruct(encoder(inputs, corruption), corruption), inputs, corruption
            )
            right += found.correct.sum(0).numpy()
            nll += found.losses.sum(0).numpy()
            row, place = corruption.predicted.nonzero(as_tuple=True)
            now, before = inputs["words"][row, place].numpy(), inputs["words"][row, place - 1].numpy()
            for column in range(len(encoder.values)):
                frequent[column] += (now[:, column] == guesses.most_frequent(column)).sum()
                after[column] += (now[:, column] == guesses.after(column, before[:, column])).sum()
            total += len(now)
    metrics: dict[str, float] = {}
    for column, field in enumerate(encoder.tokenizer.fields):
        metrics[f"recovery/{field.name}"] = right[column] / total
        metrics[f"recovery/{field.name}_frequent"] = frequent[column] / total
        metrics[f"recovery/{field.name}_after"] = after[column] / total
        metrics[f"recovery_loss/{field.name}_nll"] = nll[column] / total
    return metrics


def recoverability(
    head: AdversarialMaskedHead, model: MultimodalModel, data: MultimodalData, batches: int
) -> dict[str, float]:
    """Whether the masker knows which notes are hard, and whether the frozen ones are.

    Notes of training pieces are hidden at random, frozen ones too. `masker/auc` is the probability that the masker
    finds a note of above-median loss more probable than one below.
    """
    encoder = model.modality("midi").encoder
    losses, scores, frozen = [], [], []
    with evaluating(model), torch.no_grad():
        for number, batch in enumerate(data.loader("train")):
            if number == batches or not batch.inputs:
                break
            inputs = batch.inputs["midi"]
            units = encoder.units(inputs)
            corruption = HIDE(units, generator=torch.Generator().manual_seed(hash_seed(number)))
            found = encoder.unit_losses(
                encoder.reconstruct(encoder(inputs, corruption), corruption), inputs, corruption
            )
            losses.append(found.losses.mean(1).numpy())
            head.masker.eval()
            scores.append(head.probabilities(Features(model, batch))[corruption.predicted].numpy())
            frozen.append((~head.book.free(batch.names, units))[corruption.predicted].numpy())
    loss, score, cold = np.concatenate(losses), np.concatenate(scores), np.concatenate(frozen)
    metrics = {"masker/auc": float(roc_auc_score(loss > np.median(loss), score)), "masker/auc_chance": 0.5}
    metrics["masker/share_frozen"] = float(cold.mean())
    if cold.any() and not cold.all():
        metrics |= {
            "masker/loss_of_frozen": float(loss[cold].mean()),
            "masker/loss_of_frozen_free": float(loss[~cold].mean()),
        }
    return metrics


def classification_scores(
    scores: NDArray[Any], labels: NDArray[Any], pieces: NDArray[Any], suffix: str
) -> dict[str, float]:
    """Accuracy and macro F1 of pieces (mean score of their excerpts), and accuracy of single excerpts.

    Args:
        scores: (excerpts, classes).
        labels: (excerpts,).
        pieces: (excerpts,), which piece each belongs to.
        suffix: of the metrics' names.
    """
    numbers, first, index = np.unique(pieces, return_index=True, return_inverse=True)
    summed = np.zeros((len(numbers), scores.shape[1]))
    np.add.at(summed, index, scores)
    predicted, target = summed.argmax(1), labels[first]
    return {
        f"class/accuracy{suffix}": float((predicted == target).mean()),
        f"class/macro_f1{suffix}": float(f1_score(target, predicted, average="macro", zero_division=0.0)),
        f"class/accuracy_of_excerpts{suffix}": float((scores.argmax(1) == labels).mean()),
    }
