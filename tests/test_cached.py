"""Cached gradients: the memory of a chunk, the gradients of the batch."""

import copy

import lightning as L
import pytest
import torch
from points import make_batch, make_model, make_pretraining, make_trainer
from shapes import PointsEncoder, PointsSource
from torch import nn

from mmpt.cached import CachedFeatures
from mmpt.connectors import LinearConnector
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads import CaptioningHead, ContrastiveHead, GroupContrastiveHead, MaskedHead, MatchingHead
from mmpt.masking import Exact
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

HEADS = {
    "softmax": lambda: ContrastiveHead("points"),
    "softmax mask": lambda: ContrastiveHead("points", same_group="mask"),
    "sigmoid": lambda: ContrastiveHead("points", loss="sigmoid", bias=-2.0),
    "groups": lambda: GroupContrastiveHead("points"),
    "words": lambda: MaskedHead("text", Exact(0.5, 1.0, 0.0)),
    "matching": lambda: MatchingHead("points"),
    "caption": lambda: CaptioningHead("points"),
    # the last one, as its encoder draws numbers whether it needs them or not
    "masked": lambda: MaskedHead("points", Exact(0.5, 1.0, 0.0)),
}


def gradients(module, batch, chunk):
    module.cached_chunk = chunk
    module.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    loss, logs = module(batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, logs


def assert_equal(module, batch, chunk, tolerance=1e-9):
    """In double precision, in which a wrong gradient can't hide behind rounding."""
    module.double()
    for inputs in batch.inputs.values():
        if "points" in inputs:
            inputs["points"] = inputs["points"].double()
    loss, expected, _ = gradients(module, batch, None)
    cached_loss, cached, _ = gradients(module, batch, chunk)
    assert cached_loss == pytest.approx(loss, rel=tolerance)
    assert cached.keys() == expected.keys()
    for name, value in expected.items():
        assert (cached[name] - value).abs().max() <= tolerance * value.abs().max() + 1e-15, name
    return expected


@pytest.mark.parametrize("chunk", [1, 3, 8, 11])
@pytest.mark.parametrize("name", HEADS)
def test_every_gradient_is_the_full_batchs(name, chunk):
    torch.manual_seed(0)
    module = make_pretraining({"head": HEADS[name]()})
    found = assert_equal(module, make_batch(module.model, range(11)), chunk)
    assert any("encoder" in name for name in found)
    if name in ("softmax", "sigmoid", "groups"):
        assert found["heads.head.temperature.logit_scale"] != 0
    assert ("heads.head.logit_bias" in found) == (name == "sigmoid")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_all_heads_together(batch_norm):
    torch.manual_seed(0)
    # without the words: drawing their replacements would shift the draws of the heads behind
    heads = {name: make() for name, make in HEADS.items() if name != "words"}
    module = Pretraining(make_model(batch_norm=batch_norm), heads)
    assert_equal(module, make_batch(module.model, range(16)), 4)


def test_batch_norm_of_the_embeddings_counts_the_batch_once():
    torch.manual_seed(0)
    module = Pretraining(make_model(batch_norm=True), {"c": ContrastiveHead("points")})
    other = copy.deepcopy(module)
    batch = make_batch(module.model, range(16))
    gradients(module, batch, None)
    gradients(other, batch, 4)
    for name, value in module.model.norms.state_dict().items():
        torch.testing.assert_close(other.model.norms.state_dict()[name], value)


def test_three_towers_and_modalities_through_the_text_transformer():
    torch.manual_seed(0)
    text = make_model().text
    model = MultimodalModel(
        text,
        {
            "points": Modality(PointsEncoder()),
            "other": Modality(PointsEncoder(depth=2), LinearConnector(), through_text=True),
        },
        embed_dim=16,
    )
    module = Pretraining(
        model,
        {
            "a": ContrastiveHead("points"),
            "b": ContrastiveHead("other"),
            "c": ContrastiveHead("points", "other"),
            "d": MaskedHead("other", Exact(0.5, 1.0, 0.0)),
        },
    )
    batch = make_batch(make_model(), range(12))
    batch.inputs["other"] = {name: value.flip(0) for name, value in batch.inputs["points"].items()}
    assert_equal(module, batch, 5)


class Uncached(CachedFeatures):
    """The same chunks and random numbers, with all activations kept."""

    def _chunked(self, key, make, size=None):
        import mmpt.cached

        keep = mmpt.cached.checkpoint
        mmpt.cached.checkpoint = lambda function, start, **options: function(start)
        try:
            return super()._chunked(key, make, size)
        finally:
            mmpt.cached.checkpoint = keep


@pytest.mark.parametrize("order", [1, -1])
def test_random_numbers_are_replayed(monkeypatch, order):
    """Dropout, random replacements and two views: as if the activations of the same draws had been kept."""
    torch.manual_seed(0)
    heads = HEADS | {"simcse": lambda: ContrastiveHead("points", "points"), "random": lambda: MaskedHead("points")}
    module = Pretraining(make_model(dropout=0.3), {name: make() for name, make in list(heads.items())[::order]})
    batch = make_batch(module.model, range(12))
    loss, cached, _ = gradients(module, batch, 5)
    again, same, _ = gradients(module, batch, 5)
    assert loss == again
    assert all(torch.equal(same[name], value) for name, value in cached.items())
    monkeypatch.setattr("mmpt.pretraining.CachedFeatures", Uncached)
    kept_loss, kept, _ = gradients(module, batch, 5)
    assert kept_loss == loss
    for name, value in kept.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("first", ["embedding", "encoded"])
def test_tokens_and_embedding_of_a_sample_have_the_same_dropout(first):
    model = make_model(dropout=0.5)
    features = CachedFeatures(model, make_batch(model, range(6)), 2, seed=1)
    values = {}
    for name in (first, "embedding", "encoded"):
        values[name] = getattr(features, name)("points")
    torch.testing.assert_close(model.project("points", values["encoded"]), values["embedding"])
    # and each view has its own
    assert not torch.allclose(features.embedding("points", view=1), values["embedding"], atol=1e-3)


def test_the_encoder_never_sees_more_than_a_chunk_and_keeps_nothing():
    module = make_pretraining({"c": ContrastiveHead("points")})
    batch = make_batch(module.model, range(16))
    rows, kept = [], []
    module.model.modality("points").encoder.register_forward_pre_hook(lambda m, a: rows.append(len(a[0]["mask"])))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gradients(module, batch, 4)
    assert rows == [4] * 8  # four chunks, each twice
    width, length = 32, batch.inputs["points"]["mask"].shape[1]
    assert max(kept[: len(kept) // 2]) < 16 * length * width


def test_a_batch_that_fits_is_encoded_once():
    module = make_pretraining({"c": ContrastiveHead("points")})
    calls = []
    module.model.modality("points").encoder.register_forward_pre_hook(lambda m, a: calls.append(1))
    gradients(module, make_batch(module.model, range(8)), 8)
    assert calls == [1]


def test_evaluation_is_as_ever():
    module = make_pretraining({"c": ContrastiveHead("points")}, cached_chunk=2)
    module.eval()
    batch = make_batch(module.model, range(8))
    with torch.no_grad():
        assert module(batch)[0].item() == pytest.approx(
            module.heads["c"](Features(module.model, batch)).loss.item(), rel=1e-6
        )


def test_single_precision_agrees_to_its_rounding():
    torch.manual_seed(0)
    module = Pretraining(make_model(), {"c": ContrastiveHead("points", loss="sigmoid", bias=-2.0)})
    batch = make_batch(module.model, range(16))
    _, expected, _ = gradients(module, batch, None)
    _, cached, _ = gradients(module, batch, 4)
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (cached[name] - value).abs().max() <= 1e-6 * largest, name


def test_a_run_takes_the_same_steps():
    losses = {}
    for chunk in (None, 4):
        torch.manual_seed(0)
        module = make_pretraining({"c": ContrastiveHead("points"), "m": MatchingHead("points")}, cached_chunk=chunk)
        data = MultimodalData({"figures": PointsSource(size=80)}, batch_size=16)
        seen = losses.setdefault(chunk, [])

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, seen=seen):
                seen.append(outputs["loss"].item())

        make_trainer(max_steps=4, limit_val_batches=0, callbacks=[Watch()]).fit(module, data)
    assert losses[4] == pytest.approx(losses[None], rel=1e-4)
    assert losses[4][3] != pytest.approx(losses[4][0], rel=1e-4)


class Normed(PointsEncoder):
    """An encoder whose samples depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, inputs, corruption=None):
        return super().forward(inputs | {"points": self.norm(inputs["points"].mT).mT}, corruption)


def test_batch_norm_within_an_encoder_is_refused_with_the_way_out():
    model = MultimodalModel(make_model().text, {"points": Modality(Normed(), LinearConnector())}, embed_dim=16)
    module = Pretraining(model, {"c": ContrastiveHead("points")}, cached_chunk=4)
    data = MultimodalData({"figures": PointsSource()}, batch_size=16)
    with pytest.raises(ConfigError, match=r"encoder\.norm of modality 'points'.*group norm"):
        make_trainer(max_steps=1).fit(module, data)
    with pytest.raises(ConfigError, match="cached_chunk is 0"):
        make_pretraining({"c": ContrastiveHead("points")}, cached_chunk=0)


def test_accumulation_is_refused_with_cached_gradients_as_the_way_out():
    module = make_pretraining({"contrast": ContrastiveHead("points")})
    with pytest.raises(ConfigError, match=r"model\.cached_chunk"):
        make_trainer(max_steps=2, accumulate_grad_batches=2).fit(
            module, MultimodalData({"figures": PointsSource()}, batch_size=16)
        )
