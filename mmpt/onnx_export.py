"""ONNX files of a model's towers: the processor's tensors -> the normalised embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmpt.encoder import Inputs
from mmpt.errors import ConfigError
from mmpt.model import MultimodalModel, evaluating


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
    tower = Tower(model, modality, names)
    with evaluating(model), torch.no_grad():
        try:
            program = torch.onnx.export(
                tower, tensors, dynamo=True, input_names=names, output_names=["joint_embedding"],
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
