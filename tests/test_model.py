"""MultimodalModel: embedding, fusion, generation, zero-shot, and folders that another process reads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from points import TEXTS, make_batch, make_model, text_transformer
from safetensors.torch import load_file, save_file
from shapes import NAMES, PointsEncoder, PointsSource
from torch import nn
from torch.nn import functional

from mmpt.connectors import LinearConnector, ResamplerConnector
from mmpt.errors import CheckpointError, ConfigError, DataError, SampleError, UntrustedClassError
from mmpt.model import Modality, MultimodalModel
from mmpt.text import TruncationWarning
from mmpt.tokens import Tokens

POINTS = [PointsSource().split("train")[i].modalities["points"] for i in range(4)]
FUSIONS = pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])


class TiedEncoder(PointsEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(2, 32)
        self.twin.weight = self.input.weight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def uneven(model: MultimodalModel) -> MultimodalModel:
    """Weights at which attention is not even, so that nothing is invisible in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


class TestEmbed:
    def test_rows_are_normalised_and_do_not_depend_on_the_batch(self):
        model = uneven(make_model(dropout=0.5))
        whole = model.embed("points", POINTS)
        assert whole.shape == (4, 16)
        assert torch.allclose(whole.norm(dim=1), torch.ones(4), atol=1e-6)
        assert torch.allclose(model.embed("points", POINTS, batch_size=1), whole, atol=1e-6)
        assert torch.allclose(model.embed("points", POINTS[::-1]).flip(0), whole, atol=1e-6)

    def test_raw_samples_are_embedded_without_dropout_and_leave_the_mode_alone(self):
        model = make_model(dropout=0.5)
        model.modality("points").eval()
        assert torch.equal(model.embed("text", TEXTS), model.embed("text", TEXTS))
        assert not model.embed("text", TEXTS).requires_grad
        assert model.modality("text").training
        assert not model.modality("points").training

    def test_inputs_are_embedded_with_gradient(self):
        model = make_model()
        embedding = model.embed("points", make_batch(model).inputs["points"])
        embedding[:, 0].sum().backward()
        assert model.modality("points").encoder.input.weight.grad.any()

    def test_nothing_gives_no_rows(self):
        assert make_model().embed("points", []).shape == (0, 16)

    def test_one_string_is_not_a_list_of_letters(self):
        with pytest.raises(DataError, match="a cat"):
            make_model().embed("text", "a cat")

    def test_unknown_modalities_are_named(self):
        with pytest.raises(ConfigError, match=r"smell.*text, points"):
            make_model().embed("smell", [1])

    def test_bad_samples_are_named(self):
        with pytest.raises(SampleError):
            make_model().embed("points", [POINTS[0], [[0.0, float("nan")]]])

    def test_embedding_is_float32_under_autocast(self):
        model = make_model()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedding = model.embed("points", POINTS)
        assert embedding.dtype == torch.float32
        assert torch.allclose(embedding.norm(dim=1), torch.ones(4), atol=1e-6)

    @pytest.mark.parametrize(("pooling", "place"), [("first", 0), ("last", -1)])
    def test_pooling_chooses_the_position(self, pooling, place):
        model = MultimodalModel(text_transformer(), {"points": Modality(PointsEncoder(), pooling=pooling)}, embed_dim=8)
        model.eval()
        inputs = model.process("points", POINTS)
        encoded = model.encode("points", inputs).values
        index = [0 if place == 0 else len(p) - 1 for p in POINTS]
        pooled = encoded[torch.arange(4), index]
        expected = nn.functional.normalize(model.projections["points"](pooled), dim=-1)
        assert torch.allclose(model.embed("points", inputs), expected, atol=1e-6)

    def test_through_text_runs_the_shared_transformer(self):
        points = Modality(PointsEncoder(width=16), LinearConnector(), through_text=True)
        model = MultimodalModel(text_transformer(), {"points": points}, embed_dim=8)
        model.embed("points", model.process("points", POINTS)).sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in model.text.transformer.parameters())
        beside = make_model()
        beside.embed("points", beside.process("points", POINTS)).sum().backward()
        assert all(p.grad is None for p in beside.text.parameters())


class TestConstruction:
    def test_through_text_needs_widths_that_meet(self):
        with pytest.raises(ConfigError, match=r"16.*32.*LinearConnector"):
            MultimodalModel(text_transformer(), {"points": Modality(PointsEncoder(width=16), through_text=True)})

    def test_text_can_not_be_named_twice(self):
        with pytest.raises(ConfigError, match="text"):
            MultimodalModel(text_transformer(), {"text": Modality(PointsEncoder())})

    def test_meta_device(self):
        text = text_transformer()  # its tokenizer is trained on real data
        with torch.device("meta"):
            points = Modality(PointsEncoder(), ResamplerConnector(queries=3))
            model = MultimodalModel(text, {"points": points})
        assert model.modality("points").encoder.input.weight.is_meta

    def test_processors_are_those_of_the_encoders(self):
        model = make_model()
        assert model.processors["points"] is model.modality("points").encoder.processor
        assert set(model.processors) == {"text", "points"}


class TestFuse:
    @FUSIONS
    def test_shape_and_rows(self, fusion):
        model = uneven(make_model(fusion=fusion)).eval()
        fused = model.fuse(TEXTS, points=POINTS)
        assert torch.equal(fused.mask, model.process("text", TEXTS)["mask"])
        assert fused.values.shape == (*fused.mask.shape, 32)
        for row in range(4):
            alone = model.fuse(TEXTS[row : row + 1], points=POINTS[row : row + 1])
            assert torch.allclose(alone.values[0], fused.values[row][: alone.length], atol=1e-5)

    @FUSIONS
    def test_the_sample_matters_and_its_padding_does_not(self, fusion):
        model = uneven(make_model(fusion=fusion)).eval()
        text, points = model.process("text", TEXTS), model.process("points", POINTS)
        fused = model.fuse(text, points=points).values
        shifted = points | {"points": points["points"] + 1}
        assert not torch.allclose(model.fuse(text, points=shifted).values, fused, atol=1e-3)
        rubbish = points | {"points": points["points"].masked_fill(~points["mask"].unsqueeze(-1), 9.0)}
        assert torch.allclose(model.fuse(text, points=rubbish).values, fused, atol=1e-6)

    def test_long_texts_leave_room_for_the_tokens_in_front(self):
        long = ["a very long text " * 20]
        with pytest.raises(ConfigError, match=r"text_length: 4[0-9]\b"):
            make_model().fuse(long, points=POINTS[:1])
        roomy = make_model(text_length=40)
        with pytest.warns(TruncationWarning):
            assert roomy.fuse(long, points=POINTS[:1]).mask.sum() == 40
        with pytest.raises(ConfigError, match="3 to 48"):
            make_model(text_length=49)

    @FUSIONS
    def test_without_a_sample_it_is_the_text_alone(self, fusion):
        model = uneven(make_model(fusion=fusion)).eval()
        inputs = model.process("text", TEXTS)
        assert torch.allclose(model.fuse(TEXTS).values, model.encode("text", inputs).values, atol=1e-6)

    @FUSIONS
    def test_a_sample_that_is_all_padding_is_no_sample(self, fusion):
        model = uneven(make_model(fusion=fusion)).eval()
        inputs = model.process("text", TEXTS)
        nothing = Tokens(torch.randn(4, 3, 32), torch.zeros(4, 3, dtype=torch.bool))
        fused = model.fuse_tokens(inputs, [nothing]).values
        assert torch.allclose(fused[inputs["mask"]], model.fuse(TEXTS).values[inputs["mask"]], atol=1e-5)

    @FUSIONS
    def test_several_samples_join_in_the_order_given(self, fusion):
        text = text_transformer(cross_attention=fusion == "cross_attention")
        parts = {name: Modality(PointsEncoder(), LinearConnector()) for name in ("points", "more")}
        model = uneven(MultimodalModel(text, parts, embed_dim=8, fusion=fusion)).eval()
        both = model.fuse(TEXTS, points=POINTS, more=POINTS).values
        assert both.shape == model.fuse(TEXTS, points=POINTS).values.shape
        assert not torch.allclose(both, model.fuse(TEXTS, points=POINTS).values, atol=1e-3)

    def test_text_alone_ignores_cross_attention_bit_for_bit(self):
        model = uneven(make_model(fusion="cross_attention")).eval()
        before = model.embed("text", TEXTS)
        with torch.no_grad():
            for name, parameter in model.text.named_parameters():
                if "cross" in name:
                    parameter.add_(1)
        assert torch.equal(model.embed("text", TEXTS), before)


class TestGenerate:
    @FUSIONS
    def test_what_was_learned_is_written(self, fusion):
        model = make_model(fusion=fusion)
        batch = make_batch(model, range(4))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(60):
            text = batch.inputs["text"]
            tokens = model.fuse(text, attention="prefix", points=batch.inputs["points"])
            logits = model.text.lm_logits(tokens.values[:, :-1])
            loss = nn.functional.cross_entropy(logits[text["mask"][:, 1:]], text["ids"][:, 1:][text["mask"][:, 1:]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for beams in (1, 3):
            assert model.generate(points=POINTS, max_new_tokens=12, beams=beams) == TEXTS
            assert model.generate("a", points=POINTS[1:2], beams=beams) == ["line"]
        assert model.training

    def test_one_prompt_for_each_sample(self):
        model = make_model()
        assert len(model.generate(["a", "a circle", "", "a"], points=POINTS, max_new_tokens=2)) == 4
        assert len(model.generate("a", max_new_tokens=2)) == 1


class TestZeroShot:
    def test_cosine_with_the_mean_of_the_prompts(self):
        model = uneven(make_model())
        templates = ["{}", "a {}", "a {} a"]
        scores = model.zero_shot("points", POINTS, NAMES, templates)
        assert scores.shape == (4, 4)
        samples = model.embed("points", POINTS)
        for column, name in enumerate(NAMES):
            mean = model.embed("text", [template.format(name) for template in templates]).mean(0)
            expected = nn.functional.cosine_similarity(samples, mean[None])
            assert torch.allclose(scores[:, column], expected, atol=1e-6)

    def test_relative_to_samples_at_large(self):
        model = uneven(make_model())
        plain, others = model.zero_shot("points", POINTS, NAMES), model.zero_shot("points", POINTS[:3], NAMES)
        found = model.zero_shot("points", POINTS, NAMES, relative_to=POINTS[:3])
        assert torch.allclose(found, (plain - others.mean(0)) / others.std(0), atol=1e-4)
        with pytest.raises(DataError, match="two or more"):
            model.zero_shot("points", POINTS, NAMES, relative_to=POINTS[:1])


READ = """
import json, sys
import torch
torch.set_num_threads(1)
from mmpt import MultimodalModel
points = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = MultimodalModel.from_pretrained(folder, trust=["shapes"])
    assert not model.training
    with torch.no_grad():
        torch.save({
            "points": model.embed("points", points), "text": model.embed("text", ["a circle", "a line"]),
            "fused": model.fuse(["a circle"], points=points[:1]).values,
            "logits": model.text.lm_logits(model.fuse(["a line"]).values),
            "written": model.generate(points=points, max_new_tokens=4),
        }, folder + "/outputs.pt")
"""


def outputs(model):
    with torch.no_grad():
        return {
            "points": model.embed("points", POINTS),
            "text": model.embed("text", ["a circle", "a line"]),
            "fused": model.fuse(["a circle"], points=POINTS[:1]).values,
            "logits": model.text.lm_logits(model.fuse(["a line"]).values),
            "written": model.generate(points=POINTS, max_new_tokens=4),
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return make_model().save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder):
    return MultimodalModel.from_pretrained(folder, trust=["shapes"])


class TestFolders:
    def test_a_fresh_process_computes_the_same(self, tmp_path):
        models = {
            "prefix": make_model(dropout=0.3),
            "cross": make_model(fusion="cross_attention", text_pooling="mean"),
            "transform": MultimodalModel(
                text_transformer(lm_head="transform", input_width=24, positions="rotary"),
                {"points": Modality(PointsEncoder(), ResamplerConnector(queries=2), "last", through_text=True)},
                embed_dim=8,
            ),
        }
        folders = [str(uneven(model).eval().save_pretrained(tmp_path / name)) for name, model in models.items()]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        done = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(POINTS), *folders],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        for path, model in zip(folders, models.values(), strict=True):
            read = torch.load(f"{path}/outputs.pt")
            for name, expected in outputs(model).items():
                same = read[name] == expected if name == "written" else torch.equal(read[name], expected)
                assert same, (path, name)

    def test_files(self, folder):
        assert {"config.yaml", "model.safetensors", "README.md", "tokenizer"} <= {p.name for p in folder.iterdir()}
        assert not list(folder.glob("*.part"))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["class_path"] == "mmpt.model.MultimodalModel"
        assert config["init_args"]["text"]["init_args"]["tokenizer"] == "${folder}/tokenizer"
        assert config["init_args"]["fusion"] == "prefix"  # defaults are written out: they may change one day

    def test_a_moved_folder_works(self, copy):
        assert load(copy).embed_dim == 16

    def test_saving_twice_overwrites(self, copy):
        model = uneven(load(copy))
        model.save_pretrained(copy)
        assert torch.equal(load(copy).embed("points", POINTS), model.embed("points", POINTS))

    def test_foreign_classes_are_refused_unless_trusted(self, folder):
        with pytest.raises(UntrustedClassError, match=r"shapes\.PointsEncoder.*trust"):
            MultimodalModel.from_pretrained(folder)
        with pytest.raises(UntrustedClassError):
            MultimodalModel.from_pretrained(folder, trust=["shape", "shapes.PointsEncoder.x"])

    @pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
    def test_missing_files(self, copy, name):
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=name):
            load(copy)
        with pytest.raises(CheckpointError):
            load(copy / "nowhere")

    @pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
    def test_weights_that_were_cut_short(self, copy, keep):
        path = copy / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
        with pytest.raises(CheckpointError, match="cut short"):
            load(copy)

    @pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"- 1", b"", b"init_args: {}"])
    def test_configurations_that_describe_nothing(self, copy, content):
        (copy / "config.yaml").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config\.yaml"):
            load(copy)

    def test_a_configuration_of_something_else(self, copy):
        (copy / "config.yaml").write_text("class_path: mmpt.masking.Uniform\ninit_args: {rate: 0.3}\n")
        with pytest.raises(CheckpointError, match="Uniform"):
            load(copy)

    def test_weights_of_another_model(self, copy):
        path = copy / "model.safetensors"
        weights = load_file(path)
        name = "projections.points.weight"
        for change, message in (
            ({}, name),
            ({name: torch.zeros(3, 32)}, "size mismatch"),
            ({name: weights[name], "stranger": torch.zeros(2)}, "stranger"),
        ):
            save_file({k: v for k, v in weights.items() if k != name} | change, path)
            with pytest.raises(CheckpointError, match=message):
                load(copy)

    def test_tied_weights_stay_tied(self, tmp_path):
        model = MultimodalModel(text_transformer(), {"points": Modality(TiedEncoder())}, embed_dim=8)
        uneven(model).save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
        assert sum(name.endswith(("input.weight", "twin.weight")) for name in names) == 1
        twin = MultimodalModel.from_pretrained(tmp_path, trust=["shapes", __name__])
        encoder = twin.modality("points").encoder
        assert encoder.twin.weight is encoder.input.weight
        assert torch.equal(twin.embed("points", POINTS), model.embed("points", POINTS))

    def test_a_tied_weight_that_is_missing_under_both_names_is_noticed(self, tmp_path):
        model = MultimodalModel(text_transformer(), {"points": Modality(TiedEncoder())}, embed_dim=8)
        path = model.save_pretrained(tmp_path) / "model.safetensors"
        save_file({k: v for k, v in load_file(path).items() if not k.endswith(("input.weight", "twin.weight"))}, path)
        with pytest.raises(CheckpointError, match="2 parameters are missing"):
            MultimodalModel.from_pretrained(tmp_path, trust=["shapes", __name__])

    def test_one_encoder_under_two_names_could_not_be_rebuilt(self):
        encoder = PointsEncoder()
        with pytest.raises(ConfigError, match="twin"):
            MultimodalModel(text_transformer(), {"points": Modality(encoder), "twin": Modality(encoder)})

    def test_a_checkpoint_of_a_copy_is_independent(self, folder):
        one, other = load(folder), load(folder)
        with torch.no_grad():
            one.projections["points"].weight.zero_()
        assert other.projections["points"].weight.any()


def test_texts_may_lie_in_the_joint_space_as_they_are():
    text = text_transformer()
    model = MultimodalModel(text, embed_dim=text.width, text_projection=False, text_pooling="mean").eval()
    tokens = model.text(
        model.text.embed(**{k: v for k, v in model.process("text", ["red"]).items() if k in ("ids", "mask")})
    )
    torch.testing.assert_close(model.embed("text", ["red"]), nn.functional.normalize(tokens.mean(), dim=-1))
    with pytest.raises(ConfigError, match="projection: false"):
        MultimodalModel(text_transformer(), embed_dim=text.width + 1, text_projection=False)


def test_an_encoder_that_ends_in_the_joint_space_needs_no_projection():
    points = Modality(PointsEncoder(), projection=False)
    width = points.encoder.width
    model = MultimodalModel(text_transformer(), {"points": points}, embed_dim=width).eval()
    tokens = model.encode("points", model.process("points", POINTS))
    torch.testing.assert_close(model.embed("points", POINTS), functional.normalize(tokens.mean(), dim=-1))
    other = Modality(PointsEncoder(), projection=False)
    with pytest.raises(ConfigError, match="projection: false"):
        MultimodalModel(text_transformer(), {"points": other}, embed_dim=width + 1)
