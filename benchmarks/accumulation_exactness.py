"""Gradients of a batch that does not fit: open_clip's accumulation and mmpt's cached gradients against the full batch.

Both accumulate over k parts of one batch, in double precision, with the same towers. The number is the norm of the
gradient over that of the full batch (1 is right), and the largest difference relative to the largest entry.
"""

from __future__ import annotations

import copy

import torch
from measure import heading, quiet, table
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from mmpt.batches import Batch
from mmpt.encoder import Corruption, Encoder, Inputs, Part, Processor
from mmpt.heads import ContrastiveHead
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece
from mmpt.tokens import Tokens, full

BATCH, WIDTH = 64, 32


class Vectors(Processor):
    """Vectors as they are."""

    def __call__(self, samples: object, *, training: bool = False) -> Inputs:
        return {"x": torch.as_tensor(samples)}


class Tower(Encoder):
    """A small network over vectors, one token each."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.processor = WIDTH, Vectors()
        self.net = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        return full(self.net(inputs["x"])[:, None])

    def units(self, inputs: Inputs) -> Tensor:
        return torch.ones(len(inputs["x"]), 1, dtype=torch.bool)

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        raise NotImplementedError

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        raise NotImplementedError


def accumulated_like_open_clip(module: Pretraining, batch: Batch, parts: int) -> None:
    """open_clip_train.train: features of all parts without gradient, then each part anew among the kept ones."""
    head, loss = module.heads["c"], ClipLoss()
    names = ("a", "b")
    chunks = {name: batch.inputs[name]["x"].chunk(parts) for name in names}
    with torch.no_grad():
        kept = {name: [module.model.embed(name, {"x": x}) for x in chunks[name]] for name in names}
    for part in range(parts):
        features = {}
        for name in names:
            mine = module.model.embed(name, {"x": chunks[name][part]})
            features[name] = torch.cat([*kept[name][:part], mine, *kept[name][part + 1 :]])
        loss(features["a"], features["b"], head.temperature.logit_scale.exp()).backward()


def main() -> None:
    quiet()
    heading("open_clip_torch")
    text = TextTransformer(train_wordpiece(["a b c"] * 4, 40), width=WIDTH, depth=1, heads=2, max_length=8)
    model = MultimodalModel(text, {"a": Modality(Tower()), "b": Modality(Tower())}, embed_dim=16)
    reference = Pretraining(model, {"c": ContrastiveHead("a", "b")}).double()
    x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
    inputs = {"a": {"x": x}, "b": {"x": x + torch.randn_like(x)}}
    batch = Batch(inputs, names=[str(number) for number in range(BATCH)])
    reference(batch)[0].backward()
    scale, weight = "heads.c.temperature.logit_scale", "model.modalities.a.encoder.net.0.weight"
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    rows = []
    for parts in (2, 4, 8):
        for method in ("open_clip accumulation", "mmpt cached_chunk"):
            module = copy.deepcopy(reference)
            module.zero_grad(set_to_none=True)
            if method == "mmpt cached_chunk":
                module.cached_chunk = BATCH // parts
                module(batch)[0].backward()
            else:
                accumulated_like_open_clip(module, batch, parts)
            got = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            worst = max(float((got[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())
            norms = [float(got[name].norm() / expected[name].norm()) for name in (scale, weight)]
            rows.append([parts, method, f"{norms[0]:.6f}", f"{norms[1]:.6f}", f"{worst:.1e}"])
    table(
        f"accumulation_exactness: batch {BATCH} in k parts, against the full batch",
        ["k", "method", "gradient of logit_scale", "gradient of a weight", "largest relative difference"],
        rows,
    )
    assert all(float(row[-1]) < 1e-6 for row in rows if row[1].startswith("mmpt"))


if __name__ == "__main__":
    main()
