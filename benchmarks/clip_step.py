"""A CLIP training step against open_clip and transformers: the same towers and pairs, forward and backward.

All three have a vision transformer with a class token and a causal text transformer that pools the end-of-text token,
of one depth, width and vocabulary; the script prints their numbers of parameters (mmpt has a row for padding).
open_clip reads every text at its full context of 77, as its tokenizer gives it; transformers both so and padded to the
longest text; mmpt pads to the longest text of a batch, and can pack texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import heading, interleaved, peak_memory, quiet, ratio, table, times
from open_clip import ClipLoss, tokenize
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from mmpt.batches import Batch
from mmpt.datasets.emoji import Emoji
from mmpt.encoders.image import ImageEncoder
from mmpt.features import Features
from mmpt.heads import ContrastiveHead
from mmpt.model import Modality, MultimodalModel
from mmpt.text import TextTransformer
from mmpt.tokenization import ClipTokenizer

WIDTH, DEPTH, HEADS, PATCH, SIZE, CONTEXT, EMBED, VOCABULARY = 256, 4, 4, 16, 96, 77, 256, 49408
BATCH = 64


def open_clip_model() -> CLIP:
    vision = CLIPVisionCfg(layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIZE)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCABULARY, width=WIDTH, heads=HEADS, layers=DEPTH)
    return CLIP(EMBED, vision, text)


def transformers_model() -> CLIPModel:
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "hidden_act": "gelu",
    }
    text = {**size, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": VOCABULARY - 1}
    vision = {**size, "image_size": SIZE, "patch_size": PATCH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBED))


def mmpt_model() -> MultimodalModel:
    text = TextTransformer(ClipTokenizer(), width=WIDTH, depth=DEPTH, heads=HEADS, max_length=CONTEXT, dropout=0.0)
    backbone = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    image = ImageEncoder("vit_base_patch16_clip_224", SIZE, backbone_args=backbone, hide=None)
    return MultimodalModel(
        text,
        {"image": Modality(image, pooling="first")},
        embed_dim=EMBED,
        text_pooling="last",
        text_attention="causal",
    )


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def main() -> None:
    quiet()
    heading("open_clip_torch", "transformers")
    samples = Emoji().split("train")
    chosen = [samples[index] for index in torch.randperm(len(samples))[:BATCH].tolist()]
    ours, theirs, hugging_face = mmpt_model().train(), open_clip_model().train(), transformers_model().train()
    counts = {
        "mmpt": parameters(ours),
        "open_clip": parameters(theirs) - 1,
        "transformers": parameters(hugging_face) - 1,
    }
    print(f"parameters of the towers: {counts}")  # without the temperature, which is the head's in mmpt
    inputs = {name: ours.process(name, [sample.modalities[name] for sample in chosen]) for name in ("image", "text")}
    pixels: Tensor = inputs["image"]["pixels"]
    whole = tokenize([str(sample.modalities["text"]) for sample in chosen], CONTEXT)
    lengths = whole.argmax(1) + 1
    trimmed = whole[:, : int(lengths.max())]
    mask = torch.arange(trimmed.shape[1]) < lengths[:, None]
    assert inputs["text"]["mask"].sum() == lengths.sum()
    tokens = f"{lengths.min()} to {lengths.max()} tokens, mean {lengths.float().mean():.1f}"
    print(f"{BATCH} pictures of {SIZE} px; texts of {tokens}")
    head, loss = ContrastiveHead("image"), ClipLoss()
    head.bind(ours)
    batch = Batch(inputs, names=[sample.name for sample in chosen])

    def mmpt(packing: bool) -> None:
        ours.text.transformer.packing = packing
        head(Features(ours, batch, 0)).loss.backward()

    def open_clip() -> None:
        image, text, scale = theirs(pixels, whole)
        loss(image, text, scale).backward()

    def transformers(ids: Tensor, attention: Tensor | None) -> None:
        hugging_face(input_ids=ids, pixel_values=pixels, attention_mask=attention, return_loss=True).loss.backward()

    variants: dict[str, Callable[[], None]] = {
        "open_clip": open_clip,
        "transformers, context of 77": lambda: transformers(whole, None),
        "transformers, longest text": lambda: transformers(trimmed, mask.long()),
        "mmpt": lambda: mmpt(False),
        "mmpt, packed": lambda: mmpt(True),
    }
    for run in variants.values():
        run()
    memory = {name: peak_memory(run) for name, run in variants.items()}
    seconds = interleaved(variants, 5)
    rows = []
    for name in variants:
        against = [times(ratio(seconds, name, other)) for other in ("open_clip", "transformers, longest text")]
        rows.append([name, *against, f"{memory[name]:.0f}"])
    table(
        f"clip_step: forward and backward of {BATCH} pairs",
        ["variant", "times open_clip", "times transformers, longest text", "peak MiB"],
        rows,
    )


if __name__ == "__main__":
    main()
