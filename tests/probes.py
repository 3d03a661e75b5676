"""Tiny random text models of transformers, written as folders, for the tests of probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CLIPConfig,
    CLIPModel,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    FlavaConfig,
    FlavaModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
)

from mmpt.tokenization import train_bytelevel_bpe, train_wordpiece

WORDS = "a photo of the red green blue circle triangle rectangle shaped wedge flag wheel color banana is it good bad"
TEXTS = [WORDS, "a photo of a red wedge", "what is the color of a banana ? red", "the flag is a rectangle"] * 4

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def wordpiece() -> PreTrainedTokenizerFast:
    return train_wordpiece(TEXTS, 160)


def bytelevel() -> PreTrainedTokenizerFast:
    return train_bytelevel_bpe(TEXTS, 330)


def write(kind: str, folder: Path) -> Any:
    """A random model of a kind in a folder with its tokenizer; the model, in evaluation mode."""
    torch.manual_seed(0)
    tokenizer = bytelevel() if kind.startswith("roberta") else wordpiece()
    common = {**SIZES, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    picture = {**small, "image_size": 8, "patch_size": 4}
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, "pad_token_id": 0}
    model: Any
    if kind == "bert":
        model = BertModel(BertConfig(**common, max_position_embeddings=40))
    elif kind == "bert-mlm":
        model = BertForMaskedLM(BertConfig(**common, max_position_embeddings=40))
    elif kind in ("roberta", "roberta-mlm"):
        config = RobertaConfig(**common, max_position_embeddings=42, pad_token_id=tokenizer.pad_token_id)
        model = RobertaModel(config) if kind == "roberta" else RobertaForMaskedLM(config)
    elif kind == "distilbert":
        model = DistilBertModel(
            DistilBertConfig(
                vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40,
                initializer_range=0.2,
            )
        )  # fmt: skip
    elif kind == "electra":
        model = ElectraModel(ElectraConfig(**common, embedding_size=24, max_position_embeddings=40))
    elif kind == "clip":
        text = {**common, **ends, "max_position_embeddings": 24}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=12))
    elif kind == "siglip":
        text = {**common, **ends, "max_position_embeddings": 20, "projection_size": 16}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=picture))
    elif kind == "flava":
        model = FlavaModel(
            FlavaConfig(
                text_config={**common, "max_position_embeddings": 40},
                image_config=picture,
                multimodal_config=small,
                projection_dim=12,
                hidden_size=16,
            )
        )
    else:
        raise AssertionError(kind)
    for parameter in model.parameters():  # zero biases would hide a forgotten one
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    model = model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
