"""The image modality: any timm model as an encoder of patches.

Masking follows SimMIM (Xie et al. 2022, arXiv 2111.09886: a learned vector stands for a hidden patch) or MAE
(He et al. 2022, arXiv 2111.06377: hidden patches are left out of the encoder, a small decoder fills them in).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mmpt.encoder import KEEP, MASK, RANDOM, Corruption, Encoder, Inputs, Part
from mmpt.encoders.image_augmentation import StandardAugmentation as StandardAugmentation
from mmpt.encoders.image_augmentation import StyleAugmentation as StyleAugmentation
from mmpt.encoders.image_gradients import gradient_resnet as gradient_resnet
from mmpt.encoders.image_processor import ImageProcessor as ImageProcessor
from mmpt.errors import CheckpointError, ConfigError
from mmpt.tokens import Tokens, full
from mmpt.transformer import Transformer


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images (batch, channels, height, width) into rows of patches (batch, patches, patch * patch * channels)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    cut = images.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(batch, rows * columns, patch * patch * channels)


def unpatchify(patches: Tensor, patch: int, columns: int) -> Tensor:
    """The inverse of `patchify` for images that are `columns` patches wide."""
    batch, length, size = patches.shape
    rows, channels = length // columns, size // patch**2
    grid = patches.reshape(batch, rows, columns, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return grid.reshape(batch, channels, rows * patch, columns * patch)


def sincos_positions(columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed 2-d sine-cosine positions of a square grid (MAE, appendix A): (columns * columns, width)."""
    frequency = 10000.0 ** -(torch.arange(width // 4, device=device) / (width // 4))
    angle = torch.arange(columns, device=device)[:, None] * frequency  # (columns, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], 1)  # (columns, width / 2)
    down = axis[:, None].expand(columns, columns, -1)
    across = axis[None].expand(columns, columns, -1)
    return torch.cat([down, across], 2).reshape(columns * columns, width)


def replace_random(units: Tensor, action: Tensor) -> Tensor:
    """Put the content of a random KEEP unit of the batch wherever the action is RANDOM.

    Donors are units that stay visible, so that no hidden content enters through this door.

    Args:
        units: (batch, length, size).
        action: (batch, length).
    """
    kept = (action == KEEP).flatten()
    donors = (torch.rand(kept.shape, device=kept.device) + ~kept).argsort()  # KEEP units first, shuffled
    count = kept.sum().clamp(min=1)
    choice = torch.minimum((torch.rand(kept.shape, device=kept.device) * count).long(), count - 1)
    others = units.flatten(0, 1)[donors[choice]].view_as(units)
    return torch.where((action == RANDOM).unsqueeze(-1), others, units)


NEVER_MASKED = 'this image encoder has hide: null, so it can\'t be masked; set hide to "vector" or "drop"'


class ImageEncoder(Encoder):
    """Any timm model as an encoder of image patches.

    A unit is a patch of a vision transformer, or the square of pixels that one cell of another network's last feature
    map stands for. Class and register tokens stay in front of the patches and are no units.

    Hiding with `"vector"`: a vision transformer gets a learned vector in place of a patch's embedding (SimMIM); any
    other network has no patch at its input, so the pixels of the hidden square become one learned pixel. Either way
    the content is gone before the network mixes places. `"drop"`: the hidden patches are left out, so the tokens hold
    the visible ones only (MAE; vision transformers only). A RANDOM unit gets the content of a visible patch of the
    batch.

    Args:
        backbone: name of a timm model.
        size: height and width of the pictures; position embeddings are made for it.
        pretrained: a local weights file of this model (safetensors, or a torch file of plain tensors). Position
            embeddings of another size are interpolated by timm. Not written to a saved configuration: the saved
            weights replace it.
        backbone_args: further arguments of the timm model, e.g. `{"patch_size": 8, "depth": 6}` for a vision
            transformer or `{"output_stride": 8}` for a convolutional network.
        hide: how masked units are hidden; None leaves the parts for reconstruction out.
        decoder_width: width of the decoder.
        decoder_depth: transformer layers of the decoder. By default 2 for `"drop"` and 0, a linear layer, for
            `"vector"`.
        decoder_heads: attention heads of the decoder.
        processor: preprocessing; by default `ImageProcessor(size)`.
        normalize_target: compare with pixels normalised within each patch (MAE, section 4.1).
        drop_path: stochastic depth rate of the backbone.

    Raises:
        ConfigError: an unknown model, arguments that it refuses, or a way of hiding that it can't do.
        CheckpointError: weights that are missing, damaged or belong to another model.
    """

    def __init__(
        self,
        backbone: str = "vit_tiny_patch16_224",
        size: int = 64,
        pretrained: str | None = None,
        backbone_args: dict[str, Any] | None = None,
        hide: Literal["vector", "drop"] | None = "vector",
        decoder_width: int = 128,
        decoder_depth: int | None = None,
        decoder_heads: int = 4,
        processor: ImageProcessor | None = None,
        normalize_target: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.processor: ImageProcessor = processor or ImageProcessor(size)
        if self.processor.size != size:
            raise ConfigError(f"the processor has size {self.processor.size}, the encoder {size}; set both alike")
        self.size = size
        self.hide = hide
        self.normalize_target = normalize_target
        self.backbone = _create_backbone(backbone, size, pretrained, backbone_args, drop_path)
        self.width = int(self.backbone.head_hidden_size)
        self.prefix = int(getattr(self.backbone, "num_prefix_tokens", 0))
        self.patch = int(self.backbone.feature_info[-1]["reduction"])
        if size % self.patch:
            raise ConfigError(f"{backbone} has patches of {self.patch} pixels; size {size} is not a multiple of it")
        self.columns = size // self.patch
        self.features_width = self.width
        # patches of these models don't mix before the position is added, so hiding there hides all; a hybrid's do
        embed = getattr(self.backbone, "patch_embed", None)
        self._separate_patches = isinstance(self.backbone, VisionTransformer) and type(embed) is PatchEmbed
        if hide is not None:
            depth = decoder_depth if decoder_depth is not None else (2 if hide == "drop" else 0)
            self._add_decoder(depth, decoder_width, decoder_heads)

    def _add_decoder(self, depth: int, width: int, heads: int) -> None:
        if self.hide == "drop" and not self._separate_patches:
            name = type(self.backbone).__name__
            raise ConfigError(f'hide: "drop" needs a plain vision transformer, not {name}; use hide: "vector"')
        if self.hide == "drop" and depth == 0:
            raise ConfigError('hide: "drop" needs decoder_depth of at least 1, to tell a hidden place what is near it')
        if depth and width % 4:
            raise ConfigError(f"decoder_width is {width}; expected a multiple of 4, for the 2-d positions")
        self.decoder_input = nn.Linear(self.width, width) if depth else None
        self.decoder = Transformer(width, depth, heads, positions="none") if depth else None
        self.to_pixels = nn.Linear(width if depth else self.width, 3 * self.patch**2)
        # what stands for hidden content: a decoder vector (drop), a patch embedding, or a pixel (0 = the mean colour)
        if self.hide == "drop":
            self.blank = nn.Parameter(torch.empty(width).normal_(std=0.02))
        elif self._separate_patches:
            self.blank = nn.Parameter(torch.empty(self.width).normal_(std=0.02))
        else:
            self.blank = nn.Parameter(torch.zeros(3))

    def config(self, folder: Path | None = None) -> dict[str, Any]:
        """The configuration without `pretrained`, whose file need not exist where the model is loaded."""
        config = super().config(folder)
        config["init_args"].pop("pretrained", None)
        return config

    def units(self, inputs: Inputs) -> Tensor:
        """Every patch may be masked, class and register tokens may not: bool (batch, prefix + patches)."""
        pixels = inputs["pixels"]
        units = torch.ones(len(pixels), self.prefix + self.columns**2, dtype=torch.bool, device=pixels.device)
        units[:, : self.prefix] = False
        return units

    def max_units(self, inputs: Inputs) -> int:
        """Number of patches."""
        return self.columns**2

    def forward(self, inputs: Inputs, corruption: Corruption | None = None) -> Tokens:
        """Encode pictures.

        Args:
            inputs: `pixels`: float (batch, 3, size, size).
            corruption: what to hide, over the positions of `units`.

        Returns:
            (batch, prefix + patches, width), patches row by row; with `hide: "drop"` only the visible patches.
        """
        pixels = inputs["pixels"]
        if pixels.shape[1:] != (3, self.size, self.size):
            raise ConfigError(f"pixels have shape {tuple(pixels.shape)}; expected (batch, 3, {self.size}, {self.size})")
        if corruption is None:
            return full(self._features(pixels))
        if self.hide is None:
            raise ConfigError(NEVER_MASKED)
        action = corruption.action[:, self.prefix :]
        if self._separate_patches:
            return self._encode_corrupted(pixels, action, corruption.hidden)
        patches = replace_random(patchify(pixels, self.patch), action)
        pixel = self.blank.to(patches.dtype).repeat(self.patch**2)
        patches = torch.where((action == MASK).unsqueeze(-1), pixel, patches)
        return full(self._features(unpatchify(patches, self.patch, self.columns)))

    def _features(self, pixels: Tensor) -> Tensor:
        # convolutions, norms and pools are faster with the channels last, on CPU and GPU
        return self._sequence(self.backbone.forward_features(pixels.contiguous(memory_format=torch.channels_last)))

    def _sequence(self, features: Tensor) -> Tensor:
        # with pooling switched off, what is left of the head is the last norm or projection of some families
        features = self.backbone.forward_head(features, pre_logits=True)
        if features.ndim == 4:
            if getattr(self.backbone, "output_fmt", "NCHW") == "NCHW":
                features = features.permute(0, 2, 3, 1)
            features = features.flatten(1, 2)
        if features.shape[1:] != (self.prefix + self.columns**2, self.features_width):
            raise ConfigError(
                f"{type(self.backbone).__name__} gives features of shape {tuple(features.shape)} where {self.prefix} + "
                f"{self.columns**2} tokens of width {self.features_width} were expected; choose another backbone"
            )
        return features

    def _encode_corrupted(self, pixels: Tensor, action: Tensor, hidden: int | None) -> Tokens:
        vit = self.backbone
        embedded = vit.patch_embed(pixels)  # (batch, patches, width), or (batch, rows, columns, width) for some models
        patches = replace_random(embedded.reshape(len(pixels), -1, embedded.shape[-1]), action)
        if self.hide == "vector":
            patches = torch.where((action == MASK).unsqueeze(-1), self.blank.to(patches.dtype), patches)
        values = vit._pos_embed(patches.view_as(embedded))
        mask = torch.ones(values.shape[:2], dtype=torch.bool, device=values.device)
        attention = None
        if self.hide == "drop":
            places, seen = _visible(action, hidden)
            patches = values[:, self.prefix :].gather(1, places.unsqueeze(-1).expand(-1, -1, self.width))
            values = torch.cat([values[:, : self.prefix], patches], 1)
            mask = torch.cat([mask[:, : self.prefix], seen], 1)
            if hidden is None:  # rows may differ in length
                attention = mask[:, None, None, :].clone()
                attention[..., 0] = True  # softmax over nothing is NaN
        values = vit.norm_pre(values)
        for block in vit.blocks:
            values = block(values) if attention is None else block(values, attn_mask=attention)
        values = vit.forward_head(vit.norm(values), pre_logits=True)
        return Tokens(values, mask)

    def reconstruct(self, tokens: Tokens, corruption: Corruption) -> Tensor:
        """Predict the pixels of the predicted patches.

        Returns:
            (predicted patches, patch * patch * 3), row-major over (batch, patches), in the order of `patchify`.
        """
        if self.hide is None:
            raise ConfigError(NEVER_MASKED)
        values = tokens.values
        if self.decoder_input is not None and self.decoder is not None:
            values = self.decoder_input(values)
            front, patches = values[:, : self.prefix], values[:, self.prefix :]
            if self.hide == "drop":
                patches = self._with_mask_vectors(patches, corruption)
            patches = patches + sincos_positions(self.columns, patches.shape[-1], patches.device).to(patches.dtype)
            values = self.decoder(full(torch.cat([front, patches], 1))).values
        return self.to_pixels(values[:, self.prefix :][corruption.predicted[:, self.prefix :]])

    def _with_mask_vectors(self, visible: Tensor, corruption: Corruption) -> Tensor:
        """Visible patches (batch, visible, width) at their places among mask vectors: (batch, patches, width)."""
        places, seen = _visible(corruption.action[:, self.prefix :], corruption.hidden)
        blank = self.blank.to(visible.dtype)
        visible = torch.where(seen.unsqueeze(-1), visible, blank)  # padding points at hidden places
        patches = blank.expand(len(visible), self.columns**2, -1)
        return patches.scatter(1, places.unsqueeze(-1).expand_as(visible), visible)

    def reconstruction_loss(self, predictions: Tensor, inputs: Inputs, corruption: Corruption) -> Part:
        """Mean squared error over the predicted patches' normalised pixels.

        Logs `mse`, and `variance_explained`: 1 - mse / the variance of these patches around their mean patch
        (0 = no better than always predicting that mean).
        """
        target = patchify(inputs["pixels"], self.patch)[corruption.predicted[:, self.prefix :]]
        target = target.to(torch.float32)
        if self.normalize_target:
            target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        error = F.mse_loss(predictions.to(torch.float32), target, reduction="sum") / max(target.numel(), 1)
        spread = (target - target.sum(0) / max(len(target), 1)).square().sum() / max(target.numel(), 1)
        explained = 1 - error.detach() / spread.clamp(min=1e-12) if len(target) else error.detach()
        return Part(error, {"mse": error.detach(), "variance_explained": explained})


def _visible(action: Tensor, hidden: int | None) -> tuple[Tensor, Tensor]:
    """The places of units that are not hidden, in order.

    Returns:
        long (batch, visible) places, and bool (batch, visible), False for the padding of rows that hide more.
    """
    masked = action == MASK
    counts = (~masked).sum(1)
    length = masked.shape[1] - hidden if hidden is not None else max(int(counts.max()), 1)
    places = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :length]
    return places, torch.arange(length, device=action.device) < counts.unsqueeze(1)


def _create_backbone(
    name: str, size: int, pretrained: str | None, backbone_args: dict[str, Any] | None, drop_path: float
) -> Any:
    """A timm model whose head is gone and whose features are not pooled."""
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ConfigError(f"timm {timm.__version__} has no model {name!r}; similar: {', '.join(similar) or 'none'}")
    model: Any
    arguments = dict(backbone_args or {})
    published = timm.get_pretrained_cfg(name)
    if published is not None and published.fixed_input_size:
        arguments.setdefault("img_size", size)
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    try:
        # pretrained=True with a given state dict: timm converts layouts and interpolates positions, and fetches nothing
        if pretrained is None:
            model = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
        else:
            weights = _read_weights(pretrained)
            # timm checks names and shapes strictly only if the file's classifier is loaded too
            last = weights.get(f"{published.classifier if published is not None else 'head'}.weight")
            classes = 0 if last is None else len(last)
            overlay = {"state_dict": weights, "num_classes": classes}
            model = timm.create_model(
                name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay, **arguments
            )
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm's {name} does not take the arguments {arguments}: {error}") from error
    except (RuntimeError, KeyError) as error:
        if pretrained is None:
            raise
        problem = str(error)[:500]
        raise CheckpointError(f"the weights of {pretrained} do not fit {name} with {arguments}: {problem}") from error
    if not isinstance(getattr(model, "patch_drop", nn.Identity()), nn.Identity):
        raise ConfigError('patch_drop_rate loses patches behind the back of the masked head; use hide: "drop"')
    model.reset_classifier(0, "")
    return model


def _read_weights(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise CheckpointError(
            f"{path}: no such file; pretrained is the path of a local weights file, nothing is downloaded"
        )
    try:
        weights: dict[str, Tensor] = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # torch, pickle and safetensors each have their own
        raise CheckpointError(
            f"{path} can't be read as weights ({type(error).__name__}: {error}); expected a .safetensors file or a "
            "torch file that holds tensors only"
        ) from error
    return weights
