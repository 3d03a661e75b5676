"""Real tokens per second on skewed lengths: random padded batches against length buckets and packed sequences.

Forward and backward of a BERT with the same weights everywhere; the padded baseline is transformers'. Buckets are those
of MultimodalData (`buckets`), packing that of the text transformer (`packing: true`). In a round the padded variant
takes one random batch, the others more, so that all take seconds; speeds are per real token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from bert import both, padded, skewed_lengths
from measure import heading, interleaved, peak_memory, quiet, ratio, table, times

from mmpt.batches import MixtureSampler

SAMPLES, BATCH, PACKED = 1024, 128, 3
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(lengths: list[int], pool: int) -> Batches:
    sampler = MixtureSampler(
        {"texts": len(lengths)}, BATCH, shuffle=True, lengths={"texts": lengths} if pool else None, pool=pool
    )
    return [padded([lengths[key.index] for key in batch]) for batch in sampler]


def main() -> None:
    quiet()
    heading("transformers")
    theirs, ours = both(depth=2)
    lengths = skewed_lengths(SAMPLES)
    print(
        f"{SAMPLES} sequences of {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / SAMPLES:.0f}, in "
        f"batches of {BATCH}"
    )
    random, bucketed = batches(lengths, 0), batches(lengths, SAMPLES // BATCH)
    for name, given in (("random", random), ("bucketed", bucketed)):
        places = sum(ids.numel() for ids, _ in given)
        print(f"{name} batches have {places / sum(lengths):.2f} places for each real token")

    def hugging_face(given: Batches) -> None:
        for ids, mask in given:
            values = theirs.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            values[mask].square().mean().backward()

    def mmpt(given: Batches, packing: bool) -> None:
        ours.transformer.packing = packing
        for ids, mask in given:
            ours(ours.embed(ids, mask)).values[mask].square().mean().backward()

    parts = {
        "transformers, random padded": random[:1],
        "mmpt, buckets": bucketed,
        "mmpt, packed": random[:PACKED],
        "mmpt, buckets and packed": bucketed[:PACKED],
    }

    def variant(name: str, given: Batches) -> Callable[[], None]:
        if name.startswith("transformers"):
            return lambda: hugging_face(given)
        return lambda: mmpt(given, "packed" in name)

    largest = {name: max(given, key=lambda batch: batch[0].numel()) for name, given in parts.items()}
    memory = {name: peak_memory(variant(name, [batch])) for name, batch in largest.items()}
    seconds = interleaved({name: variant(name, given) for name, given in parts.items()}, 3, warmup=0)
    real = {name: int(sum(mask.sum() for _, mask in p)) for name, p in parts.items()}
    cost = {name: [second / real[name] for second in values] for name, values in seconds.items()}
    rows = []
    for name in parts:
        speed = ratio(cost, name, "transformers, random padded")
        rows.append([name, f"{1 / sorted(cost[name])[1]:.0f}", times(speed), f"{memory[name]:.0f}"])
    table(
        "packing: forward and backward",
        ["variant", "real tokens/s", "times random padded", "peak MiB"],
        rows,
    )


if __name__ == "__main__":
    main()
