"""What a training leaves behind: facts, skipped inputs, metrics, the model folder, predictions, the report."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from mmpt import __version__
from mmpt.batches import Batch
from mmpt.checkpoint import same_weights
from mmpt.data import MultimodalData
from mmpt.errors import DataError
from mmpt.evaluation.record import DETAILS, OUTCOMES
from mmpt.model_card import about_source, write_card
from mmpt.repeatable import RepeatableModule
from mmpt.report import append_skipped, write_metrics, write_run_facts
from mmpt.report_data import read_numbers
from mmpt.streams import RowStream, fingerprint

SKIPPED = "skipped.jsonl"


class RunFolder(Callback):
    """Writes RUN/run.json, RUN/skipped.jsonl and RUN/model with its card.

    Args:
        run: the folder.
        license: of the model, for its card.
    """

    def __init__(self, run: Path, license: str | None = None) -> None:
        self.run, self.license = run, license
        self.listed: set[tuple[str, str]] = set()
        self.usable = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Remove what an earlier run has listed and measured here."""
        if stage == "fit" and trainer.is_global_zero:
            self.run.mkdir(parents=True, exist_ok=True)
            if trainer.ckpt_path is None:
                for name in (SKIPPED, "metrics.json", DETAILS, OUTCOMES):  # of an earlier run in this folder
                    (self.run / name).unlink(missing_ok=True)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note when it began; make the model folder's configuration, which `mmpt export` needs for a checkpoint."""
        self.started = time.time()
        if trainer.is_global_zero:
            _save(pl_module, self.run / "model")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """List what could not be used."""
        self._list(batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """List what could not be used."""
        self._list(batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """List what could not be used."""
        self._list(batch)

    def _list(self, batch: Batch) -> None:
        self.usable += len(batch)
        new = [row for row in batch.skipped if (row["source"], row["sample"]) not in self.listed]
        if new:
            self.listed.update((row["source"], row["sample"]) for row in new)
            append_skipped(self.run, new)
        if self.usable == 0:
            first = batch.skipped[0]
            raise DataError(
                f"none of the first {len(self.listed)} samples can be used; the first: {first['sample']}: "
                f"{first['problem']}; expected {first['expected']}"
            )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model folder and the facts of the run."""
        if not trainer.is_global_zero:
            return
        _save(pl_module, self.run / "model")
        write_run_facts(self.run, self._facts(trainer, pl_module))
        if isinstance(pl_module, RepeatableModule) and pl_module.summary:
            write_metrics(self.run, pl_module.summary)
        write_card(self.run)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write RUN/metrics.json, and what the module knows beyond numbers."""
        if not trainer.is_global_zero:
            return
        write_metrics(self.run, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")})
        if isinstance(pl_module, RepeatableModule) and pl_module.evaluation is not None:
            pl_module.evaluation.write(self.run)
        if isinstance(pl_module, RepeatableModule) and same_weights(pl_module.plain_model, self.run / "model"):
            write_sizes(self.run, trainer.datamodule)  # type: ignore[attr-defined]
            write_card(self.run)

    def _facts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        known = described(data) if isinstance(data, MultimodalData) else {}
        own = pl_module.facts() if isinstance(pl_module, RepeatableModule) else {"task": type(pl_module).__name__}
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        return {
            **own,
            **known,
            **({"license": self.license} if self.license else {}),
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "minutes": round((time.time() - self.started) / 60, 2),
            "parameters": sum(p.numel() for p in pl_module.parameters()),
            "trained parameters": trained,
            "samples skipped": len(self.listed),
            "device": str(pl_module.device),
            "precision": str(trainer.precision),
            "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started)),
            "versions": {
                "mmpt": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "lightning": L.__version__,
            },
        }


def described(data: MultimodalData) -> dict[str, Any]:
    """What run.json says of the data: `data`, where it lies; `about`, what it is; `samples`, the sizes of splits."""
    return {
        "data": {
            name: f"{type(source).__name__}: {source.path or 'default data'}" for name, source in data.sources.items()
        },
        "about": {name: about_source(source) for name, source in data.sources.items()},
        "samples": data.sizes,
    }


def write_sizes(run: Path, data: MultimodalData) -> None:
    """Add the sizes of splits that were asked for since, where the data is that of the run."""
    facts, known = read_numbers(run)[0], described(data)
    if facts.get("data") != known["data"]:
        return
    before = facts.get("samples", {})
    write_run_facts(run, {"samples": {name: before.get(name, {}) | sizes for name, sizes in data.sizes.items()}})


class PredictionWriter(BasePredictionWriter):
    """Streams to RUN/predictions.parquet, and .csv (labels, numbers) or .npz (vectors), in the order of the data.

    The same command goes on where a killed one stopped.

    Args:
        run: the folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__("batch")
        self.run = run
        self.stream: RowStream | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look for what an earlier process has written."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if stage != "predict" or not isinstance(data, MultimodalData):
            return
        settings = {
            "model": fingerprint(pl_module),
            "data": {name: f"{type(source).__name__} {source.path}" for name, source in data.sources.items()},
            "split": data.predict,
            "batch_size": data.eval_batch_size,
        }
        self.run.mkdir(parents=True, exist_ok=True)
        self.stream = RowStream(self.run / "predictions.parquet", settings)
        data.predict_start = self.stream.consumed

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: dict[str, Any],
        batch_indices: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Add the rows of a batch."""
        assert self.stream is not None
        self.stream.add(prediction, 1, batch.skipped)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the files."""
        if self.stream is None or not self.stream.count:
            return
        if self.stream.skipped:
            append_skipped(self.run, self.stream.skipped)
        other = "predictions.npz" if self.stream.has_vectors else "predictions.csv"
        self.stream.finish(self.run / other)


def _save(module: Any, folder: Path) -> None:
    """Both `Pretraining` and `FineTuning` write their folder themselves."""
    module.save_pretrained(folder)
