"""Samples to batches: what runs in DataLoader workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmpt.encoder import Inputs, Processor
from mmpt.errors import DataError, SampleError
from mmpt.source import Examples, Sample, Split

OnError = Literal["skip", "raise"]


@dataclass
class Batch:
    """A processed batch.

    Attributes:
        inputs: modality -> tensors of its processor.
        labels: name -> (batch,), long for integers, float32 otherwise.
        names: what names each sample to a person.
        source: the dataset that the batch comes from.
        skipped: samples of the batch that could not be used, as `SampleError.as_record` with `source` and `split`.
        seed: for what is random about the batch (masks, dropout): the same whenever and wherever it is computed.
    """

    inputs: dict[str, Inputs]
    labels: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    source: str = ""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0

    def __len__(self) -> int:
        return len(self.names)


class Key(NamedTuple):
    """What a sampler asks for: a sample of a source, the seed of the batch that it is for, and which view of it."""

    source: str
    index: int  # type: ignore[assignment]  # the method `index` of tuples is not used
    seed: int
    view: int = 0


class BatchDataset(Dataset[Batch]):
    """Processed batches of one or several collections; its index is a list of keys, as `MixtureSampler` gives.

    Args:
        parts: source name -> samples.
        processors: of the model, by modality; modalities that a sample carries and the model lacks are left out.
        training: whether augmentation is on.
        on_error: "skip" leaves a bad sample out and lists it, "raise" stops with a DataError.
        split: named in the list of skipped samples.
    """

    def __init__(
        self,
        parts: Mapping[str, Examples],
        processors: Mapping[str, Processor],
        *,
        training: bool,
        on_error: OnError = "skip",
        split: Split = "train",
    ) -> None:
        self.parts = dict(parts)
        self.processors = dict(processors)
        self.training, self.on_error, self.split = training, on_error, split

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    def __getitem__(self, keys: list[Key]) -> Batch:
        """Read and process; a batch whose samples are all bad has no inputs.

        In training others of the source take the place of bad samples, so that the batches of all processes have one
        size.
        """
        batch = Batch({}, source=keys[0].source, seed=keys[0].seed)
        samples = [sample for key in keys if (sample := self._read(key, batch)) is not None]
        substitutes = self._substitutes(keys) if self.training else iter(())
        while True:
            while len(samples) < len(keys) and (key := next(substitutes, None)) is not None:
                if (sample := self._read(key, batch)) is not None:
                    samples.append(sample)
            if not samples:
                return batch
            try:
                with seeded(batch.seed):
                    return self._process(samples, batch)
            except SampleError as error:
                self._skip(error, samples.pop(error.index), batch)

    def _read(self, key: Key, batch: Batch) -> Sample | None:
        # A source that chooses at random (one of several captions) does so from the batch's seed and the index.
        with seeded(hash_seed(key.seed, key.index, key.view)):
            try:
                return self.parts[key.source][key.index]
            except SampleError as error:
                self._skip(error, None, batch)
                return None

    def _substitutes(self, keys: list[Key]) -> Iterator[Key]:
        """Samples that are not in the batch, at most as many as are."""
        source, seed = keys[0].source, keys[0].seed
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(self.parts[source]), (2 * len(keys),), generator=generator).tolist()
        taken = {key.index for key in keys}
        others = (index for index in dict.fromkeys(drawn) if index not in taken)
        yield from (Key(source, index, seed) for index in islice(others, len(keys)))

    def _process(self, samples: list[Sample], batch: Batch) -> Batch:
        inputs = {
            name: processor([s.modalities[name] for s in samples], training=self.training)
            for name, processor in self.processors.items()
            if all(name in s.modalities for s in samples)
        }
        labels = {
            name: torch.tensor([s.labels[name] for s in samples])
            for name in samples[0].labels
            if all(name in s.labels for s in samples)
        }
        return replace(batch, inputs=inputs, labels=labels, names=[s.name for s in samples])

    def _skip(self, error: SampleError, sample: Sample | None, batch: Batch) -> None:
        record = error.as_record() | {"source": batch.source, "split": self.split}
        if sample is not None:
            record["sample"] = sample.name
        if self.on_error == "raise":  # with one argument, as a DataLoader worker could not pass on a SampleError
            raise DataError(
                "{source}, {split} split: {sample}: {problem}; expected {expected}. Either (1) mend it, or (2) set "
                "on_error to skip".format(**record)
            ) from error
        batch.skipped.append(record)


class MixtureSampler(Sampler[list[Key]]):
    """Batches of keys: shuffled, resumable, the same on every worker count, disjoint between processes.

    Every batch comes from one source. With weights, the source of each batch is drawn with them; without, each source
    gives all its batches once in an epoch.

    In training all processes have batches of one source and one size at the same step, as heads compare the rows of
    all of them: n processes with batches of b see what one process with batches of n * b would. In evaluation each
    process takes every n-th batch.

    Args:
        sizes: source name -> number of samples.
        batch_size: rows in a batch of one process, views included.
        shuffle: training: in another order each epoch, from `seed` and the epoch. Else evaluation: in order, the same
            every time.
        seed: of the order and of every batch's augmentation.
        views: how often each sample stands in its batch, every time read and augmented anew.
        block: shuffle runs of this many neighbouring samples instead of single samples.
        weights: source name -> relative frequency.
        drop_last: leave out a source's last, smaller batch, unless it is the only one. Without it, training over
            several processes leaves out the samples that don't divide by their number.
        rank: of this process.
        world_size: number of processes.
        lengths: source name -> length of each sample; sources that are named are put into batches of similar lengths.
        pool: batches (of all processes together) whose samples are sorted by length together.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        views: int = 1,
        block: int = 1,
        weights: Mapping[str, float] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        lengths: Mapping[str, Sequence[int]] | None = None,
        pool: int = 0,
    ) -> None:
        self.lengths = {name: torch.as_tensor(values) for name, values in (lengths or {}).items()}
        self.pool = pool
        self.sizes, self.batch_size, self.shuffle, self.seed = dict(sizes), batch_size // views, shuffle, seed
        self.views = views
        self.block = block
        self.weights, self.drop_last, self.rank, self.world_size = weights, drop_last, rank, world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; Lightning calls this before each one."""
        if self.shuffle and epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Go on within an epoch, behind its first `start` batches."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch, also when the first ones are not given again after a resume."""
        steps = sum(len(self._cut(size)) for size in self.sizes.values())
        return steps if self.shuffle else len(range(self.rank, steps, self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        orders = {
            source: self._sorted(source, self._shuffled(size, generator), generator)
            if self.shuffle
            else torch.arange(size)
            for source, size in self.sizes.items()
        }
        for number, (source, first, rows) in enumerate(self._plan(generator)):
            if number < self.start:
                continue
            seed = hash_seed(self.seed, self.epoch, number * self.world_size + self.rank)
            indices = orders[source][first : first + rows].tolist()
            yield [Key(source, index, seed, view) for view in range(self.views) for index in indices]

    def _shuffled(self, size: int, generator: torch.Generator) -> Tensor:
        """All samples, runs of neighbours in random order; the runs begin elsewhere in each epoch."""
        if self.block == 1:
            return torch.randperm(size, generator=generator)
        turned = torch.arange(size).roll(int(torch.randint(self.block, (), generator=generator)))
        runs = turned.split(self.block)
        return torch.cat([runs[number] for number in torch.randperm(len(runs), generator=generator).tolist()])

    def _sorted(self, source: str, order: Tensor, generator: torch.Generator) -> Tensor:
        """The same order with samples of similar lengths in a batch, and the batches in random order.

        What fills no whole batch stays at the end as it was drawn: `drop_last` must not leave out the longest samples.
        """
        if source not in self.lengths or self.pool < 2:
            return order
        whole = self.batch_size * self.world_size
        rest = len(order) // whole * whole
        batches: list[Tensor] = []
        for pool in order[:rest].split(self.pool * whole):
            ranked = pool[self.lengths[source][pool].argsort(stable=True)]
            batches += ranked.split(whole)
        shuffled = [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
        return torch.cat([*shuffled, order[rest:]])

    def _cut(self, size: int) -> list[tuple[int, int]]:
        """Batches of a source, as the place of their first sample in its order and their number of samples.

        In training those of this process, else of all.
        """
        if not self.shuffle:
            return [(first, min(self.batch_size, size - first)) for first in range(0, size, self.batch_size)]
        whole = self.batch_size * self.world_size
        steps = [(first + self.rank * self.batch_size, self.batch_size) for first in range(0, size - whole + 1, whole)]
        rest = size % whole // self.world_size
        if rest and not (self.drop_last and steps):
            steps.append((size // whole * whole + self.rank * rest, rest))
        return steps

    def _plan(self, generator: torch.Generator) -> list[tuple[str, int, int]]:
        """The batches of this process in this epoch: source, place of the first sample, number of samples."""
        batches = {source: self._cut(size) for source, size in self.sizes.items()}
        flat = [(source, *batch) for source, parts in batches.items() for batch in parts]
        if not self.shuffle:
            return flat[self.rank :: self.world_size]
        if self.weights is None:
            return [flat[number] for number in torch.randperm(len(flat), generator=generator).tolist()]
        names = [name for name in batches if batches[name]]
        chances = torch.tensor([float(self.weights[name]) for name in names])
        drawn = torch.multinomial(chances, len(flat), replacement=True, generator=generator).tolist()
        again = {name: cycle(batches[name]) for name in names}
        return [(names[choice], *next(again[names[choice]])) for choice in drawn]


class seeded:  # noqa: N801 (reads as a verb where it is used)
    """Context in which torch's, numpy's and Python's generators start from a seed; afterwards they go on as before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed % 2**32

    def __enter__(self) -> None:
        """Seed."""
        self.states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        torch.random.default_generator.manual_seed(self.seed)
        np.random.seed(self.seed)
        random.seed(self.seed)

    def __exit__(self, *error: object) -> None:
        """Restore."""
        torch.set_rng_state(self.states[0])
        np.random.set_state(self.states[1])
        random.setstate(self.states[2])


def hash_seed(*numbers: int) -> int:
    """One well-mixed 32-bit seed from several numbers, the same in every process and on every machine."""
    return int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])
