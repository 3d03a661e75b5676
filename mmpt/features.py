"""Features: a lazy view of one batch. Each encoding is computed once, however many heads read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mmpt.batches import Batch, hash_seed
from mmpt.encoder import Corruption, Inputs
from mmpt.model import TEXT, MultimodalModel
from mmpt.tokens import Tokens
from mmpt.transformer import Attention

T = TypeVar("T")


class Features:
    """What heads read.

    Args:
        model: computes what is asked for.
        batch: the processed batch; it carries some of the model's modalities.
        seed: of what heads draw for the batches of all processes together; None is torch's. Another one for each step,
            the same on every process.
    """

    def __init__(self, model: MultimodalModel, batch: Batch, seed: int | None = None) -> None:
        self.model = model
        self.batch = batch
        self._seed = torch.initial_seed() if seed is None else seed
        self._drawn = 0
        self._made: dict[tuple, object] = {}

    def has(self, modalities: Sequence[str]) -> bool:
        """Whether the batch carries all of these modalities."""
        return all(name in self.batch.inputs for name in modalities)

    def inputs(self, modality: str) -> Inputs:
        """The processed tensors of a modality."""
        return self.batch.inputs[modality]

    def label(self, name: str) -> Tensor | None:
        """A label of every sample, (batch,), or None where the data has no such label."""
        return self.batch.labels.get(name)

    def encoded(self, modality: str, corruption: Corruption | None = None, view: int = 0) -> Tokens:
        """The encoder's own tokens, in its width.

        Args:
            modality: which.
            corruption: what is hidden. The same object gives the same tokens.
            view: another number is another pass, with other dropout.
        """
        encoder = self.model.modality(modality).encoder
        key = ("encoded", modality, id(corruption), view)
        return self._once(key, lambda: encoder(self.inputs(modality), corruption), keep=corruption)

    def tokens(self, modality: str, corruption: Corruption | None = None, view: int = 0) -> Tokens:
        """Tokens in text width, after the text transformer where the modality goes through it."""
        key = ("tokens", modality, id(corruption), view)
        return self._once(
            key, lambda: self.model.contextualize(modality, self.encoded(modality, corruption, view)), keep=corruption
        )

    def embedding(self, modality: str, view: int = 0) -> Tensor:
        """L2-normalised embedding (batch, embed_dim)."""
        key = ("embedding", modality, view)
        return self._once(key, lambda: self.model.project(modality, self.encoded(modality, view=view)))

    def connected(self, modality: str) -> Tokens:
        """The encoder's tokens as the text transformer takes them."""
        return self._once(("connected", modality), lambda: self.model.connect(modality, self.encoded(modality)))

    def fused(
        self,
        modality: str,
        attention: Attention = "bidirectional",
        text_rows: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tokens:
        """Text tokens that have seen another modality.

        Args:
            modality: the other one.
            attention: see `MultimodalModel.fuse_tokens`.
            text_rows: long (n,), which texts; None is all, in order.
            rows: long (n,), which samples of the modality go with them.
        """

        def make() -> Tokens:
            text, context = self.inputs(TEXT), self.connected(modality)
            if text_rows is not None:
                text = {key: value[text_rows] for key, value in text.items()}
            if rows is not None:
                context = context.rows(rows)
            return self.fuse(text, context, attention)

        if text_rows is not None or rows is not None:
            return make()
        return self._once(("fused", modality, attention), make)

    def fuse(self, text: Inputs, context: Tokens, attention: Attention = "bidirectional") -> Tokens:
        """Text tokens that have seen other tokens, one row of them for each text, as `connected` gives them."""
        return self.model.fuse_tokens(text, [context], attention)

    def draws(self, count: int) -> Tensor:
        """Uniform numbers in [0, 1) on the CPU: (count,), the same on every process, others at each call."""
        self._drawn += 1
        generator = torch.Generator().manual_seed(hash_seed(self._seed, self._drawn))
        return torch.rand(count, generator=generator)

    def _once(self, key: tuple, make: Callable[[], T], keep: object = None) -> T:
        # `keep` holds what the key names by its identity, so that the identity is not given to another object.
        if key not in self._made:
            self._made[key] = (make(), keep)
        return self._made[key][0]  # type: ignore[index]
