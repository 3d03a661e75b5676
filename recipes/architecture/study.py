"""Measure the architecture recipe over seeds, with and without masked nodes, the summary and the contrastive loss.

    python recipes/architecture/study.py --output study.jsonl [--seeds 0 1 2] [--parts main "without masked nodes" ...]
        [--steps N] [--split validation] [--minutes 30] [--smoke]

Seed N trains on and tests with other families: fold N of five is the test, fold N + 1 the validation split. Generated
networks and graph neural networks are divided in the same way for all seeds. Every finished run is a line of the output
file; what is there already is not run again. `--minutes` starts no new run after that time; `--split validation` is for
choosing settings. At the end means and standard deviations over the seeds are printed, baselines beside them.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from evaluation import accuracy, answers, captions, clones, cost, reasoning, search
from run import configuration, set_arguments

from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.datasets.architecture_bench import GraphNetworkBench
from mmpt.model import MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.recipe import keep_freed_memory
from mmpt.source import Split
from mmpt.study import Study

VARIANTS = ("main", "search alone", "without masked nodes", "without names", "without summary", "cosine error")


def configured(variant: str, seed: int, smoke: bool) -> dict[str, Any]:
    """The configuration of a variant: the recipe's with one thing changed, or another one.

    - `search alone`: search.yaml in place of pretrain.yaml; nothing but search is measured.
    - `without masked nodes`: no masked architecture modelling.
    - `without names`: what modules are called stays unseen.
    - `without summary`: ArchBERT's encoder as it is, the mean over nodes.
    - `cosine error`: the paper's objective, the squared error of cosines. Statements have their labels; descriptions
      are compared with the own text and one other, instead of by contrast with the whole batch.
    """
    config = configuration(seed, smoke, "search.yaml" if variant == "search alone" else "pretrain.yaml")
    model = config["model"]["init_args"]
    if variant == "without masked nodes":
        model["weights"]["nodes"] = 0.0
    elif variant == "without names":
        set_arguments(config, "ArchitectureProcessor", {"names": 0})
    elif variant == "without summary":
        set_arguments(config, "ArchitectureProcessor", {"summary": False, "names": 0})
        model["model"]["init_args"]["modalities"]["architecture"]["init_args"]["pooling"] = "mean"
    elif variant == "cosine error":
        for name in ("descriptions", "statements"):
            head = {"class_path": "mmpt.heads.SimilarityHead", "init_args": {"first": "architecture"}}
            model["heads"][name] = head
            model["weights"][name] = 4.0  # a squared error of cosines is small
    return config


def pretrained(variant: str, seed: int, steps: int | None, smoke: bool) -> tuple[MultimodalModel, MultimodalData]:
    """The recipe's training in this process, without a run folder."""
    config = configured(variant, seed, smoke)
    L.seed_everything(seed, verbose=False)
    module = Pretraining(**from_config(config["model"]["init_args"]))
    data = MultimodalData(**{**from_config(config["data"]), "seed": seed})
    trainer = L.Trainer(
        max_steps=steps or config["trainer"]["max_steps"], accelerator="cpu", precision=config["trainer"]["precision"],
        gradient_clip_val=config["trainer"]["gradient_clip_val"], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    model = module.model.eval()
    return model, data.attach(model.processors)


def measured(variant: str, seed: int, steps: int | None, split: Split, smoke: bool) -> dict[str, float]:
    """Everything that `run.py` measures."""
    began = time.process_time()
    model, data = pretrained(variant, seed, steps, smoke)
    metrics = {"minutes/training": (time.process_time() - began) / 60}
    if variant == "search alone":
        return metrics | search(model, data.sources["zoo"], split)
    zoo, statements, asked = (data.sources[name] for name in ("zoo", "statements", "questions"))
    bench = GraphNetworkBench(limit=100 if smoke else 4000)
    threshold = 0.5 if variant == "cosine error" else 0.0
    metrics |= search(model, zoo, split) | reasoning(model, statements, split, threshold)
    metrics |= clones(model, statements, split)
    metrics |= answers(model, asked, split) | captions(model, zoo, asked, split)
    metrics |= cost(model, zoo, split) | accuracy(model, bench, split)
    return metrics | {"minutes/everything": (time.process_time() - began) / 60}


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, help="of training, in place of the recipe's")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--smoke", action="store_true", help="two steps on few networks")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()
    study = Study(options.output, options.minutes)
    # the recipe itself over all seeds first, then everything else seed by seed
    for seed, part in sorted(product(options.seeds, options.parts), key=lambda pair: (pair[1] != "main", pair[0])):
        run = partial(measured, part, seed, 2 if options.smoke else options.steps, options.split, options.smoke)
        study.measure(run, run=part, seed=seed, split=options.split)
    study.print(("run", "split"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
