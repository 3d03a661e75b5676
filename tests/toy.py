"""A configuration that trains the points modality of `shapes` in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PRETRAIN: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "mmpt.Pretraining",
        "init_args": {
            "lr": 3e-3,
            "warmup_steps": 5,
            "model": {
                "class_path": "mmpt.MultimodalModel",
                "init_args": {
                    "embed_dim": 16,
                    "text": {
                        "class_path": "mmpt.text.TextTransformer",
                        "init_args": {
                            "tokenizer": {
                                "class_path": "mmpt.tokenization.WordPieceSource",
                                "init_args": {"texts": {"class_path": "shapes.PointsSource"}, "vocabulary_size": 60},
                            },
                            "width": 32,
                            "depth": 1,
                            "heads": 4,
                            "max_length": 48,
                        },
                    },
                    "modalities": {
                        "points": {
                            "class_path": "mmpt.Modality",
                            "init_args": {
                                "encoder": {"class_path": "shapes.PointsEncoder"},
                                "connector": {"class_path": "mmpt.connectors.LinearConnector"},
                            },
                        }
                    },
                },
            },
            "heads": {
                "contrastive": {"class_path": "mmpt.heads.ContrastiveHead", "init_args": {"first": "points"}},
                "masked": {"class_path": "mmpt.heads.MaskedHead", "init_args": {"modality": "points"}},
                "matching": {"class_path": "mmpt.heads.MatchingHead", "init_args": {"modality": "points"}},
                "caption": {"class_path": "mmpt.heads.CaptioningHead", "init_args": {"modality": "points"}},
            },
        },
    },
    "data": {"sources": {"figures": {"class_path": "shapes.PointsSource"}}, "batch_size": 16},
    "trainer": {"max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False},
}

FINETUNE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "class_path": "mmpt.FineTuning",
        "init_args": {"pretrained": "FOLDER", "modality": "points", "trust": ["shapes"]},
    },
    "data": {"sources": {"figures": {"class_path": "shapes.PointsSource"}}, "batch_size": 16},
    "trainer": {"max_epochs": 8, "log_every_n_steps": 1, "enable_progress_bar": False},
}


def write(folder: Path, config: dict[str, Any], name: str) -> Path:
    """The configuration as a YAML file."""
    path = folder / name
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path
