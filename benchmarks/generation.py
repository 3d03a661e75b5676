"""Writing text: kept keys and values against running everything each time, and against transformers on equal weights.

    python benchmarks/generation.py [--rounds 5] [--batch 8] [--prompt 64] [--new 64] [--width 256] [--depth 6]

Every round runs all ways one after the other on one thread; the table has medians of the per-round ratios. The greedy
texts of all ways must be equal, otherwise the script stops.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmpt.generation import generate
from mmpt.huggingface import HuggingFaceText, load_text
from mmpt.text import TextBackbone
from mmpt.tokenization import train_bytelevel_bpe

VOCABULARY = 2000
LOADERS: dict[str, Callable[[Path], TextBackbone]] = {
    "BertLMHeadModel": load_text,
    "GPT2LMHeadModel": HuggingFaceText,
}


def saved(folder: Path, name: str, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    model.save_pretrained(str(folder))
    train_bytelevel_bpe(["a few words"], 262).save_pretrained(str(folder))
    return model


def configurations(width: int, depth: int, positions: int) -> dict[str, transformers.PretrainedConfig]:
    shape = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    heads = max(1, width // 64)
    return {
        "BertLMHeadModel": transformers.BertConfig(
            **shape,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            max_position_embeddings=positions,
            is_decoder=True,
        ),
        "GPT2LMHeadModel": transformers.GPT2Config(
            **shape, n_embd=width, n_layer=depth, n_head=heads, n_positions=positions
        ),
    }


def measure(ways: dict[str, Callable[[], Tensor]], rounds: int, equal: bool) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):  # the first warms up
        texts = []
        for name, way in ways.items():
            start = time.perf_counter()
            texts.append(way())
            if number:
                seconds[name].append(time.perf_counter() - start)
        if equal and not all(torch.equal(texts[0], text) for text in texts):
            raise SystemExit(f"the texts differ: {texts}")
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str) -> str:
    return f"{statistics.median(s / c for s, c in zip(seconds[slow], seconds['cached'], strict=True)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Generation with and without a cache, and beside transformers")
    for name, default in (("rounds", 5), ("batch", 8), ("prompt", 64), ("new", 64), ("width", 256), ("depth", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ids = torch.randint(5, VOCABULARY, (options.batch, options.prompt), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids).bool()
    table = Table(title=f"{options.batch} prompts of {options.prompt} tokens, {options.new} new ones, one thread")
    for column in ("weights", "read by", "search", "seconds", "no cache / cache", "transformers / cache"):
        table.add_column(column)
    for name, config in configurations(options.width, options.depth, options.prompt + options.new).items():
        with tempfile.TemporaryDirectory() as folder:
            model = saved(Path(folder), name, config)
            text = LOADERS[name](Path(folder)).eval()
        for beams in (1, 4):

            def ours(use_cache: bool, beams: int = beams, text: TextBackbone = text) -> Tensor:
                return generate(text, ids, mask, max_new_tokens=options.new, beams=beams, use_cache=use_cache)

            def theirs(beams: int = beams, model: transformers.PreTrainedModel = model) -> Tensor:
                written = model.generate(
                    ids,
                    attention_mask=mask.long(),
                    max_new_tokens=options.new,
                    num_beams=beams,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                    bad_words_ids=[[0]],  # ours never writes the pad token
                )
                return written[:, options.prompt :]

            ways = {"cached": lambda ours=ours: ours(True), "plain": lambda ours=ours: ours(False), "theirs": theirs}
            seconds = measure(ways, options.rounds, equal=beams == 1)
            table.add_row(
                name,
                type(text).__name__,
                "greedy" if beams == 1 else f"{beams} beams",
                f"{statistics.median(seconds['cached']):.2f}",
                ratio(seconds, "plain"),
                ratio(seconds, "theirs"),
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
