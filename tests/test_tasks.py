"""Every task learns what its data says, and what may be chosen about tuning does what it claims."""

import copy
import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from points import make_batch, make_model, make_trainer
from shapes import NAMES, PointsSource
from torch.nn import functional

from mmpt.adapters import LoRA, blocks, depths, merged
from mmpt.best import BestCheckpoint
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.evaluation.calibration import calibration
from mmpt.evaluation.record import class_tables, paired_difference, read_outcomes
from mmpt.finetuning import FineTuning
from mmpt.labels import FewShot, Labelled
from mmpt.masking import Uniform
from mmpt.model import MultimodalModel
from mmpt.source import Sample, Source


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return str(make_model(dropout=0.1).save_pretrained(tmp_path_factory.mktemp("model")))


class Facts(Source):
    """Drawn figures with a number, several labels, and right or wrong texts."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def split(self, name):
        samples = []
        for number, sample in enumerate(PointsSource().split(name)):
            kind = sample.labels["class"]
            wrong = (number // 4) % 2
            text = f"a {NAMES[(kind + wrong) % 4]}"
            labels = {"size": 10.0 * kind + 100, "facts": [int(kind < 2), int(kind == 3)], "true": 1 - wrong, "k": kind}
            samples.append(Sample({**sample.modalities, "text": text}, sample.name, labels))
        return samples

    def label_names(self, label):
        return {"facts": ("closed", "sharp")}.get(label, ())


def module_of(folder, task, **options) -> FineTuning:
    torch.manual_seed(0)
    return FineTuning(folder, "points", task=task, trust=["shapes"], **{"lr": 1e-2, "warmup_steps": 2, **options})


def tuned(folder, task, source=None, steps=60, **options):
    module = module_of(folder, task, **options)
    data = MultimodalData({"figures": source or PointsSource()}, batch_size=16)
    trainer = make_trainer(max_steps=steps, limit_val_batches=0)
    trainer.fit(module, data)
    return module, trainer.test(module, data, verbose=False)[0], data


class TestTasks:
    def test_classification_reports_tables_and_intervals(self, folder, tmp_path):
        module, numbers, _ = tuned(folder, "classification", steps=120)
        assert numbers["test/classification/accuracy"] > 0.8
        assert numbers["test/classification/accuracy_majority"] == 0.25
        found = module.evaluation
        assert [row.label for row in found.classes] == NAMES
        assert np.array(found.confusion).sum(1).tolist() == [4, 4, 4, 4]
        assert np.trace(found.confusion) / 16 == pytest.approx(numbers["test/classification/accuracy"])
        low, high = found.intervals["test/classification/accuracy"]
        assert low <= numbers["test/classification/accuracy"] <= high
        found.write(tmp_path)
        names, outcomes = read_outcomes(tmp_path)
        assert names[0] == "test-0"
        assert outcomes["test/classification/accuracy"].mean() == pytest.approx(np.trace(found.confusion) / 16)
        assert json.loads((tmp_path / "evaluation.json").read_text())["confusion"] == found.confusion

    def test_multilabel(self, folder):
        module, numbers, data = tuned(folder, "multilabel", Facts(), label="facts", class_weights="balanced")
        assert numbers["test/multilabel/macro_f1"] > 0.8
        assert numbers["test/multilabel/exact_match_majority"] < 0.8
        assert module.task.class_weight.tolist() == [1.0, 3.0]  # half have the first, a quarter the second
        predicted = make_trainer().predict(module, data)[0]
        assert set(predicted["label"]) <= {"closed", "sharp", "", "closed;sharp"}
        assert len(predicted["p(sharp)"]) == 16

    def test_regression_is_in_the_unit_of_the_data(self, folder, tmp_path):
        module, numbers, _ = tuned(folder, "regression", Facts(), label="size", steps=100)
        assert numbers["test/regression/mae_mean"] == pytest.approx(10.0)
        assert numbers["test/regression/mae"] < 6.0
        assert numbers["test/regression/r2"] > 0.5
        again = FineTuning(str(module.save_pretrained(tmp_path)), "points", "size", "regression", trust=["shapes"])
        batch = make_batch(module.model)
        first, second = (m.eval().task.predict(m.features(batch))["size"] for m in (module, again))
        assert first == pytest.approx(second)
        assert 90 < np.mean(first) < 140

    @pytest.mark.slow
    def test_matching_with_labelled_pairs(self, folder):
        module, numbers, _ = tuned(folder, "matching", Facts(), label="true", steps=250, lr=3e-3)
        assert numbers["test/matching/auroc"] > 0.8
        assert numbers["test/matching/accuracy_majority"] == 0.5
        assert [row.label for row in module.evaluation.classes] == ["no match", "match"]

    def test_matching_makes_its_own_wrong_pairs_where_the_data_has_none(self, folder):
        _, numbers, _ = tuned(folder, "matching", label="match", steps=3)
        assert numbers["test/matching/accuracy_majority"] == pytest.approx(2 / 3)
        with pytest.raises(DataError, match="besides 0 and 1"):
            tuned(folder, "matching", label="class", steps=1)

    def test_retrieval_both_ways(self, folder):
        _, numbers, _ = tuned(folder, "retrieval", steps=200, lr=3e-3)
        assert numbers["test/retrieval/points_to_text/R@1"] > 0.7
        assert numbers["test/retrieval/points_to_text/R@1_chance"] == 0.25  # four different texts
        assert numbers["test/retrieval/text_to_points/median_rank"] == 1.0
        both = [numbers[f"test/retrieval/{way}/R@1"] for way in ("points_to_text", "text_to_points")]
        assert numbers["test/retrieval/recall_at_1"] == pytest.approx(np.mean(both))

    def test_generation_writes_the_text(self, folder):
        module, numbers, data = tuned(folder, "generation", steps=150, lr=5e-3)
        assert numbers["test/generation/exact_match"] > 0.6
        assert numbers["test/generation/exact_match_majority"] == 0.25
        written = make_trainer().predict(module, data)[0]["text"]
        assert set(written) <= {f"a {name}" for name in NAMES}

    def test_options_without_meaning_are_refused(self, folder):
        with pytest.raises(ConfigError, match="no use for masking"):
            module_of(folder, "retrieval", masking=Uniform())
        with pytest.raises(ConfigError, match="freeze leaves nothing"):
            module_of(folder, "classification", freeze=True, adapter=LoRA())
        with pytest.raises(ConfigError, match="choose one of"):
            module_of(folder, "smelling")


class TestLosses:
    def test_class_weights_and_focal_against_hand_worked_numbers(self, folder):
        task = module_of(folder, "classification", class_weights=[1.0, 3.0], focal=2.0).task
        task.build(["a", "b"])
        task.class_weight = torch.tensor([1.0, 3.0])
        scores = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        chances = torch.tensor([0.5, functional.softmax(scores[1], 0)[1]])
        each = -chances.log() * (1 - chances) ** 2
        expected = (each[0] + 3 * each[1]) / 4
        torch.testing.assert_close(task.loss(scores, torch.tensor([0, 1])), expected)

    def test_balanced_weights_give_every_class_the_same_sum(self, folder):
        task = module_of(folder, "classification").task
        task.build(["a", "b", "c"])
        values = np.array([0] * 6 + [1] * 3 + [2])
        weights = task.balanced(values)
        assert [float(weights[i] * (values == i).sum()) for i in range(3)] == pytest.approx([10 / 3] * 3)

    def test_dilated_convolutions_stay_as_they_are(self):
        part = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=2, dilation=2), torch.nn.Conv2d(4, 4, 3, padding=1))
        before = part(torch.ones(1, 3, 10, 10))
        LoRA(rank=2).inject(part)
        torch.testing.assert_close(part(torch.ones(1, 3, 10, 10)), before)
        assert type(part[0]) is torch.nn.Conv2d

    def test_numbers_have_no_classes(self, folder):
        with pytest.raises(ConfigError, match="no classes"):
            module_of(folder, "regression", class_weights="balanced")


class TestAdapters:
    @pytest.mark.parametrize("dora", [False, True])
    def test_only_adapters_and_the_head_learn_and_the_saved_model_is_plain(self, folder, tmp_path, dora):
        module, numbers, _ = tuned(folder, "classification", adapter=LoRA(rank=8, dora=dora), steps=150, lr=2e-2)
        assert numbers["test/classification/accuracy"] > 0.6
        trained = [n for n, p in module.named_parameters() if p.requires_grad]
        assert all("lora_" in n or n.startswith("task.head") for n in trained)
        before = MultimodalModel.from_pretrained(folder, trust=["shapes"]).state_dict()
        for name, value in module.model.state_dict().items():
            if "lora_" not in name:
                assert torch.equal(value, before[name.replace(".base_layer", "")]), name
        again = FineTuning(str(module.save_pretrained(tmp_path)), "points", trust=["shapes"]).eval()
        batch = make_batch(module.model)
        torch.testing.assert_close(again(batch), module.eval()(batch), atol=1e-5, rtol=1e-5)
        assert not any("lora" in name for name in again.model.state_dict())

    def test_targets_choose_the_layers(self):
        model = make_model()
        LoRA(targets=["query"]).inject(model.modality("points"))
        adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
        assert adapted
        assert all(name.endswith("query") for name in adapted)
        with pytest.raises(ConfigError, match="no layer"):
            LoRA(targets=["nowhere"]).inject(make_model())

    def test_merging_leaves_the_original_as_it_is(self):
        model = make_model()
        LoRA().inject(model.modality("points"))
        copy_of = copy.deepcopy(model.state_dict())
        plain = merged(model)
        assert list(plain.state_dict()) == list(make_model().state_dict())
        assert all(torch.equal(value, copy_of[name]) for name, value in model.state_dict().items())


class TestLayers:
    def test_blocks_are_the_layers_of_a_transformer_and_the_stages_of_a_convolutional_network(self):
        timm = pytest.importorskip("timm")
        net = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
        assert blocks(net) == list(net.blocks)
        resnet = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3)))
        assert len(blocks(resnet)) == 2

    def test_depths_rise_from_embeddings_over_blocks_to_the_last_norm(self):
        timm = pytest.importorskip("timm")
        net = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0)
        found = depths([net])
        assert found[id(net.patch_embed.proj.weight)] == 0
        assert [found[id(block.norm1.weight)] for block in net.blocks] == [1, 2, 3]
        assert found[id(net.norm.weight)] == 4

    def test_the_learning_rate_falls_from_the_head_to_the_input(self, folder):
        module = module_of(folder, "classification", layer_decay=0.5)
        module.task.build(NAMES)
        module.trainer = make_trainer()
        optimizer = module.configure_optimizers()["optimizer"]
        rates = {id(p): g["initial_lr"] for g in optimizer.param_groups for p in g["params"]}
        encoder = module.model.modality("points").encoder
        assert rates[id(module.head.classifier.weight)] == pytest.approx(1e-2)
        layer = rates[id(encoder.transformer.layers[0].expand.weight)]
        assert rates[id(encoder.input.weight)] == pytest.approx(layer / 2)
        assert layer == pytest.approx(1e-2 * 0.5**2)  # below what comes behind the layers

    def test_gradual_unfreezing_goes_from_the_top_down(self, folder):
        module = module_of(folder, "classification", unfreeze_every=2)
        encoder = module.model.modality("points").encoder
        layer, first = encoder.transformer.layers[0].expand.weight, encoder.input.weight
        states = []
        for step in (0, 2, 4, 6):
            module.thaw(step)
            states.append((layer.requires_grad, first.requires_grad))
        assert states == [(False, False), (False, False), (True, False), (True, True)]

    def test_what_is_not_reached_yet_keeps_its_weights(self, folder):
        module = module_of(folder, "classification", unfreeze_every=100)
        before = copy.deepcopy(module.model.state_dict())
        make_trainer(max_steps=3, limit_val_batches=0).fit(
            module, MultimodalData({"figures": PointsSource()}, batch_size=16)
        )
        assert all(torch.equal(value, before[name]) for name, value in module.model.state_dict().items())


def test_the_best_checkpoint_is_what_remains(folder, tmp_path):
    module = module_of(folder, "classification", patience=2, lr=3e-2)
    data = MultimodalData({"figures": PointsSource()}, batch_size=16)
    best = module.callbacks(tmp_path)
    assert isinstance(best[0], BestCheckpoint)
    trainer = make_trainer(max_epochs=30, callbacks=best, enable_checkpointing=True)
    trainer.fit(module, data)
    assert trainer.current_epoch < 30  # stopped early
    kept = module.summary["validation/classification/accuracy"]
    assert kept == pytest.approx(float(best[0].best_model_score))
    again = trainer.validate(module, data, verbose=False)[0]
    assert again["validation/classification/accuracy"] == pytest.approx(kept)


def test_an_interrupted_tuning_ends_with_the_same_weights(folder, tmp_path):
    def run(seed, checkpoint=None):
        torch.manual_seed(seed)
        module = FineTuning(folder, "points", trust=["shapes"], masking=Uniform(), warmup_steps=2, lr=1e-2)
        data = MultimodalData({"figures": PointsSource()}, batch_size=16)
        saved = ModelCheckpoint(tmp_path / str(seed), "{step}", every_n_train_steps=3, save_top_k=-1)
        trainer = make_trainer(max_steps=6, limit_val_batches=0, callbacks=[saved], enable_checkpointing=True)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module

    whole = run(3)
    resumed = run(99, tmp_path / "3" / "step=3.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert whole._seed == 3


class TestLabelled:
    def table(self, tmp_path, rows) -> str:
        path = tmp_path / "labels.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["name", "kind"], *rows])
        return str(path)

    def test_a_column_is_classes_numbers_or_sets(self, tmp_path):
        inner = PointsSource()
        classes = Labelled(inner, self.table(tmp_path, [["train-0", "b"], ["train-1", "a"]]), "kind")
        assert list(classes.label_names("kind")) == ["a", "b"]
        assert [classes.split("train")[i].labels["kind"] for i in (0, 1)] == [1, 0]
        with pytest.raises(SampleError, match="no label"):
            classes.split("train")[2]
        numbers = Labelled(inner, self.table(tmp_path, [["train-0", "1.5"]]), "kind")
        assert numbers.split("train")[0].labels["kind"] == 1.5
        sets = Labelled(inner, self.table(tmp_path, [["train-0", "x;y"], ["train-1", "z"]]), "kind")
        assert sets.split("train")[0].labels["kind"] == [1, 1, 0]

    def test_data_without_names_gets_its_label_set_from_the_values(self, folder):
        module, _, _ = tuned(folder, "classification", Facts(), label="k", steps=2)
        assert module.label_names == ["0", "1", "2", "3"]

    def test_a_label_that_is_not_there_is_explained(self, folder):
        with pytest.raises(DataError, match="mmpt.labels.Labelled"):
            tuned(folder, "classification", label="taste", steps=1)


def test_few_shots_are_balanced_nested_and_leave_the_test_alone():
    few, more = (FewShot(PointsSource(), shots, seed=1) for shots in (2, 5))
    labels = [sample.labels["class"] for sample in few.split("train")]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {s.name for s in few.split("train")} < {s.name for s in more.split("train")}
    assert {s.name for s in few.split("train")} != {s.name for s in FewShot(PointsSource(), 2, seed=2).split("train")}
    assert len(few.split("test")) == 16


def test_few_shots_pass_over_samples_without_a_label_or_that_can_not_be_read():
    class Holes(PointsSource):
        def split(self, name):
            samples = list(super().split(name))
            samples[0] = Sample(samples[0].modalities, "bare")
            return Broken(samples)

    class Broken(list):
        def __getitem__(self, index):
            if index == 2:
                raise SampleError("torn", "torn", "whole", index)
            return super().__getitem__(index)

    for seed in range(5):
        drawn = FewShot(Holes(), 3, seed=seed).split("train")
        assert sorted(sample.labels["class"] for sample in drawn) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_calibration_error_by_hand():
    found = calibration(np.array([0.9, 0.9, 0.6, 0.6]), np.array([True, False, True, True]), bins=10)
    assert found.ece == pytest.approx(0.5 * 0.4 + 0.5 * 0.4)
    assert found.count == [2, 2]


def test_class_tables_by_hand():
    rows, confusion = class_tables(np.array([0, 0, 1]), np.array([0, 1, 1]), ["a", "b"])
    assert confusion == [[1, 1], [0, 1]]
    assert (rows[0].precision, rows[0].recall, rows[1].precision, rows[1].support) == (1.0, 0.5, 0.5, 1)


def test_several_labels_have_a_table_and_no_confusion():
    rows, confusion = class_tables(np.array([[1, 0], [1, 1]]), np.array([[1, 1], [0, 1]]), ["a", "b"])
    assert confusion == []
    assert (rows[0].precision, rows[0].recall, rows[1].precision, rows[1].support) == (1.0, 0.5, 0.5, 1)


def test_differences_are_paired_by_name():
    first = (["a", "b", "c"], np.array([0.0, 1.0, 0.0]))
    second = (["c", "b", "x"], np.array([1.0, 1.0, 0.0]))
    difference, low, high = paired_difference(first, second)
    assert difference == 0.5
    assert low <= 0.5 <= high
    assert paired_difference((["a"], np.zeros(1)), (["b"], np.zeros(1))) is None
