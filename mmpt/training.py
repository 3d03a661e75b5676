"""`mmpt fit|validate|test|predict`: Lightning's command line with mmpt's run folder around it."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO

from mmpt.data import MultimodalData
from mmpt.repeatable import RepeatableModule
from mmpt.resume import WholeCheckpointIO, resumed
from mmpt.run_folder import PredictionWriter, RunFolder

TRAINER_DEFAULTS: dict[str, Any] = {
    "enable_model_summary": False,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,  # MixtureSampler divides the batches itself
}


class WriteConfig(SaveConfigCallback):
    """Writes RUN/config.yaml, which repeats the run."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write on the first process, whatever lies there from an earlier run."""
        if trainer.is_global_zero and not self.already_saved and stage == "fit":
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config["ckpt_path"] = None  # repeats the run from its beginning; `--resume` finds the checkpoint itself
            unfinished = folder / ".config.yaml.part"  # a run killed at this moment keeps the whole file from before
            self.parser.save(config, str(unfinished), overwrite=True, multifile=False)
            os.replace(unfinished, folder / "config.yaml")
            self.already_saved = True


class TrainingCLI(LightningCLI):
    """LightningCLI with `--output`, a run folder, and progress and logs by default."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add mmpt's own options."""
        parser.add_argument("--output", type=str | None, default=None, help="run folder; default: runs/DATE-TIME")
        parser.add_argument(
            "--resume", type=str | None, default=None, help="go on with the run in this folder (fit), as it was"
        )

        parser.add_argument(
            "--license", type=str | None, default=None, help="of the trained model, for its card, e.g. apache-2.0"
        )

    def before_instantiate_classes(self) -> None:
        """Point everything that writes to the run folder."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        run = Path(config.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
        self.run_folder = run
        config.trainer.default_root_dir = str(run)
        if self.subcommand == "predict":
            config.return_predictions = False  # they are on the disk; all of them may not fit into memory
        _follow(config.model, _paths(config.data))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer with the run folder's loggers and callbacks, besides those of the configuration."""
        run = self.run_folder
        config = self._get(self.config_init, "trainer", default={})
        if config.get("logger") is None:
            # A new folder for each start: a CSVLogger deletes what it finds in its own.
            version = len(list((run / "logs").glob("version_*")))
            kwargs["logger"] = [
                CSVLogger(str(run), name="logs", version=version),
                TensorBoardLogger(str(run), name="logs", version=version),
            ]
        callbacks: list[L.Callback] = [RunFolder(run, self._get(self.config_init, "license")), PredictionWriter(run)]
        if config.get("enable_progress_bar") is not False:
            callbacks.append(RichProgressBar(leave=False))
        if kwargs.get("logger") or config.get("logger"):
            callbacks.append(LearningRateMonitor("step"))
        own = config.get("callbacks") or []
        if config.get("enable_checkpointing") is not False and not any(isinstance(c, ModelCheckpoint) for c in own):
            # Two, so that there is one before the last; `last.ckpt` points to the newest.
            newest = ModelCheckpoint(
                str(run / "checkpoints"),
                filename="{epoch}-{step}",
                monitor="step",
                mode="max",
                save_top_k=2,
                save_last="link",
                enable_version_counter=False,
            )
            callbacks.append(newest)
        if isinstance(self.model, RepeatableModule):
            callbacks += self.model.callbacks(run)
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)


def _paths(data: Any) -> dict[str, str]:
    """Class of a source -> the user's own data that it reads."""
    given = {} if data.path is None else data.path
    named = dict.fromkeys(data.sources, given) if isinstance(given, str) else given
    return {source.class_path: named[name] for name, source in data.sources.items() if name in named}


def _follow(config: Any, paths: dict[str, str]) -> None:
    """Let the sources within the model's configuration, which train tokenizers, read the user's own data too."""
    if isinstance(config, Namespace | dict):
        items = vars(config) if isinstance(config, Namespace) else config
        path = paths.get(str(items.get("class_path")))
        if path is not None and items["init_args"].get("path") is None:
            items["init_args"]["path"] = path
        for item in items.values():
            _follow(item, paths)
    elif isinstance(config, list):
        for item in config:
            _follow(item, paths)


def train(arguments: Sequence[str]) -> TrainingCLI:
    """Run one of Lightning's commands.

    Args:
        arguments: as on the command line, e.g. `["fit", "--config", "pretrain.yaml", "--output", "runs/first"]`, or
            `["fit", "--resume", "runs/first"]`.

    Returns:
        The finished command line with `trainer`, `model`, `datamodule` and `run_folder`.
    """
    _quiet()
    return TrainingCLI(
        model_class=L.LightningModule,
        datamodule_class=MultimodalData,
        subclass_mode_model=True,
        seed_everything_default=0,
        save_config_callback=WriteConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults=dict(TRAINER_DEFAULTS),
        parser_kwargs={"parser_mode": "yaml"},
        args=resumed(arguments),
    )


def _quiet() -> None:
    """Leave out Lightning's advertisements and remarks that tell a user of a recipe nothing."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for remark in (
        r".*isinstance\(treespec.*",
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*infer the batch indices.*",
        ".*LightningCLI's args parameter.*",
    ):
        warnings.filterwarnings("ignore", message=remark)
