"""What a training leaves behind: facts, skipped inputs, metrics, the model folder, predictions, the report."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback

from mmpt import __version__
from mmpt.batches import Batch
from mmpt.data import MultimodalData
from mmpt.errors import DataError
from mmpt.repeatable import RepeatableModule
from mmpt.report import append_skipped, write_metrics, write_run_facts

SKIPPED = "skipped.jsonl"


class RunFolder(Callback):
    """Writes RUN/run.json, RUN/skipped.jsonl and RUN/model.

    Args:
        run: the folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.listed: set[tuple[str, str]] = set()
        self.usable = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the list of skipped inputs anew for a new run."""
        if stage == "fit" and trainer.is_global_zero:
            self.run.mkdir(parents=True, exist_ok=True)
            if trainer.ckpt_path is None:
                (self.run / SKIPPED).unlink(missing_ok=True)

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

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write RUN/metrics.json, and what the module knows beyond numbers."""
        if not trainer.is_global_zero:
            return
        write_metrics(self.run, {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")})
        if isinstance(pl_module, RepeatableModule) and pl_module.evaluation is not None:
            pl_module.evaluation.write(self.run)

    def _facts(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        sources = data.sources if isinstance(data, MultimodalData) else {}
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        return {
            "task": type(pl_module).__name__,
            "data": {
                name: f"{type(source).__name__}: {source.path or 'default data'}" for name, source in sources.items()
            },
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


class PredictionWriter(BasePredictionWriter):
    """Writes RUN/predictions.csv (labels, numbers) and RUN/predictions.npz (vectors).

    Args:
        run: the folder.
    """

    def __init__(self, run: Path) -> None:
        super().__init__("epoch")
        self.run = run

    def write_on_epoch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        predictions: Sequence[dict[str, Any]],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write the columns that the module's `predict_step` gave."""
        self.run.mkdir(parents=True, exist_ok=True)
        columns: dict[str, list[Any]] = {}
        for batch in predictions:
            for name, values in batch.items():
                columns.setdefault(name, []).extend(values)
        vectors = {name: torch.stack(v).cpu().numpy() for name, v in columns.items() if torch.is_tensor(v[0])}
        rows = {name: values for name, values in columns.items() if name not in vectors}
        if len(rows) > 1:
            with (self.run / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(rows)
                writer.writerows(zip(*rows.values(), strict=True))
        if vectors:
            arrays: dict[str, Any] = {"names": np.array(columns["names"]), **vectors}
            np.savez(self.run / "predictions.npz", **arrays)


def _save(module: Any, folder: Path) -> None:
    """Both `Pretraining` and `FineTuning` write their folder themselves."""
    module.save_pretrained(folder)
