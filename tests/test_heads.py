"""Heads: what each computes, what leaves it unchanged, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from points import make_batch, make_model

from mmpt.batches import Batch
from mmpt.encoder import MASK, Corruption, Inputs
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads import CaptioningHead, ContrastiveHead, GroupContrastiveHead, MaskedHead, MatchingHead
from mmpt.heads.alignment import hard_negatives
from mmpt.heads.contrastive import Temperature
from mmpt.losses.contrastive import grouped_contrastive, sigmoid_contrastive, softmax_contrastive
from mmpt.masking import Exact, MaskingPolicy


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bound(head, model):
    head.bind(model)
    return head


def padded(batch: Batch, extra: int = 3) -> Batch:
    """The same batch with more padding in every modality, and rubbish in it."""
    inputs: dict[str, Inputs] = {}
    for name, tensors in batch.inputs.items():
        inputs[name] = {}
        for key, value in tensors.items():
            shape = (value.shape[0], extra, *value.shape[2:])
            if value.dtype == torch.bool:
                rubbish = torch.full(shape, key == "special")
            elif key == "words":
                rubbish = value[:, -1:].expand(shape)
            else:
                rubbish = torch.full(shape, 1).to(value.dtype) * 5
            inputs[name][key] = torch.cat([value, rubbish], 1)
    return Batch(inputs, batch.labels, batch.names)


class Marked(MaskingPolicy):
    """Hides the units with the numbers 1 and 2 of every row."""

    def __call__(self, units, groups=None, limit=None, generator=None):
        chosen = units.clone()
        chosen[:, 3:] = False
        chosen[:, 0] = False
        return Corruption(chosen.to(torch.uint8) * MASK, chosen)


class TestTemperature:
    def test_scale_is_one_over_the_temperature(self):
        assert Temperature(0.05)().item() == pytest.approx(20)
        assert Temperature(0.01)().item() == pytest.approx(100)

    def test_scale_is_bounded_and_can_come_back(self):
        temperature = Temperature(0.07)
        with torch.no_grad():
            temperature.logit_scale.fill_(math.log(1000))
        temperature()
        assert temperature().item() == pytest.approx(100)
        optimizer = torch.optim.SGD(temperature.parameters(), lr=0.001)
        temperature().backward()
        optimizer.step()
        assert temperature().item() < 99

    def test_fixed_temperature_has_no_gradient(self):
        assert not Temperature(0.07, learnable=False).logit_scale.requires_grad

    @pytest.mark.parametrize("temperature", [0.0, -1.0, 0.001])
    def test_impossible_temperatures_are_refused(self, temperature):
        with pytest.raises(ConfigError, match="temperature"):
            Temperature(temperature)


class TestContrastive:
    def test_equals_the_loss_of_the_embeddings(self):
        model = make_model()
        batch = make_batch(model)
        a, b = (model.embed(name, batch.inputs[name]) for name in ("points", "text"))
        groups = batch.labels["group"]
        softmax = bound(ContrastiveHead("points", temperature=0.05), model)(Features(model, batch))
        assert softmax.loss.item() == pytest.approx(
            softmax_contrastive(a, b, torch.tensor(20.0), groups=groups).loss.item(), abs=1e-6
        )
        sigmoid = bound(ContrastiveHead("points", loss="sigmoid", temperature=0.1, bias=-3), model)
        assert sigmoid(Features(model, batch)).loss.item() == pytest.approx(
            sigmoid_contrastive(a, b, torch.tensor(10.0), torch.tensor(-3.0), groups=groups).loss.item(), abs=1e-5
        )
        grouped = bound(GroupContrastiveHead("points", temperature=0.1), model)
        assert grouped(Features(model, batch)).loss.item() == pytest.approx(
            grouped_contrastive(a, torch.tensor(10.0), groups).loss.item(), abs=1e-5
        )

    def test_same_group_reaches_the_loss(self):
        model = make_model()
        # groups of unlike texts: with equal rows "soft" and "ignore" are the same number
        features = Features(model, make_batch(model, group=torch.arange(8) // 2))
        losses = {
            kind: bound(ContrastiveHead("points", same_group=kind), model)(features).loss.item()
            for kind in ("soft", "mask", "ignore")
        }
        assert len({round(loss, 4) for loss in losses.values()}) == 3

    def test_without_group_labels_every_row_is_its_own(self):
        model = make_model()
        batch = make_batch(model)
        batch.labels = {}
        head = bound(ContrastiveHead("points", same_group="ignore"), model)
        alone = head(Features(model, batch)).loss
        assert alone.item() == pytest.approx(head(Features(model, make_batch(model))).loss.item(), abs=1e-6)

    def test_one_modality_twice_compares_two_dropout_passes(self):
        model = make_model(dropout=0.3)
        batch = make_batch(model)
        batch.labels = {}
        features = Features(model, batch)
        head = bound(ContrastiveHead("points", "points"), model)
        head(features)
        assert not torch.equal(features.embedding("points"), features.embedding("points", view=1))
        model.eval()
        features = Features(model, batch)
        head(features)
        assert torch.equal(features.embedding("points"), features.embedding("points", view=1))

    def test_group_head_needs_group_labels(self):
        model = make_model()
        batch = make_batch(model)
        batch.labels = {}
        with pytest.raises(ConfigError, match="group"):
            bound(GroupContrastiveHead("points"), model)(Features(model, batch))


class TestMatching:
    def test_fused_texts_are_pooled_as_texts_are(self):
        for pooling in ("first", "mean"):
            model = make_model()
            model.modality("text").pooling = pooling
            head = bound(MatchingHead("points"), model)
            features = Features(model, make_batch(model))
            fused = features.fused("points")
            pooled = fused.values[:, 0] if pooling == "first" else fused.mean()
            torch.testing.assert_close(head.score(model, fused), head.classifier(pooled))

    def test_hard_negatives_of_the_langcell_example(self):
        similarity = torch.tensor([[20.0, 12.0], [0.0, 16.0]])
        for _ in range(5):
            columns, possible = hard_negatives(similarity, torch.arange(2))
            assert columns.tolist() == [1, 0]
            assert possible.all()

    def test_hard_negatives_never_share_the_group(self):
        groups = torch.tensor([0, 1, 0, 2, 1, 0])
        similarity = 5 * torch.randn(6, 6)
        for _ in range(50):
            columns, possible = hard_negatives(similarity, groups)
            assert (groups[columns] != groups).all()
            assert possible.all()

    def test_hard_negatives_are_drawn_by_the_softmax_of_the_row(self):
        similarity = torch.tensor([[9.0, 1.0, 0.0], [0.0, 9.0, 2.0], [3.0, 0.0, 9.0]])
        counts = torch.zeros(3, 3)
        draws = 1000
        for _ in range(draws):
            columns, _ = hard_negatives(similarity, torch.arange(3))
            counts[torch.arange(3), columns] += 1
        share = torch.tensor([1.0, 2.0, 3.0]).sigmoid()  # of the more similar one of the two others
        assert (counts[[0, 1, 2], [1, 2, 0]] / draws - share).abs().max() < 3 * 0.5 / math.sqrt(draws)

    def test_one_group_only_has_no_negatives(self):
        columns, possible = hard_negatives(torch.zeros(3, 3), torch.zeros(3, dtype=torch.long))
        assert not possible.any()
        assert columns.shape == (3,)

    def test_matching_logits_of_the_langcell_example(self):
        # a match with logits (0, 2) costs .126928; the classifier is made to give them for every pair
        model = make_model()
        head = bound(MatchingHead("points"), model)
        with torch.no_grad():
            head.classifier.weight.zero_()
            head.classifier.bias.copy_(torch.tensor([0.0, 2.0]))
        batch = make_batch(model, group=torch.zeros(8, dtype=torch.long))
        output = head(Features(model, batch))
        assert output.loss.item() == pytest.approx(0.126928, abs=1e-6)  # negatives have no loss here
        assert output.logs["accuracy"] == 1.0
        output = head(Features(model, make_batch(model)))
        assert output.loss.item() == pytest.approx((0.126928 + 2 * 2.126928) / 3, abs=1e-5)
        assert output.logs["accuracy"].item() == pytest.approx(1 / 3)

    def test_negatives_are_drawn_by_similarity_in_both_directions(self, monkeypatch):
        given = []

        def watched(similarity, groups, *others):
            given.append(similarity)
            return hard_negatives(similarity, groups, *others)

        monkeypatch.setattr("mmpt.heads.alignment.hard_negatives", watched)
        model = make_model()
        batch = make_batch(model)
        bound(MatchingHead("points", temperature=0.1), model)(Features(model, batch))
        samples, texts = (model.embed(name, batch.inputs[name]) for name in ("points", "text"))
        assert torch.allclose(given[0], samples @ texts.T / 0.1, atol=1e-5)  # a wrong text for each sample
        assert torch.allclose(given[1], texts @ samples.T / 0.1, atol=1e-5)  # a wrong sample for each text

    def test_pairs_are_samples_with_texts_in_this_order(self):
        model = make_model()
        batch = make_batch(model, range(4))
        head = bound(MatchingHead("points"), model)
        seen: dict[str, list[int]] = {}

        def numbers(rows, among):
            return [next(i for i, other in enumerate(among) if torch.equal(row, other)) for row in rows]

        class Watched(Features):
            def fuse(self, text, context, attention="bidirectional"):
                seen.update(
                    texts=numbers(text["ids"], self.inputs("text")["ids"]),
                    samples=numbers(context.values, self.connected("points").values),
                )
                return super().fuse(text, context, attention)

        head(Watched(model, batch))
        texts, samples = torch.tensor(seen["texts"]).view(3, 4), torch.tensor(seen["samples"]).view(3, 4)
        own = torch.arange(4)
        assert torch.equal(texts[0], own)
        assert torch.equal(samples[0], own)
        assert torch.equal(samples[1], own)
        assert (texts[1] != own).all()
        assert torch.equal(texts[2], own)
        assert (samples[2] != own).all()

    @pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
    def test_the_sample_reaches_the_decision(self, fusion):
        model = make_model(fusion=fusion).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that attention is not even
                parameter.add_(0.2 * torch.randn_like(parameter))
        batch = make_batch(model)
        head = bound(MatchingHead("points"), model)
        before = head.logits(Features(model, batch))
        batch.inputs["points"]["points"] = batch.inputs["points"]["points"].flip(1) + 1
        assert (head.logits(Features(model, batch)) - before).abs().max() > 1e-3


class TestCaptioning:
    def test_equals_a_loop_over_the_tokens(self):
        model = make_model().eval()
        batch = make_batch(model)
        output = bound(CaptioningHead("points"), model)(Features(model, batch))
        text = batch.inputs["text"]
        tokens = model.fuse(text, attention="prefix", points=batch.inputs["points"])
        losses, right = [], []
        for row in range(8):
            for place in range(int(text["mask"][row].sum()) - 1):
                logits = model.text.lm_logits(tokens.values[row, place])
                losses.append(float(F.cross_entropy(logits.detach(), text["ids"][row, place + 1])))
                right.append(float(logits.argmax() == text["ids"][row, place + 1]))
        assert output.loss.item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert output.logs["accuracy"].item() == pytest.approx(sum(right) / len(right))

    @pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
    def test_a_token_never_sees_itself_or_what_follows(self, fusion):
        model = make_model(fusion=fusion).eval()
        batch = make_batch(model)
        text = batch.inputs["text"]
        before = model.fuse(text, attention="prefix", points=batch.inputs["points"]).values
        changed = text | {"ids": text["ids"].clone()}
        changed["ids"][:, 2:] = 7
        after = model.fuse(changed, attention="prefix", points=batch.inputs["points"]).values
        assert torch.allclose(before[:, :2], after[:, :2], atol=1e-6)
        assert not torch.allclose(before[:, 2:], after[:, 2:], atol=1e-6)

    def test_label_smoothing_of_the_geox_example(self):
        # logits ((2, 0), (0, 2)) with smoothing .1: .226928; targets (.95, .05) give the same
        logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        assert F.cross_entropy(logits, torch.arange(2), label_smoothing=0.1).item() == pytest.approx(0.226928, abs=1e-6)
        model = make_model().eval()
        features = Features(model, make_batch(model))
        plain, smooth = (bound(CaptioningHead("points", s), model)(features).loss for s in (0.0, 0.1))
        text = features.inputs("text")
        real = text["mask"][:, 1:]
        logits = model.text.lm_logits(features.fused("points", attention="prefix").values[:, :-1][real])
        even = -logits.log_softmax(-1).mean()
        assert smooth.item() == pytest.approx((0.9 * plain + 0.1 * even).item(), abs=1e-5)


class TestMasked:
    def test_hidden_points_cannot_influence_their_prediction(self):
        model = make_model().eval()
        batch = make_batch(model)
        head = bound(MaskedHead("points", Marked()), model)
        encoder = model.modality("points").encoder
        predictions: list[torch.Tensor] = []
        reconstruct = encoder.reconstruct

        def watched(*given):
            predictions.append(reconstruct(*given))
            return predictions[-1]

        encoder.reconstruct = watched
        before = head(Features(model, batch)).loss
        batch.inputs["points"]["points"][:, 1:3] += 100
        after = head(Features(model, batch)).loss
        assert torch.equal(predictions[0], predictions[1])
        assert after > before + 100

    def test_text_through_the_same_head(self):
        model = make_model().eval()
        output = bound(MaskedHead("text", Marked()), model)(Features(model, make_batch(model)))
        assert abs(output.loss.item() - math.log(model.text.word.num_embeddings)) < 1
        assert set(output.logs) == {"accuracy"}

    def test_through_text_needs_equal_widths(self):
        from shapes import PointsEncoder

        from mmpt.connectors import LinearConnector
        from mmpt.model import Modality, MultimodalModel

        model = make_model()
        points = Modality(PointsEncoder(width=16), LinearConnector(), through_text=True)
        with pytest.raises(ConfigError, match="width"):
            MaskedHead("points").bind(MultimodalModel(model.text, {"points": points}))


HEADS = {
    "softmax": lambda: ContrastiveHead("points"),
    "sigmoid": lambda: ContrastiveHead("points", loss="sigmoid"),
    "grouped": lambda: GroupContrastiveHead("points"),
    "matching": lambda: MatchingHead("points"),
    "captioning": lambda: CaptioningHead("points"),
    "masked points": lambda: MaskedHead("points", Marked()),
    "masked text": lambda: MaskedHead("text", Marked()),
}


@pytest.mark.parametrize("fusion", ["prefix", "cross_attention"])
@pytest.mark.parametrize("name", HEADS)
def test_padding_never_changes_a_loss(name, fusion):
    model = make_model(fusion=fusion)
    batch = make_batch(model)
    head = bound(HEADS[name](), model)
    losses = []
    for same in (batch, padded(batch), padded(batch, 11)):
        torch.manual_seed(1)
        losses.append(head(Features(model, same)).loss.item())
    assert losses[1:] == [pytest.approx(losses[0], abs=1e-5)] * 2


@pytest.mark.parametrize("name", HEADS)
def test_heads_run_under_autocast(name):
    model = make_model()
    head = bound(HEADS[name](), model)
    torch.manual_seed(1)
    exact = head(Features(model, make_batch(model))).loss
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head(Features(model, make_batch(model))).loss
    mixed.backward()
    assert mixed.item() == pytest.approx(exact.item(), rel=0.1)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_built_from_their_configuration(name):
    from mmpt.config import from_config

    head = HEADS[name]()
    config = head.config()
    if "Marked" in str(config):
        head.policy = None
        config["init_args"]["policy"] = Exact(0.3).config()
    twin = from_config(config)
    assert type(twin) is type(head)
    assert twin.modalities == head.modalities
    assert twin.config() == config
