"""Stroop probing during a pretraining run: what the text transformer knows after so many steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure

from mmpt.batches import Batch
from mmpt.errors import ConfigError
from mmpt.probing.command import write_json
from mmpt.probing.embedders import ModelEmbedder, Pooling
from mmpt.probing.plots import save
from mmpt.probing.scoring import summary
from mmpt.probing.stroop import StroopProbe, StroopSettings
from mmpt.probing.task import load_task
from mmpt.report_plots import COLOURS


class StroopCallback(Callback):
    """Probes the model before the first step, every so many steps, and at the end.

    Logs `probe/TASK/accuracy` and `probe/TASK/accuracy_calibrated` (or `spearman`), means over prompts, and writes
    RUN/probing/stroop.json and RUN/probing/stroop.png. Training is not touched: it goes on as it would without. In a
    configuration:

        trainer:
          callbacks:
            - class_path: mmpt.probing.callback.StroopCallback
              init_args: {tasks: [color, sentiment], every_n_steps: 200}

    Args:
        tasks: names of tasks or paths of their files.
        every_n_steps: optimiser steps between two probes.
        pooling: None is the model's own joint space; "mean", "cls" and "eos" read the text transformer before it.
        neutral: stands for MASK in the base sentence.
        prompts: at most so many of each task's prompts, in their order.
        limit: at most so many items of each task, the same every time.
        folder: where the files go; by default RUN/probing.

    Raises:
        ConfigError: less than one step between two probes.
    """

    def __init__(
        self,
        tasks: list[str],
        every_n_steps: int = 200,
        pooling: Pooling | None = None,
        neutral: str = "",
        prompts: int = 3,
        limit: int = 100,
        folder: str | None = None,
    ) -> None:
        if every_n_steps < 1 or prompts < 1 or limit < 3:
            raise ConfigError(
                f"every_n_steps {every_n_steps}, prompts {prompts}, limit {limit}: expected at least 1, 1 and 3"
            )
        loaded = [load_task(task).sample(limit) for task in tasks]
        self.tasks = [task if task.kind == "cloze" else task.with_prompts(task.prompts[:prompts]) for task in loaded]
        self.every_n_steps = every_n_steps
        self.settings = StroopSettings(pooling, neutral)
        self.folder = folder
        self.history: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probe the model as it is before the first step."""
        if not self.history:
            self._probe(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Probe where it is time."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self.history[-1]["step"]:
            pl_module.log_dict(self._probe(trainer, pl_module), batch_size=1)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Probe the finished model and write the files."""
        if trainer.global_step != self.history[-1]["step"]:
            self._probe(trainer, pl_module)
        if not trainer.is_global_zero:
            return
        folder = Path(self.folder or Path(trainer.default_root_dir) / "probing")
        write_json(folder / "stroop.json", self.history)
        save(self.figure(), folder / "stroop.png")

    def state_dict(self) -> dict[str, Any]:
        """What was measured, so that a resumed run goes on with it."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was measured before."""
        self.history = list(state_dict["history"])

    def _probe(self, trainer: L.Trainer, pl_module: Any) -> dict[str, float]:
        probing = StroopProbe(ModelEmbedder(pl_module.model), self.settings)
        numbers: dict[str, float] = {}
        details = {}
        for task in self.tasks:
            about = summary(probing.run(task), resamples=200)
            about.pop("prompts")
            details[task.name] = about
            for metric in ("accuracy", "accuracy_calibrated", "spearman"):
                if metric in about["over_prompts"]:
                    numbers[f"probe/{task.name}/{metric}"] = about["over_prompts"][metric]["mean"]
        self.history.append({"step": trainer.global_step, "numbers": numbers, "tasks": details})
        return numbers

    def figure(self) -> Figure:
        """The numbers over the steps, a line for each task, with its interval over items and its chance level."""
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        steps = [row["step"] for row in self.history]
        for number, task in enumerate(self.tasks):
            metric = "spearman" if task.kind == "rating" else "accuracy"
            rows = [row["tasks"][task.name] for row in self.history]
            values = [row["over_prompts"][metric]["mean"] for row in rows]
            low, high = zip(*(row[f"{metric}_interval"] for row in rows), strict=True)
            colour = COLOURS[number % len(COLOURS)]
            label = f"{task.name} ({metric})"
            axes.plot(steps, values, marker="o", markersize=3, color=colour, label=label)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.axhline(rows[0]["chance"], color=colour, linestyle="--", linewidth=0.8)
        axes.set_xlabel("step")
        axes.set_ylabel("mean over prompts")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)
        return figure
