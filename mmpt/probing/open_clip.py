"""open_clip architectures with a local checkpoint as text encoders of a probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpt.errors import CheckpointError, ConfigError
from mmpt.probing.embedders import Pooling, TokenEmbedder


class OpenClipEmbedder(TokenEmbedder):
    """The text side of an open_clip model; "projected" is what `encode_text` gives.

    Args:
        architecture: a name of `open_clip.list_models()`, e.g. ViT-B-32.
        checkpoint: local weights (.pt, .safetensors); nothing is downloaded.
        name: what names it in tables.

    Raises:
        ConfigError: open_clip is not installed, an unknown architecture, or one whose tokenizer would be downloaded.
        CheckpointError: the checkpoint is absent or does not fit.
    """

    poolings: tuple[Pooling, ...] = ("projected",)

    def __init__(self, architecture: str, checkpoint: str | Path, name: str | None = None) -> None:
        path = Path(checkpoint).expanduser()
        try:
            import open_clip
        except ImportError as error:
            raise ConfigError('open_clip models need open_clip_torch: pip install "mmpt[compare]"') from error
        config = open_clip.get_model_config(architecture)
        if config is None:
            raise ConfigError(f"open_clip has no architecture {architecture!r}; see open_clip.list_models()")
        text = config["text_cfg"]
        if text.get("hf_tokenizer_name") or text.get("hf_model_name"):
            raise ConfigError(
                f"the tokenizer of {architecture} is a download; probe the Hugging Face folder of the model instead"
            )
        if not path.is_file():
            raise CheckpointError(
                f"{path} does not exist; expected the weights of {architecture}. Nothing is downloaded"
            )
        try:
            self.model = open_clip.create_model(architecture, pretrained=str(path)).float().eval().requires_grad_(False)
        except Exception as error:  # torch and open_clip raise many kinds for files that don't fit
            raise CheckpointError(f"{path} can't be loaded as {architecture}: {error}") from error
        self.tokenizer = open_clip.get_tokenizer(architecture)
        self.name = name or f"{architecture} {path.stem}"
        self.pad_id = 0
        self.fixed_length = int(text.get("context_length", 77))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See `TokenEmbedder.tokenize`; open_clip pads to its context length itself."""
        return self.tokenizer(list(texts), context_length=self.fixed_length).tolist()

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`."""
        encoded: Tensor = self.model.encode_text(ids.to(torch.long))
        return encoded
