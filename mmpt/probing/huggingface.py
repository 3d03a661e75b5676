"""Hugging Face folders as text encoders of a probe: BERT and its kind, sentence-transformers, CLIP, SigLIP, FLAVA."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextModelWithProjection,
    FlavaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipTextModel,
)
from transformers.utils import logging

from mmpt.errors import CheckpointError, ConfigError
from mmpt.probing.embedders import Pooling, TokenEmbedder, pool
from mmpt.text import TruncationWarning
from mmpt.tokenization import load_tokenizer

SIGLIP_LENGTH = 64

OPTIONAL_WEIGHTS = ("pooler", "text_projection", "logit_scale", "position_ids")
"""Parts that a folder may lack: then the pooling that needs them is not offered."""

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)


class HuggingFaceEmbedder(TokenEmbedder):
    """An encoder of transformers: BERT, RoBERTa, DistilBERT, ELECTRA and any other with `last_hidden_state`.

    A pooler counts only if the folder holds its weights; transformers would make up random ones.

    Args:
        folder: config.json, weights and tokenizer.
        name: what names it in tables; by default the folder's name.
        own: the encoder's own pooling; by default "pooler" where there is one, else "mean".

    Raises:
        CheckpointError: the folder is absent, incomplete or damaged. Nothing is downloaded.
        ConfigError: an encoder-decoder.
    """

    def __init__(self, folder: str | Path, name: str | None = None, own: Pooling | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.name
        self.model, missing = load_model(self.folder, AutoModel)
        if self.model.config.is_encoder_decoder:
            raise ConfigError(f"{self.folder} holds an encoder-decoder; a probe reads encoders")
        pooled = getattr(self.model, "pooler", None) is not None and not any("pooler." in key for key in missing)
        self._setup(("pooler", "mean", "cls", "eos") if pooled else ("mean", "cls", "eos"), own)

    model: Any  # a PreTrainedModel, whose parts differ between architectures

    def _setup(self, poolings: tuple[Pooling, ...], own: Pooling | None = None) -> None:
        self.poolings = poolings
        if own is not None:
            self.poolings = (self.check(own), *(other for other in poolings if other != own))
        self.tokenizer = padded_tokenizer(self.folder)
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.max_length = max_length(self.model, self.tokenizer)
        self.device = next(self.model.parameters()).device

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See `TokenEmbedder.tokenize`."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`."""
        output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return output.pooler_output if pooling == "pooler" else pool(output.last_hidden_state, lengths, pooling)


class ClipEmbedder(HuggingFaceEmbedder):
    """The text tower of a CLIP folder. "pooler" and "eos" are the end-of-text state; "projected" is CLIP's embedding.

    Args:
        folder: of a CLIPModel or CLIPTextModel(WithProjection).
        name: what names it in tables.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.name
        self.model, missing = load_model(self.folder, CLIPTextModelWithProjection)
        projected = not any("text_projection" in key for key in missing)
        self._setup(("projected", "pooler", "eos", "cls", "mean") if projected else ("pooler", "eos", "cls", "mean"))

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`; the text is causal, so what is behind its end never counts."""
        output = self.model.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if pooling in ("cls", "mean"):
            return pool(output.last_hidden_state, lengths, pooling)
        pooled = output.pooler_output
        return self.model.text_projection(pooled) if pooling == "projected" else pooled


class SiglipEmbedder(HuggingFaceEmbedder):
    """The text tower of a SigLIP folder, which was trained on texts padded to one length and without a mask.

    Args:
        folder: of a SiglipModel or SiglipTextModel.
        name: what names it in tables.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.name
        self.model, _ = load_model(self.folder, SiglipTextModel)
        self._setup(("projected", "pooler", "mean"))
        self.fixed_length = self.max_length = min(SIGLIP_LENGTH, self.model.config.max_position_embeddings)

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`; the head reads the last position, whatever stands there."""
        output = self.model(input_ids=ids)
        return pool(output.last_hidden_state, lengths, pooling) if pooling == "mean" else output.pooler_output


class FlavaEmbedder(HuggingFaceEmbedder):
    """The text tower of a FLAVA folder; "projected" is its contrastive embedding, of position 0.

    Args:
        folder: of a FlavaModel or FlavaForPreTraining.
        name: what names it in tables.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.name = name or self.folder.name
        self.model, missing = load_model(self.folder, FlavaModel)
        pooled = not any("text_model.pooler." in key for key in missing)
        self._setup(("projected", *(("pooler",) if pooled else ()), "cls", "mean", "eos"))

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`."""
        output = self.model.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        if pooling == "projected":
            return self.model.text_projection(output.last_hidden_state[:, 0])
        return output.pooler_output if pooling == "pooler" else pool(output.last_hidden_state, lengths, pooling)


KINDS: dict[str, type[ClipEmbedder | SiglipEmbedder | FlavaEmbedder]] = {
    "clip": ClipEmbedder,
    "clip_text_model": ClipEmbedder,
    "siglip": SiglipEmbedder,
    "siglip_text_model": SiglipEmbedder,
    "flava": FlavaEmbedder,
}
"""Model types whose text tower is pooled in a way of its own."""


def load_folder(folder: Path, name: str | None = None) -> HuggingFaceEmbedder:
    """A Hugging Face or sentence-transformers folder.

    Raises:
        CheckpointError: the folder is absent or damaged.
        ConfigError: a sentence-transformers pipeline with parts that have no counterpart here.
    """
    if (folder / "modules.json").is_file():
        return _sentence_transformer(folder, name)
    kind = KINDS.get(_config(folder).model_type)
    return HuggingFaceEmbedder(folder, name) if kind is None else kind(folder, name)


def _sentence_transformer(folder: Path, name: str | None) -> HuggingFaceEmbedder:
    """The transformer of a sentence-transformers folder with the pooling that it says."""
    own: Pooling | None = None
    body = folder
    for module in _json(folder / "modules.json"):
        kind, path = str(module["type"]).rpartition(".")[2], folder / str(module["path"])
        if kind == "Transformer":
            body = path
        elif kind == "Pooling":
            chosen = [key for key, value in _json(path / "config.json").items() if value is True]
            modes: dict[str, Pooling] = {
                "pooling_mode_mean_tokens": "mean",
                "pooling_mode_cls_token": "cls",
                "pooling_mode_lasttoken": "eos",
            }
            asked = [key for key in chosen if key.startswith("pooling_mode")]
            if len(asked) != 1 or asked[0] not in modes:
                raise ConfigError(f"{path} pools by {', '.join(asked)}; a probe knows {', '.join(modes)}")
            own = modes[asked[0]]
        elif kind != "Normalize":
            raise ConfigError(
                f"{folder} has a module {kind} behind its pooling; pass a function texts -> array instead, e.g. "
                "SentenceTransformer(...).encode"
            )
    return HuggingFaceEmbedder(body, name or folder.name, own)


def load_model(folder: Path, auto: Any) -> tuple[PreTrainedModel, set[str]]:
    """A model in evaluation mode, and the names of the weights that the folder lacks.

    Raises:
        CheckpointError: absent or damaged.
    """
    config = _config(folder)
    if auto in (CLIPTextModelWithProjection, SiglipTextModel):
        whole, config = config, config.get_text_config()
        if auto is CLIPTextModelWithProjection:  # a CLIPModel is projected to the width that the whole names
            config.projection_dim = whole.projection_dim
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # "some weights were not used": the image side
    logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(
            str(folder), config=config, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        raise CheckpointError(f"{folder} can't be read as a transformers model: {error}") from error
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
    missing = set(info["missing_keys"])
    essential = sorted(key for key in missing if not any(part in key for part in OPTIONAL_WEIGHTS))
    if essential:
        raise CheckpointError(
            f"{folder} lacks weights of its own config.json: {len(essential)}, e.g. {essential[0]}; they would be "
            "random"
        )
    return model.eval().requires_grad_(False), missing


def _config(folder: Path) -> Any:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; expected a model folder. Nothing is downloaded")
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except LOADING_ERRORS as error:
        raise CheckpointError(
            f"{folder} holds no readable config.json of a transformers model ({error}); a model folder of mmpt has a "
            "config.yaml"
        ) from error


def padded_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The folder's tokenizer, with a pad token if it has none."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """The longest text in tokens; RoBERTa and its relatives keep the first positions of their table free."""
    config = model.config.get_text_config()
    positions = int(getattr(config, "max_position_embeddings", tokenizer.model_max_length))
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return min(positions - (0 if padding is None else padding + 1), int(tokenizer.model_max_length))


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], longest: int) -> list[list[int]]:
    """Token ids with special tokens; longer texts lose their end, with a warning."""
    ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    if any(len(row) > longest for row in ids):
        warnings.warn(f"texts of more than {longest} tokens lose their end", TruncationWarning, stacklevel=3)
        ids = tokenizer(list(texts), truncation=True, max_length=longest, verbose=False)["input_ids"]
    return ids


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error
