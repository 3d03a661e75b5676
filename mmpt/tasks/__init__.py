"""What a pretrained model can be tuned for; `mmpt.FineTuning` takes one of these by its name."""

from mmpt.tasks.generation import Generation
from mmpt.tasks.labels import Classification, MultiLabel, Regression, Tagging
from mmpt.tasks.pairs import Matching, Retrieval
from mmpt.tasks.task import Task, TaskOptions

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "tagging": Tagging,
    "regression": Regression,
    "matching": Matching,
    "retrieval": Retrieval,
    "generation": Generation,
}

__all__ = [
    "TASKS",
    "Classification",
    "Generation",
    "Matching",
    "MultiLabel",
    "Regression",
    "Retrieval",
    "Tagging",
    "Task",
    "TaskOptions",
]
