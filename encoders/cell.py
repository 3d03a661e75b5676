"""The cell modality: a transformer over the genes of a cell, ranked by expression (Geneformer, LangCell)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmpt.encoder import MASK, RANDOM, Corruption, Encoder, Inputs, Part
from mmpt.encoders import cell_vocabulary as vocabulary_module
from mmpt.encoders.cell_expression import Cell as Cell
from mmpt.encoders.cell_expression import Expression as Expression
from mmpt.encoders.cell_expression import expression_of as expression_of
from mmpt.encoders.cell_processor import CellProcessor as CellProcessor
from mmpt.encoders.cell_processor import GeneWarning as GeneWarning
from mmpt.encoders.cell_vocabulary import GeneVocabulary as GeneVocabulary
from mmpt.errors import ConfigError
from mmpt.naming import named_vectors
from mmpt.tokens import Tokens
from mmpt.transformer import Activation, Transformer


class CellEncoder(Encoder):
    """A transformer over rank-value tokens; a gene is a unit, its position is its rank.

    A hidden gene becomes `<mask>`, a random one any other gene. What is predicted is which gene stands at the rank
    (masked gene modelling): logits over the vocabulary, tied to the gene vectors.

    Args:
        vocabulary: genes and their medians.
        width: size of the tokens.
        depth: layers.
        heads: attention heads.
        feedforward: hidden size of the feed-forward blocks; 4 * `width` by default.
        max_length: most tokens of a cell, `<cls>` included.
        norm: "pre", or "post" (BERT, Geneformer).
        final_norm: layer norm after the last layer; by default with pre-norm only. Without it the mean over the
            tokens can weigh genes: a layer norm gives all the same length.
        activation: of the feed-forward blocks and before the prediction.
        dropout: of the input and of every part's output; two passes with it are the two views of a cell.
        gene_dropout: see `CellProcessor`.
        expression: weigh gene vectors by the genes' log expression, in units of the cell's mean. Ranks relative to
            medians do not say how much of a gene there is, and without layers the mean over tokens not even their
            order. A hidden gene weighs 1. A layer norm of the input (post-norm) takes the weights away.
        vocabulary_size: number of gene vectors; by default the vocabulary's tokens.
        named_genes: gene vectors start from the genes' names, see `mmpt.naming`. With `shared_names` of the model, a
            gene and the word for it start as one vector, so that what training finds out about some genes holds for
            those it never meets in a text.
        packing: see `mmpt.transformer.Transformer`; pays off where cells differ much in their number of genes.

    Raises:
        ConfigError: a vocabulary_size below the vocabulary.
    """

    def __init__(
        self,
        vocabulary: GeneVocabulary,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        feedforward: int | None = None,
        max_length: int = 2048,
        norm: Literal["pre", "post"] = "pre",
        final_norm: bool | None = None,
        activation: Activation = "gelu",
        dropout: float = 0.1,
        gene_dropout: float = 0.0,
        expression: bool = False,
        vocabulary_size: int | None = None,
        named_genes: bool = False,
        packing: bool = False,
    ) -> None:
        super().__init__()
        size = len(vocabulary) if vocabulary_size is None else vocabulary_size
        if size < len(vocabulary):
            raise ConfigError(f"vocabulary_size={size} is less than the {len(vocabulary)} tokens of the vocabulary")
        self.vocabulary = vocabulary
        self.width = width
        self.processor: CellProcessor = CellProcessor(vocabulary, max_length, gene_dropout, expression)
        self.gene = nn.Embedding(size, width, padding_idx=vocabulary_module.PAD)
        self.transformer = Transformer(
            width,
            depth,
            heads,
            feedforward=feedforward,
            norm=norm,
            max_length=max_length,
            input_norm=norm == "post",
            final_norm=final_norm,
            activation=activation,
            dropout=dropout,
            packing=packing,
        )
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(size))
        nn.init.normal_(self.gene.weight, std=0.02)
        with torch.no_grad():
            if named_genes:
                own = slice(vocabulary_module.FIRST_GENE, vocabulary.cls)
                self.gene.weight[own] = named_vectors(self.unit_names(), width).to(self.gene.weight)
            self.gene.weight[vocabulary_module.PAD].zero_()

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode cells: (batch, length, width), `<cls>` first."""
        ids = inputs["ids"]
        if corruption is not None:
            random = torch.randint(vocabulary_module.FIRST_GENE, self.vocabulary.cls, ids.shape, device=ids.device)
            ids = torch.where(corruption.action == MASK, vocabulary_module.MASK, ids)
            ids = torch.where(corruption.action == RANDOM, random, ids)
        genes = self.gene(ids)
        if self.processor.expression:
            weights = inputs["weights"]
            if corruption is not None:  # how much there is of a hidden gene would give it away
                weights = torch.where((corruption.action == MASK) | (corruption.action == RANDOM), 1.0, weights)
            genes = genes * weights.unsqueeze(-1).to(genes.dtype)
        return self.transformer(Tokens(genes, inputs["mask"]))

    def units(self, inputs: Inputs) -> Tensor:
        """The genes, without `<cls>` and padding: bool (batch, length)."""
        units = inputs["mask"].clone()
        units[:, :1] = False
        return units

    def unit_names(self) -> list[str]:
        """The genes of the vocabulary."""
        genes = range(vocabulary_module.FIRST_GENE, self.vocabulary.cls)
        return [self.vocabulary.name(number) for number in genes]

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        """Logits of the genes at the predicted ranks only, in row-major order: (predicted, vocabulary)."""
        hidden = self.transform(tokens.values[corruption.predicted & tokens.mask])
        return functional.linear(hidden, self.gene.weight, self.bias)

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        """Mean cross-entropy over the predicted genes (0 if there are none), and the accuracy."""
        targets = inputs["ids"][corruption.predicted & inputs["mask"]]
        count = max(len(targets), 1)
        loss = functional.cross_entropy(predictions.float(), targets, reduction="sum") / count
        accuracy = (predictions.detach().argmax(-1) == targets).float().sum() / count
        return Part(loss, {"accuracy": accuracy})
