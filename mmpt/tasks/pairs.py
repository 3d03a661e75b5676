"""Tasks on pairs of a sample and a text: do they match, and which text belongs to which sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from mmpt.errors import ConfigError, DataError
from mmpt.evaluation.record import Evaluation, classified, joined
from mmpt.evaluation.retrieval import retrieval
from mmpt.features import Features
from mmpt.heads.alignment import MatchingHead
from mmpt.heads.contrastive import ContrastiveHead
from mmpt.heads.head import HeadOutput
from mmpt.model import TEXT, MultimodalModel
from mmpt.tasks.task import Task, TaskOptions


def refuse_label_options(options: TaskOptions, name: str) -> None:
    """Refuse options that only labels give a meaning to.

    Raises:
        ConfigError: naming the option.
    """
    given = {
        "head": options.head is not None,
        "masking": options.masking is not None,
        "class_weights": options.class_weights != "none",
        "focal": options.focal != 0,
    }
    for option, present in given.items():
        if present:
            raise ConfigError(f"{name} has no use for {option}; leave it out")


class Matching(Task):
    """Whether a text belongs to a sample, from the text that has seen the sample.

    Where the data has the label, pairs with 1 match and pairs with 0 don't. Data of matching pairs alone is paired
    wrongly within the batch, hard ones first (`MatchingHead`).
    """

    name, monitor = "matching", "accuracy"

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        super().__init__(model, options)
        refuse_label_options(options, self.name)
        self.head = MatchingHead(self.modality)
        self.head.bind(model)
        self.notes: list[tuple[Tensor, Tensor, list[str]]] = []
        self.means: list[tuple[float, int]] = []

    def trained(self, model: MultimodalModel) -> list[nn.Module]:
        """The tower and the text transformer that reads both."""
        return [model.modality(self.modality), model.modality(TEXT)]

    def forward(self, features: Features) -> HeadOutput:
        """See `Task`."""
        labels = features.label(self.label)
        if labels is None:
            return self.head(features)
        if bool(((labels != 0) & (labels != 1)).any()):
            raise DataError(
                f"the label {self.label!r} has values besides 0 and 1; matching needs 1 for pairs that match and 0 for "
                "others. Data of matching pairs alone takes a label that it does not have, e.g. `match`"
            )
        logits = self.head.logits(features)
        loss = F.cross_entropy(logits.float(), labels.long(), label_smoothing=self.options.label_smoothing)
        return HeadOutput(loss, {"accuracy": (logits.argmax(1) == labels).float().mean().detach()})

    def evaluate(self, features: Features) -> dict[str, Tensor]:
        """See `Task`."""
        output = self(features)
        labels = features.label(self.label)
        if labels is None:
            self.means.append((float(output.logs["accuracy"]), len(features.batch)))
        else:
            chance = self.head.logits(features).float().softmax(1)[:, 1]
            self.notes.append((chance.cpu(), labels.cpu(), features.batch.names))
        return {"loss": output.loss}

    def finish(self) -> Evaluation:
        """Accuracy and area under the ROC curve for labelled pairs; accuracy among in-batch negatives otherwise."""
        chances, labels = joined([note[0] for note in self.notes]), joined([note[1] for note in self.notes])
        names, means = [name for note in self.notes for name in note[2]], list(self.means)
        self.notes.clear()
        self.means.clear()
        if means:
            total = sum(count for _, count in means)
            # Two of three pairs are wrong ones, so always saying no is right that often.
            return Evaluation({"accuracy": sum(m * c for m, c in means) / total, "accuracy_majority": 2 / 3})
        if not len(labels):
            return Evaluation()
        answers, targets = (chances > 0.5).astype(int), labels.astype(int)
        correct = answers == targets
        metrics = {
            "accuracy": float(correct.mean()),
            "accuracy_majority": float(max(targets.mean(), 1 - targets.mean())),
        }
        if 0 < targets.mean() < 1:
            metrics |= {"auroc": float(roc_auc_score(targets, chances)), "auroc_chance": 0.5}
        return replace(classified(targets, answers, ["no match", "match"], names), metrics=metrics)

    def predict(self, features: Features) -> dict[str, Any]:
        """The probability that sample and text match."""
        return {"match": self.head.logits(features).float().softmax(1)[:, 1].tolist()}


class Retrieval(Task):
    """Embeddings in which a sample and its text are near; ranks among the whole split, both ways."""

    name, monitor = "retrieval", "recall_at_1"

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        super().__init__(model, options)
        refuse_label_options(options, self.name)
        self.head = ContrastiveHead(self.modality, temperature=0.05)
        self.head.bind(model)
        self.notes: list[tuple[Tensor, Tensor, Tensor, list[str]]] = []

    def trained(self, model: MultimodalModel) -> list[nn.Module]:
        """Both towers with their projections."""
        return [*model.parts(self.modality), *model.parts(TEXT)]

    def forward(self, features: Features) -> HeadOutput:
        """See `Task`."""
        output = self.head(features)
        return HeadOutput(output.loss, {"accuracy": output.logs["accuracy"]})

    def evaluate(self, features: Features) -> dict[str, Tensor]:
        """See `Task`."""
        samples, texts = features.embedding(self.modality), features.embedding(TEXT)
        seen = sum(len(note[3]) for note in self.notes)
        groups = features.label("group")
        rows = torch.arange(seen, seen + len(samples)) if groups is None else groups.cpu()
        self.notes.append((samples.detach().cpu(), texts.detach().cpu(), rows, features.batch.names))
        return {"loss": self(features).loss}

    def finish(self) -> Evaluation:
        """R@k, median and mean reciprocal rank of texts for samples and of samples for texts."""
        if not self.notes:
            return Evaluation()
        samples, texts, groups = (torch.cat([note[i] for note in self.notes]) for i in range(3))  # type: ignore[misc]
        names = [name for note in self.notes for name in note[3]]
        self.notes.clear()
        _, places = np.unique(groups.numpy(), return_index=True)
        first = torch.from_numpy(np.sort(places))
        right = groups[:, None] == groups[first][None, :]  # (samples, texts)
        forward = retrieval(samples, texts[first], right)
        backward = retrieval(texts[first], samples, right.T)
        metrics = {
            "recall_at_1": (forward.recall[1] + backward.recall[1]) / 2,
            "recall_at_1_chance": (forward.chance[1] + backward.chance[1]) / 2,
        }
        found, other = (
            forward.evaluation(f"{self.modality}_to_text", names),
            backward.evaluation(f"text_to_{self.modality}"),
        )
        return replace(
            found,
            metrics=metrics | found.metrics | other.metrics,
            statistics=found.statistics | other.statistics,
        )

    def predict(self, features: Features) -> dict[str, Any]:
        """The embeddings of what a batch has."""
        return {name: features.embedding(name) for name in (self.modality, TEXT) if features.has([name])}
