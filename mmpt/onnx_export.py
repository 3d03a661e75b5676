"""ONNX files of a model's towers: the processor's tensors -> the embedding, or what a tuned model says of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpt.encoder import Inputs
from mmpt.errors import ConfigError
from mmpt.model import MultimodalModel, evaluating
from mmpt.tasks.labels import LabelTask


class Tower(nn.Module):
    """One modality as a function of tensors in a fixed order, the names' alphabetical one.

    Args:
        model: holds it.
        modality: which.
        names: of the processor's tensors.
    """

    def __init__(self, model: MultimodalModel, modality: str, names: list[str]) -> None:
        super().__init__()
        self.model, self.modality, self.names = model, modality, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """(batch, embed_dim)."""
        return self.model.embed(self.modality, dict(zip(self.names, tensors, strict=True)))


class TunedTower(nn.Module):
    """A tuned model as a function of tensors in a fixed order, the names' alphabetical one.

    Args:
        model: what was tuned.
        task: with labels.
        names: of the processor's tensors.
    """

    def __init__(self, model: MultimodalModel, task: LabelTask, names: list[str]) -> None:
        super().__init__()
        self.model, self.task, self.names = model, task, names

    def forward(self, *tensors: Tensor) -> Tensor:
        """(batch, labels), (batch, length, labels) for tagging, (batch,) for regression."""
        return self.task.answers(self.task.logits(self.model, dict(zip(self.names, tensors, strict=True))))


def export_tuned(model: MultimodalModel, task: LabelTask, inputs: Inputs, path: Path) -> Path:
    """Write a tuned model with the task's layers as ONNX; else as `export_tower`.

    The file's output is `scores`: logits in the order of the label names of task.json, numbers for regression.

    Args:
        model: what was tuned.
        task: one with labels.
        inputs: an example of what the processor gives, of at least two samples; for tagging what `task.example` makes
            of it.
        path: of the file.

    Raises:
        ConfigError: see `export_tower`.
    """
    names = sorted(inputs)
    task.eval()
    with evaluating(model):
        return _export(TunedTower(model, task, names), inputs, path, "scores", task.modality)


def export_tower(model: MultimodalModel, modality: str, inputs: Inputs, path: Path) -> Path:
    """Write one tower as ONNX, through `torch.onnx.export(dynamo=True)`; onnxruntime runs it without mmpt.

    The batch is free, and so are the axes that have the length of a mask. The file's inputs have the names of the
    processor's tensors, its output is `joint_embedding`.

    Args:
        model: which.
        modality: one of its modalities, "text" included.
        inputs: an example of what the processor gives, of at least two samples.
        path: of the file.

    Raises:
        ConfigError: the tower has steps that depend on values, which ONNX can't follow; the message has torch's reason.
    """
    with evaluating(model):
        return _export(Tower(model, modality, sorted(inputs)), inputs, path, "joint_embedding", modality)


def _export(tower: nn.Module, inputs: Inputs, path: Path, output: str, modality: str) -> Path:
    names = sorted(inputs)
    shapes: list[dict[int, object]] = []
    widths = _lengths(inputs)
    for name in names:
        axes: dict[int, object] = {0: torch.export.Dim.AUTO}
        for axis in range(1, inputs[name].ndim):
            if inputs[name].shape[axis] in widths:
                axes[axis] = torch.export.Dim.AUTO
        shapes.append(axes)
    tensors = tuple(inputs[name] for name in names)
    with torch.no_grad():
        try:
            program = torch.onnx.export(
                tower.eval(), tensors, dynamo=True, input_names=names, output_names=[output],
                dynamic_shapes=(tuple(shapes),), verbose=False,
            )  # fmt: skip
        except Exception as error:  # torch raises many kinds
            raise ConfigError(f"{modality} can't be exported to ONNX: {str(error).strip().splitlines()[0]}") from error
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    return path


def _lengths(inputs: Mapping[str, Tensor]) -> set[int]:
    """The lengths of padded axes: those of the masks."""
    return {v.shape[1] for v in inputs.values() if v.dtype == torch.bool and v.ndim >= 2}
