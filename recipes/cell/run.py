"""The cell recipe: pretrain on cells and descriptions in two stages, type cells by text, with few labels and with many.

    python recipes/cell/run.py [--smoke | --demo] [--output RUN] [--seed N] [--data.path mine.h5ad] [...options of
    mmpt fit]

Three models are trained: the main one in both stages (RUN/stage1, RUN), one that reads no label (RUN/unlabelled), for
few-shot typing, and one that reads none and sees no cell of some types (RUN/left_out). With --data.path the last is
left out. study.py repeats all this over seeds, and measures transfer between two studies and what each loss adds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from evaluation import (
    best_share,
    few_shot_metrics,
    supervised_baselines,
    typed,
    typing_metrics,
    unseen_metrics,
    zero_shot,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from umap import UMAP

from mmpt.checkpoint import load_heads
from mmpt.commands import retrieval_metrics
from mmpt.data import MultimodalData
from mmpt.datasets.cell import Cells
from mmpt.evaluation.projection import two_dimensional
from mmpt.finetuning import rebuilt
from mmpt.heads import MatchingHead
from mmpt.model import TEXT, MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, recipe_main, start
from mmpt.report import ExampleRow, write_embeddings, write_examples
from mmpt.training import train

HERE = Path(__file__).parent
LEFT_OUT = ("CD19+ B", "CD56+ NK")
SHOTS = (1, 5, 20, None)
UMAP_CELLS = 20
"""Fewest cells for a UMAP, which compares each with its 15 neighbours."""
SENTENCES_ALONE = HERE / "sentences.yaml"
SMOKE = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Pretrain, evaluate, tune, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    model, head, data = stages.run("pretraining, two stages", pretrain, options)
    metrics: dict[str, float] = {}
    labelled = len(cells_of(data).label_names("class")) > 1
    if labelled:
        metrics |= stages.run("typing by description", typing, model, head, data)
        metrics |= stages.run("retrieval", retrieval_metrics, model, data, "cell", "test")
        metrics |= stages.run("few labels, from a model without any", few_labels, options)
        metrics |= stages.run("fine-tuning with all labels", fine_tuning, options)
        stages.run("examples and map", illustrate, model, head, data, options)
    if labelled and options.data_path is None and not options.demo:
        metrics |= stages.run("types left out of training", left_out, options, LEFT_OUT)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(options.output, metrics, console, data)
    return metrics


def pretrain(options: RecipeOptions) -> tuple[MultimodalModel, MatchingHead, MultimodalData]:
    """Both stages: the first in RUN/stage1, the second in RUN."""
    first, second, run = HERE / "pretrain.yaml", HERE / "align.yaml", options.output
    fit([first], run / "stage1", options)
    finished = fit([first, second], run, options, ["--model.pretrained", str(run / "stage1" / "model")])
    model = finished.model.model.eval()
    head = load_heads(run / "model", model)["matching"]
    assert isinstance(head, MatchingHead)
    return model, head, finished.datamodule.attach(model.processors)


def fit(configs: Sequence[Path], output: Path, options: RecipeOptions, extra: Sequence[str] = ()) -> Any:
    """`mmpt fit` with one or several configurations, later ones overriding earlier ones."""
    arguments = ["fit", *(part for config in configs for part in ("--config", str(config))), "--output", str(output)]
    arguments += ["--seed_everything", str(options.seed), "--data.seed", str(options.seed), *extra]
    return train([*arguments, *(SMOKE if options.smoke else []), *options.overrides])


def without_types(config: Path, exclude: Sequence[str], output: Path) -> Path:
    """Write a configuration in which no source of cells shows these types: not to the tokenizer and medians either."""
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("class_path") == "mmpt.datasets.cell.Cells":
                node.setdefault("init_args", {})["exclude"] = list(exclude)
            for part in node.values():
                visit(part)

    visit(tree)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return output


def cells_of(data: MultimodalData) -> Cells:
    """The described cells of the recipe's data."""
    source = data.sources["described"]
    assert isinstance(source, Cells)
    return source


def typing(model: MultimodalModel, head: MatchingHead, data: MultimodalData) -> dict[str, float]:
    """Cells of the test split among all types, by description."""
    source = cells_of(data)
    texts = [source.definitions.describe(name) for name in source.label_names("class")]
    share = best_share(model, head, source, texts)
    metrics = typing_metrics(model, head, source, share, typed(source, "test"), "zero_shot")
    untrained = typing_metrics(rebuilt(model).eval(), None, source, 1.0, typed(source, "test"), "zero_shot")
    metrics |= {f"{name}_untrained": untrained[name] for name in ("zero_shot/accuracy", "zero_shot/macro_f1")}
    return metrics | {"zero_shot/share_of_similarity": share}


def fine_tuning(options: RecipeOptions) -> dict[str, float]:
    """All training labels: the model of sentences alone, its architecture from scratch, and logistic regression."""
    metrics: dict[str, float] = {}
    pretrained = str(options.output / "unlabelled" / "model")
    path = ["--data.path", str(options.data_path)] if options.data_path else []
    steps = ["--trainer.max_steps", "2"] if options.smoke else []
    for suffix, scratch in (("", False), ("_scratch", True)):
        seeds = ["--seed_everything", str(options.seed), "--data.seed", str(options.seed)]
        start_from = ["--model.pretrained", pretrained, "--model.from_scratch", json.dumps(scratch)]
        folder = str(options.output / f"finetuned{suffix}")
        config = str(HERE / "finetune.yaml")
        finished = train(["fit", "--config", config, "--output", folder, *seeds, *start_from, *steps, *path])
        tested = finished.trainer.test(finished.model, finished.datamodule, verbose=False)[0]
        metrics[f"all_labels/accuracy{suffix}"] = tested["test/classification/accuracy"]
        metrics[f"all_labels/macro_f1{suffix}"] = tested["test/classification/macro_f1"]
    (source,) = finished.datamodule.sources.values()
    return metrics | supervised_baselines(typed(source, "train"), typed(source, "test"), "all_labels")


def few_labels(options: RecipeOptions) -> dict[str, float]:
    """n-shot typing with a model whose training used no type, only cells and the genes that they express."""
    finished = fit([SENTENCES_ALONE], options.output / "unlabelled", options)
    model = finished.model.model.eval()
    source = cells_of(finished.datamodule)
    models = {"": model, "_untrained": rebuilt(model).eval()}
    draws = 2 if options.smoke else 10
    return few_shot_metrics(models, source, SHOTS, "few_labels", draws)


def left_out(options: RecipeOptions, types: Sequence[str]) -> dict[str, float]:
    """Types that training never saw, neither as cells nor as text, by a model of sentences alone."""
    run = options.output / "left_out"
    finished = fit([without_types(SENTENCES_ALONE, types, run / "sentences.yaml")], run, options)
    source = cells_of(finished.datamodule)
    return unseen_metrics(finished.model.model.eval(), None, source, types, 1.0, "left_out")


def illustrate(model: MultimodalModel, head: MatchingHead, data: MultimodalData, options: RecipeOptions) -> None:
    """A confusion matrix, some cells with the types found for them, and a map of cells and descriptions."""
    source = cells_of(data)
    names = list(source.label_names("class"))
    test = typed(source, "test")
    texts = [source.definitions.describe(name) for name in names]
    found = zero_shot(model, head, test.cells, texts)
    predicted = found.cosines.argmax(1).numpy()
    picture = confusion_picture(test.labels, predicted, names)
    rows: list[ExampleRow] = [
        {
            "query": {"image": picture, "text": "true type (rows) and the type found by description (columns)"},
            "results": [],
        }
    ]
    chosen = np.random.default_rng(0).permutation(len(test.cells))[:16]
    for number in chosen.tolist():
        best = found.cosines[number].topk(min(3, len(names)))
        rows.append(
            {
                "query": {"text": f"a cell of the type {names[test.labels[number]]}"},
                "results": [
                    {"text": names[i], "score": float(score), "correct": i == test.labels[number]}
                    for score, i in zip(best.values, best.indices.tolist(), strict=True)
                ],
            }
        )
    own = model.embed("cell", test.cells, 256)
    if len(own) >= UMAP_CELLS:
        picture = umap_picture(own.numpy(), test.labels, names, options.seed)
        rows.insert(1, {"query": {"image": picture, "text": "UMAP of the test cells, by true type"}, "results": []})
    write_examples(options.output, "Types found for cells of the test split", rows)
    vectors = torch.cat([own, model.embed(TEXT, texts)])
    labels = [names[label] for label in test.labels] + names
    kinds = ["cell"] * len(test.cells) + ["description"] * len(names)
    write_embeddings(options.output, two_dimensional(vectors, options.seed), labels, kinds)


def umap_picture(vectors: np.ndarray, labels: np.ndarray, names: Sequence[str], seed: int) -> Image.Image:
    """UMAP of embeddings (n, width) with cosine distance, as a picture; distances between clumps mean little."""
    points = UMAP(metric="cosine", random_state=seed, n_jobs=1).fit_transform(vectors)
    figure, axes = plt.subplots(figsize=(6.6, 4.6), layout="constrained")
    colours = plt.get_cmap("tab10" if len(names) <= 10 else "tab20")
    for number, name in enumerate(names):
        own = points[labels == number]
        axes.scatter(own[:, 0], own[:, 1], s=12, color=colours(number % colours.N), label=f"{name} ({len(own)})")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("UMAP 1")
    axes.set_ylabel("UMAP 2")
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return rendered(figure)


def rendered(figure: Figure) -> Image.Image:
    """A figure as a picture."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


def confusion_picture(right: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Shares of each true type, as a picture."""
    table = np.zeros((len(names), len(names)))
    np.add.at(table, (right, predicted), 1)
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(
        range(len(names)), [f"{n} ({int(c)})" for n, c in zip(names, table.sum(1), strict=True)], fontsize=7
    )
    for row, column in np.argwhere(shares > 0.005):
        dark = shares[row, column] > 0.5
        axes.text(column, row, f"{shares[row, column]:.2f}"[1:] if shares[row, column] < 1 else "1", ha="center",
                  va="center", fontsize=6, color="white" if dark else "black")  # fmt: skip
    axes.set_xlabel("found by description")
    axes.set_ylabel("true type (cells)")
    return rendered(figure)


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
