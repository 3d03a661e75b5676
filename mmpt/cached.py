"""Cached gradients: batches of any size in the memory of a small one, with exactly the large batch's gradients.

GradCache (Gao et al. 2021, arXiv 2101.06983): a large batch is encoded in chunks, and no activations are kept but the
results; the loss sees all of them. In the backward pass each chunk is encoded once more, with the same random numbers,
and takes the gradient of its own rows. Here this is one autograd graph of recomputed chunks, so that it holds for any
number of towers and heads, every parameter has one gradient, and distributed strategies reduce it once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpt.batches import Batch, hash_seed
from mmpt.encoder import Corruption, Inputs
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.model import MultimodalModel
from mmpt.tokens import Tokens
from mmpt.transformer import Attention

R = TypeVar("R", Tensor, Tokens)


class CachedFeatures(Features):
    """Features of a large batch, encoded `chunk` samples at a time and again in the backward pass.

    Embeddings are kept for the whole batch. Tokens are kept too where a head reads them (masked, matching and
    captioning heads do): the last layer's output, not the activations below it. What depends on the samples of a batch
    together stays exact: batch norm of the embeddings sees all of them, and policies choose units for all of them.
    Dropout is drawn for each chunk, so with dropout the gradients are those of other, equally good random numbers.

    Args:
        model: computes what is asked for.
        batch: the processed batch.
        chunk: samples at a time.
        seed: see `Features`.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, chunk: int, seed: int | None = None) -> None:
        super().__init__(model, batch, seed)
        self.chunk = chunk
        self._noise = torch.initial_seed()  # of dropout and whatever else encoders draw, on this process
        self._passes: dict[tuple, int] = {}

    def encoded(self, modality: str, corruption: Corruption | None = None, view: int = 0) -> Tokens:
        """See `Features`."""
        encoder = self.model.modality(modality).encoder

        def make(rows: slice) -> Tokens:
            hidden = None
            if corruption is not None:
                hidden = Corruption(corruption.action[rows], corruption.predicted[rows], corruption.hidden)
            return encoder(self._rows(modality, rows), hidden)

        key = ("encoded", modality, id(corruption), view)
        return self._once(key, lambda: self._chunked(key, make), keep=corruption)

    def tokens(self, modality: str, corruption: Corruption | None = None, view: int = 0) -> Tokens:
        """See `Features`."""
        key = ("tokens", modality, id(corruption), view)

        def make() -> Tokens:
            encoded = self.encoded(modality, corruption, view)
            return self._chunked(key, lambda rows: self.model.contextualize(modality, _cut(encoded, rows)))

        return self._once(key, make, keep=corruption)

    def embedding(self, modality: str, view: int = 0) -> Tensor:
        """See `Features`."""
        key, source = ("embedding", modality, view), ("encoded", modality, id(None), view)

        def make() -> Tensor:
            if source in self._made:
                tokens = self.encoded(modality, view=view)
                rows = self._chunked(key, lambda rows: self.model.projected(modality, _cut(tokens, rows)))
            else:
                # The tokens are dropped. Should a head ask for them later, they are made again with the same dropout.
                encoder = self.model.modality(modality).encoder
                rows = self._chunked(
                    source, lambda rows: self.model.projected(modality, encoder(self._rows(modality, rows)))
                )
            return self.model.standardized(modality, rows)

        return self._once(key, make)

    def connected(self, modality: str) -> Tokens:
        """See `Features`."""
        key = ("connected", modality)

        def make() -> Tokens:
            encoded = self.encoded(modality)
            return self._chunked(key, lambda rows: self.model.connect(modality, _cut(encoded, rows)))

        return self._once(key, make)

    def fuse(self, text: Inputs, context: Tokens, attention: Attention = "bidirectional") -> Tokens:
        """See `Features`."""

        def make(rows: slice) -> Tokens:
            words = {key: value[rows] for key, value in text.items()}
            return self.model.fuse_tokens(words, [_cut(context, rows)], attention)

        return self._chunked(("fused", len(self._passes)), make, len(context.mask))

    def _rows(self, modality: str, rows: slice) -> Inputs:
        return {key: value[rows] for key, value in self.inputs(modality).items()}

    def _chunked(self, key: tuple, make: Callable[[slice], R], size: int | None = None) -> R:
        """Compute rows chunk by chunk now, and each chunk again when its gradient comes.

        Args:
            key: of the pass; the same key has the same random numbers.
            make: rows -> their part of the result.
            size: number of rows; None is the batch's.
        """
        seed = hash_seed(self._noise, self._passes.setdefault(key, len(self._passes)))

        def once(start: int) -> R:
            devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(hash_seed(seed, start))
                return make(slice(start, start + self.chunk))

        starts = range(0, len(self.batch) if size is None else size, self.chunk)
        parts = [checkpoint(once, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
        return _stack(parts) if isinstance(parts[0], Tokens) else torch.cat(parts)


def _cut(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(tokens.values[rows], tokens.mask[rows])


def _stack(parts: Sequence[Tokens]) -> Tokens:
    """The rows of all parts, padded to the longest."""
    length = max(part.length for part in parts)
    return Tokens(
        torch.cat([F.pad(part.values, (0, 0, 0, length - part.length)) for part in parts]),
        torch.cat([F.pad(part.mask, (0, length - part.length)) for part in parts]),
    )


def refuse_inexact(model: MultimodalModel) -> None:
    """Refuse encoders whose output for one sample depends on the other samples of its chunk.

    Raises:
        ConfigError: an encoder or connector with batch norm that is trained; says what to do instead.
    """
    for name in model.modalities:
        for path, module in model.modality(name).named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ConfigError(
                    f"cached_chunk with the batch norm {path} of modality {name!r}: it would see a chunk instead of "
                    "the batch, so the gradients would be other ones. Either (1) take an encoder with layer or group "
                    "norm, (2) freeze the modality, or (3) leave cached_chunk out. (The model's own option batch_norm "
                    "is fine: it sees the whole batch)"
                )
