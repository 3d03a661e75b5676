"""What `mmpt probe` does: encoders by tasks, a table, JSON and plots."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mmpt.errors import ConfigError
from mmpt.files import write_atomically
from mmpt.probing.comparison import compare
from mmpt.probing.embedders import Embedder, TokenEmbedder
from mmpt.probing.linear import LinearWordProbe
from mmpt.probing.loading import load_embedder
from mmpt.probing.masked_lm import MaskedLmProbe
from mmpt.probing.page import write_page
from mmpt.probing.plots import write_plots
from mmpt.probing.scoring import summary
from mmpt.probing.stroop import PRESETS, ProbeResult, StroopProbe, StroopSettings, count
from mmpt.probing.tables import print_comparisons, print_linear, print_prompts, print_summaries
from mmpt.probing.task import Task, load_task

GRID_NEUTRAL = ("", "thing")
"""Neutral texts that `--grid` tries."""


def probe(options: argparse.Namespace) -> None:
    """`mmpt probe stroop|masked-lm|linear`."""
    console = Console()
    tasks = [_task(source, options) for source in options.task]
    if options.output is not None and options.output.suffix not in ("", ".json"):
        raise ConfigError(f"--output {options.output}: expected a name that ends in .json, or a folder for a report")
    page = options.output is not None and not options.output.suffix
    numbers = options.output / "probe.json" if page else options.output
    if options.probe == "linear":
        summaries = _linear(options, tasks, console, numbers)
    else:
        results = _masked(options, tasks, console) if options.probe == "masked-lm" else _stroop(options, tasks, console)
        summaries = report(results, numbers, console, options.seed)["results"]
    if page:
        console.print(
            f"report  {write_page(options.output, options.probe, summaries)}", highlight=False, soft_wrap=True
        )


def report(results: Sequence[ProbeResult], output: Path | None, console: Console, seed: int = 0) -> dict[str, Any]:
    """Print the tables; with `output`, write JSON there and plots into the folder `NAME-plots` beside it.

    Returns:
        What was written: `results`, one summary with predictions for each model and task, and `comparisons`.
    """
    summaries = [summary(result, seed=seed) for result in results]
    comparisons = [
        compare(first, second, seed=seed)
        for first, second in combinations(results, 2)
        if first.task == second.task and first.model != second.model and _comparable(first, second)
    ]
    print_prompts(summaries, console)
    print_summaries(summaries, console)
    print_comparisons(comparisons, console)
    written = {
        "results": [
            about | {"predictions": _predictions(result)} for about, result in zip(summaries, results, strict=True)
        ],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    if output is not None:
        write_json(output, written)
        folder = write_plots(results, summaries, output.parent / f"{output.stem}-plots")
        console.print(f"numbers {output}\nplots   {folder}", highlight=False, soft_wrap=True)
    return written


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_atomically(path, lambda file: file.write(text.encode()))


def _task(source: str, options: argparse.Namespace) -> Task:
    task = load_task(source, None if options.probe == "linear" else options.prompt)
    return task if options.limit is None else task.sample(options.limit, options.seed)


def _comparable(first: ProbeResult, second: ProbeResult) -> bool:
    """With `--grid` an encoder has many results of a task; those of other settings are not what is compared."""
    free = ("pooling",)
    a, b = ({k: v for k, v in r.settings.items() if k not in free} for r in (first, second))
    return a == b


def _predictions(result: ProbeResult) -> list[list[Any]]:
    """For each prompt the option given for each item, or its score for ratings."""
    if result.task.kind == "rating":
        return [[round(float(score), 6) for score in scores] for scores in result.scores]
    return [
        [item.options[choice] for item, choice in zip(result.task.items, row, strict=True)]
        for row in result.predictions
    ]


def _stroop(options: argparse.Namespace, tasks: Sequence[Task], console: Console) -> list[ProbeResult]:
    results: list[ProbeResult] = []
    for source in options.model:
        encoder = _encoder(source, options)
        for settings in _settings(options, encoder):
            probing = StroopProbe(encoder, settings)
            for task in tasks:
                results.append(with_bar(f"{encoder.name}: {task.name}", count(task), task, probing.run, console))
    return results


def _settings(options: argparse.Namespace, encoder: Embedder) -> list[StroopSettings]:
    own = StroopSettings(
        None if options.pooling == "auto" else options.pooling, options.neutral, not options.no_attention_mask
    )
    if options.preset is not None:
        if options.grid or own != StroopSettings():
            raise ConfigError(f"--preset {options.preset} fixes pooling, neutral text and mask; leave the others out")
        return [PRESETS[options.preset]]
    if not options.grid:
        return [own]
    masks = (True, False) if isinstance(encoder, TokenEmbedder) and encoder.fixed_length is None else (True,)
    poolings = encoder.poolings if own.pooling is None else (own.pooling,)
    neutrals = dict.fromkeys((*GRID_NEUTRAL, options.neutral))
    return [
        replace(own, pooling=pooling, neutral=neutral, attention_mask=mask)
        for pooling in poolings
        for neutral in neutrals
        for mask in masks
    ]


def _masked(options: argparse.Namespace, tasks: Sequence[Task], console: Console) -> list[ProbeResult]:
    results = []
    for source in options.model:
        name, _, path = source.rpartition("=") if "=" in source and not Path(source).exists() else ("", "", source)
        probing = MaskedLmProbe.from_folder(path, options.policy, name or None, options.trust)
        results += [with_bar(f"{probing.name}: {task.name}", None, task, probing.run, console) for task in tasks]
    return results


def _linear(
    options: argparse.Namespace, tasks: Sequence[Task], console: Console, output: Path | None
) -> list[dict[str, Any]]:
    rows = []
    pooling = None if options.pooling == "auto" else options.pooling
    for source in options.model:
        probing = LinearWordProbe(_encoder(source, options), pooling, options.seed)
        rows += [
            with_bar(f"{probing.encoder.name}: {task.name}", len(task.items), task, probing.run, console).summary()
            for task in tasks
        ]
    print_linear(rows, console)
    if output is not None:
        write_json(output, {"results": rows})
    return rows


def _encoder(source: str, options: argparse.Namespace) -> Embedder:
    encoder = load_embedder(source, options.trust)
    if isinstance(encoder, TokenEmbedder):
        encoder.precision = options.precision
    return encoder


def with_bar(
    title: str, total: int | None, task: Task, run: Callable[[Task, Callable[[int], Any]], Any], console: Console
) -> Any:
    """Run a probe on a task with a progress bar that goes away at the end."""
    with Progress(console=console, transient=True) as bar:
        line = bar.add_task(title, total=total)
        return run(task, lambda done: bar.advance(line, done))
