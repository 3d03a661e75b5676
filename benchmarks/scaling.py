"""How the cost of mmpt grows: the loss with the batch, the transformer with the length, an epoch with the data."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from bert import both, padded
from measure import heading, peak_memory, quiet, table

from mmpt.batches import MixtureSampler
from mmpt.losses.contrastive import softmax_contrastive


def seconds(run) -> float:
    run()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def loss_step(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(size, 256, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    softmax_contrastive(a, b, torch.tensor(10.0, requires_grad=True), chunk=512).loss.backward()


def main() -> None:
    quiet()
    heading()
    rows = [
        [size, seconds(lambda size=size: loss_step(size)), peak_memory(lambda size=size: loss_step(size))]
        for size in (1024, 2048, 4096, 8192)
    ]
    table("scaling: softmax loss in blocks, width 256", ["batch", "seconds", "extra MiB"], rows)
    _, text = both(depth=2)
    rows = []
    for length in (64, 128, 256, 512):
        ids, mask = padded([length] * (2048 // length))

        def step(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> None:
            text(text.embed(ids, mask)).values.square().mean().backward()

        rows.append([length, seconds(step), peak_memory(step)])
    table("scaling: text transformer, 2048 tokens in all", ["length", "seconds", "extra MiB"], rows)
    rows = []
    for size in (10_000, 100_000, 1_000_000):
        began = time.perf_counter()
        sampler = MixtureSampler({"a": size}, 256, shuffle=True, lengths={"a": range(size)}, pool=50)
        count = sum(1 for _ in sampler)
        rows.append([size, time.perf_counter() - began, count])
    table("scaling: an epoch's order with buckets", ["samples", "seconds", "batches"], rows)


if __name__ == "__main__":
    main()
