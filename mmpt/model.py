"""MultimodalModel: modality encoders around one shared text transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpt.config import Configurable
from mmpt.connectors import Connector
from mmpt.encoder import Corruption, Encoder, Inputs, Processor
from mmpt.errors import ConfigError, DataError
from mmpt.evaluation.zero_shot import relative
from mmpt.generation import generate
from mmpt.text import TextBackbone, TextEncoder
from mmpt.tokens import Tokens, concatenate
from mmpt.transformer import Attention

Pooling = Literal["mean", "first", "last"]
"""How tokens become one vector: mean over real positions, the first ([CLS]), or the last real one (end of text)."""

TEXT = "text"
"""The name of the modality that every model has."""


class Modality(nn.Module, Configurable):
    """One modality of a model: its encoder and how the encoder's tokens are used.

    Args:
        encoder: raw tensors to tokens.
        connector: maps the encoder's tokens to the width of the text transformer's input, for fusion with text and for
            `through_text`. None: the widths must be equal where they meet.
        pooling: how the tokens become the vector that is embedded.
        through_text: the tokens run through the shared text transformer before they are pooled (ArchBERT), instead of
            the encoder standing beside it (CLIP, LangCell).
        projection: a linear map leads from the pooled vector to the joint space; False: the vector lies there as it is.
    """

    def __init__(
        self,
        encoder: Encoder,
        connector: Connector | None = None,
        pooling: Pooling = "mean",
        through_text: bool = False,
        projection: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.connector = connector
        self.pooling = pooling
        self.through_text = through_text
        self.projection = projection

    def pool(self, tokens: Tokens) -> Tensor:
        """(batch, width)."""
        if self.pooling == "mean":
            return tokens.mean()
        return tokens.first() if self.pooling == "first" else tokens.last()


class MultimodalModel(nn.Module, Configurable):
    """Encoders, connectors and the shared text transformer.

    "text" is a modality like the others; its encoder is the text transformer itself.

    Args:
        text: the shared text transformer.
        modalities: name -> modality, besides "text".
        embed_dim: width of the joint embedding space.
        batch_norm: standardise every dimension of the projected vectors over the batch before they are normalised, each
            modality by itself. Without it the embeddings of a new model lie in a narrow cone, which a contrastive head
            must open first. With several processes use `trainer.sync_batchnorm`.
        text_pooling: how a text becomes one vector.
        text_attention: of the text encoder; "causal" goes with pooling "last" (CLIP).
        text_length: longest text in tokens. The rest of the text transformer's `max_length` is room for the tokens that
            other modalities put in front of a text; None leaves none.
        text_projection: as `projection` of the other modalities.
        unique_texts: encode equal texts of a batch once: for data in which many samples share a text.
        shared_names: words that name a unit of a modality (`Encoder.unit_names`) start as `mmpt.naming` has it; an
            encoder of the same width whose units start so too meets them there.
        fusion: how another modality's tokens reach the text transformer: in front of the text ("prefix"), or as the
            keys and values of its cross-attention layers ("cross_attention").

    Raises:
        ConfigError: widths that don't meet, or fusion that the text transformer can't do.
    """

    def __init__(
        self,
        text: TextBackbone,
        modalities: dict[str, Modality] | None = None,
        embed_dim: int = 256,
        batch_norm: bool = False,
        text_pooling: Pooling = "first",
        text_attention: Literal["bidirectional", "causal"] = "bidirectional",
        text_length: int | None = None,
        text_projection: bool = True,
        unique_texts: bool = False,
        shared_names: bool = False,
        fusion: Literal["prefix", "cross_attention"] = "prefix",
    ) -> None:
        super().__init__()
        if modalities and TEXT in modalities:
            raise ConfigError('modalities must not name "text"; the `text` argument is that modality')
        self.fusion = fusion
        self.embed_dim = embed_dim
        self.modalities = nn.ModuleDict(
            {
                TEXT: Modality(
                    TextEncoder(text, text_attention, once=unique_texts, max_length=text_length),
                    pooling=text_pooling,
                    projection=text_projection,
                )
            }
        )
        for name, modality in (modalities or {}).items():
            if any(modality.encoder is other.encoder for other in self.modalities.values()):
                raise ConfigError(
                    f"modality {name!r} shares its encoder with another one; a configuration can't say so, and the "
                    "saved model would have two. Give it an encoder of its own"
                )
            _join(name, modality, text)
            self.modalities[name] = modality
        if shared_names:
            text.name_words(
                [unit for modality in (modalities or {}).values() for unit in modality.encoder.unit_names()]
            )
        self.projections = nn.ModuleDict({name: self._projection(name) for name in self.modalities})
        self.norms = nn.ModuleDict(
            {name: nn.BatchNorm1d(embed_dim, affine=False) for name in self.modalities} if batch_norm else {}
        )

    @property
    def text(self) -> TextBackbone:
        """The shared text transformer."""
        encoder = self.modality(TEXT).encoder
        assert isinstance(encoder, TextEncoder)
        return encoder.text

    @property
    def processors(self) -> dict[str, Processor]:
        """The preprocessing of each modality, for the data module."""
        return {name: self.modality(name).encoder.processor for name in self.modalities}

    def modality(self, name: str) -> Modality:
        """The parts of one modality.

        Raises:
            ConfigError: the model has no such modality.
        """
        if name not in self.modalities:
            raise ConfigError(f"the model has no modality {name!r}; it has {', '.join(self.modalities)}")
        module = self.modalities[name]
        assert isinstance(module, Modality)
        return module

    def pooled_width(self, name: str) -> int:
        """Size of the tokens that are pooled: the encoder's, or the text transformer's where they go through it."""
        modality = self.modality(name)
        return self.text.width if modality.through_text else modality.encoder.width

    def _projection(self, name: str) -> nn.Module:
        width = self.pooled_width(name)
        if self.modality(name).projection:
            return nn.Linear(width, self.embed_dim, bias=False)
        if width != self.embed_dim:
            raise ConfigError(
                f"modality {name!r} has projection: false and width {width}, but embed_dim is {self.embed_dim}; "
                "make them equal, or let it be projected"
            )
        return nn.Identity()

    def parts(self, name: str) -> list[nn.Module]:
        """What belongs to one modality alone: encoder, connector, projection and norm.

        Args:
            name: of the modality, or of one of its parts: "image.encoder", "image.connector".

        Raises:
            ConfigError: no such modality or part.
        """
        name, _, part = name.partition(".")
        if part:
            modality = self.modality(name)
            chosen = {"encoder": modality.encoder, "connector": modality.connector}.get(part)
            if chosen is None:
                raise ConfigError(
                    f"modality {name!r} has no part {part!r}; name its encoder, or its connector if it has one"
                )
            return [chosen]
        return [self.modality(name), self.projections[name], *([self.norms[name]] if name in self.norms else [])]

    # Tensors to tensors: what training uses.

    def connect(self, name: str, encoded: Tokens) -> Tokens:
        """An encoder's tokens as the text transformer takes them: (batch, length, text.input_width)."""
        connector = self.modality(name).connector
        return encoded if connector is None else connector(encoded)

    def encode(self, name: str, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Tokens of one modality in text width, after the text transformer where the modality goes through it."""
        return self.contextualize(name, self.modality(name).encoder(inputs, corruption))

    def contextualize(self, name: str, encoded: Tokens) -> Tokens:
        """An encoder's tokens in text width, after the text transformer where the modality goes through it."""
        tokens = self.connect(name, encoded)
        return self.text(tokens) if self.modality(name).through_text else tokens

    def project(self, name: str, encoded: Tokens) -> Tensor:
        """An encoder's tokens -> L2-normalised embedding (batch, embed_dim), in float32."""
        return self.standardized(name, self.projected(name, encoded))

    def projected(self, name: str, encoded: Tokens) -> Tensor:
        """The first half of `project`, each sample by itself: pooled and projected, at least float32."""
        modality = self.modality(name)
        tokens = self.contextualize(name, encoded) if modality.through_text else encoded
        projected = self.projections[name](modality.pool(tokens))
        return projected.to(torch.promote_types(projected.dtype, torch.float32))

    def standardized(self, name: str, projected: Tensor) -> Tensor:
        """The second half of `project`, over the whole batch: batch norm where the model has it, and length one."""
        if name in self.norms:
            projected = self.norms[name](projected)
        return F.normalize(projected, dim=-1)

    def fuse_tokens(self, text: Inputs, context: Sequence[Tokens], attention: Attention = "bidirectional") -> Tokens:
        """Run the text transformer over a text with other modalities' connected tokens.

        Args:
            text: inputs of the text processor.
            context: tokens in text width, as `connect` gives them.
            attention: "prefix" lets every position see the context and makes the text causal.

        Returns:
            Tokens at the positions of the text: (batch, text length, text.width).
        """
        words = self.text.embed(text["ids"], text["mask"])
        if not context:
            return self.text(words, attention=attention)
        foreign = concatenate(*context)
        if self.fusion == "cross_attention":
            kind: Attention = "causal" if attention == "prefix" else attention
            return self.text(words, attention=kind, context=foreign)
        if foreign.length + words.length > self.text.max_length:
            raise ConfigError(
                f"{foreign.length} tokens of other modalities in front of {words.length} of text, but the text "
                f"transformer takes {self.text.max_length}. Either (1) give the model text_length: "
                f"{max(self.text.max_length - foreign.length, 0)} so that longer texts are cut, or (2) raise max_length"
            )
        joined = concatenate(foreign, words)
        prefix = torch.zeros_like(joined.mask)
        prefix[:, : foreign.length] = True
        output = self.text(joined, attention=attention, prefix=prefix if attention == "prefix" else None)
        return Tokens(output.values[:, foreign.length :], words.mask)

    # Raw samples: what people use.

    def process(self, name: str, samples: Sequence[Any]) -> Inputs:
        """Raw samples -> inputs on the model's device.

        Raises:
            DataError: one string in place of a list of samples; its letters would be taken for samples.
        """
        if isinstance(samples, str):
            raise DataError(f"{name}: {samples[:60]!r} is one string; give a list of samples, [{samples[:20]!r}]")
        inputs = self.modality(name).encoder.processor(samples)
        device = next(self.parameters()).device
        return {key: value.to(device) for key, value in inputs.items()}

    def embed(
        self, name: str, samples: Sequence[Any] | Inputs, batch_size: int = 64, store: str | None = None
    ) -> Tensor:
        """Embed one modality.

        Args:
            name: the modality.
            samples: raw samples (embedded in batches, in evaluation mode, without gradient), or processed inputs
                (embedded in one go, in the current mode, with gradient).
            batch_size: how many raw samples at once.
            store: also write the embeddings under this name into what holds the raw samples (`AnnData.obsm`).

        Returns:
            (batch, embed_dim), L2-normalised.

        Raises:
            ConfigError: `store` with samples that have no place for embeddings.
        """
        encoder = self.modality(name).encoder
        if isinstance(samples, Mapping):
            return self.project(name, encoder(samples))
        with evaluating(self), torch.no_grad():
            parts = [
                self.project(name, encoder(self.process(name, samples[start : start + batch_size])))
                for start in range(0, len(samples), batch_size)
            ]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.embed_dim)
        if store is not None:
            encoder.processor.store(samples, store, vectors)
        return vectors

    def fuse(self, text: Sequence[str] | Inputs, attention: Attention = "bidirectional", **modalities: Any) -> Tokens:
        """Text tokens that have seen other modalities.

        Args:
            text: texts or inputs of the text processor.
            attention: see `fuse_tokens`.
            modalities: name -> raw samples or processed inputs, one for each text.
        """
        inputs = text if isinstance(text, Mapping) else self.process(TEXT, text)
        return self.fuse_tokens(inputs, self._context(modalities), attention)

    def _context(self, modalities: Mapping[str, Any]) -> list[Tokens]:
        context = []
        for name, samples in modalities.items():
            inputs = samples if isinstance(samples, Mapping) else self.process(name, samples)
            context.append(self.connect(name, self.modality(name).encoder(inputs)))
        return context

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        beams: int = 1,
        **modalities: Sequence[Any],
    ) -> list[str]:
        """Write text about samples of other modalities.

        Args:
            prompt: one text for all samples, or one for each.
            max_new_tokens: the most tokens to write.
            temperature: 0 is greedy; otherwise samples are drawn from the softmax at this temperature.
            top_p: draw only from the most probable tokens that hold this share.
            beams: width of the beam search (greedy with 1).
            modalities: name -> raw samples.
        """
        count = max((len(samples) for samples in modalities.values()), default=1)
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        with evaluating(self), torch.no_grad():
            inputs = self.process(TEXT, prompts)
            tokenizer = self.text.tokenizer
            end_id = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
            ids, mask = _open_end(inputs, end_id)
            context = self._context(modalities)
            foreign = concatenate(*context) if context else None
            crossed = self.fusion == "cross_attention"
            written = generate(
                self.text,
                ids,
                mask,
                prefix=None if crossed else foreign,
                context=foreign if crossed else None,
                attention="causal" if crossed or foreign is None else "prefix",
                max_new_tokens=max_new_tokens,
                end_id=end_id,
                temperature=temperature,
                top_p=top_p,
                beams=beams,
            )
        return self.text.tokenizer.batch_decode(written, skip_special_tokens=True)

    def zero_shot(
        self,
        name: str,
        samples: Sequence[Any],
        labels: Sequence[str],
        templates: Sequence[str] = ("{}",),
        relative_to: Sequence[Any] | None = None,
    ) -> Any:
        """Cosine of each sample with each label's mean prompt embedding.

        Args:
            name: the modality of the samples.
            samples: raw samples.
            labels: candidate texts.
            templates: prompts with one `{}`; a label is the normalised mean over its prompts.
            relative_to: samples at large, labelled or not, e.g. those of training: each label's similarities become
                relative to theirs (`mmpt.evaluation.zero_shot.relative`). For labels that training never saw.

        Returns:
            (samples, labels) similarities; the argmax is the prediction. A tensor, or what people of the field read
            where the samples come with names: a DataFrame for AnnData.
        """
        prompts = [template.format(label) for label in labels for template in templates]
        texts = self.embed(TEXT, prompts).unflatten(0, (len(labels), len(templates)))
        classes = F.normalize(texts.mean(1), dim=-1)
        similarities = self.embed(name, samples) @ classes.T
        if relative_to is not None:
            similarities = relative(similarities, self.embed(name, relative_to) @ classes.T)
        return self.modality(name).encoder.processor.table(samples, labels, similarities)

    def save_pretrained(self, folder: str | Path, card: str = "") -> Path:
        """Write config.yaml, model.safetensors, tokenizer files and README.md (the model card)."""
        from mmpt.checkpoint import save_pretrained

        return save_pretrained(self, Path(folder), card)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        trust: Sequence[str] = (),
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> MultimodalModel:
        """Rebuild a saved model, in evaluation mode.

        Args:
            folder: written by `save_pretrained`.
            trust: packages besides mmpt whose classes the configuration may name.
            encoders: modality -> arguments of its encoder that shall differ from the folder's, such as dropout or
                augmentation. The weights must still fit.

        Raises:
            CheckpointError: not such a folder, damaged, or weights that don't fit the arguments.
            ConfigError: no such modality, or an argument that its encoder doesn't have.
            UntrustedClassError: the configuration names other classes.
        """
        from mmpt.checkpoint import from_pretrained

        return from_pretrained(Path(folder), trust, encoders)


class evaluating:  # noqa: N801 (reads as a verb where it is used)
    """Context in which a module is in evaluation mode; afterwards each part is in the mode that it had."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        """Enter evaluation mode."""
        self.modes = {part: part.training for part in self.module.modules()}
        self.module.eval()

    def __exit__(self, *error: object) -> None:
        """Restore the modes."""
        for part, training in self.modes.items():
            part.training = training


def _join(name: str, modality: Modality, text: TextBackbone) -> None:
    """Build the connector of a modality, or check that none is needed."""
    if modality.connector is not None:
        modality.connector.build(modality.encoder.width, text.input_width)
    elif modality.through_text and modality.encoder.width != text.input_width:
        raise ConfigError(
            f"modality {name!r}: the encoder gives vectors of width {modality.encoder.width} and the text transformer "
            f"takes {text.input_width}. Either (1) give it a connector such as mmpt.connectors.LinearConnector, or (2) "
            "make the widths equal"
        )


def _open_end(inputs: Inputs, end_id: int | None) -> tuple[Tensor, Tensor]:
    """Prompts without their closing [SEP], so that they can be continued: ids and mask, both (batch, length)."""
    ids, mask = inputs["ids"], inputs["mask"].clone()
    last = mask.sum(1) - 1
    rows = torch.arange(len(ids), device=ids.device)
    mask[rows, last] = mask[rows, last] & (ids[rows, last] != end_id)
    width = max(int(mask.sum(1).max()), 1)
    return ids[:, :width], mask[:, :width]
