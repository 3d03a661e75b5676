"""The text side: the contract of the shared text transformer, our implementation of it, and text as a modality."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from mmpt.cache import Cache, TransformerCache
from mmpt.config import FOLDER, Configurable, to_config
from mmpt.encoder import MASK, RANDOM, Corruption, Encoder, Inputs, Part, Processor, UnitLosses
from mmpt.errors import ConfigError, SampleError
from mmpt.naming import named_vectors, parts_of
from mmpt.positions import Positions
from mmpt.tokenization import TokenizerSource, resolve_tokenizer
from mmpt.tokens import Tokens
from mmpt.transformer import Activation, Attention, Transformer, activation_function


class TruncationWarning(UserWarning):
    """A text was longer than the model reads and lost its end."""


class TextBackbone(nn.Module, Configurable, ABC):
    """The shared text transformer, as encoders, connectors and heads see it.

    Vectors of other modalities enter at one seam: between `embed` and `forward`, spliced in (`splice`) or put in front
    (`mmpt.tokens.concatenate`). They have the width of word vectors, `input_width`, and get positions like words.

    Attributes:
        width: size of the vectors that `forward` gives.
        input_width: size of word vectors, and of foreign vectors at the seam.
        tokenizer: the tokenizer that belongs to these weights.
        max_length: longest sequence, foreign vectors included.
    """

    width: int
    input_width: int
    tokenizer: PreTrainedTokenizerFast
    max_length: int

    @abstractmethod
    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tokens:
        """Word vectors, before positions.

        Args:
            ids: long (batch, length).
            mask: bool (batch, length), True where real; by default everything but the pad id.

        Returns:
            Tokens with values (batch, length, input_width).
        """

    @abstractmethod
    def forward(
        self,
        tokens: Tokens,
        attention: Attention = "bidirectional",
        context: Tokens | None = None,
        prefix: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tokens:
        """Contextualise word vectors and foreign vectors.

        The position of a token is the number of real tokens before it, wherever the padding stands.

        Args:
            tokens: values (batch, length, input_width).
            attention: see `mmpt.attention.Attention`.
            context: tokens for the cross-attention layers; without it these layers are skipped.
            prefix: bool (batch, length), with `attention="prefix"`: positions that all others see.
            cache: what earlier calls have read, from `new_cache`; `tokens` follow it and are added to it. Behind it
                attention is "causal". The context stays the one of the first call.

        Returns:
            Tokens with values (batch, length, width).

        Raises:
            ConfigError: what the model can't do: too long, wrong width, a context without cross-attention.
        """

    @abstractmethod
    def lm_logits(self, values: Tensor) -> Tensor:
        """Scores of the vocabulary: (..., width) -> (..., vocabulary)."""

    @abstractmethod
    def new_cache(self) -> Cache | None:
        """An empty cache for `forward`, of any batch size; None for a model that can't keep what it has read."""

    def name_words(self, names: Sequence[str]) -> None:
        """Let the words that occur in names of another modality's units start as these units do (`mmpt.naming`).

        Words that name nothing keep their small vectors, so that in a mean over words they don't drown the others
        before training has said what they mean.

        Raises:
            ConfigError: the model's word vectors are not ours to start; the default.
        """
        raise ConfigError(f"{type(self).__name__} can't take words by their names (shared_names)")

    def splice(self, tokens: Tokens, positions: Tensor, vectors: Tensor) -> Tokens:
        """Put foreign vectors in the place of word vectors; the gradient flows to both.

        Args:
            tokens: values (batch, length, input_width), as `embed` gives them.
            positions: long (batch, n), different from each other within a row.
            vectors: (batch, n, input_width).

        Returns:
            Tokens of the same shape and mask; other positions are unchanged.

        Raises:
            ConfigError: another number of vectors than positions, or another width.
        """
        if vectors.shape[:2] != positions.shape or len(positions) != len(tokens.values):
            raise ConfigError(
                f"splice: vectors {tuple(vectors.shape)} at positions {tuple(positions.shape)} of a batch of "
                f"{len(tokens.values)}; expected one vector for each position, (batch, n, width) at (batch, n)"
            )
        if vectors.shape[2] != tokens.width:
            raise ConfigError(
                f"splice: vectors of width {vectors.shape[2]} among word vectors of width {tokens.width}; "
                "put a connector in between"
            )
        index = positions.unsqueeze(-1).expand(vectors.shape)
        return Tokens(tokens.values.scatter(1, index, vectors.to(tokens.values.dtype)), tokens.mask)

    def config(self, folder: Path | None = None) -> dict[str, Any]:
        """The configuration; with a folder, the tokenizer is written to folder/tokenizer and named from there."""
        if folder is None:
            return super().config(folder)
        self.tokenizer.save_pretrained(str(folder / "tokenizer"))
        arguments = {name: to_config(value, folder) for name, value in self._init_args.items() if name != "tokenizer"}
        cls = type(self)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {"tokenizer": f"{FOLDER}/tokenizer", **arguments},
        }


class TextTransformer(TextBackbone):
    """Our text transformer: word vectors, `mmpt.transformer.Transformer`, and an output layer tied to the word vectors.

    `mmpt.huggingface.load_text` builds one from BERT, RoBERTa, ELECTRA or DeBERTa-v2/v3 weights.

    Args:
        tokenizer: a tokenizer, the path of one (Hugging Face folder, tokenizer.json, vocab.txt), or text to train it
            on.
        width: size of the vectors inside and at the output.
        depth: number of layers.
        heads: number of attention heads.
        feedforward: hidden size of the feed-forward blocks; 4 * `width` by default.
        norm: "pre" or "post" (BERT).
        positions: see `mmpt.positions.Positions`.
        max_length: longest sequence, foreign vectors included; longer texts are cut to it.
        input_width: size of word vectors; `width` by default.
        input_norm: layer norm of the input, after the positions.
        final_norm: layer norm after the last layer; by default with pre-norm only.
        activation: nonlinearity of the feed-forward blocks and of the output layer.
        dropout: dropout of the input and of every part's output.
        attention_dropout: dropout of attention probabilities.
        norm_eps: epsilon of all layer norms.
        cross_attention: which layers can read a context: all (True), none, or a list of layer numbers.
        context_width: size of the context vectors; by default `input_width`, the width that connectors give.
        relative_buckets: see `mmpt.transformer.Transformer`, as for the other `relative_` options.
        relative_distance: see there.
        relative_terms: see there.
        relative_share: see there.
        relative_norm: see there.
        token_types: add one learned vector to every input position (BERT's token type 0).
        lm_head: "tied": product with the word vectors; "transform": dense, activation, norm before it and a bias after
            it (BERT). Needed where `input_width` differs from `width`.
        vocabulary_size: number of word vectors; by default the tokenizer's.
        packing: see `mmpt.transformer.Transformer`.

    Raises:
        ConfigError: options that can't work together, a tokenizer without a pad token.
        CheckpointError: the tokenizer's path holds none.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        feedforward: int | None = None,
        norm: Literal["pre", "post"] = "pre",
        positions: Positions = "absolute",
        max_length: int = 128,
        input_width: int | None = None,
        input_norm: bool = False,
        final_norm: bool | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.1,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        cross_attention: Sequence[int] | bool = False,
        context_width: int | None = None,
        relative_buckets: int = 0,
        relative_distance: int | None = None,
        relative_terms: Sequence[Literal["c2p", "p2c"]] = ("c2p", "p2c"),
        relative_share: bool = True,
        relative_norm: bool = True,
        token_types: bool = False,
        lm_head: Literal["tied", "transform"] = "tied",
        vocabulary_size: int | None = None,
        packing: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = resolve_tokenizer(tokenizer)
        self.width = width
        self.input_width = width if input_width is None else input_width
        self.max_length = max_length
        self.vocabulary_size = _vocabulary_size(self.tokenizer, vocabulary_size)
        if lm_head == "tied" and self.input_width != width:
            raise ConfigError(
                f"lm_head='tied' compares outputs of width {width} with word vectors of width {self.input_width}; "
                "use lm_head='transform'"
            )
        self.word = nn.Embedding(self.vocabulary_size, self.input_width, padding_idx=self.tokenizer.pad_token_id)
        self.token_type = nn.Parameter(torch.empty(self.input_width)) if token_types else None
        self.transformer = Transformer(
            width,
            depth,
            heads,
            feedforward=feedforward,
            norm=norm,
            positions=positions,
            max_length=max_length,
            input_width=self.input_width,
            input_norm=input_norm,
            final_norm=final_norm,
            activation=activation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            norm_eps=norm_eps,
            cross_attention=cross_attention,
            context_width=self.input_width if context_width is None else context_width,
            relative_buckets=relative_buckets,
            relative_distance=relative_distance,
            relative_terms=relative_terms,
            relative_share=relative_share,
            relative_norm=relative_norm,
            packing=packing,
        )
        self.lm_head = LmTransform(self, activation, norm_eps) if lm_head == "transform" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the word vectors and the token type anew: normal with standard deviation 0.02, the pad vector zero."""
        nn.init.normal_(self.word.weight, std=0.02)
        with torch.no_grad():
            self.word.weight[self.tokenizer.pad_token_id].zero_()
        if self.token_type is not None:
            nn.init.normal_(self.token_type, std=0.02)

    def name_words(self, names: Sequence[str]) -> None:
        """See `TextBackbone.name_words`."""
        wanted = {part for name in names for part in parts_of(name)}
        found = [(row, word) for word, row in self.tokenizer.get_vocab().items() if word in wanted]
        if found:
            rows, words = zip(*found, strict=True)
            with torch.no_grad():
                self.word.weight[list(rows)] = named_vectors(words, self.input_width).to(self.word.weight)

    def embed(self, ids: Tensor, mask: Tensor | None = None) -> Tokens:
        """See `TextBackbone.embed`."""
        return Tokens(self.word(ids), ids != self.tokenizer.pad_token_id if mask is None else mask)

    def forward(
        self,
        tokens: Tokens,
        attention: Attention = "bidirectional",
        context: Tokens | None = None,
        prefix: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tokens:
        """See `TextBackbone.forward`."""
        assert cache is None or isinstance(cache, TransformerCache)
        before = None if cache is None else cache.mask
        position_ids = ranks(tokens.mask if before is None else torch.cat([before, tokens.mask], dim=1))
        return self.transformer(
            tokens,
            attention,
            context=context,
            prefix=prefix,
            position_ids=position_ids[:, position_ids.shape[1] - tokens.length :],
            position_limit=position_ids.shape[1],
            cache=cache,
            shift=self.token_type,
        )

    def new_cache(self) -> TransformerCache:
        """See `TextBackbone.new_cache`."""
        return TransformerCache(self.transformer.depth)

    def lm_logits(self, values: Tensor) -> Tensor:
        """See `TextBackbone.lm_logits`."""
        if self.lm_head is None:
            return functional.linear(values, self.word.weight)
        return functional.linear(self.lm_head(values), self.word.weight, self.lm_head.bias)


class LmTransform(nn.Module):
    """BERT's transform before the tied output layer: dense (width -> input_width), activation, norm; holds the bias.

    Args:
        text: the text transformer that it belongs to.
        activation: nonlinearity.
        norm_eps: epsilon of the layer norm.
    """

    def __init__(self, text: TextTransformer, activation: Activation, norm_eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(text.width, text.input_width)
        self.activation = activation_function(activation)
        self.norm = nn.LayerNorm(text.input_width, norm_eps)
        self.bias = nn.Parameter(torch.zeros(text.vocabulary_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, values: Tensor) -> Tensor:
        """(..., width) -> (..., input_width)."""
        return self.norm(self.activation(self.dense(values)))


def ranks(mask: Tensor) -> Tensor:
    """The number of real tokens before each position: long (batch, length); never negative."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _vocabulary_size(tokenizer: PreTrainedTokenizerFast, asked: int | None) -> int:
    if asked is not None and asked < len(tokenizer):
        raise ConfigError(f"vocabulary_size={asked} is less than the {len(tokenizer)} entries of the tokenizer")
    return len(tokenizer) if asked is None else asked


class TextProcessor(Processor):
    """Texts -> token ids, padded to the longest text of the batch.

    | key     | shape                 | meaning                                                                    |
    |---------|-----------------------|----------------------------------------------------------------------------|
    | ids     | long (batch, length)  | token ids; the tokenizer's pad id where there is no text                   |
    | mask    | bool (batch, length)  | True where real, special tokens included                                   |
    | words   | long (batch, length)  | number of the word that a token belongs to, non-decreasing along a row     |
    | special | bool (batch, length)  | True for special tokens, padding included                                  |

    Args:
        tokenizer: turns text into ids.
        max_length: most tokens of a text, special tokens included.
        too_long: longer texts are cut before their final [SEP] ("truncate", with a `TruncationWarning`) or refused
            ("error").

    Raises:
        ConfigError: the tokenizer has no pad token.
    """

    def __init__(
        self,
        tokenizer: TokenizerSource,
        max_length: int = 128,
        too_long: Literal["truncate", "error"] = "truncate",
    ) -> None:
        self.tokenizer = resolve_tokenizer(tokenizer)
        self.max_length = max_length
        self.too_long = too_long
        self.special_ids = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))

    def __call__(self, samples: Sequence[str], *, training: bool = False) -> Inputs:
        """Tokenize a batch of texts; an empty text is fine.

        Raises:
            SampleError: a sample that is not a string; a text that is too long, with `too_long="error"`.
        """
        for index, sample in enumerate(samples):
            if not isinstance(sample, str):
                raise SampleError(repr(sample), f"a {type(sample).__name__}", "a text (str)", index)
        encodings = self._encode(list(samples))
        length = max((len(encoding.ids) for encoding in encodings), default=0)
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings], dtype=torch.long)
        mask = torch.arange(length) < lengths.unsqueeze(1)
        ids = _padded([encoding.ids for encoding in encodings], length, self.tokenizer.pad_token_id)
        words = _padded(
            [[_SPECIAL if word is None else word for word in encoding.word_ids] for encoding in encodings],
            length,
            _PADDING,
        )
        starts = words == _SPECIAL  # a special token is a word of its own, all padding is one more
        starts[:, 1:] |= words[:, 1:] != words[:, :-1]
        starts[:, :1] = False
        words = starts.cumsum(1)
        return {"ids": ids, "mask": mask, "words": words, "special": torch.isin(ids, self.special_ids)}

    def _encode(self, texts: list[str]) -> list[Any]:
        if not texts:
            return []
        encodings = list(self.tokenizer(texts, verbose=False).encodings or [])
        long = [index for index, encoding in enumerate(encodings) if len(encoding.ids) > self.max_length]
        if not long:
            return encodings
        if self.too_long == "error":
            index = long[0]
            raise SampleError(
                texts[index][:60], f"{len(encodings[index].ids)} tokens", f"at most {self.max_length} tokens", index
            )
        # The same message every time: Python's warning filter shows it once.
        warnings.warn(
            f"texts of more than {self.max_length} tokens lose their end; raise max_length, or refuse them with "
            "too_long='error'",
            TruncationWarning,
            stacklevel=3,
        )
        cut = self.tokenizer([texts[i] for i in long], truncation=True, max_length=self.max_length, verbose=False)
        for index, encoding in zip(long, cut.encodings or [], strict=True):
            encodings[index] = encoding
        return encodings


_SPECIAL, _PADDING = -1, -2


def _padded(rows: list[list[int]], length: int, fill: int) -> Tensor:
    """Rows of different lengths -> long (rows, length)."""
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows], dtype=torch.long).view(len(rows), length)


class TextEncoder(Encoder):
    """Text as a modality like the others: a unit is a token.

    Args:
        text: the shared text transformer.
        attention: what a token of a text sees; "causal" for text towers that pool the last token (CLIP).
        too_long: what happens to texts longer than `max_length`; see `TextProcessor`.
        once: encode equal texts of a batch once (without corruption). It asks the device for their number; with dropout
            they share their noise.
        max_length: most tokens of a text; by default `text.max_length`.

    Raises:
        ConfigError: a `max_length` that the text transformer does not reach.
    """

    def __init__(
        self,
        text: TextBackbone,
        attention: Literal["bidirectional", "causal"] = "bidirectional",
        too_long: Literal["truncate", "error"] = "truncate",
        once: bool = False,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        if max_length is not None and not 2 < max_length <= text.max_length:
            raise ConfigError(f"texts of {max_length} tokens; expected 3 to {text.max_length}, the text transformer's")
        self.text = text
        self.once = once
        self.attention: Attention = attention
        self.width = text.width
        self.processor = TextProcessor(text.tokenizer, max_length or text.max_length, too_long)

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode texts; a hidden token becomes the mask token, a random one any id that is not special.

        Raises:
            ConfigError: corruption for a tokenizer without a mask token.
        """
        ids, mask = inputs["ids"], inputs["mask"]
        if corruption is not None:
            ids = self._corrupt(ids, corruption)
        elif self.once:
            different, rows = torch.unique(torch.where(mask, ids, -1), dim=0, return_inverse=True)
            seen = different >= 0
            pad_id = self.text.tokenizer.pad_token_id
            tokens = self.text(self.text.embed(different.masked_fill(~seen, pad_id), seen), attention=self.attention)
            return tokens.rows(rows)
        return self.text(self.text.embed(ids, mask), attention=self.attention)

    def units(self, inputs: Inputs) -> Tensor:
        """Real tokens that are not special: bool (batch, length)."""
        return inputs["mask"] & ~inputs["special"]

    def groups(self, inputs: Inputs) -> Tensor:
        """Number of the word of each token, for whole-word masking: long (batch, length)."""
        return inputs["words"]

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        """Logits at the predicted tokens only, in row-major order: (predicted, vocabulary)."""
        return self.text.lm_logits(tokens.values[corruption.predicted & tokens.mask])

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        """Mean cross-entropy over the predicted tokens (0 if there are none), and the accuracy."""
        targets = inputs["ids"][corruption.predicted & inputs["mask"]]
        count = max(len(targets), 1)
        loss = functional.cross_entropy(predictions.float(), targets, reduction="sum") / count
        accuracy = (predictions.detach().argmax(-1) == targets).float().sum() / count
        return Part(loss, {"accuracy": accuracy})

    def unit_losses(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> UnitLosses:
        """Cross-entropy of each predicted token; one part."""
        targets = inputs["ids"][corruption.predicted & inputs["mask"]]
        losses = functional.cross_entropy(predictions.float(), targets, reduction="none")
        return UnitLosses(losses.unsqueeze(1), (predictions.detach().argmax(-1) == targets).unsqueeze(1))

    def _corrupt(self, ids: Tensor, corruption: Corruption) -> Tensor:
        tokenizer = self.text.tokenizer
        if tokenizer.mask_token_id is None:
            raise ConfigError(
                "the tokenizer has no mask token, so tokens can't be hidden; use one that has, or leave the masked "
                "head out"
            )
        special = sorted(set(tokenizer.all_special_ids))
        # Numbers of the ordinary tokens only, then a step over each special id: no table on the device.
        random = torch.randint(len(tokenizer) - len(special), ids.shape, device=ids.device)
        for number in special:
            random += random >= number
        ids = torch.where(corruption.action == MASK, tokenizer.mask_token_id, ids)
        return torch.where(corruption.action == RANDOM, random, ids)
