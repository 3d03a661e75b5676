"""Samples to batches: what runs in DataLoader workers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mmpt.encoder import Inputs, Processor
from mmpt.errors import SampleError
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
    """

    inputs: dict[str, Inputs]
    labels: dict[str, Tensor] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    source: str = ""
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


class Key(NamedTuple):
    """What a sampler asks for: a sample of a source, the seed of the batch that it is for, and which view of it."""

    source: str
    index: int
    seed: int
    view: int = 0


class BatchDataset(Dataset[Batch]):
    """Processed batches of one or several collections; its index is a list of keys, as `MixtureSampler` gives.

    Args:
        parts: source name -> samples.
        processors: of the model, by modality; modalities that a sample carries and the model lacks are left out.
        training: whether augmentation is on.
        on_error: "skip" leaves a bad sample out and lists it, "raise" stops.
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
        """Read and process; a batch whose samples are all bad has no inputs."""
        source, seed = keys[0].source, keys[0].seed
        samples: list[Sample] = []
        skipped: list[dict[str, Any]] = []
        for key in keys:
            # A source that chooses at random (one of several captions) does so from the batch's seed and the index.
            with seeded(hash_seed(key.seed, key.index, key.view)):
                try:
                    samples.append(self.parts[source][key.index])
                except SampleError as error:
                    self._skip(error, None, source, skipped)
        while samples:
            try:
                with seeded(seed):
                    return self._process(samples, source, skipped)
            except SampleError as error:
                self._skip(error, samples.pop(error.index), source, skipped)
        return Batch({}, source=source, skipped=skipped)

    def _process(self, samples: list[Sample], source: str, skipped: list[dict[str, Any]]) -> Batch:
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
        return Batch(inputs, labels, [s.name for s in samples], source, skipped)

    def _skip(self, error: SampleError, sample: Sample | None, source: str, skipped: list[dict[str, Any]]) -> None:
        if self.on_error == "raise":
            raise error
        record = error.as_record()
        if sample is not None:
            record["sample"] = sample.name
        skipped.append({**record, "source": source, "split": self.split})


class MixtureSampler(Sampler[list[Key]]):
    """Batches of keys: shuffled, resumable, the same on every worker count, disjoint between processes.

    Every batch comes from one source. With weights, the source of each batch is drawn with them; without, each source
    gives all its batches once in an epoch.

    Args:
        sizes: source name -> number of samples.
        batch_size: rows in a batch of one process, views included.
        shuffle: in another order each epoch, from `seed` and the epoch; else in order.
        seed: of the order and of every batch's augmentation.
        views: how often each sample stands in its batch, every time read and augmented anew.
        weights: source name -> relative frequency.
        drop_last: leave out a source's last, smaller batch.
        rank: of this process.
        world_size: number of processes. Each takes every world_size-th batch; when shuffling, batches that would leave
            some process without one are left out.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        views: int = 1,
        weights: Mapping[str, float] | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sizes, self.batch_size, self.shuffle, self.seed = dict(sizes), batch_size // views, shuffle, seed
        self.views = views
        self.weights, self.drop_last, self.rank, self.world_size = weights, drop_last, rank, world_size
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; Lightning calls this before each one."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume(self, epoch: int, start: int) -> None:
        """Go on within an epoch, behind its first `start` batches."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Batches of a whole epoch, also when the first ones are not given again after a resume."""
        return self._count()

    def _count(self) -> int:
        batches = sum(self._batches_of(size) for size in self.sizes.values())
        if self.shuffle:
            return batches // self.world_size
        return len(range(self.rank, batches, self.world_size))

    def _batches_of(self, size: int) -> int:
        return size // self.batch_size if self.drop_last else -(-size // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        plan = self._plan()
        own = plan[self.rank :: self.world_size][: self._count()]
        for number, (source, indices) in enumerate(own):
            if number < self.start:
                continue
            seed = hash_seed(self.seed, self.epoch, self.rank, number)
            yield [Key(source, index, seed, view) for view in range(self.views) for index in indices]

    def _plan(self) -> list[tuple[str, list[int]]]:
        """The batches of all processes in this epoch."""
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
        batches: dict[str, list[list[int]]] = {}
        for source, size in self.sizes.items():
            order = torch.randperm(size, generator=generator).tolist() if self.shuffle else list(range(size))
            batches[source] = [
                order[number * self.batch_size : (number + 1) * self.batch_size]
                for number in range(self._batches_of(size))
            ]
        if self.weights is None or not self.shuffle:
            flat = [(source, batch) for source, parts in batches.items() for batch in parts]
            order = torch.randperm(len(flat), generator=generator).tolist() if self.shuffle else list(range(len(flat)))
            return [flat[number] for number in order]
        names = [name for name in batches if batches[name]]
        chances = torch.tensor([float(self.weights[name]) for name in names])
        total = sum(len(parts) for parts in batches.values())
        drawn = torch.multinomial(chances, total, replacement=True, generator=generator).tolist()
        used = dict.fromkeys(names, 0)
        plan = []
        for choice in drawn:
            name = names[choice]
            plan.append((name, batches[name][used[name] % len(batches[name])]))
            used[name] += 1
        return plan


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
