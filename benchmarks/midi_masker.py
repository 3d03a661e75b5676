"""What the sign error of the released masker costs: masker and recovery with the error and without, equal seeds.

    python benchmarks/midi_masker.py [--seeds 3] [--steps 200] [--data.path as for recipes/midi/run.py]

Printed for each seed and way: the probability that the masker finds a note of above-median loss more probable than one
below (0.5 is chance), the share of hidden notes that are frozen, and the mean loss of frozen and of free notes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import lightning as L
import torch
import yaml

EPOCH = 50
"""Batches that count as an epoch: after the first one, notes are frozen."""

RECIPE = Path(__file__).parent.parent / "recipes" / "midi"
sys.path.insert(0, str(RECIPE))

from evaluation import recoverability  # noqa: E402

from mmpt.config import from_config  # noqa: E402
from mmpt.data import MultimodalData  # noqa: E402
from mmpt.pretraining import Pretraining  # noqa: E402
from mmpt.recipe import precision  # noqa: E402


def measured(released: bool, seed: int, steps: int, path: str | None) -> dict[str, float]:
    config = yaml.safe_load((RECIPE / "adversarial.yaml").read_text(encoding="utf-8"))
    config["model"]["init_args"]["heads"]["adversarial"]["init_args"]["released"] = released
    torch.manual_seed(seed)
    module = Pretraining(**from_config(config["model"]["init_args"]))
    data = MultimodalData(**from_config(config["data"]), path=path, seed=seed).attach(module.model.processors)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", precision=precision(), gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        limit_train_batches=EPOCH,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return recoverability(module.heads["adversarial"], module.model, data, 40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--data.path", dest="path")
    options = parser.parse_args()
    for seed in range(options.seeds):
        for released in (False, True):
            found = measured(released, seed, options.steps, options.path)
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"seed {seed}, {'with' if released else 'without'} the sign error: {numbers}", flush=True)


if __name__ == "__main__":
    main()
