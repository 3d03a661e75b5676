"""Scores of pairs by a matching head."""

import pytest
import torch
from contracts.cases import TEXTS, text_transformer
from shapes import PointsEncoder, draw

from mmpt import Modality, MultimodalModel
from mmpt.checkpoint import load_heads
from mmpt.connectors import LinearConnector
from mmpt.errors import CheckpointError, ConfigError
from mmpt.evaluation.matching import choose_share, match_probabilities, mixed_scores
from mmpt.heads import ContrastiveHead, MatchingHead
from mmpt.pretraining import Pretraining

COSINES, PROBABILITIES = torch.tensor([[0.8, 0.6]]), torch.tensor([[0.9, 0.2]])


def make_model() -> MultimodalModel:
    torch.manual_seed(0)
    text = text_transformer(cross_attention=True)
    cell = Modality(PointsEncoder(), connector=LinearConnector())
    return MultimodalModel(text, {"points": cell}, embed_dim=16, fusion="cross_attention")


def points(count: int = 5):
    generator = torch.Generator().manual_seed(0)
    return [draw("circle", 4 + i, generator).tolist() for i in range(count)]


@pytest.mark.parametrize(("share", "expected"), [(0.1, (0.69957, 0.30043)), (0.5, (0.8251, 0.1749))])
def test_the_worked_example_of_langcell(share, expected):
    torch.testing.assert_close(
        mixed_scores(COSINES, PROBABILITIES, share)[0], torch.tensor(expected), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(PROBABILITIES.softmax(1)[0], torch.tensor([0.668188, 0.331812]), atol=1e-6, rtol=0)


def test_probabilities_as_they_are():
    assert torch.equal(mixed_scores(COSINES, PROBABILITIES, 0.0, matching_norm="none"), PROBABILITIES)
    with pytest.raises(ConfigError, match="share is 1.5"):
        mixed_scores(COSINES, PROBABILITIES, 1.5)


def test_the_share_is_the_one_that_types_validation_samples_best():
    right = torch.tensor([0, 1])
    good, bad = torch.tensor([[0.9, 0.1], [0.1, 0.9]]), torch.tensor([[0.1, 0.9], [0.9, 0.1]])
    assert choose_share(bad, good, right, matching_norm="none") == 0.4  # the most of similarity that does no harm
    assert choose_share(good, bad, right) == 0.5
    assert choose_share(good, good, right) == 0.5


def test_each_pair_is_scored_as_if_alone():
    model = make_model().eval()
    head = MatchingHead("points")
    head.bind(model)
    samples = points()
    table = match_probabilities(model, head, samples, TEXTS, batch_size=2)
    assert table.shape == (5, 4)
    for row, column in ((0, 0), (3, 2), (4, 3)):
        fused = model.fuse([TEXTS[column]], points=[samples[row]])
        alone = head.classifier(fused.first()).softmax(1)[0, 1]
        torch.testing.assert_close(table[row, column], alone, atol=1e-5, rtol=1e-4)


def test_heads_come_back_from_a_run_folder(tmp_path):
    model = make_model()
    module = Pretraining(
        model, {"matching": MatchingHead("points"), "pairs": ContrastiveHead("points", temperature=0.05)}
    )
    module.save_pretrained(tmp_path)
    again = MultimodalModel.from_pretrained(tmp_path, trust=["shapes"])
    heads = load_heads(tmp_path, again)
    assert set(heads) == {"matching", "pairs"}
    before = match_probabilities(model, module.heads["matching"], points(), TEXTS)
    torch.testing.assert_close(match_probabilities(again, heads["matching"], points(), TEXTS), before)
    assert float(heads["pairs"].temperature().detach()) == pytest.approx(20, rel=1e-5)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="has no heads.yaml"):
        load_heads(tmp_path / "bare", again)


def test_text_that_skips_the_context_ignores_it_and_fused_text_does_not():
    model = make_model().eval()
    plain = model.fuse(TEXTS[:2])
    alone = model.text(
        model.text.embed(**{k: v for k, v in model.process("text", TEXTS[:2]).items() if k in ("ids", "mask")})
    )
    assert torch.equal(plain.values, alone.values)
    fused = model.fuse(TEXTS[:2], points=points(2))
    assert not torch.allclose(plain.values, fused.values, atol=1e-4)
