"""Sampling, reading and batching: every sample once, the same everywhere, resumable, bad ones skipped."""

from collections import Counter
from itertools import chain

import pytest
import torch
from points import make_model
from shapes import PointsProcessor, PointsSource

from mmpt.batches import Batch, BatchDataset, Key, MixtureSampler, hash_seed, seeded
from mmpt.data import MultimodalData
from mmpt.encoder import Processor
from mmpt.errors import CheckpointError, ConfigError, DataError, SampleError
from mmpt.source import Concatenation, Sample, Source


def indices(batches):
    return [(key.source, key.index) for batch in batches for key in batch]


def sampler(sizes, batch_size, shuffle=True, **options):
    return MixtureSampler(sizes if isinstance(sizes, dict) else {"a": sizes}, batch_size, shuffle=shuffle, **options)


class TestSampler:
    @pytest.mark.parametrize("shuffle", [True, False])
    @pytest.mark.parametrize("size", [1, 7, 8, 29])
    def test_every_sample_once_an_epoch(self, size, shuffle):
        batches = sampler(size, 4, shuffle)
        for epoch in range(3):
            batches.set_epoch(epoch)
            given = list(batches)
            assert sorted(index for _, index in indices(given)) == list(range(size))
            assert len(given) == len(batches) == -(-size // 4)

    def test_epochs_differ_and_repeat(self):
        batches = sampler(29, 4)
        epochs = []
        for epoch in (0, 1, 0):
            batches.set_epoch(epoch)
            epochs.append(list(batches))
        assert epochs[0] == epochs[2]
        assert indices(epochs[0]) != indices(epochs[1])
        assert {b[0].seed for b in epochs[0]}.isdisjoint({b[0].seed for b in epochs[1]})

    def test_seeds_differ_between_batches_and_runs(self):
        first = list(sampler(29, 4, seed=1))
        assert len({batch[0].seed for batch in first}) == len(first)
        assert all(key.seed == batch[0].seed for batch in first for key in batch)
        assert first != list(sampler(29, 4, seed=2))
        assert first == list(sampler(29, 4, seed=1))

    def test_evaluation_is_in_order_and_the_same_in_every_epoch(self):
        batches = sampler(10, 4, shuffle=False)
        before = list(batches)
        assert [index for _, index in indices(before)] == list(range(10))
        batches.set_epoch(5)
        assert list(batches) == before

    def test_drop_last_leaves_out_the_smaller_batch_but_never_everything(self):
        assert [len(batch) for batch in sampler(11, 4, drop_last=True)] == [4, 4]
        assert [len(batch) for batch in sampler(3, 4, drop_last=True)] == [3]
        assert [len(batch) for batch in sampler({"big": 9, "small": 2}, 4, drop_last=True, seed=1)].count(2) == 1

    @pytest.mark.parametrize("start", [0, 1, 4, 7])
    def test_resume_goes_on_where_it_stopped(self, start):
        whole, resumed = sampler(29, 4), sampler(29, 4)
        whole.set_epoch(3)
        resumed.resume(3, start)
        resumed.set_epoch(3)  # Lightning says it again
        assert list(resumed) == list(whole)[start:]
        assert len(resumed) == len(whole)
        whole.set_epoch(4)
        resumed.set_epoch(4)
        assert list(resumed) == list(whole)

    def test_views_are_the_same_samples_again(self):
        for batch in sampler(12, 8, views=2):
            assert len(batch) == 8
            assert [key.index for key in batch[:4]] == [key.index for key in batch[4:]]
            assert [key.view for key in batch] == [0] * 4 + [1] * 4


class TestBuckets:
    LENGTHS = torch.randint(1, 500, (103,), generator=torch.Generator().manual_seed(0)).tolist()

    def waste(self, batches):
        padded = sum(len(batch) * max(self.LENGTHS[key.index] for key in batch) for batch in batches)
        return padded / sum(self.LENGTHS[key.index] for batch in batches for key in batch)

    def make(self, **options):
        return sampler(103, 8, **{"lengths": {"a": self.LENGTHS}, "pool": 6} | options)

    def test_a_batch_holds_similar_lengths(self):
        assert self.waste(list(self.make(pool=0))) > 1.5
        assert self.waste(list(self.make(drop_last=True))) < 1.2

    @pytest.mark.parametrize("drop_last", [False, True])
    def test_every_sample_comes_once_and_epochs_differ(self, drop_last):
        batches = self.make(drop_last=drop_last)
        first = list(batches)
        batches.set_epoch(1)
        second = list(batches)
        for epoch in (first, second):
            assert len(set(indices(epoch))) == len(indices(epoch)) == (96 if drop_last else 103)
        assert indices(first) != indices(second)

    def test_batches_are_not_sorted(self):
        means = [sum(self.LENGTHS[key.index] for key in batch) / 8 for batch in self.make(drop_last=True)]
        assert means not in (sorted(means), sorted(means, reverse=True))

    def test_the_longest_samples_are_not_the_ones_that_are_dropped(self):
        dropped = []
        batches = self.make(drop_last=True)
        for epoch in range(30):
            batches.set_epoch(epoch)
            dropped += sorted(set(range(103)) - {index for _, index in indices(batches)})
        mean = sum(self.LENGTHS) / 103
        assert abs(sum(self.LENGTHS[i] for i in dropped) / len(dropped) - mean) < 40  # 7 of 103 a time: error 10

    def test_two_processes_see_what_one_with_twice_the_batch_sees(self):
        whole = list(sampler(103, 16, lengths={"a": self.LENGTHS}, pool=3))
        first, second = (list(self.make(pool=3, rank=r, world_size=2)) for r in (0, 1))
        for batch, one, two in zip(whole[:6], first[:6], second[:6], strict=True):
            assert len(batch) == 16 or indices([batch])[:3] == indices([one])
            if len(batch) == 16:
                assert indices([batch]) == indices([one, two])

    def test_resume(self):
        resumed = self.make()
        resumed.resume(0, 4)
        assert list(resumed) == list(self.make())[4:]

    def test_sources_without_lengths_are_left_alone(self):
        mixed = {"a": 40, "b": 40}
        given = list(sampler(mixed, 4, lengths={"a": self.LENGTHS[:40]}, pool=5, drop_last=True))
        assert Counter(indices(given)) == Counter((name, i) for name in mixed for i in range(40))

    def test_a_module_reads_the_lengths_of_its_sources(self):
        class Known(PointsSource):
            def lengths(self, name):
                return [len(sample.modalities["points"]) for sample in self.split(name)]

        def padding(**options):
            data = module({"a": Known(size=64)}, **options)
            return sum(int((~b.inputs["points"]["mask"]).sum()) for b in data.train_dataloader())

        assert padding(buckets=8) * 4 < padding()

        class Wrong(PointsSource):
            def lengths(self, name):
                return [1, 2]

        with pytest.raises(DataError, match=r"Wrong.lengths gives 2 numbers for the 20 samples"):
            module({"a": Wrong(size=20)}, buckets=4).train_dataloader()
        with pytest.raises(ConfigError, match=r"PointsSource a method `lengths`"):
            module(buckets=4).train_dataloader()
        with pytest.raises(ConfigError, match="block"):
            module(buckets=4, block=2)


class TestMixture:
    SIZES = {"a": 20, "b": 7, "c": 1}

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_batch_is_of_one_source_and_all_samples_come(self, shuffle):
        given = list(sampler(self.SIZES, 4, shuffle))
        assert all(len({key.source for key in batch}) == 1 for batch in given)
        assert Counter(indices(given)) == Counter((name, i) for name, size in self.SIZES.items() for i in range(size))

    def test_sources_are_mixed(self):
        order = [batch[0].source for batch in sampler({"a": 40, "b": 40}, 4)]
        assert order[:10] != ["a"] * 10
        assert order != sorted(order, reverse=True)

    def test_weights_are_frequencies_of_batches(self):
        batches = sampler({"a": 4000, "b": 40}, 4, weights={"a": 1.0, "b": 3.0})
        given = list(batches)
        share = sum(batch[0].source == "b" for batch in given) / len(given)
        assert abs(share - 0.75) < 3 * (0.75 * 0.25 / len(given)) ** 0.5
        counts = Counter(index for name, index in indices(given) if name == "b")
        assert len(counts) == 40
        assert max(counts.values()) - min(counts.values()) <= 1  # each sample once before any comes again

    def test_weight_zero_leaves_a_source_out(self):
        assert {batch[0].source for batch in sampler(self.SIZES, 2, weights={"a": 1, "b": 0, "c": 1})} == {"a", "c"}


class TestProcesses:
    @pytest.mark.parametrize("world_size", [2, 3])
    @pytest.mark.parametrize("sizes", [{"a": 24}, {"a": 31, "b": 10}])
    def test_evaluation_is_divided_without_loss_or_repetition(self, sizes, world_size):
        parts = [list(sampler(sizes, 4, False, rank=r, world_size=world_size)) for r in range(world_size)]
        assert Counter(indices(chain(*parts))) == Counter(indices(sampler(sizes, 4, False)))
        assert [len(sampler(sizes, 4, False, rank=r, world_size=world_size)) for r in range(world_size)] == [
            len(part) for part in parts
        ]

    @pytest.mark.parametrize("world_size", [2, 3])
    @pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 2.0}])
    def test_steps_of_all_processes_match(self, world_size, weights):
        # heads wait for the rows of all processes: another source or size at the same step would never end
        options = {"world_size": world_size, "weights": weights}
        parts = [list(sampler({"a": 31, "b": 10}, 4, rank=r, **options)) for r in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        for step in zip(*parts, strict=True):
            assert len({batch[0].source for batch in step}) == 1
            assert len({len(batch) for batch in step}) == 1
            assert len({batch[0].seed for batch in step}) == world_size

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_training_never_repeats_and_leaves_out_only_what_can_not_be_divided(self, world_size):
        parts = [list(sampler({"a": 31, "b": 10}, 4, rank=r, world_size=world_size)) for r in range(world_size)]
        counts = Counter(indices(chain(*parts)))
        assert set(counts.values()) == {1}
        for name, size in (("a", 31), ("b", 10)):
            assert sum(source == name for source, _ in counts) == size // world_size * world_size

    def test_two_processes_see_what_one_with_twice_the_batch_sees(self):
        whole = list(sampler(40, 8, seed=3))
        first, second = (list(sampler(40, 4, seed=3, rank=r, world_size=2)) for r in (0, 1))
        for batch, one, two in zip(whole, first, second, strict=True):
            assert indices([batch]) == indices([one, two])

    def test_small_data_gives_every_process_a_batch(self):
        parts = [list(sampler(5, 4, rank=r, world_size=2, drop_last=True)) for r in (0, 1)]
        assert [len(batch) for part in parts for batch in part] == [2, 2]


class Numbers(Processor):
    """Numbers; negative ones are bad, and training adds noise."""

    def __call__(self, samples, *, training=False):
        for index, sample in enumerate(samples):
            if sample < 0:
                raise SampleError(sample, "negative", "a number from 0", index)
        values = torch.tensor([float(sample) for sample in samples])
        return {"value": values + (torch.rand(len(values)) if training else 0)}


class Listed(Source):
    """Samples from a list of values; None can't even be read."""

    def __init__(self, values, name="listed", labels=None) -> None:
        self.values, self.name, self.labels = values, name, labels

    def split(self, name):
        source = self

        class Examples:
            def __len__(self):
                return len(source.values) if name == "train" else 3

            def __getitem__(self, index):
                if source.values[index] is None:
                    raise SampleError(f"{source.name}-{index}", "unreadable", "a file")
                labels = {"group": index} if source.labels is None else source.labels(index)
                return Sample({"number": source.values[index]}, f"{source.name}-{index}", labels)

        return Examples()


def dataset(values, training=False, **options):
    return BatchDataset({"a": Listed(values).split("train")}, {"number": Numbers()}, training=training, **options)


def keys(*numbers, seed=0):
    return [Key("a", number, seed) for number in numbers]


class TestReading:
    def test_inputs_labels_and_names(self):
        batch = dataset([5, 6, 7])[keys(2, 0)]
        assert batch.inputs["number"]["value"].tolist() == [7.0, 5.0]
        assert batch.labels["group"].tolist() == [2, 0]
        assert batch.labels["group"].dtype == torch.long
        assert batch.names == ["listed-2", "listed-0"]
        assert (batch.source, len(batch)) == ("a", 2)

    def test_labels_that_some_samples_lack_are_left_out(self):
        def labels(index):
            return {"score": index / 2, **({"group": 1} if index else {})}

        parts = {"a": Listed([1, 2, 3], labels=labels).split("train")}
        batch = BatchDataset(parts, {"number": Numbers()}, training=False)[keys(0, 1)]
        assert set(batch.labels) == {"score"}
        assert batch.labels["score"].dtype == torch.float32
        assert batch.labels["score"].tolist() == [0.0, 0.5]

    def test_modalities_that_the_model_lacks_are_left_out(self):
        batch = BatchDataset({"a": Listed([1]).split("train")}, {}, training=False)[keys(0)]
        assert batch.inputs == {}

    def test_bad_samples_are_listed_and_the_others_stay_in_order(self):
        batch = dataset([5, -1, None, 8, -2])[keys(4, 3, 2, 1, 0)]
        assert batch.names == ["listed-3", "listed-0"]
        assert batch.inputs["number"]["value"].tolist() == [8.0, 5.0]
        assert batch.labels["group"].tolist() == [3, 0]
        assert {(row["sample"], row["problem"]) for row in batch.skipped} == {
            ("listed-4", "negative"),
            ("listed-2", "unreadable"),
            ("listed-1", "negative"),
        }
        assert all(row["source"] == "a" and row["split"] == "train" for row in batch.skipped)

    def test_in_training_others_take_their_places(self):
        # the batches of all processes must keep one size
        values = [5, -1, None, 8, *range(10, 30)]
        batch = dataset(values, training=True)[keys(0, 1, 2, 3)]
        assert len(batch) == 4
        assert batch.names[:2] == ["listed-0", "listed-3"]
        assert len(set(batch.names)) == 4
        assert len(batch.skipped) == 2
        assert batch.names == dataset(values, training=True)[keys(0, 1, 2, 3)].names

    def test_a_batch_of_bad_samples_has_no_inputs(self):
        for training in (False, True):
            batch = dataset([-1, None, -3], training)[keys(0, 1, 2)]
            assert batch.inputs == {}
            assert len(batch) == 0
            assert len(batch.skipped) == 3

    @pytest.mark.parametrize(("values", "problem"), [([5, -1], "negative"), ([5, None], "unreadable")])
    def test_on_error_raise_names_the_sample(self, values, problem):
        with pytest.raises(DataError, match=f"listed-1: {problem}"):
            dataset(values, on_error="raise")[keys(0, 1)]

    def test_augmentation_depends_on_the_seed_of_the_batch_alone(self):
        data = dataset(list(range(9)), training=True)
        first = data[keys(1, 2, seed=4)].inputs["number"]["value"]
        torch.rand(5)
        assert torch.equal(data[keys(1, 2, seed=4)].inputs["number"]["value"], first)
        assert not torch.equal(data[keys(1, 2, seed=5)].inputs["number"]["value"], first)

    def test_reading_leaves_the_generators_alone(self):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        dataset(list(range(9)), training=True)[keys(1, 2)]
        assert torch.equal(torch.rand(3), expected)

    def test_seeded_covers_all_generators_and_restores_them(self):
        import random

        import numpy as np

        def draw():
            return float(torch.rand(1)), float(np.random.rand()), random.random()

        with seeded(7):
            first = draw()
        outside = draw()
        with seeded(7):
            assert draw() == first
        assert outside not in (first, draw())

    def test_hash_seed_mixes(self):
        seeds = {hash_seed(a, b) for a in range(30) for b in range(30)}
        assert len(seeds) == 900
        assert hash_seed(1, 2) == hash_seed(1, 2)


class TestConcatenation:
    def test_index(self):
        parts = [["a", "b"], [], ["c"]]
        joined = Concatenation(parts)
        assert [joined[i] for i in range(len(joined))] == ["a", "b", "c"]
        assert len(Concatenation([])) == 0

    @pytest.mark.parametrize("index", [3, -1])
    def test_outside(self, index):
        with pytest.raises(IndexError):
            Concatenation([["a", "b"], ["c"]])[index]


def module(sources=None, **options):
    data = MultimodalData(sources or {"a": PointsSource(size=20)}, **{"batch_size": 8, **options})
    return data.attach({"points": PointsProcessor(), "text": make_model().processors["text"]})


def contents(loader):
    return [
        (batch.names, batch.seed, {f"{m}/{k}": v for m, t in batch.inputs.items() for k, v in t.items()})
        for batch in loader
    ]


def assert_same(first, second):
    assert [names for names, *_ in first] == [names for names, *_ in second]
    for (_, seed, one), (_, other_seed, other) in zip(first, second, strict=True):
        assert seed == other_seed
        assert all(torch.equal(one[key], other[key]) for key in one)


class TestModule:
    def test_batches_do_not_depend_on_workers_or_on_what_was_drawn_before(self):
        torch.manual_seed(1)
        alone = contents(module().train_dataloader())
        torch.manual_seed(2)
        assert_same(contents(module(num_workers=2).train_dataloader()), alone)

    def test_errors_of_workers_keep_their_type(self):
        data = MultimodalData({"a": Listed([1, -1, 2, 3])}, batch_size=4, num_workers=1, on_error="raise")
        with pytest.raises(DataError, match="listed-1"):
            list(data.attach({"number": Numbers()}).train_dataloader())

    def test_training_shuffles_and_drops_and_evaluation_does_neither(self):
        data = module()
        assert [len(batch) for batch in data.train_dataloader()] == [8, 8]
        assert sorted(len(batch) for batch in module(drop_last=False).train_dataloader()) == [4, 8, 8]
        names = [name for batch in data.test_dataloader() for name in batch.names]
        assert names == [f"test-{i}" for i in range(16)]
        assert [len(batch) for batch in module(eval_batch_size=5).val_dataloader()] == [5, 5, 5, 1]

    def test_evaluation_is_not_augmented(self):
        data = module()
        raw = PointsProcessor()([s.modalities["points"] for s in PointsSource().split("validation")[:8]])
        for _ in range(2):
            batch = next(iter(data.val_dataloader()))
            assert torch.equal(batch.inputs["points"]["points"], raw["points"])

    def test_small_data_trains_in_one_batch(self):
        assert [len(batch) for batch in module({"a": PointsSource(size=3)}).train_dataloader()] == [3]

    def test_a_small_source_of_a_mixture_is_not_lost(self):
        data = module({"a": PointsSource(size=20), "b": PointsSource(size=3)})
        assert Counter(batch.source for batch in data.train_dataloader()) == {"a": 2, "b": 1}

    def test_empty_data_is_an_error_that_names_it(self):
        with pytest.raises(DataError, match="a "):
            module({"a": PointsSource(size=0)}).train_dataloader()

    def test_no_validation_data_is_no_loader(self):
        class TrainOnly(PointsSource):
            def split(self, name):
                return super().split(name) if name == "train" else []

        assert module({"a": TrainOnly()}).val_dataloader() == []

    def test_path_replaces_the_data_of_sources(self):
        data = MultimodalData({"a": PointsSource()}, path="mine")
        assert data.sources["a"].path == "mine"
        data = MultimodalData({"a": PointsSource(), "b": PointsSource()}, path={"b": "mine"})
        assert (data.sources["a"].path, data.sources["b"].path) == (None, "mine")
        data = MultimodalData({"a": PointsSource(), "b": PointsSource()}, path="mine")
        assert (data.sources["a"].path, data.sources["b"].path) == ("mine", "mine")

        class OtherFormat(PointsSource):
            pass

        with pytest.raises(ConfigError, match="several kinds"):
            MultimodalData({"a": PointsSource(), "b": OtherFormat()}, path="mine")
        with pytest.raises(ConfigError, match="path names"):
            MultimodalData({"a": PointsSource()}, path={"c": "mine"})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size"),
            ({"batch_size": 3, "views": 2}, "views"),
            ({"weights": {"b": 1.0}}, "weights"),
            ({"weights": {"a": 0.0}}, "weights"),
            ({"weights": {"a": -1.0}}, "weights"),
        ],
    )
    def test_settings_that_do_not_fit_are_refused(self, options, message):
        with pytest.raises(ConfigError, match=message):
            MultimodalData({"a": PointsSource()}, **options)

    def test_without_sources_or_model(self):
        with pytest.raises(ConfigError, match="source"):
            MultimodalData({})
        with pytest.raises(ConfigError, match="attach"):
            MultimodalData({"a": PointsSource()}).train_dataloader()

    @pytest.mark.parametrize(
        "change", [{"batch_size": 4}, {"seed": 1}, {"drop_last": False}, {"weights": {"a": 2.0}}, {"num_workers": 1}]
    )
    def test_a_position_is_refused_where_it_would_mean_something_else(self, change):
        state = {"epoch": 1, "batches": 1, "setting": module()._setting() | {"sizes": {"a": 20}}}
        module().load_state_dict(state)
        with pytest.raises(CheckpointError, match=next(iter(change))):
            module(**change).load_state_dict(state)

    def test_another_number_of_processes_is_refused(self):
        setting = module()._setting() | {"world_size": 2}
        with pytest.raises(CheckpointError, match="world_size=2, this run has world_size=1"):
            module().load_state_dict({"epoch": 1, "batches": 1, "setting": setting})

    def test_other_data_is_noticed_when_it_is_opened(self):
        state = {"epoch": 1, "batches": 1, "setting": module()._setting() | {"sizes": {"a": 20}}}
        data = module({"a": PointsSource(size=21)})
        data.load_state_dict(state)
        with pytest.raises(CheckpointError, match="sizes"):
            data.train_dataloader()

    @pytest.mark.parametrize("loader_first", [True, False])
    def test_position_is_taken_up_in_either_order(self, loader_first):
        state = {"epoch": 1, "batches": 1, "setting": module()._setting() | {"sizes": {"a": 20}}}
        data = module()
        if loader_first:
            loader = data.train_dataloader()
            data.load_state_dict(state)
        else:
            data.load_state_dict(state)
            loader = data.train_dataloader()
        whole = module().train_dataloader()
        whole.sampler.set_epoch(1)
        assert_same(contents(loader), contents(whole)[1:])


def test_a_batch_without_names_is_empty():
    assert len(Batch({})) == 0
