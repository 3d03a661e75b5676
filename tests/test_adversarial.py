"""Masking by scores, the book of frozen units, and the head that learns the scores, against hand-worked numbers."""

import pytest
import torch
from midi_pieces import piece

from mmpt.batches import Batch
from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_tokens import CompoundWords
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads import AdversarialMaskedHead
from mmpt.heads.adversarial import inverse_shares, masker_loss, masker_targets
from mmpt.mask_book import MaskBook
from mmpt.masking import Scored, highest
from mmpt.model import Modality, MultimodalModel


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestScored:
    def test_counts(self):
        units, free = torch.tensor([1024, 1024, 1024]), torch.tensor([600, 1000, 0])
        share = torch.tensor([0.2, 0.3, 0.3], dtype=torch.float64)
        assert Scored().count(units, free, share).tolist() == [120, 153, 0]
        assert Scored(limit=1.0).count(units, free, share).tolist() == [120, 300, 0]

    def test_the_highest_scores_among_the_free_units_are_chosen(self):
        scores = torch.arange(40.0).repeat(2, 1)
        units = torch.ones(2, 40, dtype=torch.bool)
        units[1, 30:] = False
        free = units.clone()
        free[0, 38:] = False
        chosen = Scored(0.1, 0.1)(scores, units, free, generator()).predicted
        assert chosen[0].nonzero().flatten().tolist() == [35, 36, 37]
        assert chosen[1].nonzero().flatten().tolist() == [27, 28, 29]

    def test_chosen_units_are_treated_in_exact_shares(self):
        units = torch.ones(3, 400, dtype=torch.bool)
        corruption = Scored(0.3, 0.3, 0.1)(torch.rand(3, 400, generator=generator()), units, generator=generator())
        assert corruption.predicted.sum(1).tolist() == [40] * 3
        for kind, count in ((MASK, 32), (RANDOM, 4)):
            assert ((corruption.action == kind) & corruption.predicted).sum(1).tolist() == [count] * 3
        assert (corruption.action[~corruption.predicted] == KEEP).all()

    def test_which_of_the_chosen_are_hidden_does_not_depend_on_their_scores(self):
        scores, units = torch.arange(100.0).unsqueeze(0), torch.ones(1, 100, dtype=torch.bool)
        kept = torch.zeros(100)
        for seed in range(200):
            corruption = Scored(0.1, 0.1)(scores, units, generator=generator(seed))
            kept += ((corruption.action == KEEP) & corruption.predicted).float()[0]
        assert (kept[90:] > 5).all()

    @pytest.mark.parametrize("options", [{"low": 0.4, "high": 0.2}, {"limit": 0}, {"mask": 0.9, "random": 0.2}])
    def test_shares_that_cannot_work_are_refused(self, options):
        with pytest.raises(ConfigError, match="shares"):
            Scored(**options)

    def test_highest_takes_none_that_is_not_among_the_candidates(self):
        among = torch.tensor([[True, False, True, True]])
        assert highest(torch.tensor([[1.0, 9.0, 3.0, 2.0]]), among, torch.tensor([2])).tolist() == [
            [False, False, True, True]
        ]
        assert highest(torch.zeros(1, 4), among, torch.tensor([9])).sum() == 3


class TestMaskBook:
    units = torch.ones(2, 200, dtype=torch.bool)

    def test_freezing_takes_the_highest_scores_and_between_a_tenth_and_three_tenths_of_the_free_units(self):
        book = MaskBook(thaw=0.0)
        scores = torch.arange(200.0).repeat(2, 1)
        free_before = 200
        for seed in range(4):
            book.freeze(["a", "b"], scores, self.units, generator(seed))
            free = book.free(["a", "b"], self.units)
            newly = free_before - int(free[0].sum())
            assert 0.1 * free_before - 1 <= newly <= 0.3 * free_before
            free_before = int(free[0].sum())
            assert free[0].tolist() == sorted(free[0].tolist(), reverse=True)  # the last ones have the highest scores

    def test_frozen_units_are_never_masked(self):
        book = MaskBook()
        scores = torch.rand(2, 200, generator=generator())
        book.freeze(["a", "b"], scores, self.units, generator())
        frozen = ~book.free(["a", "b"], self.units)
        assert frozen.any()
        for seed in range(20):
            corruption = Scored()(scores, self.units, ~frozen, generator(seed))
            assert not (corruption.predicted & frozen).any()
            assert (corruption.action[frozen] == KEEP).all()

    def test_some_frozen_units_become_free_again(self):
        book = MaskBook(low=0.3, high=0.3, thaw=1.0)
        book.freeze(["a", "b"], torch.zeros(2, 200), self.units, generator(3))
        assert 0 < int((~book.free(["a", "b"], self.units)).sum()) < 120

    def test_samples_are_known_by_name_whatever_batch_and_padding_they_come_in(self):
        book = MaskBook(thaw=0.0)
        units = torch.zeros(1, 10, dtype=torch.bool)
        units[0, 2:8] = True
        book.freeze(["a"], torch.arange(10.0).unsqueeze(0), units, generator())
        wide = torch.zeros(2, 20, dtype=torch.bool)
        wide[0, :6] = wide[1, 5:11] = True
        free = book.free(["other", "a"], wide)
        assert torch.equal(free[0], wide[0])
        assert (~free[1] & wide[1]).nonzero().flatten().tolist() == [10]

    def test_a_sample_of_another_length_begins_anew(self):
        book = MaskBook()
        book.freeze(["a"], torch.zeros(1, 200), self.units[:1])
        assert book.free(["a"], torch.ones(1, 50, dtype=torch.bool)).all()

    def test_the_book_is_part_of_a_checkpoint_without_pickled_code(self, tmp_path):
        book = MaskBook()
        book.freeze(["a", "b"], torch.rand(2, 200), self.units)
        torch.save(book.state_dict(), tmp_path / "book.pt")
        other = MaskBook()
        other.load_state_dict(torch.load(tmp_path / "book.pt", weights_only=True))
        assert torch.equal(other.free(["a", "b"], self.units), book.free(["a", "b"], self.units))
        assert other.share == book.share > 0


class TestMaskerTargets:
    losses = torch.tensor([[0.1, 0.9, 0.5, 0.3]])
    corruption = Corruption(torch.tensor([[MASK, MASK, RANDOM, KEEP]]), torch.tensor([[True, True, True, True]]))
    probabilities = torch.tensor([[0.2, 0.6, 0.5, 0.4]])

    def twice(self) -> tuple[torch.Tensor, Corruption, torch.Tensor]:
        two = Corruption(self.corruption.action.repeat(2, 1), self.corruption.predicted.repeat(2, 1))
        return self.losses.repeat(2, 1), two, self.probabilities.repeat(2, 1)

    def test_the_hardest_changed_unit_is_an_example_of_one_and_the_easiest_of_zero(self):
        targets = masker_targets(self.losses, self.corruption, 0.3)
        assert targets.high.tolist() == [[False, True, False, False]]
        assert targets.low.tolist() == [[True, False, False, False]]
        assert float(masker_loss(self.probabilities, targets)) == pytest.approx(0.20)

    def test_all_rows_are_treated_alike_and_the_released_code_turns_every_second_one(self):
        losses, corruption, probabilities = self.twice()
        right = masker_targets(losses, corruption, 0.3)
        assert float(masker_loss(probabilities, right)) == pytest.approx(0.20)
        wrong = masker_targets(losses, corruption, 0.3, released=True)
        assert float(masker_loss(probabilities, wrong)) == pytest.approx((0.20 + 0.72) / 2)

    def test_a_batch_of_one_works(self):
        targets = masker_targets(self.losses, self.corruption, 0.3, released=True)
        assert float(masker_loss(self.probabilities, targets)) == pytest.approx(0.20)

    def test_the_masker_learns_to_find_hard_units(self):
        probabilities = torch.full((1, 4), 0.5, requires_grad=True)
        masker_loss(probabilities, masker_targets(self.losses, self.corruption, 0.3)).backward()
        assert probabilities.grad[0, 1] < 0 < probabilities.grad[0, 0]
        assert probabilities.grad[0, 2:].tolist() == [0, 0]

    def test_rows_with_too_few_units_give_no_example(self):
        few = Corruption(torch.tensor([[MASK, KEEP, KEEP, KEEP]]), torch.tensor([[True, False, False, False]]))
        assert float(masker_loss(self.probabilities, masker_targets(self.losses, few, 0.3))) == 0


def test_weights_of_fields_are_in_inverse_proportion_to_their_accuracies():
    shares = inverse_shares(torch.tensor([0.9, 0.5, 0.9, 0.3, 0.3, 0.2, 0.9, 0.9]))
    expected = [0.0613, 0.1104, 0.0613, 0.1840, 0.1840, 0.2761, 0.0613, 0.0613]
    assert shares.tolist() == pytest.approx(expected, abs=5e-5)
    assert inverse_shares(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([100 / 101, 1 / 101])


class TestHead:
    def features(self, text, **options) -> tuple[AdversarialMaskedHead, Features]:
        torch.manual_seed(0)
        encoder = MidiEncoder(CompoundWords(), 16, 1, 2, field_width=4, max_length=64, norm="pre", dropout=0.0)
        model = MultimodalModel(text, {"midi": Modality(encoder)}, embed_dim=8)
        head = AdversarialMaskedHead("midi", hidden=8, dropout=0.0, **options)
        head.bind(model)
        pieces = [piece(60), piece(45, 1), piece(60, 2)]
        return head, Features(model, Batch({"midi": encoder.processor(pieces)}, {}, ["a", "b", "c"]))

    @pytest.fixture
    def text(self):
        from contracts.cases import text_transformer

        return text_transformer()

    def test_loss_is_recovery_plus_masker_and_reaches_all_its_parts(self, text):
        head, features = self.features(text)
        output = head(features)
        assert float(output.loss.detach()) == pytest.approx(float(output.logs["recovery"] + output.logs["masker"]))
        output.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in head.parameters())
        assert features.model.modality("midi").encoder.embedding.weight.grad.any()

    def test_recovery_is_the_mean_over_hidden_and_over_all_notes(self, text):
        head, features = self.features(text)
        torch.manual_seed(5)
        output = head(features)
        torch.manual_seed(5)
        encoder, inputs = features.model.modality("midi").encoder, features.inputs("midi")
        units = encoder.units(inputs)
        corruption = head.policy(head.probabilities(features), units, units)
        everywhere = Corruption(corruption.action, units)
        # the tokens of the same corruption: random words are drawn in the same state
        found = encoder.unit_losses(encoder.reconstruct(encoder(inputs, corruption), everywhere), inputs, everywhere)
        chosen = corruption.predicted[units]
        expected = (found.losses[chosen].mean(0) + found.losses.mean(0)).mean()
        assert float(output.logs["recovery"]) == pytest.approx(float(expected.detach()), abs=1e-5)

    def test_epochs_set_the_weights_and_freeze(self, text):
        head, features = self.features(text, freeze_every=2)
        head.start_epoch(0)
        head(features)
        assert head.shares is None
        head.start_epoch(1)
        assert float(head.shares.sum()) == pytest.approx(1)
        assert not head.freezing
        head(features)
        assert head.book.share == 0
        head.start_epoch(2)
        head(features)
        assert 0.05 < head.book.share < 0.31
        head.start_epoch(3)
        assert float(head(features).logs["frozen"]) == pytest.approx(head.book.share)

    def test_weights_and_book_survive_a_checkpoint(self, text, tmp_path):
        head, features = self.features(text, freeze_every=1)
        for epoch in range(3):
            head.start_epoch(epoch)
            head(features)
        torch.save(head.state_dict(), tmp_path / "head.pt")
        other, _ = self.features(text, freeze_every=1)
        other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
        assert torch.equal(other.shares, head.shares)
        assert other.freezing
        other.start_epoch(2)  # resumed within the epoch: its accuracies are not complete yet
        assert torch.equal(other.shares, head.shares)
        assert torch.equal(other.right, head.right)
        assert other.book.share == head.book.share

    def test_evaluation_hides_notes_at_random_and_leaves_the_book_alone(self, text):
        head, features = self.features(text)
        head.eval()
        torch.manual_seed(1)
        output = head(features)
        assert set(output.logs) == {
            f"{kind}_{f}" for kind in ("accuracy", "nll") for f in ("bar", "position", "pitch", "duration")
        }
        assert not head.book.frozen

    def test_an_encoder_without_losses_of_single_units_is_refused_by_name(self, text):
        from shapes import PointsEncoder

        model = MultimodalModel(text, {"points": Modality(PointsEncoder())}, embed_dim=8)
        head = AdversarialMaskedHead("points")
        head.bind(model)
        inputs = model.process("points", [[[0.0, 1.0]] * 9] * 2)
        with pytest.raises(ConfigError, match="PointsEncoder gives no loss for single units"):
            head(Features(model, Batch({"points": inputs}, {}, ["a", "b"])))

    def test_texts_can_be_masked_by_scores_too(self, text):
        model = MultimodalModel(text)
        head = AdversarialMaskedHead("text")
        head.bind(model)
        words = ["a very small green dot beside a large grey one"] * 2
        output = head(Features(model, Batch({"text": model.process("text", words)}, {}, ["a", "b"])))
        output.loss.backward()
        assert torch.isfinite(output.loss)
