"""Real tokens per second on skewed lengths: random padded batches against length buckets and packed sequences.

Forward and backward of a BERT with the same weights everywhere; the padded baseline is transformers'. Buckets are those
of MultimodalData (`buckets`), packing that of the text transformer (`packing: true`).
"""

from __future__ import annotations

import torch
from bert import both, padded, skewed_lengths
from measure import heading, interleaved, peak_memory, quiet, ratio, table, times

from mmpt.batches import MixtureSampler
from mmpt.text import TextTransformer

SAMPLES, BATCH = 64, 16


def batches(lengths: list[int], pool: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    sampler = MixtureSampler(
        {"texts": len(lengths)}, BATCH, shuffle=True, lengths={"texts": lengths} if pool else None, pool=pool
    )
    return [padded([lengths[key.index] for key in batch]) for batch in sampler]


def main() -> None:
    quiet()
    heading("transformers")
    theirs, ours = both(depth=2)
    lengths = skewed_lengths(SAMPLES)
    print(f"{SAMPLES} sequences of {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / len(lengths):.0f}")
    random, bucketed = batches(lengths, 0), batches(lengths, SAMPLES // BATCH)

    def hugging_face(parts: list) -> None:
        for ids, mask in parts:
            values = theirs.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            (values * mask[..., None]).square().mean().backward()

    def mmpt(parts: list, packing: bool, model: TextTransformer = ours) -> None:
        model.transformer.packing = packing
        for ids, mask in parts:
            model(model.embed(ids, mask)).values.square().mean().backward()

    variants = {
        "transformers, random padded": lambda: hugging_face(random),
        "mmpt, random padded": lambda: mmpt(random, False),
        "mmpt, buckets": lambda: mmpt(bucketed, False),
        "mmpt, packed": lambda: mmpt(random, True),
        "mmpt, buckets and packed": lambda: mmpt(bucketed, True),
    }
    memory = {name: peak_memory(run) for name, run in variants.items()}
    seconds = interleaved(variants, 3, warmup=0)
    rows = []
    for name in variants:
        speed = ratio(seconds, name, "transformers, random padded")
        tokens = sum(lengths) / sorted(seconds[name])[1]
        rows.append([name, f"{tokens:.0f}", times(speed), f"{memory[name]:.0f}"])
    table(
        "packing: forward and backward",
        ["variant", "real tokens/s", "times random padded", "peak MiB"],
        rows,
    )


if __name__ == "__main__":
    main()
