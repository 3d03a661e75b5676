"""MultimodalData: the LightningDataModule for one dataset or a mixture of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
from torch.utils.data import DataLoader

from mmpt.batches import Batch, BatchDataset, MixtureSampler, OnError
from mmpt.encoder import Processor
from mmpt.errors import CheckpointError, ConfigError, DataError
from mmpt.source import Source, Split, WholeSource


class MultimodalData(L.LightningDataModule):
    """Batches of one source, or of several with weights, processed as the model wants it.

    Args:
        sources: name -> dataset.
        path: the user's own data in place of the default; with sources of several classes a mapping from name to path.
        batch_size: samples in a training batch of one process.
        eval_batch_size: samples in a batch of validation, test and prediction; None is `batch_size`.
        views: how often each sample stands in its training batch, every time read and augmented anew: for sources that
            draw among several pictures or texts of one thing, and heads that pull them together.
        block: keep this many neighbouring samples of a source together when shuffling: where a source puts what is
            alike side by side, a batch then holds hard negatives, and positives of each other.
        buckets: sort the samples of this many training batches by length, so that a batch holds samples of similar
            lengths and little padding; 0 or 1 leaves them as they are drawn. Sources must know their `lengths`. Batches
            are in random order all the same, but contrastive heads then compare samples of similar lengths. With
            several sources, those without lengths are left alone.
        weights: name -> how often a training batch comes from this source, relative to the others; None: each source's
            batches come once in an epoch.
        num_workers: processes that prepare batches; 0 prepares them in the training process.
        seed: of the order of samples and of their augmentation.
        on_error: "skip" lists a bad sample in the run's report and goes on; "raise" stops at it.
        drop_last: leave out the last, smaller training batch of an epoch, unless a source has no other.
        predict: what `mmpt predict` predicts: the test split, or all samples in order ("everything").

    Attributes:
        sizes: source -> split -> number of samples, of the splits that were asked for so far.

    Raises:
        ConfigError: settings that don't fit together.
        DataError: a source has no data for training.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        path: str | dict[str, str] | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        views: int = 1,
        block: int = 1,
        buckets: int = 0,
        weights: dict[str, float] | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_error: OnError = "skip",
        drop_last: bool = True,
        predict: Literal["test", "everything"] = "test",
    ) -> None:
        super().__init__()
        if not sources:
            raise ConfigError("MultimodalData needs at least one source")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
        if views < 1 or batch_size % views:
            raise ConfigError(f"batch_size is {batch_size} and views is {views}; a batch must hold whole samples")
        _check_names("weights", weights, sources)
        if weights and (min(weights.values()) < 0 or sum(weights.values()) <= 0):
            raise ConfigError(f"weights are {weights}; none may be negative, and one must be positive")
        self.sources = sources
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.views = views
        self.block = block
        if buckets < 0 or (buckets > 1 and block > 1):
            raise ConfigError(
                f"buckets is {buckets} and block is {block}; sorting by length tears neighbours apart, use one"
            )
        self.buckets = buckets
        self.weights, self.num_workers, self.seed = weights, num_workers, seed
        self.on_error, self.drop_last = on_error, drop_last
        self.predict, self.predict_start = predict, 0  # which batch prediction begins with
        self.sizes: dict[str, dict[str, int]] = {}
        self._processors: dict[str, Processor] | None = None
        self._train_sampler: MixtureSampler | None = None
        self._position: dict[str, Any] | None = None
        self._progress: tuple[int, int] | None = None  # epoch, and how many of its training batches were given
        self._set_paths(path)

    def _set_paths(self, path: str | dict[str, str] | None) -> None:
        if path is None:
            return
        if isinstance(path, str):
            if len({type(source) for source in self.sources.values()}) > 1:
                raise ConfigError(
                    f"path names one place, but there are sources of several kinds ({', '.join(self.sources)}); give a "
                    f"mapping such as {{{next(iter(self.sources))}: {path}}}"
                )
            path = dict.fromkeys(self.sources, path)
        _check_names("path", path, self.sources)
        for name, own in path.items():
            self.sources[name].path = own

    def attach(self, processors: Mapping[str, Processor]) -> MultimodalData:
        """Use these processors; within a Trainer they are taken from its model."""
        self._processors = dict(processors)
        return self

    @property
    def processors(self) -> dict[str, Processor]:
        """The processors of the model that is trained or evaluated."""
        if self._processors is not None:
            return self._processors
        if self.trainer is None:
            raise ConfigError(
                "MultimodalData has no model yet: call attach(model.processors), or use it with a Trainer"
            )
        return self.trainer.lightning_module.model.processors  # type: ignore[union-attr,return-value]

    def loader(self, split: Split, *, training: bool = False) -> DataLoader[Batch]:
        """Batches of one split.

        Args:
            split: which.
            training: shuffled, augmented, in batches of `batch_size`; else in order and complete.

        Raises:
            DataError: every source is empty in this split.
        """
        parts = {name: source.split(split) for name, source in self.sources.items()}
        sizes = {name: len(part) for name, part in parts.items()}
        for name, size in sizes.items():
            self.sizes.setdefault(name, {})[split] = size
        if sum(sizes.values()) == 0:
            origins = ", ".join(f"{name} ({source.path or 'default data'})" for name, source in self.sources.items())
            raise DataError(f"no samples in the {split} split of {origins}")
        lengths = self._lengths(split, sizes) if training and self.buckets > 1 else {}
        trainer = self.trainer
        world_size = trainer.world_size if trainer is not None else 1
        sampler = MixtureSampler(
            sizes,
            self.batch_size if training else self.eval_batch_size,
            shuffle=training,
            seed=self.seed,
            views=self.views if training else 1,
            block=self.block,
            weights=self.weights if training else None,
            drop_last=training and self.drop_last,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=world_size,
            lengths=lengths,
            pool=self.buckets,
        )
        if training:
            if len(sampler) == 0:
                raise DataError(
                    f"{sum(sizes.values())} samples for training can't be divided by {world_size} processes"
                )
            self._train_sampler, self._progress = sampler, None
            self._resume()
        dataset = BatchDataset(parts, self.processors, training=training, on_error=self.on_error, split=split)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=_same,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0 and training,
        )

    def _lengths(self, split: Split, sizes: Mapping[str, int]) -> dict[str, Sequence[int]]:
        """Lengths of the samples of each source that knows them."""
        known: dict[str, Sequence[int]] = {}
        for name, source in self.sources.items():
            lengths = source.lengths(split)
            if lengths is None:
                continue
            if len(lengths) != sizes[name]:
                raise DataError(
                    f"{type(source).__name__}.lengths gives {len(lengths)} numbers for the {sizes[name]} samples of "
                    f"the {split} split"
                )
            known[name] = lengths
        if not known:
            raise ConfigError(
                f"buckets={self.buckets} needs the lengths of samples, and no source gives them. Either (1) give "
                f"{type(next(iter(self.sources.values()))).__name__} a method `lengths`, or (2) set buckets to 0; a "
                "text transformer with packing: true does without"
            )
        return known

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, augmented batches of the training split."""
        return self.loader("train", training=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The validation split in order; no loader where no source has one."""
        if all(len(source.split("validation")) == 0 for source in self.sources.values()):
            return []
        return self.loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test split in order."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test split, or everything, in order."""
        sources = self.sources
        if self.predict == "everything":
            self.sources = {name: WholeSource(source) for name, source in sources.items()}
        try:
            loader = self.loader("test")
        finally:
            self.sources = sources
        assert isinstance(loader.sampler, MixtureSampler)
        loader.sampler.start = self.predict_start
        return loader

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Count the training batches of the epoch; Lightning's count is not right after every kind of resume."""
        if self._train_sampler is not None and self.trainer is not None and self.trainer.training:
            epoch, batches = self._progress or (-1, 0)
            if epoch != self._train_sampler.epoch:
                epoch, batches = self._train_sampler.epoch, self._train_sampler.start
            self._progress = epoch, batches + 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position within the epoch, and what must be equal for it to mean the same."""
        if self._train_sampler is None or self.trainer is None:
            return {}
        epoch, batches = self._progress or (self._train_sampler.epoch, self._train_sampler.start)
        now = self.trainer.fit_loop.epoch_loop.batch_progress.current
        if now.ready > now.processed:  # type: ignore[attr-defined]  # stopped within a step, which has to be repeated
            batches -= 1
        if batches >= self.trainer.num_training_batches:
            # Loaders with workers ask for batches before they hear of a new epoch.
            epoch, batches = epoch + 1, 0
        return {
            "epoch": epoch,
            "batches": batches,
            "setting": self._setting() | {"sizes": self._train_sampler.sizes},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written.

        Raises:
            CheckpointError: the order of samples would be another one, because a setting differs.
        """
        if not state_dict:
            return
        _check_equal(state_dict["setting"], self._setting())
        self._position = state_dict
        self._resume()

    def _resume(self) -> None:
        """Move the sampler to the checkpoint's position as soon as both are there, whichever comes first."""
        if self._train_sampler is None or self._position is None:
            return
        _check_equal(self._position["setting"], {"sizes": self._train_sampler.sizes})
        self._train_sampler.resume(self._position["epoch"], self._position["batches"])

    def _setting(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "views": self.views,
            "block": self.block,
            "buckets": self.buckets,
            "weights": self.weights,
            "seed": self.seed,
            "sources": sorted(self.sources),
            "num_workers": self.num_workers,
            "world_size": self.trainer.world_size if self.trainer is not None else 1,
        }


def _same(batch: Batch) -> Batch:
    return batch


def _check_equal(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before[name] != value:
            reason = "a source that keeps something between its samples would give others"
            if name != "num_workers":
                reason = "the order of samples would differ"
            raise CheckpointError(
                f"the checkpoint was written with {name}={before[name]}, this run has {name}={value}; {reason}. Either "
                f"(1) resume with {name}={before[name]}, or (2) start a new run from its model folder"
            )


def _check_names(what: str, given: Mapping[str, Any] | None, sources: Mapping[str, Source]) -> None:
    unknown = set(given or ()) - set(sources)
    missing = set(sources) - set(given) if what == "weights" and given else set()
    if unknown or missing:
        raise ConfigError(
            f"{what} names {sorted(given or ())}, the sources are {sorted(sources)}; they must be the same names"
        )
