"""Plots of a probe: bars of several models for each task, and items by options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mmpt.files import write_atomically
from mmpt.probing.scoring import aligned, calibrated, consensus
from mmpt.probing.stroop import ProbeResult
from mmpt.report_plots import COLOURS

MOST_ITEMS = 60
"""Rows of a heat map; of more items every n-th one is shown."""


def write_plots(results: Sequence[ProbeResult], summaries: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write tasks.png, and for each model and task with fixed options items-NUMBER-MODEL-TASK.png.

    Returns:
        The folder.
    """
    save(bars(summaries), folder / "tasks.png")
    for number, result in enumerate(results):
        if result.task.fixed_options is not None:
            name = re.sub(r"[^\w.-]+", "-", f"{number:02d}-{result.model}-{result.task.name}")
            save(heat_map(result), folder / f"items-{name}.png")
    return folder


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def bars(summaries: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy of each model on each task: mean over prompts, a dot for each prompt, 95 % interval over items.

    Ratings show Spearman's correlation. A dashed line stands at chance and a dotted one at the majority's accuracy.
    """
    tasks = list(dict.fromkeys(str(about["task"]) for about in summaries))
    models = list(dict.fromkeys(_title(about) for about in summaries))
    figure = Figure(figsize=(1.5 + len(tasks) * max(0.8, 0.24 * len(models)), 4.0), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(models)
    for about in summaries:
        rating = about["kind"] == "rating"
        metric = "spearman" if rating else "accuracy"
        column = models.index(_title(about))
        x = tasks.index(str(about["task"])) - 0.4 + width * (column + 0.5)
        mean = about["over_prompts"][metric]["mean"]
        low, high = about[f"{metric}_interval"]
        colour = COLOURS[column % len(COLOURS)]
        axes.bar(x, mean, width * 0.9, color=colour, alpha=0.75)
        axes.plot([x, x], [low, high], color="black", linewidth=1.2)
        values = [row[metric] for row in about["prompts"]]
        offsets = np.linspace(-0.25, 0.25, len(values)) * width if len(values) > 1 else np.zeros(1)
        axes.plot(x + offsets, values, ".", color="black", markersize=3, alpha=0.6)
    for place, task in enumerate(tasks):
        about = next(row for row in summaries if row["task"] == task)
        for name, style in (("chance", "--"), ("majority", ":")):
            if about[name] is not None and about["kind"] != "rating":
                axes.plot([place - 0.45, place + 0.45], [about[name]] * 2, style, color="#444444", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    labels = [
        f"{task}\n(Spearman)" if any(r["task"] == task and r["kind"] == "rating" for r in summaries) else task
        for task in tasks
    ]
    axes.set_xticks(
        range(len(tasks)),
        labels,
        rotation=30 if len(tasks) > 4 else 0,
        ha="right" if len(tasks) > 4 else "center",
        parse_math=False,
    )
    axes.set_ylabel("accuracy, mean over prompts")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], alpha=0.75) for i in range(len(models))]
    legend = figure.legend(handles, models, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _title(about: Mapping[str, Any]) -> str:
    settings = about["settings"]
    words = [str(about["model"]), str(settings.get("pooling", settings.get("policy", "")))]
    words += [f"neutral {settings['neutral']!r}"] if settings.get("neutral") else []
    words += ["no mask"] if settings.get("attention_mask") is False else []
    return " ".join(words)


def heat_map(result: ProbeResult) -> Figure:
    """Scores of items by options, averaged over prompts, minus the mean of the option and of the item.

    Items are sorted by their answer; a circle marks the answer, a dot the option that is given (without calibration).
    """
    task = result.task
    options = task.fixed_options
    assert options is not None
    scores, answers = aligned(task, consensus(result))
    order = np.argsort(answers, kind="stable")
    order = order[:: max(1, -(-len(order) // MOST_ITEMS))]
    centred = calibrated(scores)
    shown = (centred - centred.mean(1, keepdims=True))[order]
    figure = Figure(figsize=(2.5 + 0.45 * len(options), 1.2 + 0.17 * len(order)), layout="constrained")
    axes = figure.add_subplot()
    limit = float(np.abs(shown).max()) or 1.0
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.plot(answers[order], np.arange(len(order)), "o", mfc="none", mec="black", markersize=6)
    axes.plot(scores[order].argmax(1), np.arange(len(order)), ".", color="black", markersize=4)
    axes.set_xticks(range(len(options)), options, rotation=45, ha="right", parse_math=False)
    names = [task.items[number].name[:40] for number in order]
    axes.set_yticks(range(len(order)), names, fontsize=7, parse_math=False)
    axes.set_title(f"{result.model}: {task.name}", fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, label="score minus the means of option and item", shrink=0.6)
    return figure
