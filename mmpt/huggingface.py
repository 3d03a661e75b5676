"""Text models of Hugging Face folders: `load_text` reads weights into ours, `HuggingFaceText` wraps any other model."""

from __future__ import annotations

import inspect
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DynamicCache,
    EncoderDecoderCache,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mmpt.attention import attention_mask
from mmpt.cache import Cache
from mmpt.config import FOLDER
from mmpt.errors import CheckpointError, ConfigError
from mmpt.text import TextBackbone, TextTransformer, ranks
from mmpt.tokenization import load_tokenizer
from mmpt.tokens import Tokens
from mmpt.transformer import Attention

_PREFIXES = {"bert": "bert.", "roberta": "roberta.", "electra": "electra.", "deberta-v2": "deberta."}
"""Model types that `load_text` reads, and what their weights' names begin with when there is a head."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

_BODY = (
    (r"embeddings\.word_embeddings\.weight", "word.weight"),
    (r"embeddings\.position_embeddings\.weight", "transformer.position.weight"),
    (r"embeddings\.token_type_embeddings\.weight", "token_type"),
    (r"embeddings\.LayerNorm\.(\w+)", r"transformer.input_norm.\1"),
    (r"embeddings_project\.(\w+)", r"transformer.projection.\1"),
    (r"encoder\.rel_embeddings\.weight", "transformer.relative.weight"),
    (r"encoder\.LayerNorm\.(\w+)", r"transformer.relative_norm.\1"),
    (r"attention\.self\.pos_(query|key)_proj\.(\w+)", r"attention.position_\1.\2"),
    (r"attention\.self\.(query|key|value)(?:_proj)?\.(\w+)", r"attention.\1.\2"),
    (r"crossattention\.self\.(query|key|value)\.(\w+)", r"cross.\1.\2"),
    (r"crossattention\.output\.dense\.(\w+)", r"cross.output.\1"),
    (r"crossattention\.output\.LayerNorm\.(\w+)", r"cross_norm.\1"),
    (r"attention\.output\.dense\.(\w+)", r"attention.output.\1"),
    (r"attention\.output\.LayerNorm\.(\w+)", r"attention_norm.\1"),
    (r"intermediate\.dense\.(\w+)", r"expand.\1"),
    (r"output\.dense\.(\w+)", r"contract.\1"),
    (r"output\.LayerNorm\.(\w+)", r"feedforward_norm.\1"),
)
"""Names in Hugging Face's BERT family -> our names; the part before (`encoder.layer.N.`) is translated apart."""

_HEAD = (
    (r"cls\.predictions\.transform\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
    (r"cls\.predictions\.(?:decoder\.)?bias", "lm_head.bias"),
    (r"lm_head\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"lm_head\.layer_norm\.(\w+)", r"lm_head.norm.\1"),
    (r"lm_head\.(?:decoder\.)?bias", "lm_head.bias"),
    (r"generator_predictions\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"generator_predictions\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
    (r"generator_lm_head\.bias", "lm_head.bias"),
    (r"lm_predictions\.lm_head\.dense\.(\w+)", r"lm_head.dense.\1"),
    (r"lm_predictions\.lm_head\.LayerNorm\.(\w+)", r"lm_head.norm.\1"),
    (r"lm_predictions\.lm_head\.bias", "lm_head.bias"),
)
_DECODERS = ("cls.predictions.decoder.weight", "lm_head.decoder.weight", "generator_lm_head.weight")
_UNUSED = re.compile(r"^pooler\.|position_ids$|token_type_ids$")


def load_text(
    folder: str | Path,
    max_length: int | None = None,
    cross_attention: Sequence[int] | bool = False,
    context_width: int | None = None,
    packing: bool = False,
) -> TextTransformer:
    """Read a BERT, RoBERTa, ELECTRA or DeBERTa-v2/v3 folder into our text transformer, with equal outputs.

    Dropout is that of the folder. The masked-LM head is read if there is one (an ELECTRA discriminator has none);
    without one the output layer is tied to the word vectors, behind a fresh transform where widths differ.

    Args:
        folder: holds config.json, model.safetensors (or shards, or pytorch_model.bin) and the tokenizer.
        max_length: use only so many positions.
        cross_attention: layers that get cross-attention; its weights are read if the folder has them, otherwise new.
        context_width: size of the context vectors.
        packing: see `mmpt.transformer.Transformer`.

    Raises:
        CheckpointError: the folder is absent, incomplete or damaged.
        ConfigError: a kind of model or an option of it that ours does not have; `HuggingFaceText` wraps those.
    """
    folder = Path(folder).expanduser()
    config = _read_config(folder)
    weights = _translate(_read_weights(folder), config)
    options = _options(config, max_length)
    has_head = "lm_head.dense.weight" in weights
    narrow = options["input_width"] != options["width"]
    if has_head and config["model_type"] in ("roberta", "electra") and options["activation"] != "gelu":
        raise ConfigError(
            f"{folder}: hidden_act={config['hidden_act']!r} with a head that uses gelu; use HuggingFaceText"
        )
    text = TextTransformer(
        load_tokenizer(folder),
        **options,
        lm_head="transform" if has_head or narrow else "tied",
        cross_attention=cross_attention,
        context_width=context_width,
        packing=packing,
    )
    if "transformer.position.weight" in weights:
        weights["transformer.position.weight"] = weights["transformer.position.weight"][: text.max_length]
    if "token_type" in weights:
        weights["token_type"] = weights["token_type"][0]
    if not text.transformer.reads_context:
        weights = {name: weight for name, weight in weights.items() if ".cross" not in name}
    try:
        missing, unexpected = text.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {folder} don't fit its config.json: {error}") from error
    fresh = ("lm_head.",) if not has_head else ()
    missing = [name for name in missing if ".cross" not in name and not name.startswith(fresh)]
    if missing or unexpected:
        raise CheckpointError(
            f"the weights of {folder} don't fit its config.json: {len(missing)} are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} are unknown ({', '.join(unexpected[:3])})"
        )
    return text


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json with the defaults of transformers filled in."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind in _PREFIXES:
            return AutoConfig.from_pretrained(str(folder), local_files_only=True).to_dict()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} has no readable config.json ({error}); expected a folder that `save_pretrained` of transformers "
            "wrote. Nothing is downloaded"
        ) from error
    raise ConfigError(
        f"{folder} holds a {kind!r} model; load_text reads {', '.join(_PREFIXES)}. "
        "Use mmpt.huggingface.HuggingFaceText for others"
    )


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        if (folder / "model.safetensors").is_file():
            return load_file(folder / "model.safetensors")
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            # Only names, no paths: a shard can't be outside the folder.
            return {name: tensor for shard in shards for name, tensor in load_file(folder / Path(shard).name).items()}
        if (folder / "pytorch_model.bin").is_file():
            return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the weights in {folder} can't be read: {error}") from error
    raise CheckpointError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _translate(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the weights our names, in float32.

    Raises:
        ConfigError: an output layer with vectors of its own.
    """
    prefix = _PREFIXES[config["model_type"]]
    prefix = prefix if any(name.startswith(prefix) for name in weights) else ""
    word = weights.get(f"{prefix}embeddings.word_embeddings.weight")
    translated: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name in _DECODERS and word is not None and not torch.equal(weight, word):
            raise ConfigError("the output layer is not tied to the word vectors; use HuggingFaceText")
        # Weights of 2018 call a norm's parameters gamma and beta.
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        target = _rename(name, _HEAD)
        if target is None and name.startswith(prefix):
            target = _rename_body(name.removeprefix(prefix), headless=not prefix)
        if target is not None:
            translated[target] = weight.float()
    offset = config["pad_token_id"] + 1 if config["model_type"] == "roberta" else 0
    if offset:  # RoBERTa's positions begin behind the pad id
        translated["transformer.position.weight"] = translated["transformer.position.weight"][offset:]
    return translated


def _rename_body(name: str, headless: bool) -> str | None:
    if _UNUSED.search(name):
        return None
    layer = re.match(r"encoder\.layer\.(\d+)\.", name)
    if layer is None:
        target = _rename(name, _BODY)
        # In a file without prefix, heads of other kinds stand beside the body.
        return target if target is not None or headless else name
    target = _rename(name[layer.end() :], _BODY)
    return name if target is None else f"transformer.layers.{layer[1]}.{target}"


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    for pattern, target in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(target)
    return None


def _options(config: Mapping[str, Any], max_length: int | None) -> dict[str, Any]:
    """Options of TextTransformer for a config.json.

    Raises:
        ConfigError: an option that ours does not have.
    """
    kind = config["model_type"]
    width = config["hidden_size"]
    longest = config["max_position_embeddings"] - (config["pad_token_id"] + 1 if kind == "roberta" else 0)
    if max_length is not None and max_length > longest:
        raise ConfigError(f"max_length={max_length} is more than the {longest} positions of the folder")
    _require(config["hidden_act"] in _ACTIVATIONS, config, "hidden_act")
    _require(config.get("position_embedding_type", "absolute") == "absolute", config, "position_embedding_type")
    options: dict[str, Any] = {
        "width": width,
        "depth": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "feedforward": config["intermediate_size"],
        "norm": "post",
        "max_length": max_length or longest,
        "input_width": config.get("embedding_size", width),
        "input_norm": True,
        "activation": _ACTIVATIONS[config["hidden_act"]],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
        "norm_eps": config["layer_norm_eps"],
        "token_types": config["type_vocab_size"] > 0,
        "vocabulary_size": config["vocab_size"],
    }
    return options | _relative_options(config) if kind == "deberta-v2" else options


def _relative_options(config: Mapping[str, Any]) -> dict[str, Any]:
    _require(config["relative_attention"], config, "relative_attention")
    _require(not config["position_biased_input"], config, "position_biased_input")
    _require(config.get("conv_kernel_size", 0) <= 0, config, "conv_kernel_size")
    _require(config.get("embedding_size", config["hidden_size"]) == config["hidden_size"], config, "embedding_size")
    named = config["pos_att_type"] or []
    terms = [term.strip() for term in named.lower().split("|")] if isinstance(named, str) else list(named)
    _require(set(terms) <= {"c2p", "p2c"}, config, "pos_att_type")
    longest = config.get("max_relative_positions", -1)
    return {
        "positions": "disentangled",
        "relative_buckets": max(config.get("position_buckets", -1), 0),
        "relative_distance": longest if longest >= 1 else config["max_position_embeddings"],
        "relative_terms": terms,
        "relative_share": config.get("share_att_key", False),
        "relative_norm": "layer_norm" in config.get("norm_rel_ebd", "none").lower(),
    }


def _require(fine: bool, config: Mapping[str, Any], option: str) -> None:
    if not fine:
        raise ConfigError(
            f"load_text does not read {config['model_type']} models with {option}={config.get(option)!r}; "
            "use mmpt.huggingface.HuggingFaceText"
        )


class HuggingFaceText(TextBackbone):
    """Any encoder or causal language model of transformers as the shared text transformer.

    Encoders are bidirectional by nature, language models causal; the other kinds of attention pass through a mask of
    pairs where the architecture takes one. Cross-attention exists where the folder's config has `add_cross_attention`;
    there, unlike in ours, a row whose context is all padding is not skipped but reads zeros.

    Args:
        path: folder with config.json, the weights and the tokenizer. Nothing is downloaded.
        load_weights: False builds the architecture with fresh weights, to be loaded as part of a larger model.
        max_length: longest sequence; by default what the folder says.

    Raises:
        CheckpointError: the folder is absent or damaged.
        ConfigError: an encoder-decoder model.
    """

    def __init__(self, path: str | Path, load_weights: bool = True, max_length: int | None = None) -> None:
        super().__init__()
        folder = Path(path).expanduser()
        self.tokenizer = _padded_tokenizer(folder)
        model = _load_model(folder, load_weights)
        config = model.config
        if config.is_encoder_decoder:
            raise ConfigError(
                f"{folder} holds an encoder-decoder ({config.model_type}); use an encoder or a causal model"
            )
        self.natural: Attention = "causal" if _is_causal(config) else "bidirectional"
        self.body, self.lm_head = _split(model)
        self.architecture = type(model).__name__
        word = cast(nn.Embedding, self.body.get_input_embeddings())
        self.width = config.hidden_size
        self.input_width = word.weight.shape[1]
        self.position_offset = _position_offset(self.body)
        self.max_length = _max_length(config, self.tokenizer, self.position_offset, max_length)
        self._accepted = frozenset(inspect.signature(type(self.body).forward).parameters)
        names = [name for name in ("cache", "past_key_values") if name in self._accepted]
        self._cache_argument = names[0] if names and not self.body._is_stateful else None

    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tokens:
        """See `TextBackbone.embed`."""
        values = self.body.get_input_embeddings()(ids)
        return Tokens(values, ids != self.tokenizer.pad_token_id if mask is None else mask)

    def forward(
        self,
        tokens: Tokens,
        attention: Attention = "bidirectional",
        context: Tokens | None = None,
        prefix: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tokens:
        """See `TextBackbone.forward`.

        Raises:
            ConfigError: a kind of attention or a context that the architecture can't do.
        """
        past = 0 if cache is None else cache.length
        if past + tokens.length > self.max_length:
            raise ConfigError(
                f"{past + tokens.length} tokens for a model of at most {self.max_length}; shorten the input"
            )
        if past and attention != "causal":
            raise ConfigError(f"attention={attention!r} behind a filled cache; continue with attention='causal'")
        mask = tokens.mask if cache is None else cache.extend(tokens.mask)
        visible = _visible_keys(mask)
        arguments: dict[str, Any] = {
            "inputs_embeds": tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), 0.0),
            "attention_mask": visible.long(),
            "position_ids": ranks(mask)[:, past:] + self.position_offset,
            "use_cache": False,
        }
        if cache is not None:
            assert isinstance(cache, HuggingFaceCache)
            assert self._cache_argument is not None
            arguments |= {"use_cache": True, self._cache_argument: cache.kept}
        if attention != self.natural or prefix is not None:
            self._check_pairs(attention)
            allowed = attention_mask(tokens.mask, attention, prefix)
            arguments["attention_mask"] = self._pair_mask(allowed.expand(-1, -1, tokens.length, -1), tokens.values)
        if context is not None:
            self._check_context(context)
            arguments["encoder_hidden_states"] = context.values.masked_fill(~context.mask.unsqueeze(-1), 0.0)
            arguments["encoder_attention_mask"] = _visible_keys(context.mask).long()
        output = self.body(**{name: value for name, value in arguments.items() if name in self._accepted})
        return Tokens(output.last_hidden_state, tokens.mask)

    def lm_logits(self, values: Tensor) -> Tensor:
        """See `TextBackbone.lm_logits`; without a head, the product with the word vectors.

        Raises:
            ConfigError: no head, and word vectors of another width.
        """
        if self.lm_head is not None:
            rows = values.reshape(1, -1, self.width)  # heads of language models expect (batch, length, width)
            logits: Tensor = self.lm_head(inputs_embeds=rows).logits
            return logits.view(*values.shape[:-1], logits.shape[-1])
        if self.input_width != self.width:
            raise ConfigError(
                f"{self.architecture} has no language-model head, and its outputs ({self.width}) don't fit its word "
                f"vectors ({self.input_width}); load the ForMaskedLM or ForCausalLM version of the folder"
            )
        return functional.linear(values, cast(nn.Embedding, self.body.get_input_embeddings()).weight)

    def new_cache(self) -> HuggingFaceCache | None:
        """See `TextBackbone.new_cache`; None for encoders and for models whose state is no list of keys and values."""
        if self.natural != "causal" or self._cache_argument is None:
            return None
        return HuggingFaceCache(self.body.config)

    def config(self, folder: Path | None = None) -> dict[str, Any]:
        """The configuration; with a folder, config.json and tokenizer are written to folder/text."""
        if folder is None:
            return super().config(folder)
        written = self.body.config.__class__.from_dict(self.body.config.to_dict())
        written.architectures = [self.architecture]
        written.save_pretrained(str(folder / "text"))
        self.tokenizer.save_pretrained(str(folder / "text"))
        cls = type(self)
        arguments = {"path": f"{FOLDER}/text", "load_weights": False, "max_length": self.max_length}
        return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}

    def _check_pairs(self, attention: Attention) -> None:
        layers = getattr(self.body.config, "layer_types", None) or []
        if not self.body._supports_attention_backend or any(kind != "full_attention" for kind in layers):
            raise ConfigError(
                f"{type(self.body).__name__} can't do attention={attention!r}: it is {self.natural} and takes no mask "
                "of pairs. Either (1) use its own kind of attention, or (2) another architecture, such as BERT"
            )

    def _pair_mask(self, allowed: Tensor, values: Tensor) -> Tensor:
        if self.body.config._attn_implementation == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=values.dtype).masked_fill(~allowed, torch.finfo(values.dtype).min)

    def _check_context(self, context: Tokens) -> None:
        if not getattr(self.body.config, "add_cross_attention", False):
            raise ConfigError(
                f"a context for {type(self.body).__name__} without cross-attention; its config.json needs "
                "is_decoder and add_cross_attention, or use fusion by prefix"
            )
        if context.width != self.width:
            raise ConfigError(f"the context has width {context.width}, expected {self.width}")


class HuggingFaceCache(Cache):
    """The cache of a transformers model.

    Attributes:
        kept: what the model reads and fills.

    Args:
        config: of the model; says which layers keep a window only, and whether there is cross-attention.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        crossed = getattr(config, "add_cross_attention", False)
        own = DynamicCache(config=config)
        self.kept = EncoderDecoderCache(own, DynamicCache(config=config)) if crossed else own

    def select(self, rows: Tensor) -> None:
        """See `Cache.select`."""
        super().select(rows)
        self.kept.reorder_cache(cast(torch.LongTensor, rows))


class _Given(nn.Module):
    """Stands for the body in a model whose head alone is wanted: gives back its input."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPastAndCrossAttentions:
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=inputs_embeds)

    @property
    def decoder(self) -> _Given:
        return self  # OPT asks its body's decoder


def _split(model: PreTrainedModel) -> tuple[PreTrainedModel, nn.Module | None]:
    """The body, and the model with its body taken out (so that it computes the head only), or None without a head."""
    body = cast(PreTrainedModel, model.base_model)
    head: nn.Module | None = None
    if body is not model:
        setattr(model, model.base_model_prefix, _Given())
        head = model
    if getattr(body, "pooler", None) is not None:
        setattr(body, "pooler", None)  # noqa: B010 (a Module attribute); its parameters would never get a gradient
    return body, head


def _load_model(folder: Path, load_weights: bool) -> PreTrainedModel:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; expected a Hugging Face folder. Nothing is downloaded")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        names = config.architectures or [""]
        if names[0].endswith("ForMaskedLM"):
            auto: Any = AutoModelForMaskedLM
        elif names[0].endswith(("ForCausalLM", "LMHeadModel")):
            auto = AutoModelForCausalLM
        else:
            auto = AutoModel
        if load_weights:
            return auto.from_pretrained(str(folder), config=config, local_files_only=True, dtype=torch.float32)
        return auto.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder} can't be read as a transformers model: {error}") from error


def _padded_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:  # causal models often have none; what pads never matters, the mask hides it
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _is_causal(config: PretrainedConfig) -> bool:
    kind = config.model_type
    only_causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return only_causal or bool(getattr(config, "is_decoder", False))


def _position_offset(body: nn.Module) -> int:
    """RoBERTa and its relatives keep the pad id's row of the position table free and begin behind it."""
    table = getattr(getattr(body, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _max_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, offset: int, asked: int | None) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    longest = tokenizer.model_max_length if positions is None else positions - offset
    return int(longest if asked is None else min(asked, longest))


def _visible_keys(mask: Tensor) -> Tensor:
    """The mask, but all True in rows without anything real, which would give NaN."""
    return mask | ~mask.any(1, keepdim=True)
