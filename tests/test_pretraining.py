"""Pretraining: which heads run with which weight, the schedule, faults, and runs that go on as if never stopped."""

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from points import figures, make_batch, make_model, make_pretraining, make_trainer
from shapes import PointsSource
from torch import nn

from mmpt.adapters import LoRA
from mmpt.batches import Batch
from mmpt.checkpoint import NewWeightsWarning
from mmpt.data import MultimodalData
from mmpt.errors import CheckpointError, ConfigError, NonFiniteLossError
from mmpt.heads import CaptioningHead, ContrastiveHead, Head, HeadOutput, MaskedHead, MatchingHead
from mmpt.masking import Span
from mmpt.model import MultimodalModel
from mmpt.optimization import interpolate, parameter_groups, warmup_cosine
from mmpt.pretraining import Pretraining
from mmpt.source import Sample
from mmpt.text import TextTransformer
from mmpt.tokenization import train_wordpiece

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Constant(Head):
    """A loss that is a parameter, so that its gradient is its weight."""

    def __init__(self, value: float = 2.0, modalities: tuple[str, ...] = ("points",)) -> None:
        super().__init__()
        self.modalities = modalities
        self.value = nn.Parameter(torch.tensor(float(value)))
        self.calls = 0

    def forward(self, features):
        self.calls += 1
        return HeadOutput(self.value * 1, {"twice": 2 * self.value.detach()})


class TestStages:
    """A later stage starts from an earlier one's folder, with parts of it locked."""

    def test_starts_from_the_folder_and_warns_of_new_parts(self, tmp_path):
        first = make_model()
        first.save_pretrained(tmp_path)
        torch.manual_seed(1)
        second = make_model(fusion="cross_attention")
        new = {name for name in second.state_dict() if name not in first.state_dict()}
        assert new
        assert all("cross" in name for name in new)
        with pytest.warns(NewWeightsWarning, match=f"{len(new)} parameters"):
            Pretraining(second, {"one": Constant()}, pretrained=str(tmp_path))
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name

    def test_refuses_folders_that_do_not_fit(self, tmp_path):
        with pytest.raises(CheckpointError, match="RUN/model"):
            Pretraining(make_model(), {"one": Constant()}, pretrained=str(tmp_path))
        make_model(fusion="cross_attention").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="are unknown"):
            Pretraining(make_model(), {"one": Constant()}, pretrained=str(tmp_path))

    def test_refuses_a_folder_with_other_tokens(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        other = MultimodalModel(TextTransformer(train_wordpiece(["quite other words"] * 3, 60), width=32, depth=1))
        with pytest.raises(CheckpointError, match="other ids"):
            Pretraining(other, {"one": Constant(modalities=("text",))}, pretrained=str(tmp_path))

    def test_a_frozen_tower_stays_as_it_is_and_the_other_learns(self):
        torch.manual_seed(0)
        model = make_model(dropout=0.3, batch_norm=True)
        module = Pretraining(model, {"c": ContrastiveHead("points")}, freeze=["points"], warmup_steps=0, lr=1e-2)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        points = make_batch(model).inputs["points"]
        module.eval()
        embedded = model.embed("points", points)
        make_trainer(max_steps=3).fit(module.train(), figures())
        changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        assert any(name.startswith("model.modalities.text.") for name in changed)
        assert any(name.startswith("model.norms.text.") for name in changed)
        assert not [name for name in changed if ".points." in name]
        # neither dropout nor the batch's own statistics touch it in training
        assert torch.equal(module.train().model.embed("points", points), embedded)

    def test_adapters_learn_in_place_of_the_weights_and_the_saved_model_is_plain(self, tmp_path):
        model = make_model()
        adapters = {"text.encoder": LoRA(rank=2)}
        module = Pretraining(model, {"c": ContrastiveHead("points")}, freeze=["points"], adapters=adapters, lr=1e-2)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        make_trainer(max_steps=3).fit(module, figures())
        changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
        inside = {name for name in changed if name.startswith("model.modalities.text.")}
        assert inside
        assert all(".lora_" in name for name in inside)
        assert "model.projections.text.weight" in changed
        module.save_pretrained(tmp_path)
        plain = make_model()
        Pretraining(plain, {"c": ContrastiveHead("points")}, pretrained=str(tmp_path))
        assert list(plain.state_dict()) == list(make_model().state_dict())
        words = ["a red circle", "a blue square"]
        torch.testing.assert_close(plain.embed("text", words), model.embed("text", words), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(plain.embed("text", words), make_model().embed("text", words), atol=1e-3)

    def test_a_part_is_frozen_or_adapted(self):
        with pytest.raises(ConfigError, match="leave one out"):
            make_pretraining({"one": Constant()}, freeze=["text"], adapters={"text": LoRA()})
        with pytest.raises(ConfigError, match="smell"):
            make_pretraining({"one": Constant()}, adapters={"smell": LoRA()})

    def test_freezing_needs_a_modality(self):
        with pytest.raises(ConfigError, match="smell"):
            make_pretraining({"one": Constant()}, freeze=["smell"])


class TestSum:
    def test_losses_are_weighted_and_summed(self):
        heads = {"one": Constant(2.0), "two": Constant(5.0), "off": Constant(7.0)}
        module = make_pretraining(heads, weights={"two": 0.5, "off": 0})
        total, logs = module(make_batch(module.model))
        total.backward()
        assert total.item() == pytest.approx(2 + 0.5 * 5)
        assert (heads["one"].value.grad, heads["two"].value.grad) == (1.0, 0.5)
        assert heads["off"].calls == 0
        assert {name: value.item() for name, value in logs.items()} == {
            "one/loss": 2.0,
            "one/twice": 4.0,
            "two/loss": 5.0,
            "two/twice": 10.0,
            "loss": 4.5,
        }
        assert not any(value.requires_grad for value in logs.values())

    def test_heads_rest_where_a_modality_is_absent(self):
        heads = {"points": Constant(2.0), "both": Constant(5.0, ("points", "text"))}
        module = make_pretraining(heads)
        batch = make_batch(module.model)
        del batch.inputs["text"]
        total, logs = module(batch)
        assert total.item() == 2.0
        assert set(logs) == {"points/loss", "points/twice", "loss"}
        assert module(Batch({})) == (None, {})

    def test_weight_follows_the_step(self):
        module = make_pretraining({"one": Constant(1.0), "two": Constant(1.0)}, weights={"two": [[2, 0.0], [4, 1.0]]})
        seen = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append(trainer.callback_metrics.get("train/two/loss") is not None)

        module.lr = 0.0
        make_trainer(max_steps=4, callbacks=[Watch()]).fit(module, figures())
        assert seen == [False, False, False, True]
        assert module.heads["two"].calls > 0

    def test_configurations_that_can_not_work(self):
        with pytest.raises(ConfigError, match=r"head 'c'.*smell"):
            make_pretraining({"c": ContrastiveHead("smell")})
        with pytest.raises(ConfigError, match="at least one head"):
            make_pretraining({})
        with pytest.raises(ConfigError, match="'x'"):
            make_pretraining({"c": Constant()}, weights={"x": 1.0})


class TestSchedules:
    def test_interpolation(self):
        points = [[10, 1.0], [20, 3.0]]
        assert [interpolate(points, step) for step in (0, 10, 15, 20, 99)] == [1.0, 1.0, 2.0, 3.0, 3.0]
        assert interpolate(0.5, 7) == 0.5
        assert interpolate([[3, 2.0]], 0) == interpolate([[3, 2.0]], 9) == 2.0

    @pytest.mark.parametrize(("before", "after"), [(1.0, 0.0), (0.0, 1.0)])
    def test_interpolation_jumps_where_a_step_has_two_values(self, before, after):
        points = [(0, before), (10, before), (10, after)]
        assert [interpolate(points, step) for step in (0, 9, 11, 50)] == [before, before, after, after]

    def test_warmup_and_cosine(self):
        # ODM: 1e-4 * (step + 1) / 10000, so 1e-8 at step 0 and 5e-5 at step 4999
        assert 1e-4 * warmup_cosine(0, 10000, 50000) == pytest.approx(1e-8)
        assert 1e-4 * warmup_cosine(4999, 10000, 50000) == pytest.approx(5e-5)
        assert warmup_cosine(9999, 10000, 50000) == warmup_cosine(10000, 10000, 50000) == 1.0
        assert warmup_cosine(30000, 10000, 50000) == pytest.approx(0.5)
        assert warmup_cosine(20000, 10000, 50000) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
        assert warmup_cosine(50000, 10000, 50000) == warmup_cosine(60000, 10000, 50000) == pytest.approx(0.0)
        assert warmup_cosine(60000, 10000, 50000, final=0.1) == pytest.approx(0.1)

    @pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_epochs": 2}])
    @pytest.mark.parametrize("warmup", [0, 3])
    def test_learning_rate_of_a_run_ends_with_the_run(self, options, warmup):
        rates = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer, *args):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        module = make_pretraining({"c": Constant()}, lr=0.1, warmup_steps=warmup)
        trainer = make_trainer(callbacks=[Watch()], **options)
        trainer.fit(module, figures(batch_size=20))
        assert len(rates) == 8
        assert rates == pytest.approx([0.1 * warmup_cosine(step, warmup, 8) for step in range(8)])
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)

    def test_total_steps_may_be_given(self):
        module = make_pretraining({"c": Constant()}, lr=0.1, warmup_steps=0, total_steps=16)
        trainer = make_trainer(max_steps=8)
        trainer.fit(module, figures())
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)

    def test_a_run_without_end_is_refused(self):
        with pytest.raises(ConfigError, match="total_steps"):
            make_trainer(max_epochs=-1).fit(make_pretraining({"c": Constant()}), figures())


class TestParameterGroups:
    def test_matrices_decay_and_the_rest_does_not(self):
        module = make_pretraining({"c": ContrastiveHead("points", loss="sigmoid"), "m": MatchingHead("points")})
        decayed, kept = parameter_groups(module, 0.05)
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        decayed_names = {names[id(p)] for p in decayed["params"]}
        kept_names = {names[id(p)] for p in kept["params"]}
        assert decayed_names | kept_names == set(names.values())
        assert not decayed_names & kept_names
        assert "heads.c.temperature.logit_scale" in kept_names
        assert "heads.c.logit_bias" in kept_names
        assert {"heads.m.classifier.weight", "model.projections.points.weight"} <= decayed_names
        assert all(("norm" in n or "bias" in n or "word" in n or n.endswith("position.weight")) <= (n in kept_names)
                   for n in names.values())  # fmt: skip

    def test_frozen_parameters_are_in_neither_and_shared_ones_in_one(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
        model[0].requires_grad_(False)
        model.append(nn.Linear(3, 3))
        model[3].weight = model[1].weight
        decayed, kept = parameter_groups(model, 0.1)
        assert [id(p) for p in decayed["params"]] == [id(model[1].weight)]
        assert len(kept["params"]) == 4  # two biases, weight and bias of the norm

    def test_pretrained_parts_may_learn_more_slowly(self):
        module = make_pretraining({"c": ContrastiveHead("points")}, lr=0.1, warmup_steps=0, total_steps=10)
        factors = {"model.modalities.text": 0.5, "model.modalities.text.encoder.text.word": 0.1}
        module.lr_factors = factors
        groups = parameter_groups(module, 0.05, 0.1, factors)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        found = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
        assert set(found) == set(names.values())
        for name, rate in found.items():
            slow = 0.01 if name.startswith("model.modalities.text.encoder.text.word") else 0.05
            assert rate == pytest.approx(slow if name.startswith("model.modalities.text") else 0.1), name
        trainer = make_trainer(max_steps=5)
        trainer.fit(module, figures())
        rates = {round(group["lr"], 6) for group in trainer.optimizers[0].param_groups}
        assert rates == {0.05, 0.025, 0.005}  # half of a cosine over ten steps

    def test_a_factor_for_nothing_is_refused(self):
        with pytest.raises(ConfigError, match="no trained parameter"):
            parameter_groups(nn.Linear(2, 2), 0.1, 0.1, {"model.txt": 0.1})


class TestFaults:
    def test_accumulation_with_a_contrastive_head_is_refused_before_the_first_step(self):
        module = make_pretraining({"masked": MaskedHead("points"), "contrast": ContrastiveHead("points")})
        before = [p.clone() for p in module.parameters()]
        with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2.*'contrast'"):
            make_trainer(max_steps=2, accumulate_grad_batches=2).fit(module, figures())
        assert all(torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))

    def test_accumulation_that_is_scheduled_is_refused_too(self):
        module = make_pretraining({"contrast": ContrastiveHead("points")})
        with pytest.raises(ConfigError, match="accumulate_grad_batches=4"):
            make_trainer(max_epochs=2, callbacks=[GradientAccumulationScheduler({1: 4})]).fit(module, figures())

    def test_accumulation_without_a_contrastive_head_is_fine(self):
        trainer = make_trainer(max_steps=1, accumulate_grad_batches=2)
        trainer.fit(make_pretraining({"masked": MaskedHead("points")}), figures())
        assert trainer.global_step == 1

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_no_number_stops_the_run_and_names_the_head(self, value):
        module = make_pretraining({"good": Constant(1.0), "broken": Constant(value)})
        with pytest.raises(NonFiniteLossError, match=r"broken/loss=(nan|inf).*step 0"):
            make_trainer(max_steps=2).fit(module, figures())
        assert module.heads["good"].value.item() == 1.0

    def test_a_batch_that_no_head_reads_is_passed_over(self):
        class Textless(PointsSource):
            def split(self, name):
                return [Sample({"text": s.modalities["text"]}, s.name, s.labels) for s in super().split(name)]

        module = make_pretraining({"c": Constant()})
        data = MultimodalData({"all": PointsSource(size=32), "text": Textless(size=32)}, batch_size=16)
        trainer = make_trainer(max_epochs=1)
        trainer.fit(module, data)
        assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 4
        assert module.heads["c"].calls == 2 + 1  # training and validation

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_gradients_are_clipped_in_every_precision(self, precision):
        module = make_pretraining({"c": ContrastiveHead("points"), "m": CaptioningHead("points")})
        trainer = make_trainer(max_steps=2, gradient_clip_val=1.0, precision=precision)
        trainer.fit(module, figures())
        assert trainer.global_step == 2


HEADS = {
    "contrast": lambda: ContrastiveHead("points"),
    "masked": lambda: MaskedHead("points", Span(0.3)),
    "words": lambda: MaskedHead("text"),
    "matching": lambda: MatchingHead("points"),
    "caption": lambda: CaptioningHead("points"),
}


class Record(L.Callback):
    def __init__(self) -> None:
        self.steps: list[tuple] = []
        self.validations: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.steps.append((trainer.current_epoch, trainer.global_step, batch.names, outputs["loss"].item(), rate))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.validations.append(trainer.callback_metrics["validation/loss"].item())


def run(folder=None, checkpoint=None, workers=0, checkpoints=None, seed=5, **options):
    """Three epochs of five steps; every step, and every validation."""
    L.seed_everything(seed)
    module = make_pretraining({name: make() for name, make in HEADS.items()}, dropout=0.2, lr=3e-3)
    record = Record()
    callbacks: list[L.Callback] = [record]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **(checkpoints or {})))
    trainer = make_trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=folder is not None, **options)
    trainer.fit(module, figures(num_workers=workers), ckpt_path=checkpoint)
    return record, trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that was never stopped, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp("straight")
    record, trainer = run(folder, checkpoints={"every_n_train_steps": 1})
    trainer.save_checkpoint(folder / "final.ckpt")
    return folder, record


class TestResume:
    @pytest.mark.parametrize("step", [3, 5, 7, 10, 14])
    def test_a_stopped_run_repeats_the_losses_bit_for_bit(self, straight, step):
        folder, whole = straight
        L.seed_everything(99)  # what another process happened to draw before
        resumed, _ = run(checkpoint=folder / f"step={step}.ckpt")
        assert resumed.steps == whole.steps[step:]
        assert resumed.validations == whole.validations[(step - 1) // 5 :]

    @pytest.mark.parametrize("step", [5, 7])
    def test_workers_that_read_ahead_lose_and_repeat_nothing(self, straight, tmp_path, step):
        _, whole = straight
        run(tmp_path, checkpoints={"every_n_train_steps": 1}, workers=2)
        resumed, _ = run(checkpoint=tmp_path / f"step={step}.ckpt", workers=2)
        assert resumed.steps == whole.steps[step:]

    def test_a_run_may_be_stopped_twice(self, straight, tmp_path):
        folder, whole = straight
        run(tmp_path, checkpoint=folder / "step=3.ckpt", checkpoints={"every_n_train_steps": 1})
        again, _ = run(checkpoint=tmp_path / "step=7.ckpt")
        assert again.steps == whole.steps[7:]

    @pytest.mark.parametrize("at_epoch_end", [True, False])
    def test_checkpoints_at_the_end_of_an_epoch(self, straight, tmp_path, at_epoch_end):
        _, whole = straight
        run(tmp_path, checkpoints={"save_on_train_epoch_end": at_epoch_end}, workers=2)
        resumed, _ = run(checkpoint=tmp_path / "step=5.ckpt", workers=2)
        assert resumed.steps == whole.steps[5:]

    def test_checkpoints_between_validations(self, straight, tmp_path):
        _, whole = straight
        run(tmp_path, checkpoints={"save_on_train_epoch_end": False}, val_check_interval=2)
        resumed, _ = run(checkpoint=tmp_path / "step=7.ckpt", val_check_interval=2)
        assert resumed.steps == whole.steps[7:]

    def test_a_finished_run_can_be_extended(self, straight):
        folder, whole = straight
        L.seed_everything(5)
        module = make_pretraining({name: make() for name, make in HEADS.items()}, dropout=0.2)
        record = Record()
        make_trainer(max_epochs=4, callbacks=[record]).fit(module, figures(), ckpt_path=folder / "final.ckpt")
        assert [step[:2] for step in record.steps] == [(3, 16 + i) for i in range(5)]
        assert sorted(name for step in record.steps for name in step[2]) == sorted(
            name for step in whole.steps[:5] for name in step[2]
        )

    def test_every_sample_comes_once_an_epoch(self, straight):
        _, whole = straight
        for epoch in range(3):
            names = [name for step in whole.steps[5 * epoch : 5 * epoch + 5] for name in step[2]]
            assert len(set(names)) == len(names) == 80

    def test_checkpoints_hold_plain_values_only(self, straight):
        folder, _ = straight
        assert "state_dict" in torch.load(folder / "step=3.ckpt", weights_only=True)


class TestValidation:
    def test_losses_do_not_depend_on_when_or_how_they_are_computed(self):
        module = make_pretraining({name: make() for name, make in HEADS.items()}, dropout=0.2)
        trainer = make_trainer()
        first = trainer.validate(module, figures(), verbose=False)
        torch.manual_seed(77)
        assert trainer.validate(module, figures(num_workers=1), verbose=False) == first

    def test_validation_does_not_disturb_training(self, straight):
        _, whole = straight
        alone, _ = run(limit_val_batches=0)
        assert alone.steps == whole.steps

    def test_prediction_gives_embeddings_by_modality(self):
        module = make_pretraining({"c": ContrastiveHead("points")})
        predictions: Any = make_trainer().predict(module, figures())
        assert [len(p["names"]) for p in predictions] == [16]
        source = PointsSource().split("test")
        points = module.model.embed("points", [sample.modalities["points"] for sample in source])
        assert torch.allclose(predictions[0]["points"], points, atol=1e-6)
        assert predictions[0]["text"].shape == (16, 16)


def test_other_seeds_give_other_runs(straight):
    _, whole = straight
    other, _ = run(seed=6)
    assert other.steps[0][3] != whole.steps[0][3]
