"""Small models, batches and trainers over the points modality of `shapes`, built in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L
from shapes import NAMES, PointsEncoder, PointsSource
from torch import Tensor

from mmpt.batches import Batch, BatchDataset, Key
from mmpt.connectors import LinearConnector
from mmpt.data import MultimodalData
from mmpt.heads import Head
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece

TEXTS = [f"a {name}" for name in NAMES]


def text_transformer(**options: Any) -> TextTransformer:
    options = {"width": 32, "depth": 1, "heads": 4, "max_length": 48, "dropout": 0.0} | options
    return TextTransformer(train_wordpiece(TEXTS * 3, 60), **options)


def make_model(*, fusion: str = "prefix", dropout: float = 0.0, **options: Any) -> MultimodalModel:
    text = text_transformer(dropout=dropout, cross_attention=fusion == "cross_attention")
    points = Modality(PointsEncoder(dropout=dropout), LinearConnector())
    return MultimodalModel(text, {"points": points}, embed_dim=16, fusion=fusion, **options)


def make_batch(model: MultimodalModel, indices: Sequence[int] = range(8), **labels: Tensor) -> Batch:
    """The samples of the training split with these numbers; `labels` replace those of the source."""
    source = PointsSource()
    dataset = BatchDataset({"figures": source.split("train")}, model.processors, training=False)
    batch = dataset[[Key("figures", index, 0) for index in indices]]
    return replace(batch, labels=labels or batch.labels)


def make_pretraining(heads: dict[str, Head], dropout: float = 0.0, **options: Any) -> Pretraining:
    return Pretraining(make_model(dropout=dropout), heads, **{"warmup_steps": 3, **options})


def figures(**options: Any) -> MultimodalData:
    return MultimodalData({"figures": PointsSource(size=80)}, **{"batch_size": 16, **options})


def make_trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**(quiet | options))
