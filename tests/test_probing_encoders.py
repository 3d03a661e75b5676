"""Text encoders of probes give what transformers and open_clip give themselves, whatever else is in the batch."""

import json

import numpy as np
import pytest
import torch
from probes import write

from mmpt.errors import CheckpointError, ConfigError, DataError
from mmpt.probing.embedders import FunctionEmbedder, ModelEmbedder
from mmpt.probing.loading import load_embedder
from mmpt.probing.stroop import PRESETS, StroopProbe, StroopSettings
from mmpt.text import TruncationWarning

TEXTS = ["a photo of a  shaped wedge", "a red flag", "", "what is the color of a banana? green", "a red flag"]

POOLINGS = {
    "bert": {"pooler", "mean", "cls", "eos"},
    "roberta": {"pooler", "mean", "cls", "eos"},
    "distilbert": {"mean", "cls", "eos"},
    "electra": {"mean", "cls", "eos"},
    "clip": {"projected", "pooler", "eos", "cls", "mean"},
    "siglip": {"projected", "pooler", "mean"},
    "flava": {"projected", "pooler", "mean", "cls", "eos"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in POOLINGS}
    return {kind: (folder, write(kind, folder)) for kind, folder in folders.items()}


def expected(kind, model, encoder, text, pooling):
    """One text alone, by the model's own forward."""
    ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        if kind == "siglip":
            ids = torch.nn.functional.pad(ids, (0, 20 - ids.shape[1]), value=encoder.pad_id)
            output = model.text_model(input_ids=ids)
        elif kind == "clip":
            output = model.text_model(input_ids=ids)
        elif kind == "flava":
            output = model.text_model(input_ids=ids, attention_mask=torch.ones_like(ids))
        else:
            output = model(input_ids=ids)
        hidden = output.last_hidden_state
        if pooling == "projected":
            if kind == "clip":
                return model.text_projection(output.pooler_output)[0]
            return model.text_projection(hidden[:, 0])[0] if kind == "flava" else output.pooler_output[0]
    if pooling == "pooler" or (kind == "clip" and pooling == "eos"):
        return output.pooler_output[0]
    return {"mean": hidden.mean(1), "cls": hidden[:, 0], "eos": hidden[:, -1]}[pooling][0]


@pytest.mark.parametrize("kind", POOLINGS)
def test_embeddings_equal_those_of_transformers(kind, made):
    folder, model = made[kind]
    encoder = load_embedder(folder)
    assert set(encoder.poolings) == POOLINGS[kind]
    for pooling in encoder.poolings:
        found = encoder.embed(TEXTS, pooling)
        wanted = torch.stack([expected(kind, model, encoder, text, pooling) for text in TEXTS])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "own"), [("clip", "projected"), ("siglip", "projected"), ("flava", "projected")])
def test_joint_embeddings_equal_get_text_features(kind, own, made):
    folder, model = made[kind]
    encoder = load_embedder(folder)
    assert encoder.poolings[0] == own
    text = "a photo of a red wedge"
    ids = torch.tensor(encoder.tokenize([text]))
    if kind == "siglip":
        ids = torch.nn.functional.pad(ids, (0, 20 - ids.shape[1]), value=encoder.pad_id)
    with torch.no_grad():
        output = model.get_text_features(input_ids=ids)
    features = output if torch.is_tensor(output) else output.pooler_output
    features = features[:, 0] if features.ndim == 3 else features
    torch.testing.assert_close(encoder.embed([text]), features, atol=1e-5, rtol=1e-5)


def test_an_open_clip_model_gives_what_encode_text_gives(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "patch_size": 4, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-test-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-test-clip").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = load_embedder(f"open_clip:tiny-test-clip:{tmp_path / 'weights.pt'}")
    tokens = open_clip.get_tokenizer("tiny-test-clip")(TEXTS, context_length=16)
    with torch.no_grad():
        torch.testing.assert_close(encoder.embed(TEXTS), model.encode_text(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="Nothing is downloaded"):
        load_embedder(f"open_clip:tiny-test-clip:{tmp_path / 'absent.pt'}")


def test_a_pooler_without_weights_is_not_offered(tmp_path):
    from safetensors.torch import load_file, save_file

    write("bert", tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "pooler" not in k}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    encoder = load_embedder(tmp_path)
    assert "pooler" not in encoder.poolings
    with pytest.raises(ConfigError, match="can do mean, cls, eos"):
        StroopProbe(encoder, PRESETS["released"])


def test_missing_weights_are_an_error_and_not_random(tmp_path):
    from safetensors.torch import load_file, save_file

    write("bert", tmp_path)
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if "layer.1." not in k}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="random"):
        load_embedder(tmp_path)


def test_a_sentence_transformers_folder_pools_as_it_says(made, tmp_path):
    write("bert", tmp_path / "0_Transformer")
    (tmp_path / "1_Pooling").mkdir()
    modules = [
        {"idx": 0, "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    for mode, pooling in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, mode: True}))
        encoder = load_embedder(tmp_path)
        assert encoder.poolings[0] == pooling
        torch.testing.assert_close(encoder.embed(TEXTS), load_embedder(made["bert"][0]).embed(TEXTS, pooling))
    modules.append({"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigError, match="Dense"):
        load_embedder(tmp_path)


def test_a_model_of_ours_gives_its_own_embedding(toy_model):
    encoder = ModelEmbedder(toy_model)
    texts = ["a circle", "a spiral line", "a line"]
    torch.testing.assert_close(encoder.embed(texts), toy_model.embed("text", texts), atol=1e-6, rtol=1e-5)
    tokens = toy_model.encode("text", toy_model.process("text", texts))
    torch.testing.assert_close(encoder.embed(texts, "mean"), tokens.mean(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(encoder.embed(texts, "eos"), tokens.last(), atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def toy_model():
    from mmpt.model import MultimodalModel
    from mmpt.text import TextTransformer
    from mmpt.tokenization import train_wordpiece

    torch.manual_seed(0)
    tokenizer = train_wordpiece(["a circle a line a spiral a zigzag red green good bad it was"] * 3, 80)
    text = TextTransformer(tokenizer, width=32, depth=2, heads=4, max_length=32)
    return MultimodalModel(text, {}, embed_dim=16).eval()


def test_a_function_is_an_encoder():
    calls = []

    def lengths(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        return np.array([[len(text), 1.0] for text in texts])

    encoder = FunctionEmbedder(lengths, batch_size=2)
    assert encoder.embed(["a", "bb", "a", "ccc"]).tolist() == [[1, 1], [2, 1], [1, 1], [3, 1]]
    assert calls == [2, 1]
    with pytest.raises(ConfigError, match="attention mask"):
        StroopProbe(encoder, StroopSettings(attention_mask=False)).score("a", ["b"])
    with pytest.raises(DataError, match="shape"):
        FunctionEmbedder(lambda texts: np.zeros(3)).embed(["a"])


def test_a_function_can_be_named_on_the_command_line(monkeypatch, tmp_path):
    (tmp_path / "bags.py").write_text("import numpy as np\ndef bag(texts):\n    return np.ones((len(texts), 2))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_embedder("python:bags:bag").embed(["a"]).tolist() == [[1, 1]]
    with pytest.raises(ConfigError, match="MODULE:FUNCTION"):
        load_embedder("python:bags:nothing")


def test_long_texts_lose_their_end_with_a_warning(made):
    encoder = load_embedder(made["bert"][0])
    with pytest.warns(TruncationWarning, match="40 tokens"):
        encoder.embed(["red " * 60])


@pytest.mark.parametrize("source", ["nowhere/at/all", "open_clip:ViT-B-32:nowhere.pt"])
def test_absent_models_are_explained(source):
    with pytest.raises(CheckpointError, match="Nothing is downloaded"):
        load_embedder(source)


SETS = [
    ("a photo of a MASK shaped wedge", ["circle", "triangle", "rectangle"]),
    ("the flag is MASK", ["red", "green shaped flag", "blue"]),
    ("MASK", ["it was good", "bad"]),
]


@pytest.mark.parametrize("kind", ["bert", "roberta", "clip", "siglip"])
def test_masked_scores_depend_neither_on_the_order_of_options_nor_on_the_batch(kind, made):
    probe = StroopProbe(load_embedder(made[kind][0]))
    alone = [probe.score_from_options(sentence, options) for sentence, options in SETS]
    reverse = [probe.score_from_options(sentence, options[::-1])[::-1] for sentence, options in SETS]
    filled = [(s.replace("MASK", ""), tuple(s.replace("MASK", o) for o in options)) for s, options in SETS]
    together = probe._scores([*filled, *[("a red flag " * k, ("it is a banana " * k,)) for k in (1, 2)]])
    for a, b, c in zip(alone, reverse, together, strict=False):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)


def test_the_released_setting_equals_an_unmasked_computation_and_depends_on_the_options(made):
    folder, model = made["bert"]
    encoder = load_embedder(folder)
    probe = StroopProbe(encoder, PRESETS["released"])
    options = ["red", "green shaped flag wheel", "blue"]
    texts = ["the flag is ", *(f"the flag is {option}" for option in options)]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        pooled = torch.nn.functional.normalize(model(input_ids=batch["input_ids"]).pooler_output.double(), dim=1)
    found = probe.score_from_options("the flag is MASK", options)
    np.testing.assert_allclose(found, (pooled[1:] @ pooled[0]).numpy(), atol=1e-6)
    assert batch["attention_mask"].min() == 0  # there was padding to see
    fewer = probe.score_from_options("the flag is MASK", ["red", "blue"])
    assert abs(fewer[0] - found[0]) > 1e-4
    masked = StroopProbe(encoder, StroopSettings("pooler")).score_from_options("the flag is MASK", options)
    assert np.abs(masked - found).max() > 1e-4


def test_bfloat16_is_close_and_not_equal(made):
    encoder = load_embedder(made["bert"][0])
    exact = encoder.embed(TEXTS, "mean")
    encoder.precision = "bf16"
    near = encoder.embed(TEXTS, "mean")
    assert near.dtype == torch.float32
    assert not torch.equal(exact, near)
    assert torch.nn.functional.cosine_similarity(exact, near).min() > 0.99
