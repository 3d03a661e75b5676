"""A masked language modelling step: logits at the predicted positions only, against transformers' at all of them."""

from __future__ import annotations

import torch
from bert import VOCABULARY, both, padded, skewed_lengths
from measure import heading, interleaved, peak_memory, quiet, ratio, table, times
from torch.nn import functional as F


def main() -> None:
    quiet()
    heading("transformers")
    theirs, ours = both(depth=2)
    for title, lengths in (("all of 128 tokens", [128] * 24), ("skewed lengths", skewed_lengths(32))):
        ids, mask = padded(lengths)
        predicted = mask & (torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)) < 0.15)
        hidden = ids.masked_fill(predicted, 4)
        labels = ids.masked_fill(~predicted, -100)

        def hugging_face(hidden=hidden, mask=mask, labels=labels) -> torch.Tensor:
            loss = theirs(input_ids=hidden, attention_mask=mask.long(), labels=labels).loss
            loss.backward()
            return loss.detach()

        def mmpt(packing: bool, hidden=hidden, mask=mask, ids=ids, predicted=predicted) -> torch.Tensor:
            ours.transformer.packing = packing
            tokens = ours(ours.embed(hidden, mask))
            loss = F.cross_entropy(ours.lm_logits(tokens.values[predicted]), ids[predicted])
            loss.backward()
            return loss.detach()

        variants = {
            "transformers": hugging_face,
            "mmpt": lambda mmpt=mmpt: mmpt(False),
            "mmpt, packed": lambda mmpt=mmpt: mmpt(True),
        }
        torch.testing.assert_close(mmpt(False), hugging_face(), rtol=1e-4, atol=1e-4)
        memory = {name: peak_memory(run) for name, run in variants.items()}
        seconds = interleaved(variants, 5)
        rows = [[name, times(ratio(seconds, name, "transformers")), f"{memory[name]:.0f}"] for name in variants]
        table(f"masked_lm_step: {title}, vocabulary {VOCABULARY}", ["variant", "times transformers", "peak MiB"], rows)


if __name__ == "__main__":
    main()
