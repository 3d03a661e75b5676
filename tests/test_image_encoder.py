"""The image encoder and its processor: shapes, hiding without leaks, reconstruction, reading of difficult files."""

import io
import struct
import zlib

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from mmpt.config import from_config
from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.encoders.image import ImageEncoder, patchify, replace_random, sincos_positions, unpatchify
from mmpt.encoders.image_augmentation import StandardAugmentation, StyleAugmentation, edges
from mmpt.encoders.image_processor import ImageProcessor, read_image
from mmpt.errors import CheckpointError, ConfigError, SampleError
from mmpt.masking import Exact

VIT = {"backbone": "test_vit", "size": 64}
RESNET = {"backbone": "test_resnet", "size": 64}
FAMILIES = ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "mobilenetv3_small_050"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pictures(batch=2, size=64):
    return {"pixels": torch.randn(batch, 3, size, size)}


def hide(encoder, inputs, *places, action=MASK):
    actions = torch.zeros(encoder.units(inputs).shape, dtype=torch.uint8)
    for row, unit in places:
        actions[row, encoder.prefix + unit] = action
    return Corruption(actions, actions == action)


def repainted(encoder, inputs, row, unit):
    """The same pictures with other pixels in one patch."""
    y, x = divmod(unit, encoder.columns)
    pixels = inputs["pixels"].clone()
    p = encoder.patch
    pixels[row, :, y * p : (y + 1) * p, x * p : (x + 1) * p] = torch.randn(3, p, p)
    return {"pixels": pixels}


# Encoding


@pytest.mark.parametrize("name", [*FAMILIES, "swin_tiny_patch4_window7_224"])
def test_every_family_gives_one_token_for_each_unit_and_carries_gradient(name):
    encoder = ImageEncoder(name, size=64, hide=None)
    inputs = pictures()
    tokens = encoder(inputs)
    assert tokens.values.shape == (*encoder.units(inputs).shape, encoder.width)
    assert tokens.mask.all()
    assert encoder.max_units(inputs) == encoder.units(inputs).sum(1)[0] == (64 // encoder.patch) ** 2
    tokens.values.square().sum().backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None] == []


def test_prefix_tokens_stand_in_front_and_are_no_units():
    encoder = ImageEncoder("test_vit3", size=64, backbone_args={"reg_tokens": 3})
    units = encoder.units(pictures())
    assert encoder.prefix >= 3
    assert not units[:, : encoder.prefix].any()
    assert units[:, encoder.prefix :].all()


def test_tokens_of_a_convolutional_network_run_row_by_row():
    encoder = ImageEncoder("test_resnet", size=128).eval()
    inputs = pictures(1, 128)
    tokens = encoder(inputs).values
    features = encoder.backbone.forward_features(inputs["pixels"])  # (1, width, 4, 4)
    torch.testing.assert_close(tokens[0, 1], features[0, :, 0, 1])


def test_position_embeddings_are_made_for_the_size():
    encoder = ImageEncoder("vit_tiny_patch16_224", size=96, backbone_args={"depth": 1})
    assert encoder(pictures(1, 96)).values.shape == (1, 1 + 36, 192)


def test_paper_size_model_builds_on_the_meta_device():
    with torch.device("meta"):
        encoder = ImageEncoder("vit_base_patch32_224", size=224, hide="drop", decoder_width=512)
    assert all(weight.is_meta for weight in encoder.parameters())
    assert encoder.width == 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet_of_dreams"}, "no model"),
        ({"backbone": "test_vit", "backbone_args": {"colour": 3}}, "does not take"),
        ({"backbone": "test_vit", "size": 70}, "multiple"),
        ({"backbone": "test_resnet", "hide": "drop"}, 'use hide: "vector"'),
        ({"backbone": "test_vit", "hide": "drop", "decoder_depth": 0}, "decoder_depth"),
        ({"backbone": "test_vit", "size": 64, "processor": ImageProcessor(32)}, "set both alike"),
        ({"backbone": "test_vit", "backbone_args": {"patch_drop_rate": 0.5}}, "patch_drop_rate"),
    ],
)
def test_configurations_that_cannot_work_say_why(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ImageEncoder(**arguments)


def test_pictures_of_another_size_are_refused():
    with pytest.raises(ConfigError, match="expected"):
        ImageEncoder(**VIT)(pictures(1, 32))


def test_an_encoder_without_hiding_refuses_to_be_masked():
    encoder = ImageEncoder(**VIT, hide=None)
    inputs = pictures()
    with pytest.raises(ConfigError, match="hide"):
        encoder(inputs, hide(encoder, inputs, (0, 0)))


# Patches


def test_patchify_and_unpatchify_are_inverses_and_run_row_by_row():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert torch.equal(unpatchify(patches, 4, columns=3), images)
    # second patch of the first row: rows 0-3, columns 4-7; colours of one pixel stand together
    assert torch.equal(patches[0, 1].reshape(4, 4, 3), images[0, :, :4, 4:8].permute(1, 2, 0))


def test_positions_of_the_decoder_tell_rows_from_columns():
    positions = sincos_positions(3, 8)
    assert positions.shape == (9, 8)
    assert len(positions.unique(dim=0)) == 9
    torch.testing.assert_close(positions[1, :4], positions[0, :4])  # same row
    torch.testing.assert_close(positions[3, 4:], positions[0, 4:])  # same column


# Corruption


@pytest.mark.parametrize(
    "arguments", [VIT, {**VIT, "hide": "drop"}, RESNET, {**VIT, "backbone": "vit_tiny_r_s16_p8_224"}]
)
def test_keeping_every_unit_changes_nothing(arguments):
    encoder = ImageEncoder(**arguments).eval()
    inputs = pictures()
    kept = encoder(inputs, hide(encoder, inputs))
    torch.testing.assert_close(kept.values, encoder(inputs).values, atol=1e-5, rtol=1e-5)
    assert kept.mask.all()


@pytest.mark.parametrize(
    "arguments",
    [VIT, {**VIT, "decoder_depth": 1}, {**VIT, "hide": "drop"}, RESNET, {**VIT, "backbone": "vit_tiny_r_s16_p8_224"}],
)
def test_hidden_pixels_reach_nothing_but_the_loss(arguments):
    encoder = ImageEncoder(**arguments).eval()
    inputs = pictures()
    changed = repainted(encoder, inputs, 1, 2)
    corruption = hide(encoder, inputs, (1, 2), (0, 1))
    one, two = encoder(inputs, corruption), encoder(changed, corruption)
    assert torch.equal(one.values, two.values)
    predictions = encoder.reconstruct(one, corruption)
    assert torch.equal(predictions, encoder.reconstruct(two, corruption))
    losses = [encoder.reconstruction_loss(predictions, i, corruption).loss for i in (inputs, changed)]
    assert losses[0] != losses[1]
    # the test can fail: a visible patch does reach the tokens
    assert not torch.equal(encoder(repainted(encoder, inputs, 1, 0), corruption).values, one.values)


def test_dropping_leaves_the_visible_patches_at_their_own_positions():
    encoder = ImageEncoder(**VIT, hide="drop").eval()
    encoder.backbone.blocks = torch.nn.Sequential()  # no mixing of places: tokens can be compared one by one
    inputs = pictures()
    corruption = hide(encoder, inputs, *((0, unit) for unit in range(16) if unit not in (3, 7)))
    tokens = encoder(inputs, corruption)
    whole = encoder(inputs)
    torch.testing.assert_close(tokens.values[0, : encoder.prefix + 2], whole.values[0][[0, 1 + 3, 1 + 7]])
    assert tokens.mask.sum(1).tolist() == [3, 17]  # row 1 hides nothing and sets the length
    torch.testing.assert_close(tokens.values[1], whole.values[1])


def test_rows_that_hide_different_numbers_do_not_influence_each_other():
    encoder = ImageEncoder(**VIT, hide="drop").eval()
    inputs = pictures()
    corruption = hide(encoder, inputs, *((0, unit) for unit in range(9)), (1, 4))
    together = encoder(inputs, corruption)
    alone = encoder({"pixels": inputs["pixels"][:1]}, Corruption(corruption.action[:1], corruption.predicted[:1], 9))
    assert alone.mask.all()
    torch.testing.assert_close(together.values[0][together.mask[0]], alone.values[0], atol=1e-5, rtol=1e-5)
    predictions = encoder.reconstruct(together, corruption)
    alone_predictions = encoder.reconstruct(alone, Corruption(corruption.action[:1], corruption.predicted[:1], 9))
    torch.testing.assert_close(predictions[:9], alone_predictions, atol=1e-5, rtol=1e-5)


def test_masked_autoencoder_keeps_49_of_196_patches_at_75_percent():
    encoder = ImageEncoder("vit_tiny_patch16_224", size=224, hide="drop", backbone_args={"depth": 1})
    inputs = pictures(2, 224)
    corruption = Exact(rate=0.75, mask=1.0, random=0.0)(encoder.units(inputs), limit=encoder.max_units(inputs))
    tokens = encoder(inputs, corruption)
    assert tokens.values.shape == (2, 1 + 49, 192)
    assert tokens.mask.all()
    assert encoder.reconstruct(tokens, corruption).shape == (2 * 147, 768)


def test_a_row_that_hides_everything_stays_finite_without_a_class_token():
    plain = {"class_token": False, "global_pool": "avg"}
    encoder = ImageEncoder(**VIT, hide="drop", backbone_args=plain).eval()
    inputs = pictures()
    corruption = hide(encoder, inputs, *((0, unit) for unit in range(16)), (1, 4))
    tokens = encoder(inputs, corruption)
    assert tokens.mask.sum(1).tolist() == [0, 15]
    assert encoder.reconstruct(tokens, corruption).isfinite().all()


def test_the_decoder_puts_mask_vectors_at_the_hidden_places():
    encoder = ImageEncoder(**VIT, hide="drop")
    inputs = pictures(1)
    corruption = hide(encoder, inputs, (0, 0), (0, 5))
    visible = torch.arange(14.0).reshape(1, 14, 1).expand(1, 14, 128) + 1
    placed = encoder._with_mask_vectors(visible, corruption)
    assert placed[0, :, 0].tolist()[1:5] == [1, 2, 3, 4]
    assert placed[0, 6:, 0].tolist() == list(range(5, 15))
    assert torch.equal(placed[0, 0], encoder.blank)
    assert torch.equal(placed[0, 5], encoder.blank)


def test_hidden_places_get_predictions_of_their_own():
    encoder = ImageEncoder(**VIT, hide="drop").eval()
    inputs = pictures(1)
    corruption = hide(encoder, inputs, (0, 0), (0, 5))
    first, second = encoder.reconstruct(encoder(inputs, corruption), corruption)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("arguments", [VIT, {**VIT, "hide": "drop"}, RESNET])
def test_every_parameter_learns_from_reconstruction(arguments):
    encoder = ImageEncoder(**arguments)
    inputs = pictures()
    corruption = hide(encoder, inputs, (0, 1), (1, 2))
    loss = encoder.reconstruction_loss(
        encoder.reconstruct(encoder(inputs, corruption), corruption), inputs, corruption
    ).loss
    loss.backward()
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None] == []


def test_random_units_get_the_content_of_a_visible_unit_of_the_batch():
    units = torch.arange(12.0).reshape(2, 6, 1)
    action = torch.tensor([[KEEP, MASK, MASK, MASK, MASK, RANDOM], [RANDOM, KEEP, MASK, MASK, MASK, RANDOM]])
    seen = set()
    for _ in range(50):
        replaced = replace_random(units, action)
        assert torch.equal(replaced[action != RANDOM], units[action != RANDOM])
        seen |= set(replaced[action == RANDOM].flatten().tolist())
    assert seen == {0.0, 7.0}  # the two KEEP units


@pytest.mark.parametrize("arguments", [VIT, {**VIT, "hide": "drop"}, RESNET])
def test_a_random_unit_does_not_show_its_own_pixels(arguments):
    encoder = ImageEncoder(**arguments).eval()
    inputs = pictures()
    corruption = hide(encoder, inputs, (0, 1), action=RANDOM)
    changed = repainted(encoder, inputs, 0, 1)
    torch.manual_seed(1)
    one = encoder(inputs, corruption)
    torch.manual_seed(1)
    two = encoder(changed, corruption)
    assert torch.equal(one.values, two.values)
    assert not torch.allclose(one.values, encoder(inputs).values)


# Reconstruction loss


def test_reconstruction_loss_counts_predicted_patches_only():
    encoder = ImageEncoder(**VIT)
    inputs = pictures()
    corruption = hide(encoder, inputs, (0, 3), (1, 0))
    target = torch.stack([patchify(inputs["pixels"], 16)[0, 3], patchify(inputs["pixels"], 16)[1, 0]])
    perfect = encoder.reconstruction_loss(target, inputs, corruption)
    assert perfect.loss == 0
    assert perfect.logs["variance_explained"] == 1
    off = encoder.reconstruction_loss(target + torch.tensor([[2.0], [0.0]]), inputs, corruption)
    torch.testing.assert_close(off.loss, torch.tensor(2.0))
    mean = encoder.reconstruction_loss(target.mean(0).expand_as(target), inputs, corruption)
    torch.testing.assert_close(mean.logs["variance_explained"], torch.tensor(0.0), atol=1e-6, rtol=0)


def test_normalised_targets_ignore_brightness_and_contrast_of_a_patch():
    encoder = ImageEncoder(**VIT, normalize_target=True)
    inputs = pictures()
    corruption = hide(encoder, inputs, (0, 3))
    prediction = torch.randn(1, 768)
    brighter = {"pixels": inputs["pixels"] * 3 + 1}
    losses = [encoder.reconstruction_loss(prediction, i, corruption).loss for i in (inputs, brighter)]
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["vector", "drop"])
def test_nothing_predicted_gives_zero_with_a_graph(way):
    encoder = ImageEncoder(**VIT, hide=way)
    inputs = pictures()
    corruption = hide(encoder, inputs)
    part = encoder.reconstruction_loss(encoder.reconstruct(encoder(inputs, corruption), corruption), inputs, corruption)
    assert part.loss == 0
    part.loss.backward()
    assert encoder.to_pixels.weight.grad is not None


# Pretrained weights


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_pretrained_weights_come_from_a_local_file_with_positions_interpolated(tmp_path, suffix):
    model = timm.create_model("test_vit", num_classes=10)  # 160 pixels, with a classifier
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    same = ImageEncoder("test_vit", size=160, pretrained=str(path)).eval()
    inputs = pictures(1, 160)
    torch.testing.assert_close(same(inputs).values, model.eval().forward_features(inputs["pixels"]))
    smaller = ImageEncoder("test_vit", size=64, pretrained=str(path))
    assert torch.equal(smaller.backbone.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert smaller(pictures()).values.shape == (2, 17, 64)


def test_a_saved_configuration_does_not_need_the_pretrained_file(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(timm.create_model("test_vit").state_dict(), path)
    encoder = ImageEncoder(
        "test_vit", 64, str(path), processor=ImageProcessor(64, augmentation=StandardAugmentation(scale=(0.5, 1.0)))
    )
    config = encoder.config()
    path.unlink()
    rebuilt = from_config(config)
    rebuilt.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(rebuilt.eval()(pictures(1)).values.shape, encoder.eval()(pictures(1)).values.shape)
    assert rebuilt.processor.augmentation.scale == [0.5, 1.0]


def test_missing_damaged_and_foreign_weights_are_typed_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        ImageEncoder("test_vit", pretrained=str(tmp_path / "none.pt"))
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="can't be read"):
        ImageEncoder("test_vit", pretrained=str(tmp_path / "broken.safetensors"))
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="do not fit"):
        ImageEncoder("test_vit", pretrained=str(tmp_path / "other.pt"))


def test_a_weights_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"model": timm.create_model("test_vit")}, tmp_path / "pickled.pt")
    with pytest.raises(CheckpointError, match="can't be read"):
        ImageEncoder("test_vit", pretrained=str(tmp_path / "pickled.pt"))


# Processor


def halves(width=40, height=40):
    """A picture that is red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def as_picture(pixels):
    """Undo the default normalisation: uint8 (height, width, 3) of the first picture."""
    processor = ImageProcessor()
    mean, std = torch.tensor(processor.mean).view(3, 1, 1), torch.tensor(processor.std).view(3, 1, 1)
    return ((pixels[0] * std + mean) * 255).round().permute(1, 2, 0)


def test_a_picture_its_path_and_its_array_give_the_same_pixels(tmp_path):
    image = halves(50, 40)
    image.save(tmp_path / "naïve picture.png")
    path = tmp_path / "naïve picture.png"
    results = [ImageProcessor(32)([form])["pixels"] for form in (image, path, str(path), np.asarray(image))]
    assert results[0].dtype == torch.float32
    assert results[0].shape == (1, 3, 32, 32)
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_normalisation_and_orientation_are_right():
    shown = as_picture(ImageProcessor(32)([halves()])["pixels"])
    assert shown[16, 4].tolist() == [255, 0, 0]
    assert shown[16, 28].tolist() == [0, 0, 255]


def test_the_centre_of_a_wide_picture_is_kept():
    image = Image.new("RGB", (90, 30), "white")
    image.paste("black", (30, 0, 60, 30))
    shown = as_picture(ImageProcessor(30)([image])["pixels"])
    assert shown[:, 2:28].max() == 0


def test_evaluation_is_deterministic_and_training_follows_torchs_generator():
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 255, (40, 40, 3), dtype=np.uint8) for _ in range(3)]
    processor = ImageProcessor(32, augmentation=StandardAugmentation())
    plain = processor(samples)["pixels"]
    assert torch.equal(plain, processor(samples)["pixels"])
    torch.manual_seed(3)
    one, two = processor(samples, training=True)["pixels"], processor(samples, training=True)["pixels"]
    torch.manual_seed(3)
    assert torch.equal(one, processor(samples, training=True)["pixels"])
    assert not torch.equal(one, two)
    assert not torch.equal(one, plain)
    assert torch.equal(ImageProcessor(32)(samples, training=True)["pixels"], plain)


STILL = dict.fromkeys(
    ("geometry", "color", "line", "sketch", "texture", "horizontal_flip", "background", "cutout"), 0.0
)


def drawing():
    """A red left half on transparent ground."""
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 16, 32))
    return image


def test_style_augmentation_without_strength_changes_nothing():
    result = StyleAugmentation(**STILL)([drawing(), drawing()], 32)
    expected = torch.from_numpy(np.array(read_image(drawing()))).permute(2, 0, 1)
    assert result.dtype == torch.uint8
    assert (result.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("name", STILL)
def test_every_part_of_style_augmentation_changes_pictures_by_torchs_generator(name):
    augmentation = StyleAugmentation(**{**STILL, name: 1.0})
    plain = StyleAugmentation(**STILL)([drawing()] * 8, 32)
    torch.manual_seed(3)
    one = augmentation([drawing()] * 8, 32)
    torch.manual_seed(3)
    assert torch.equal(one, augmentation([drawing()] * 8, 32))
    assert not torch.equal(one, augmentation([drawing()] * 8, 32)) or name in ("horizontal_flip", "sketch")
    assert not torch.equal(one, plain)


def test_parts_of_style_augmentation_do_what_they_say():
    pictures = [drawing()] * 8
    flipped = StyleAugmentation(**{**STILL, "horizontal_flip": 1.0})(pictures, 32)
    assert flipped[0, :, 16, 28].tolist() == [255, 0, 0]
    assert flipped[0, :, 16, 4].tolist() == [255, 255, 255]
    grounds = StyleAugmentation(**{**STILL, "background": 1.0})(pictures, 32)
    assert grounds[:, :, 16, 4].tolist() == [[255, 0, 0]] * 8  # what is opaque stays
    assert len(grounds[:, :, 16, 28].unique(dim=0)) == 8
    sketch = StyleAugmentation(**{**STILL, "sketch": 1.0})(pictures, 32)
    assert sketch[0, :, 16, 4].tolist() == [255, 255, 255]
    assert sketch[0, :, 16, 15].tolist() == [0, 0, 0]
    recolored = StyleAugmentation(**{**STILL, "color": 0.5})([Image.new("RGBA", (8, 8), "white")] * 64, 8)
    assert (recolored.amin((1, 2, 3)) >= 254).float().mean() > 0.9  # white stays white, unless inverted


def test_edges_are_as_long_as_the_step_is_high():
    step = torch.zeros(1, 3, 5, 6)
    step[0, 1, :, 3:] = 0.8
    found = edges(step)
    assert found.shape == (1, 1, 5, 6)
    torch.testing.assert_close(found[0, 0, 2], torch.tensor([0, 0, 0.8, 0.8, 0, 0]))
    torch.testing.assert_close(edges(step.mT)[0, 0, :, 2], found[0, 0, 2])


def test_style_augmentation_takes_photographs_of_any_size_and_refuses_nonsense():
    result = ImageProcessor(24, augmentation=StyleAugmentation())([halves(90, 40), halves(300, 300)], training=True)
    assert result["pixels"].shape == (2, 3, 24, 24)
    for arguments in ({"cutout": 1.5}, {"geometry": -1}):
        with pytest.raises(ConfigError, match="expected"):
            StyleAugmentation(**arguments)


def test_augmentation_leaves_other_generators_as_they_were():
    import random

    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    ImageProcessor(32, augmentation=StandardAugmentation())([halves()], training=True)
    assert (random.random(), np.random.rand()) == expected


def png_with_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def damaged_files():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    jpeg, png = encoded(noise, "JPEG"), encoded(noise, "PNG")
    return {
        "zero bytes.jpg": (b"", "empty"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "can't be decoded"),
        "cut.png": (png[: len(png) // 2], "can't be decoded"),
        "flipped.png": (png[:60] + bytes([png[60] ^ 255]) + png[61:], "can't be decoded"),
        "notes.jpg": (b"These are my notes.", "can't be decoded"),
        "bomb.png": (png_with_header(9000, 9000), "pixels"),
        "huge bomb.png": (png_with_header(60000, 60000), "pixels"),
    }


@pytest.mark.parametrize("name", damaged_files())
def test_unusable_files_are_named_with_their_place_in_the_batch(tmp_path, name):
    content, problem = damaged_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=problem) as caught:
        ImageProcessor(32)([halves(), tmp_path / name])
    assert name in str(caught.value)
    assert caught.value.index == 1


@pytest.mark.parametrize(
    "sample",
    [
        "/no/such/picture.png",
        7,
        None,
        np.zeros((4, 4, 3), dtype=np.float32),
        np.zeros((4, 4, 2), dtype=np.uint8),
        np.zeros((0, 4, 3), dtype=np.uint8),
        Image.new("RGB", (1, 40000)),
    ],
    ids=["missing", "number", "none", "float array", "two channels", "no pixels", "strip"],
)
def test_other_unusable_samples_are_typed_errors(sample):
    with pytest.raises(SampleError, match="expected"):
        ImageProcessor(64)([sample])


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(SampleError, match="folder"):
        ImageProcessor(64)([tmp_path])


def test_the_limit_of_pixels_is_checked_before_decoding(tmp_path):
    (tmp_path / "large.png").write_bytes(png_with_header(200, 200))  # decoding would fail with another message
    with pytest.raises(SampleError, match="200 x 200"):
        read_image(tmp_path / "large.png", max_pixels=39_999)


def test_transparent_parts_become_white():
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 4, 8))
    shown = np.asarray(read_image(image))
    assert shown[0, 6].tolist() == [255, 255, 255]
    assert shown[0, 1].tolist() == [255, 127, 127]
    palette = image.convert("RGB").quantize(2)
    palette.info["transparency"] = palette.getpixel((6, 0))
    assert np.asarray(read_image(palette))[0, 6].tolist() == [255, 255, 255]
    grey = Image.merge("LA", (Image.new("L", (2, 2), 10), Image.new("L", (2, 2), 0)))
    assert np.asarray(read_image(grey)).min() == 255


def test_unusual_pixel_formats_become_rgb(tmp_path):
    grey = np.asarray(read_image(np.full((4, 4), 90, dtype=np.uint8)))
    assert grey.shape == (4, 4, 3)
    assert grey.max() == grey.min() == 90
    assert np.asarray(read_image(np.full((4, 4, 1), 90, dtype=np.uint8))).max() == 90
    deep = Image.fromarray(np.array([[0, 65535], [32896, 257]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png")
    for form in (deep, tmp_path / "deep.png"):
        assert np.asarray(read_image(form))[..., 0].tolist() == [[0, 255], [128, 1]]
    assert np.asarray(read_image(Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32)))).max() in (127, 128)
    with pytest.raises(SampleError, match="0 to 1"):
        read_image(Image.fromarray(np.full((2, 2), 900.0, dtype=np.float32)))
    halves().convert("CMYK").save(tmp_path / "print.jpg")
    red = np.asarray(read_image(tmp_path / "print.jpg"))[20, 2]
    assert red[0] > 200
    assert red[2] < 60
    assert np.asarray(read_image(Image.new("1", (2, 2), 1))).min() == 255


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png"):
        path = tmp_path / f"two.{suffix}"
        frames[0].save(
            path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {})
        )
        assert np.asarray(read_image(path))[0, 0].tolist() == [255, 0, 0]


def test_pictures_are_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees clockwise
    halves().save(tmp_path / "turned.png", exif=exif)
    shown = np.asarray(read_image(tmp_path / "turned.png"))
    assert shown[2, 20].tolist() == [255, 0, 0]
    assert shown[37, 20].tolist() == [0, 0, 255]
