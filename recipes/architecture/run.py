"""The architecture recipe: pretrain on networks and texts, then search, reason, find clones, answer and estimate cost.

    python recipes/architecture/run.py [--smoke | --demo] [--output RUN] [--seed N] [...options of mmpt fit]

The test families are fold SEED of five: whole source files of timm and torchvision that training never saw.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluation import GRAPHS, accuracy, answers, captions, clones, column, cost, reasoning, samples, search
from rich.console import Console

from mmpt.data import MultimodalData
from mmpt.datasets.architecture import ModelZoo
from mmpt.datasets.architecture_bench import GraphNetworkBench
from mmpt.datasets.architecture_drawing import draw
from mmpt.evaluation.projection import two_dimensional
from mmpt.model import TEXT, MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, recipe_main, start
from mmpt.report import ExampleRow, write_embeddings, write_examples
from mmpt.training import train

HERE = Path(__file__).parent
DEMO = ["--trainer.max_steps", "300"]
SMOKE = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Pretrain, evaluate, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    model, data = stages.run("pretraining", pretrain, options)
    zoo, statements, asked = (data.sources[name] for name in ("zoo", "statements", "questions"))
    metrics = stages.run("search among unseen families", search, model, zoo)
    metrics |= stages.run("is the statement true", reasoning, model, statements)
    metrics |= stages.run("clones", clones, model, statements)
    metrics |= stages.run("questions", answers, model, asked)
    metrics |= stages.run("captions", captions, model, zoo, asked)
    metrics |= stages.run("cost of unseen families", cost, model, zoo)
    bench = GraphNetworkBench(limit=100 if options.smoke else 4000)
    metrics |= stages.run("accuracy of graph networks", accuracy, model, bench)
    stages.run("examples and map", illustrate, model, zoo, options)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(options.output, metrics, console, data)
    return metrics


def pretrain(options: RecipeOptions) -> tuple[MultimodalModel, MultimodalData]:
    """`mmpt fit` with pretrain.yaml, on the fold of families that belongs to the seed."""
    config = configuration(options.seed, options.smoke)
    path = options.output / "pretrain.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    seeds = ["--seed_everything", str(options.seed), "--data.seed", str(options.seed)]
    extra = SMOKE if options.smoke else DEMO if options.demo else []
    command = ["fit", "--config", str(path), "--output", str(options.output), *seeds]
    finished = train([*command, *extra, *options.overrides])
    model = finished.model.model.eval()
    return model, finished.datamodule.attach(model.processors)


def configuration(seed: int, smoke: bool = False, name: str = "pretrain.yaml") -> dict[str, Any]:
    """A configuration with the fold of families that belongs to a seed; few networks for a trial."""
    config: dict[str, Any] = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    set_arguments(config, "ModelZoo", {"fold": seed % 5} | ({"limit": 40} if smoke else {}))
    set_arguments(config, "GeneratedNetworks", {"count": 40} if smoke else {})
    return config


def set_arguments(config: Any, name: str, arguments: dict[str, Any]) -> None:
    """Change arguments of every class of this name in a configuration."""
    if isinstance(config, dict):
        if str(config.get("class_path", "")).endswith(f".{name}"):
            config["init_args"] = config.get("init_args", {}) | arguments
        for value in config.values():
            set_arguments(value, name, arguments)


def illustrate(model: MultimodalModel, zoo: ModelZoo, options: RecipeOptions) -> None:
    """Models found for descriptions, and a map of the test networks by family."""
    tests = samples(zoo, "test")
    vectors = model.embed(GRAPHS, column(tests, GRAPHS))
    queries = list(dict.fromkeys(column(tests, TEXT)))
    chosen = random.Random(0).sample(queries, min(12, len(queries)))
    rows: list[ExampleRow] = []
    for text, scores in zip(chosen, model.embed(TEXT, chosen) @ vectors.T, strict=True):
        best = scores.topk(min(3, len(tests)))
        rows.append(
            {
                "query": {"text": text},
                "results": [
                    {
                        "text": tests[i].name,
                        "image": draw(tests[i].modalities[GRAPHS]),
                        "score": float(s),
                        "correct": tests[i].modalities[TEXT] == text,
                    }
                    for s, i in zip(best.values, best.indices.tolist(), strict=True)
                ],
            }
        )
    write_examples(options.output, "Models of unseen families found for descriptions", rows)
    families = {entry.name: entry.family for entry in zoo.entries("test")}
    if len(tests) > 3:
        points = two_dimensional(vectors, options.seed, "pca" if len(tests) < 40 else "tsne")
        names = [families.get(row.name, row.name) for row in tests]
        write_embeddings(options.output, points, names, ["network"] * len(tests))


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
