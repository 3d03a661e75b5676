"""Stroop probing of 10,000 prompt variants: mmpt against a loop over prompt sets, on the same encoder and sentences.

    python benchmarks/stroop_speed.py [--model FOLDER] [--variants 10000] [--rounds 4]

The loop tokenises, pads and encodes one prompt set (a base sentence and its options) at a time. mmpt computes each
different sentence once, in batches of equal length. A round gives both (and mmpt with bfloat16 products) the same
part of the variants, one after the other; printed are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice, product

import numpy as np
import torch

from mmpt.probing.embedders import TokenEmbedder
from mmpt.probing.loading import MINILM, load_embedder
from mmpt.probing.stroop import StroopProbe
from mmpt.probing.task import MASK, load_task


def loop(encoder: TokenEmbedder, sets: list[tuple[str, tuple[str, ...]]]) -> list[np.ndarray]:
    """One prompt set at a time, padded, with mask; mean pooling and cosine."""
    scores = []
    for base, sentences in sets:
        batch = encoder.tokenizer([base, *sentences], padding=True, return_tensors="pt")  # type: ignore[attr-defined]
        with torch.inference_mode():
            hidden = encoder.model(**batch).last_hidden_state  # type: ignore[attr-defined]
        weight = batch["attention_mask"].unsqueeze(-1)
        pooled = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
        scores.append((pooled[1:] @ pooled[0]).numpy())
    return scores


def prompt_sets(variants: int) -> list[tuple[str, tuple[str, ...]]]:
    """Base sentences with their options, from the shape and size tasks, `variants` sentences in all."""
    sets = [
        (sentence.replace(MASK, ""), tuple(sentence.replace(MASK, option) for option in item.options))
        for task in (load_task("shape"), load_task("shape_adjectives"), load_task("size"), load_task("facts"))
        for prompt, item in product(task.prompts, task.items)
        for sentence in [task.sentence(item, prompt)]
    ]
    np.random.default_rng(0).shuffle(sets)  # type: ignore[arg-type]
    total = np.cumsum([1 + len(options) for _, options in sets])
    if total[-1] < variants:
        sets = sets * -(-variants // int(total[-1]))
        total = np.cumsum([1 + len(options) for _, options in sets])
    return list(islice(sets, int(np.searchsorted(total, variants)) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--variants", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    encoder = load_embedder(options.model)
    assert isinstance(encoder, TokenEmbedder)
    probe = StroopProbe(encoder)
    sets = prompt_sets(options.variants)
    print(f"{sum(1 + len(o) for _, o in sets)} sentences in {len(sets)} sets, {torch.get_num_threads()} threads")
    loop(encoder, sets[:20])
    seconds: dict[str, list[float]] = {"loop": [], "mmpt": [], "mmpt bf16": []}
    differ, worst, given = 0, 0.0, 0
    for number in range(options.rounds):
        part = sets[number :: options.rounds]
        began = time.perf_counter()
        slow = loop(encoder, part)
        seconds["loop"].append(time.perf_counter() - began)
        for name, precision in (("mmpt", "32"), ("mmpt bf16", "bf16")):
            encoder.precision = precision  # type: ignore[assignment]
            began = time.perf_counter()
            fast = probe._scores(part)
            seconds[name].append(time.perf_counter() - began)
            if precision == "32":
                worst = max(worst, max(float(np.abs(a - b).max()) for a, b in zip(slow, fast, strict=True)))
            else:
                differ += sum(a.argmax() != b.argmax() for a, b in zip(slow, fast, strict=True))
                given += len(part)
    for name, values in seconds.items():
        ratio = np.median(np.array(seconds["loop"]) / np.array(values))
        print(
            f"{name:10} {sum(values):7.1f} s   {ratio:.2f} times the loop's speed (median of {options.rounds} rounds)"
        )
    print(f"largest difference of a score, 32 bits: {worst:.1e}; other answers with bf16: {differ / given:.2%}")


if __name__ == "__main__":
    main()
