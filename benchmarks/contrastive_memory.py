"""Softmax and sigmoid contrastive losses at a large batch: time and memory of forward and backward.

Compared: mmpt in blocks of rows, mmpt with the whole matrix, two logsumexp over one matrix (what one would write in 30
lines), and open_clip's ClipLoss and SigLipLoss.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from measure import heading, interleaved, peak_memory, quiet, ratio, table, times
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from mmpt.losses.contrastive import sigmoid_contrastive, softmax_contrastive


def two_logsumexp(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    logits = scale * a @ b.T
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet()
    heading("open_clip_torch")
    a, b = (F.normalize(torch.randn(options.batch, options.width), dim=-1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    clip, siglip = ClipLoss(), SigLipLoss()
    groups = torch.arange(options.batch) // 4
    losses = {
        "mmpt softmax, blocks": lambda: softmax_contrastive(a, b, scale, chunk=512).loss,
        "mmpt softmax, blocks, 4 positives each": lambda: (
            softmax_contrastive(a, b, scale, groups=groups, chunk=512).loss
        ),
        "mmpt softmax, one matrix": lambda: softmax_contrastive(a, b, scale).loss,
        "two logsumexp": lambda: two_logsumexp(a, b, scale),
        "open_clip ClipLoss": lambda: clip(a, b, scale),
        "mmpt sigmoid, blocks": lambda: sigmoid_contrastive(a, b, scale, bias, chunk=512).loss,
        "open_clip SigLipLoss": lambda: siglip(a, b, scale, bias),
    }

    def step(name: str) -> None:
        for tensor in (a, b, scale, bias):
            tensor.grad = None
        losses[name]().backward()

    memory = {}
    for name in losses:
        memory[name] = peak_memory(lambda name=name: step(name))
    seconds = interleaved({name: lambda name=name: step(name) for name in losses}, options.rounds, warmup=0)
    rows = []
    for name in losses:
        ours = "mmpt sigmoid, blocks" if "Sig" in name or "sig" in name else "mmpt softmax, blocks"
        rows.append([name, f"{memory[name] / 1024:.3f}", times(ratio(seconds, ours, name))])
    table(
        f"contrastive_memory: batch {options.batch}, width {options.width}, forward and backward",
        ["loss", "extra GiB", "time / mmpt in blocks"],
        rows,
    )


if __name__ == "__main__":
    main()
