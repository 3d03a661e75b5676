"""Fine-tuning of samples and of units: heads, labels, masking, saving."""

import functools
import json

import lightning as L
import pytest
import torch
from contracts.cases import text_transformer
from lightning.pytorch.callbacks import EMAWeightAveraging
from midi_pieces import piece
from points import make_trainer
from shapes import PointsEncoder, PointsSource
from torch.nn import functional

from mmpt.batches import Batch
from mmpt.blocks import repeated_blocks
from mmpt.connectors import LinearConnector
from mmpt.data import MultimodalData
from mmpt.encoder import IGNORED
from mmpt.encoders.midi import MidiEncoder
from mmpt.encoders.midi_tokens import VELOCITY_CLASSES, CompoundWords
from mmpt.errors import CheckpointError, ConfigError
from mmpt.finetuning import FineTuning
from mmpt.masking import Exact
from mmpt.model import Modality, MultimodalModel
from mmpt.source import Sample, Source
from mmpt.task_heads import AttentionPoolingHead, PooledHead, UnitHead
from mmpt.tokens import Tokens


class Pieces(Source):
    """High and low pieces; loud notes are the high ones."""

    def __init__(self) -> None:
        self.path = None

    def split(self, name):
        samples = []
        for number in range(24):
            low = 40 + 30 * (number % 2)
            notes = piece(10 + number, number, low, low + 12)
            notes.velocity[:] = 20 + 5 * (notes.pitch - low)
            samples.append(Sample({"midi": notes}, f"{name} {number}", {"class": number % 2}))
        return samples

    def label_names(self, label):
        return {"class": ("low", "high"), "velocity": VELOCITY_CLASSES}.get(label, ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    encoder = MidiEncoder(CompoundWords(), 32, 1, 2, field_width=8, max_length=64, norm="pre", dropout=0.0)
    model = MultimodalModel(text_transformer(), {"midi": Modality(encoder)}, embed_dim=8)
    return str(model.save_pretrained(tmp_path_factory.mktemp("model")))


def fitted(folder, steps=40, callbacks=(), **options) -> tuple[L.Trainer, FineTuning, MultimodalData]:
    torch.manual_seed(0)
    module = FineTuning(folder, "midi", **{"lr": 1e-2, "warmup_steps": 2, **options})
    data = MultimodalData({"pieces": Pieces()}, batch_size=12).attach(module.model.processors)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, module, data


def test_weights_can_be_averaged_over_steps(folder):
    _, plain, _ = fitted(folder)
    averaging = EMAWeightAveraging(decay=0.9)
    _, averaged, _ = fitted(folder, callbacks=[averaging])
    moved = [(a - b).abs().max() for a, b in zip(plain.parameters(), averaged.parameters(), strict=True)]
    assert 0 < max(moved) < 0.1
    assert averaged.label_names == ["low", "high"]


def tokens(lengths: list[int], width: int = 6) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(lengths), max(lengths), width, generator=generator)
    return Tokens(values, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))


class TestAttentionPooling:
    def built(self) -> AttentionPoolingHead:
        torch.manual_seed(0)
        head = AttentionPoolingHead(queries=3, attention=5, hidden=7, dropout=0.0)
        head.build(6, 4)
        return head

    def test_weights_are_a_softmax_over_the_real_positions(self):
        head, batch = self.built(), tokens([5, 3])
        for row, length in enumerate([5, 3]):
            real = batch.values[row, :length]
            weights = ((real @ head.inner.weight.T).tanh() @ head.outer.weight.T).softmax(0)
            torch.testing.assert_close(head.sums(batch)[row], weights.T @ real)

    def test_padding_changes_nothing(self):
        head, batch = self.built(), tokens([5, 3])
        garbage = batch.values.masked_fill(~batch.mask.unsqueeze(-1), float("nan"))
        scores = head(Tokens(garbage, batch.mask), Tokens.mean)
        torch.testing.assert_close(scores, head(batch, Tokens.mean))
        assert scores.shape == (2, 4)

    def test_a_row_of_padding_alone_stays_finite(self):
        batch = tokens([5, 3])
        empty = Tokens(batch.values, batch.mask & torch.tensor([[True], [False]]))
        assert torch.isfinite(self.built()(empty, Tokens.mean)).all()


class TestPooledHead:
    def built(self, batch_norm):
        torch.manual_seed(0)
        head = PooledHead(dropout=0.0, batch_norm=batch_norm)
        head.build(6, 2)
        return head

    def test_what_all_samples_have_in_common_and_its_scale_play_no_role_with_batch_norm(self):
        head, batch = self.built(True), tokens([5, 3, 4, 2])
        scores = head(batch, Tokens.mean)
        moved = Tokens(100.0 + 0.5 * batch.values, batch.mask)
        torch.testing.assert_close(head(moved, Tokens.mean), scores, rtol=1e-2, atol=1e-2)
        plain = self.built(False)
        assert (plain(moved, Tokens.mean) - plain(batch, Tokens.mean)).abs().max() > 1

    def test_in_use_a_sample_is_scored_by_the_running_statistics_whatever_stands_beside_it(self):
        head, batch = self.built(True), tokens([5, 3, 4, 2])
        for _ in range(200):
            head(batch, Tokens.mean)
        pooled = batch.mean()
        head.eval()
        expected = head.classifier((pooled - pooled.mean(0)) / (pooled.var(0) + head.norm.eps).sqrt())
        torch.testing.assert_close(head(batch, Tokens.mean), expected, rtol=1e-3, atol=1e-3)
        one = Tokens(batch.values[:1], batch.mask[:1])
        torch.testing.assert_close(head(one, Tokens.mean), head(batch, Tokens.mean)[:1])

    def test_the_last_batch_of_an_epoch_may_hold_one_sample(self):
        head, batch = self.built(True), tokens([5, 3])
        head(batch, Tokens.mean)
        before = head.norm.running_mean.clone()
        one = Tokens(batch.values[:1], batch.mask[:1])
        trained = head(one, Tokens.mean)
        torch.testing.assert_close(trained, head.eval()(one, Tokens.mean))
        torch.testing.assert_close(head.norm.running_mean, before)


def test_recomputed_layers_are_tuned_alike(folder):
    tuned = [fitted(folder, 3, checkpointing=on)[1] for on in (False, True)]
    assert any(isinstance(block.forward, functools.partial) for block in repeated_blocks(tuned[1].model))
    torch.testing.assert_close(tuned[1].state_dict(), tuned[0].state_dict())


class TestClassification:
    @pytest.mark.parametrize(
        "head", [PooledHead(), PooledHead(hidden=16, batch_norm=True), AttentionPoolingHead(2, 8, 16)]
    )
    def test_learns_and_is_loaded_again(self, folder, head, tmp_path):
        trainer, module, data = fitted(folder, 100, head=head)
        tested = trainer.test(module, data, verbose=False)[0]
        assert tested["test/classification/accuracy"] > 0.9
        saved = module.save_pretrained(tmp_path)
        again = FineTuning(str(saved), "midi").eval()
        batch = Batch({"midi": module.model.process("midi", [piece(9)])}, {}, ["a"])
        torch.testing.assert_close(again(batch), module.eval()(batch))
        assert type(again.head) is type(head)


class TestChangedEncoder:
    def test_takes_other_arguments_with_the_weights_of_the_folder(self, folder, tmp_path):
        module = FineTuning(folder, "midi", encoder={"dropout": 0.5})
        plain = FineTuning(folder, "midi")
        torch.testing.assert_close(module.model.state_dict(), plain.model.state_dict())
        inputs = module.model.process("midi", [piece(9)])
        passes = [[m.model.embed("midi", inputs) for _ in range(2)] for m in (module, plain)]
        assert not torch.equal(*passes[0])
        assert torch.equal(*passes[1])  # the folder's dropout is 0
        again = MultimodalModel.from_pretrained(module.model.save_pretrained(tmp_path)).train()
        assert not torch.equal(again.embed("midi", inputs), again.embed("midi", inputs))

    def test_the_baseline_from_scratch_has_them_too(self, folder):
        module = FineTuning(folder, "midi", encoder={"dropout": 0.5}, from_scratch=True).train()
        inputs = module.model.process("midi", [piece(9)])
        assert not torch.equal(module.model.embed("midi", inputs), module.model.embed("midi", inputs))

    def test_what_does_not_exist_or_fit_is_refused(self, folder):
        with pytest.raises(ConfigError, match="dropuot"):
            FineTuning(folder, "midi", encoder={"dropuot": 0.5})
        with pytest.raises(CheckpointError, match="another configuration"):
            FineTuning(folder, "midi", encoder={"width": 16})
        with pytest.raises(ConfigError, match="no modality 'image'; it has text, midi"):
            MultimodalModel.from_pretrained(folder, encoders={"image": {}})


class TestTagging:
    def test_learns_what_the_hidden_field_would_give_away(self, folder):
        trainer, module, data = fitted(folder, 80, task="tagging", label="velocity")
        tested = trainer.test(module, data, verbose=False)[0]
        assert tested["test/tagging/accuracy"] > 0.6  # pitches tell it; the most frequent class has a third
        assert tested["test/tagging/macro_f1"] > 0.4

    def test_loss_leaves_padding_out(self, folder):
        module = FineTuning(folder, "midi", "velocity", task="tagging", head=UnitHead(0.0))
        module.task.build(VELOCITY_CLASSES)
        inputs = module.model.process("midi", [piece(30), piece(5, 1)])
        scores, targets = module.task.scores(module.features(Batch({"midi": inputs}, {}, ["a", "b"])))
        assert scores.shape == (2, 30, 6)
        assert (targets != IGNORED).sum(1).tolist() == [30, 5]
        real = targets != IGNORED
        expected = functional.cross_entropy(scores[real], targets[real])
        torch.testing.assert_close(module.task.loss(scores, targets), expected)

    def test_each_sample_hides_its_own_notes_in_training_only_and_leaves_them_out_of_the_loss(self, folder):
        module = FineTuning(folder, "midi", "velocity", task="tagging", masking=Exact(0.2, 1.0, 0.0))
        module.task.build(VELOCITY_CLASSES)
        batch = Batch({"midi": module.model.process("midi", [piece(40), piece(30, 1)])}, {}, ["a", "b"])
        module.train()
        drawn = [module.task.scores(module.features(batch))[1] == IGNORED for _ in range(60)]
        masked = [hidden for hidden in drawn if hidden[0].any()]
        assert 15 <= len(masked) <= 45  # every second batch stays whole, as all are in use
        for hidden in masked:
            assert hidden[0].sum() == 8
            assert hidden[1, :30].sum() == 6
            assert not torch.equal(hidden[0, :30], hidden[1, :30])
        module.eval()
        _, targets = module.task.scores(module.features(batch))
        assert (targets != IGNORED).sum(1).tolist() == [40, 30]

    def test_predictions_name_a_label_for_each_note(self, folder):
        module = FineTuning(folder, "midi", "velocity", task="tagging").eval()
        module.task.build(VELOCITY_CLASSES)
        batch = Batch({"midi": module.model.process("midi", [piece(12), piece(5, 1)])}, {}, ["a", "b"])
        predicted = module.predict_step(batch, 0)
        assert [len(row) for row in predicted["label"]] == [12, 5]
        assert set(predicted["label"][0]) <= set(VELOCITY_CLASSES)

    def test_a_saved_tagger_says_its_task_and_is_not_taken_for_a_classifier(self, folder, tmp_path):
        module = FineTuning(folder, "midi", "velocity", task="tagging", head=UnitHead(hidden=8))
        module.task.build(VELOCITY_CLASSES)
        saved = module.save_pretrained(tmp_path)
        assert json.loads((saved / "task.json").read_text())["task"] == "tagging"
        assert FineTuning(str(saved), "midi", "velocity", task="tagging").label_names == list(VELOCITY_CLASSES)
        assert FineTuning(str(saved), "midi", "velocity").label_names == []


def test_a_head_for_another_task_is_refused(folder):
    with pytest.raises(ConfigError, match="scores each unit, which is not classification"):
        FineTuning(folder, "midi", head=UnitHead())
    with pytest.raises(ConfigError, match="scores whole samples"):
        FineTuning(folder, "midi", task="tagging", head=PooledHead())


def test_a_modality_that_goes_through_the_text_transformer_is_tuned_with_it(tmp_path):
    points = Modality(PointsEncoder(width=16), LinearConnector(), through_text=True)
    MultimodalModel(text_transformer(), {"points": points}, embed_dim=16).save_pretrained(tmp_path)
    module = FineTuning(str(tmp_path), "points", "class", trust=["shapes"], warmup_steps=0, lr=1e-2)
    before = module.model.text.transformer.layers[0].expand.weight.clone()
    make_trainer(max_steps=2).fit(module, MultimodalData({"figures": PointsSource(size=60)}, batch_size=8))
    assert module.head(Tokens(torch.zeros(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)), points.pool).ndim == 2
    # what the classifier reads has been through the text transformer
    assert not torch.equal(module.model.text.transformer.layers[0].expand.weight, before)


def test_balanced_tagging_counts_the_units_of_the_training_split(folder):
    module = FineTuning(folder, "midi", "velocity", "tagging", class_weights="balanced")
    source = Pieces()
    module.task.prepare([source], training=True)
    edges = [piece.modalities["midi"].velocity for piece in source.split("train")]
    classes = module.task.values([source])
    assert len(classes) == sum(map(len, edges))  # a note that is cut off would be missing
    counts = functools.reduce(lambda total, value: total | {value: total.get(value, 0) + 1}, classes.tolist(), {})
    for number, weight in enumerate(module.task.class_weight.tolist()):
        assert weight == pytest.approx(len(classes) / (len(VELOCITY_CLASSES) * counts.get(number, 1)))
    assert len(counts) > 1
