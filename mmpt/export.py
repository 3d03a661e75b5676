"""What `mmpt export` does: a checkpoint or a model folder -> a folder with a card, and ONNX files on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from mmpt.checkpoint import from_pretrained, same_weights, save_pretrained
from mmpt.commands import data_of, usable_batches
from mmpt.config import from_config
from mmpt.errors import CheckpointError
from mmpt.model import MultimodalModel
from mmpt.model_card import CARD, CLASSIFIER, CONFIG, TASK, Known, card_text, licensed, save_card
from mmpt.report_data import read_numbers


def export(checkpoint: Path, output: Path, license: str | None = None, trust: Sequence[str] = ()) -> Path:
    """The weights of a training checkpoint in a model folder, with a task's own layers where it was tuned for one.

    Args:
        checkpoint: RUN/checkpoints/NAME.ckpt.
        output: the new folder.
        license: for the card; None is the run's.
        trust: packages besides mmpt whose classes the folder may name.

    Raises:
        CheckpointError: not a checkpoint of a run folder, or damaged.
    """
    if not checkpoint.is_file():
        raise CheckpointError(f"{checkpoint} does not exist; checkpoints lie in RUN/checkpoints")
    run = checkpoint.resolve().parent.parent
    template = run / "model"
    if not (template / CONFIG).is_file():
        raise CheckpointError(
            f"{template / CONFIG} is missing; a checkpoint is exported within its run folder, whose model/ describes "
            "the architecture"
        )
    model = from_config(yaml.safe_load((template / CONFIG).read_text(encoding="utf-8")), folder=template, trust=trust)
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = content["state_dict"]
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        raise CheckpointError(f"{checkpoint} can't be read as a checkpoint of plain tensors: {error}") from error
    own, layers = (
        {name.removeprefix(prefix): value.contiguous() for name, value in state.items() if name.startswith(prefix)}
        for prefix in ("model.", "task.")
    )
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not fit {template / CONFIG}: {error}") from error
    save_pretrained(model, output)
    if layers and (template / TASK).is_file():
        save_file(layers, output / CLASSIFIER)
        shutil.copy(template / TASK, output / TASK)
    facts, metrics, details = read_numbers(run)
    if not same_weights(model, template):  # the run measured other weights than these
        metrics, details = content.get("metrics", {}), {}
        facts = facts | {"steps": content["global_step"], "epochs": content["epoch"]}
    facts = facts | ({"license": license} if license else {})
    save_card(output, card_text(output, Known(output.resolve().name, facts, metrics, details)))
    return output


def export_folder(folder: Path, output: Path, license: str | None = None, trust: Sequence[str] = ()) -> Path:
    """A model folder, complete and readable, under another name and with a card; `output` may be the folder itself.

    Args:
        folder: a run's RUN/model, whose run is told of in the card, or any other.
        output: the new folder.
        license: for the card; None is the run's.
        trust: packages besides mmpt whose classes the folder may name.

    Raises:
        CheckpointError: not a model folder.
    """
    from_pretrained(folder, trust=trust)
    if output.resolve() != folder.resolve():
        shutil.copytree(folder, output, dirs_exist_ok=True)
    facts, metrics, details = read_numbers(folder.resolve().parent)
    if facts and folder.resolve().name == "model":
        facts = facts | ({"license": license} if license else {})
        name = output.resolve().parent.name if output.name == "model" else output.resolve().name
        save_card(output, card_text(output, Known(name, facts, metrics, details)))
    elif license is not None:  # nothing is known but what the card says already
        save_card(output, licensed((output / CARD).read_text(encoding="utf-8"), license))
    return output


def export_onnx(folder: Path, config: Path, path: str | None = None, trust: Sequence[str] = ()) -> list[Path]:
    """`mmpt export --onnx`: every tower that the data has samples for, beside the model as MODALITY.onnx.

    A folder that was tuned for a task with labels gets MODALITY-TASK.onnx as well, which gives the scores.

    Args:
        folder: of the model.
        config: a configuration whose data give the example that is traced.
        path: replaces its default data.
        trust: packages besides mmpt whose classes the folder may name.

    Raises:
        ConfigError: a tower that ONNX can't follow.
    """
    from mmpt.finetuning import FineTuning
    from mmpt.onnx_export import export_tower, export_tuned
    from mmpt.tasks.labels import LabelTask

    model = MultimodalModel.from_pretrained(folder, trust=list(trust))
    data = data_of(config, path).attach(model.processors)
    data.eval_batch_size = 3
    batch = next(iter(usable_batches(model, data.loader("test"))))
    written = [
        export_tower(model, name, inputs, folder / f"{name}.onnx")
        for name, inputs in batch.inputs.items()
        if name in model.modalities
    ]
    if (folder / TASK).is_file():
        facts = json.loads((folder / TASK).read_text(encoding="utf-8"))
        module = FineTuning(str(folder), facts["modality"], facts["label"], facts["task"], trust=list(trust))
        task = module.task
        if isinstance(task, LabelTask) and task.modality in batch.inputs:
            inputs = task.example(module.model, batch.inputs[task.modality])
            place = folder / f"{task.modality}-{task.name}.onnx"
            written.append(export_tuned(module.model, task, inputs, place))
    return written
