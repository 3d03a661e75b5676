"""The contract of a task: a batch's features -> a loss, numbers, and predictions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from mmpt.evaluation.record import Evaluation
from mmpt.features import Features
from mmpt.heads.head import HeadOutput
from mmpt.masking import MaskingPolicy
from mmpt.model import MultimodalModel
from mmpt.source import Source
from mmpt.task_heads import TaskHead

ClassWeights = Literal["none", "balanced"] | list[float]
"""How much an example of each class counts: all alike, n / (classes * n of the class), or given in label order."""


@dataclass(frozen=True)
class TaskOptions:
    """What a person may choose about a task.

    Attributes:
        modality: what is tuned.
        label: the label of the data that is learned.
        head: from tokens to scores; None is the task's own.
        masking: hides units of the input in training.
        class_weights: see `ClassWeights`.
        focal: gamma of the focal loss (Lin et al., arXiv 1708.02002); 0 is cross-entropy.
        label_smoothing: of the cross-entropy.
    """

    modality: str
    label: str
    head: TaskHead | None = None
    masking: MaskingPolicy | None = None
    class_weights: ClassWeights = "none"
    focal: float = 0.0
    label_smoothing: float = 0.0


class Task(nn.Module, ABC):
    """One thing that a model is tuned for.

    `prepare` is called once the data is there, `forward` in training, `evaluate` for each batch of an evaluation and
    `finish` at its end.

    Args:
        model: what is tuned.
        options: what was chosen.

    Attributes:
        name: in logs, `validation/<name>/<metric>`.
        monitor: the metric by which the best checkpoint is chosen.
    """

    name: str
    monitor: str

    def __init__(self, model: MultimodalModel, options: TaskOptions) -> None:
        super().__init__()
        self.options = options
        self.modality, self.label = options.modality, options.label

    @abstractmethod
    def trained(self, model: MultimodalModel) -> list[nn.Module]:
        """The parts of the model that tuning changes, from the input to the output."""

    def prepare(self, sources: Sequence[Source], training: bool) -> None:
        """Read what the task needs to know of the data.

        Raises:
            DataError: the data lacks what the task learns from, or is not that of the folder.
        """

    @abstractmethod
    def forward(self, features: Features) -> HeadOutput:
        """The loss of a training batch."""

    @abstractmethod
    def evaluate(self, features: Features) -> dict[str, Tensor]:
        """The means of one batch, weighted by `weight` over the batches; it also takes notes for `finish`."""

    def weight(self, features: Features) -> int:
        """How many examples the means of a batch are over."""
        return max(1, len(features.batch))

    @abstractmethod
    def finish(self) -> Evaluation:
        """Everything about the evaluation that ends here; the notes are cleared."""

    @abstractmethod
    def predict(self, features: Features) -> dict[str, Any]:
        """Columns for the samples of a batch: lists, or tensors with a row for each."""

    def facts(self) -> dict[str, Any]:
        """What a saved folder must say so that `restore` can build the task's own layers."""
        return {}

    def restore(self, facts: dict[str, Any], trust: Sequence[str]) -> None:
        """Build the layers of a saved task, before their weights are loaded."""
