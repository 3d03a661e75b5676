"""Model folders: config.yaml, model.safetensors, tokenizer files, README.md."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch.distributed.tensor import DTensor

from mmpt.config import from_config
from mmpt.errors import CheckpointError, ConfigError
from mmpt.model_card import CONFIG, WEIGHTS, card_text, save_card

if TYPE_CHECKING:
    from mmpt.heads.head import Head
    from mmpt.model import MultimodalModel

HEADS_CONFIG, HEADS = "heads.yaml", "heads.safetensors"


def save_pretrained(model: MultimodalModel, folder: Path, card: str = "") -> Path:
    """Write a model folder; the weights appear last and whole, so a folder with weights is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config(folder)
    (folder / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    unfinished = folder / f"{WEIGHTS}.part"
    save_model(model, str(unfinished))
    save_card(folder, card or card_text(folder, weights=unfinished))
    os.replace(unfinished, folder / WEIGHTS)
    return folder


def from_pretrained(
    folder: Path, trust: Sequence[str] = (), encoders: Mapping[str, Mapping[str, Any]] | None = None
) -> MultimodalModel:
    """Rebuild the model of a folder, in evaluation mode; see `MultimodalModel.from_pretrained`."""
    from mmpt.model import MultimodalModel

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} has no {name}; a model folder is what `model.save_pretrained`, a recipe's RUN/model or "
                "`mmpt export` wrote"
            )
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / CONFIG} is not readable YAML: {error}") from error
    if not isinstance(config, dict) or "class_path" not in config:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model: it has no class_path")
    for name, arguments in (encoders or {}).items():
        _encoder_config(config, name)["init_args"].update(arguments)
    model = from_config(config, folder=folder, trust=trust)
    if not isinstance(model, MultimodalModel):
        raise CheckpointError(f"{folder / CONFIG} describes a {type(model).__name__}, not a MultimodalModel")
    load_weights(model, folder / WEIGHTS)
    return model.eval()


def _encoder_config(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a model's configuration that describes the encoder of a modality."""
    parts: dict[str, Any] = config["init_args"]
    modalities: dict[str, Any] = parts.get("modalities") or {}
    if name == "text":
        found: dict[str, Any] = parts["text"]
    elif name in modalities:
        found = modalities[name]["init_args"]["encoder"]
    else:
        raise ConfigError(f"the folder has no modality {name!r}; it has {', '.join(['text', *modalities])}")
    return found


def save_heads(heads: Mapping[str, Head], folder: Path) -> None:
    """Write the heads that trained a model into its folder: temperatures, and classifiers that score pairs.

    What a head remembers of the run itself (`get_extra_state`) is in checkpoints only.
    """
    weights = {
        f"{name}.{key}": value.contiguous()
        for name, head in heads.items()
        for key, value in head.state_dict().items()
        if torch.is_tensor(value)
    }
    config = {name: head.config(folder) for name, head in heads.items()}
    (folder / HEADS_CONFIG).write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    unfinished = folder / f"{HEADS}.part"
    save_file(weights, str(unfinished))
    os.replace(unfinished, folder / HEADS)


def load_heads(folder: str | Path, model: MultimodalModel, trust: Sequence[str] = ()) -> dict[str, Head]:
    """Rebuild the heads of a folder that pretraining wrote, in evaluation mode.

    Args:
        folder: a run's RUN/model.
        model: the model of that folder.
        trust: packages besides mmpt whose classes the configuration may name.

    Raises:
        CheckpointError: the folder has no heads (a fine-tuned model has none), or they belong to another model.
        UntrustedClassError: the configuration names other classes.
    """
    from mmpt.heads.head import Head

    folder = Path(folder)
    if not (folder / HEADS_CONFIG).is_file() or not (folder / HEADS).is_file():
        raise CheckpointError(f"{folder} has no {HEADS_CONFIG} and {HEADS}; heads are what a pretraining run adds")
    config = yaml.safe_load((folder / HEADS_CONFIG).read_text(encoding="utf-8"))
    heads = from_config(config, folder=folder, trust=trust)
    module = torch.nn.ModuleDict(heads)
    for head in heads.values():
        if not isinstance(head, Head):
            raise CheckpointError(f"{folder / HEADS_CONFIG} describes a {type(head).__name__}, not a Head")
        head.bind(model)
    load_weights(module, folder / HEADS)
    module.eval()
    return dict(heads)


class NewWeightsWarning(UserWarning):
    """Parts of a model that a folder has no weights for, which start new."""


def start_from(model: MultimodalModel, folder: Path) -> None:
    """Load a folder's weights into a model that may have more parts than the folder.

    Raises:
        CheckpointError: no model folder, damaged, with weights that the model has no place for, or with other tokens.
    """
    from mmpt.tokenization import load_tokenizer

    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} has no {WEIGHTS}; a model folder is what an earlier stage wrote as RUN/model")
    if load_tokenizer(folder / "tokenizer").get_vocab() != model.text.tokenizer.get_vocab():
        raise CheckpointError(
            f"the tokenizer of {folder} gives other ids than the model's, so its word vectors would stand for other "
            f"words; set the text transformer's tokenizer to {folder / 'tokenizer'}"
        )
    missing = load_weights(model, folder / WEIGHTS, partial=True)
    if missing:
        warnings.warn(
            f"{folder} has no weights for {len(missing)} parameters, which start new: {', '.join(missing[:5])}",
            NewWeightsWarning,
            stacklevel=2,
        )


def load_weights(module: torch.nn.Module, path: Path, partial: bool = False) -> list[str]:
    """Load a safetensors file into a module; every parameter must be present, once, with its shape.

    Args:
        module: loaded into.
        path: the file.
        partial: parameters may be missing from the file.

    Returns:
        The names that are missing.

    Raises:
        CheckpointError: the file is damaged or belongs to another configuration.
    """
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); it may be cut short") from error
    tied = _tied_names(module)
    try:
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{path} belongs to another configuration: {error}") from error
    missing = [name for name in missing if not (tied.get(name, set()) & weights.keys())]
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if (missing and not partial) or unexpected:
        raise CheckpointError(
            f"{path} belongs to another configuration: {len(missing)} parameters are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unknown ({', '.join(unexpected[:3])})"
        )
    return missing


def same_weights(model: torch.nn.Module, folder: Path) -> bool:
    """Whether a folder holds these weights, up to the rounding of merged adapters."""
    if not (folder / WEIGHTS).is_file():
        return False
    weights, own = load_file(folder / WEIGHTS), model.state_dict()
    if any(isinstance(value, DTensor) for value in own.values()):
        return False  # each process holds but a part
    return weights.keys() <= own.keys() and all(
        value.shape == own[name].shape and torch.allclose(value, own[name].cpu(), rtol=1e-5, atol=1e-7)
        for name, value in weights.items()
    )


def _tied_names(module: torch.nn.Module) -> dict[str, set[str]]:
    """Parameter name -> the other names of the same tensor (safetensors keeps only one of them)."""
    names: dict[int, set[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), set()).add(name)
    return {name: group - {name} for group in names.values() for name in group if len(group) > 1}
