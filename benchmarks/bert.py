"""The same BERT twice: as transformers has it, and the same weights in mmpt; and sequences of skewed lengths."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from mmpt.huggingface import load_text
from mmpt.text import TextTransformer

VOCABULARY = 8000


def both(width: int = 256, depth: int = 4) -> tuple[BertForMaskedLM, TextTransformer]:
    """A BERT without dropout and with random weights, and mmpt's with the same ones."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCABULARY - 5))]
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    theirs = BertForMaskedLM(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.txt").write_text("\n".join(words))
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(name)
        theirs.save_pretrained(name)
        ours = load_text(folder)
    return theirs.train(), ours.train()


def skewed_lengths(count: int, seed: int = 0) -> list[int]:
    """Lengths between 8 and 512 with a mean near 88: log-normal, as of texts, gene lists and notes."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (4.05 + 0.9 * draws).exp().round().clamp(8, 512).long().tolist()


def padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and the mask of a batch with these lengths, both (batch, longest)."""
    generator = torch.Generator().manual_seed(1)
    shape = (len(lengths), max(lengths))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, VOCABULARY, shape, generator=generator)
    return ids.masked_fill(~mask, 0), mask
