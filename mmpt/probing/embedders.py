"""Text encoders as probes see them: any model that turns a text into one vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mmpt.errors import ConfigError, DataError
from mmpt.model import TEXT, MultimodalModel, evaluating
from mmpt.text import TextEncoder
from mmpt.tokens import Tokens

Pooling = Literal["pooler", "cls", "eos", "mean", "projected"]
"""How a text becomes one vector.

- pooler: the trained layer on top of [CLS] (BERT), or the pooled state of a CLIP-like model before its projection;
- cls: the first position of the last layer;
- eos: the last real position (CLIP: the end-of-text token);
- mean: mean over the real positions, special tokens included (sentence-transformers);
- projected: the vector in the joint space of texts and another modality.
"""

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)

BATCH_TOKENS = 2048
"""Tokens in a forward pass: enough for large matrix products, few enough to stay in a CPU's cache."""


class Embedder(ABC):
    """A frozen text encoder.

    Attributes:
        name: what names it in tables.
        poolings: what it can do; the first one is its own, as it was trained or published.
    """

    name: str
    poolings: tuple[Pooling, ...]

    @abstractmethod
    def embed(
        self,
        texts: Sequence[str],
        pooling: Pooling | None = None,
        groups: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """One vector for each text, whatever other texts are asked for.

        Args:
            texts: any.
            pooling: None is the encoder's own.
            groups: with it, the texts of a group are padded to the longest of them and the padding is NOT masked, as
                in the released code of Stroop probing. By default nothing is padded, or the padding is masked.
            progress: called with the number of texts that are done.

        Returns:
            float32 (texts, width), not normalised.

        Raises:
            ConfigError: a pooling that the encoder can't do.
        """

    def check(self, pooling: Pooling | None) -> Pooling:
        """The pooling, or the encoder's own for None.

        Raises:
            ConfigError: the encoder can't do it.
        """
        if pooling is None:
            return self.poolings[0]
        if pooling not in self.poolings:
            raise ConfigError(f"{self.name} can't do pooling {pooling!r}; it can do {', '.join(self.poolings)}")
        return pooling


class TokenEmbedder(Embedder):
    """An encoder that reads token ids.

    Equal texts are computed once. Texts are sorted by their number of tokens and only texts of one length share a
    forward pass, so nothing is padded, no work is spent on padding, and a text's vector does not depend on the others.

    Attributes:
        pad_id: stands where an unmasked text is shorter than its group's longest one.
        fixed_length: models that were trained on texts padded to one length (SigLIP) get all texts so.
        precision: "32", or "bf16" for bfloat16 products: faster on CPUs and GPUs that have them, and cosines differ
            from those of "32" in the third decimal.
    """

    pad_id: int
    fixed_length: int | None = None
    precision: Literal["32", "bf16"] = "32"
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids with special tokens, cut to the longest text that the model reads."""

    @abstractmethod
    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """Encode without a mask.

        Args:
            ids: long (batch, length).
            lengths: long (batch,), how many of them are the text's own.
            pooling: one of `poolings`.

        Returns:
            (batch, width).
        """

    def embed(
        self,
        texts: Sequence[str],
        pooling: Pooling | None = None,
        groups: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """See `Embedder.embed`."""
        chosen = self.check(pooling)
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise DataError("expected a list of texts (str)")
        if not texts:
            return torch.zeros(0, 0)
        different = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(different)}
        ids = self.tokenize(different)
        own = np.array([len(row) for row in ids])
        text_n = np.array([place[text] for text in texts])
        padded_n = self._padded(own[text_n], groups)
        # A text padded to two lengths is two computations; equal ones are one.
        computed, row_n = np.unique(np.stack([padded_n, text_n], 1), axis=0, return_inverse=True)  # sorted by length
        counts = np.bincount(row_n.ravel(), minlength=len(computed))
        parts: list[Tensor] = []
        for start, stop in _runs(computed[:, 0]):
            length = int(computed[start, 0])
            batch = torch.full((stop - start, length), self.pad_id)
            for row, number in enumerate(computed[start:stop, 1]):
                batch[row, : own[number]] = torch.tensor(ids[number])
            real = torch.from_numpy(own[computed[start:stop, 1]])
            parts.append(self._forward(batch, real, chosen))
            if progress is not None:
                progress(int(counts[start:stop].sum()))
        return torch.cat(parts)[torch.from_numpy(row_n.ravel())]

    def _padded(self, lengths: np.ndarray, groups: Sequence[int] | None) -> np.ndarray:
        """The length that each text is padded to: (texts,)."""
        if self.fixed_length is not None:
            return np.full_like(lengths, self.fixed_length)
        if groups is None:
            return lengths
        _, group_n = np.unique(np.asarray(groups), return_inverse=True)
        longest = np.zeros(group_n.max() + 1, dtype=lengths.dtype)
        np.maximum.at(longest, group_n, lengths)
        return longest[group_n]

    def _forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            return self.forward(ids.to(self.device), lengths.to(self.device), pooling).float().cpu().clone()


def _runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Batches of neighbours of equal length, of about `BATCH_TOKENS` tokens: (start, stop) pairs of sorted lengths."""
    runs = []
    start = 0
    while start < len(lengths):
        same = int(np.searchsorted(lengths, lengths[start], side="right"))
        stop = min(same, start + max(1, BATCH_TOKENS // max(1, int(lengths[start]))))
        runs.append((start, stop))
        start = stop
    return runs


class ModelEmbedder(TokenEmbedder):
    """The text side of an mmpt model, also while it is trained.

    Args:
        model: its mode is restored after each pass.
        name: what names it in tables.
    """

    def __init__(self, model: MultimodalModel, name: str = "model") -> None:
        encoder = model.modality(TEXT).encoder
        assert isinstance(encoder, TextEncoder)
        self.model, self.name, self.encoder = model, name, encoder
        self.poolings = ("projected", "cls", "eos", "mean")
        self.pad_id = int(model.text.tokenizer.pad_token_id)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """See `TokenEmbedder.tokenize`; cut as the model's own processor cuts."""
        self.device = next(self.model.parameters()).device
        inputs = self.encoder.processor(texts)
        return [row[:length].tolist() for row, length in zip(inputs["ids"], inputs["mask"].sum(1), strict=True)]

    def forward(self, ids: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
        """See `TokenEmbedder.forward`."""
        text = self.model.text
        with evaluating(self.model):
            everything = torch.ones_like(ids, dtype=torch.bool)
            tokens = text(text.embed(ids, everything), attention=self.encoder.attention)
            if pooling == "projected":
                return self.model.project(TEXT, tokens)
        return pool(tokens.values, lengths, pooling)


def pool(values: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """Pool by "cls", "eos" or "mean": (batch, length, width) without a mask, the mean over all that the model saw.

    Raises:
        ConfigError: another pooling; it needs a layer of the model.
    """
    tokens = Tokens(values, torch.ones(values.shape[:2], dtype=torch.bool, device=values.device))
    if pooling == "cls":
        return tokens.first()
    if pooling == "eos":
        return values[torch.arange(len(values), device=values.device), lengths - 1]
    if pooling == "mean":
        return tokens.mean()
    raise ConfigError(f"pooling {pooling!r} is not a function of the last layer")


class FunctionEmbedder(Embedder):
    """Any function from a list of texts to an array (texts, width): an API, a bag of words, a model of another kind.

    Args:
        function: called with at most `batch_size` texts.
        name: what names it in tables.
        batch_size: most texts of a call.
    """

    poolings: tuple[Pooling, ...] = ("projected",)

    def __init__(self, function: Callable[[list[str]], Any], name: str = "function", batch_size: int = 256) -> None:
        self.function, self.name, self.batch_size = function, name, batch_size

    def embed(
        self,
        texts: Sequence[str],
        pooling: Pooling | None = None,
        groups: Sequence[int] | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> Tensor:
        """See `Embedder.embed`.

        Raises:
            ConfigError: a pooling or unmasked padding; only the function knows how it pools and pads.
            DataError: the function gave another shape than (texts, width).
        """
        self.check(pooling)
        if groups is not None:
            raise ConfigError(f"{self.name} is a function, so its attention mask can't be left out")
        different = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(different)}
        parts = []
        for start in range(0, len(different), self.batch_size):
            part = different[start : start + self.batch_size]
            vectors = torch.as_tensor(np.asarray(self.function(part)), dtype=torch.float32)
            if vectors.ndim != 2 or len(vectors) != len(part):
                raise DataError(
                    f"{self.name} gave the shape {tuple(vectors.shape)} for {len(part)} texts; expected (texts, width)"
                )
            parts.append(vectors)
        if progress is not None:
            progress(len(texts))
        return torch.cat(parts)[torch.tensor([place[text] for text in texts])] if parts else torch.zeros(0, 0)
