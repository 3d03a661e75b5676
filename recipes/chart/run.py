"""The chart recipe: learn to read the data of charts, then to answer questions, beside a decoder that sees no picture.

    python recipes/chart/run.py [--smoke | --demo] [--output RUN] [--seed N] [--data.path MINE] [...options of mmpt fit]

Default data: charts of real tables; the tables, colours and fonts of the test are never trained on.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from evaluation import answering, majority_answers, middle_of_axis, reading
from rich.console import Console

from mmpt.datasets.chart import Chart, Charts
from mmpt.datasets.chart_records import ChartRecord
from mmpt.datasets.chart_render import Job, random_style, render
from mmpt.errors import DataError, MmptError
from mmpt.model import MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, precision, recipe_main, start
from mmpt.report import ExampleRow, Item, write_examples
from mmpt.training import train

HERE = Path(__file__).parent
SHORT = {"smoke": ("3", 24), "demo": ("300", 600)}
"""Steps and charts of a shortened run."""


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Learn to read, align, tune, evaluate, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    run_folder = options.output
    stages.run("learning to read values", fit, options, "read.yaml", run_folder / "read", {})
    reader = ["--model.pretrained", str(run_folder / "read" / "model")]
    aligned, source = stages.run("alignment", fit, options, "pretrain.yaml", run_folder / "align", {}, reader)
    blind, _ = stages.run(
        "alignment without pictures", fit, options, "pretrain.yaml", run_folder / "blind", {"blind": True}, reader
    )
    charts = [chart for chart in source.drawn("test") if chart.problem is None]
    if not charts:
        raise DataError(
            "no charts to test on: tables are split whole, so at least 3 tables that can be charted are needed"
        )
    charts = charts[:8] if options.smoke else charts
    read, metrics = stages.run("reading unseen charts", reading, aligned, charts, source, False)
    _, without = stages.run("reading without pictures", reading, blind, charts, source, True)
    metrics |= {f"{name}_blind": value for name, value in without.items()}
    pretrained = ["--model.pretrained", str(run_folder / "align" / "model")]
    tuned, _ = stages.run("tuning on questions", fit, options, "tune.yaml", run_folder, {}, pretrained)
    metrics |= stages.run("answering", answering, tuned, charts, source)
    train = [chart.record for chart in source.drawn("train") if chart.record is not None]
    metrics |= majority_answers(train, charts, source) | middle_of_axis(charts)
    illustrate(run_folder, charts, read, source)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(run_folder, metrics, console)
    return metrics


def fit(
    options: RecipeOptions, config: str, output: Path, changes: dict[str, Any], extra: list[str] | None = None
) -> tuple[MultimodalModel, Charts]:
    """`mmpt fit` with one of the recipe's configurations, changed for a short run or a baseline."""
    settings = yaml.safe_load((HERE / config).read_text(encoding="utf-8"))
    chosen = settings["data"]["sources"]["charts"]["init_args"]
    chosen |= changes | {"seed": 0}
    short = SHORT.get("smoke" if options.smoke else "demo" if options.demo else "")
    if short is not None:
        settings["trainer"]["max_steps"] = int(short[0])
        chosen |= {"charts": short[1], "held_out": min(chosen["held_out"], short[1])}
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    arguments = ["fit", "--config", str(path), "--output", str(output), "--seed_everything", str(options.seed)]
    arguments += ["--data.seed", str(options.seed), "--trainer.precision", precision()]
    finished = train([*arguments, *(extra or []), *options.overrides])
    source = finished.datamodule.sources["charts"]
    assert isinstance(source, Charts)
    return finished.model.model.eval(), source


def illustrate(run_folder: Path, charts: list[Chart], read: list[ChartRecord | None], source: Charts) -> None:
    """Charts beside what was read, drawn again."""
    rows: list[ExampleRow] = []
    for chart, record in list(zip(charts, read, strict=True))[:24]:
        assert chart.record is not None
        text = source.text_of(chart.record, "align-json").partition(source.separator)[2]
        query: Item = {"image": render(job(chart.record, source)), "text": text}
        results: list[Item] = []
        if record is not None:
            written = source.text_of(record, "align-json").partition(source.separator)[2]
            results.append({"text": written, "correct": written == text})
            with contextlib.suppress(MmptError):  # what was read need not be drawable
                results[0]["image"] = render(job(record, source))
        rows.append({"query": query, "results": results})
    write_examples(run_folder, "Charts of unseen tables, and what was read drawn again", rows)


def job(record: ChartRecord, source: Charts) -> Job:
    """The record in one plain style, larger than the model sees it."""
    return Job(record, random_style(["matplotlib"], 0), True, (2 * source.size, 2 * source.size))


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
