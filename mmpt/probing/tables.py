"""The tables that `mmpt probe` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmpt.probing.comparison import Comparison
from mmpt.probing.task import load_task, shipped_tasks
from mmpt.report_data import MISSING

MOST_PROMPT_ROWS = 60
"""With more rows the table of single prompts stays in the JSON."""


def print_tasks(console: Console) -> None:
    """The tasks that ship with mmpt."""
    table = _table("Tasks of mmpt", ("task", "about", "visual"), ("items", "options", "prompts"))
    for name in shipped_tasks():
        task = load_task(name)
        options = str(len(task.items[0].options) or "rating")
        visual = "yes" if task.visual else "no"
        table.add_row(name, str(task.about["about"]), visual, str(len(task.items)), options, str(len(task.prompts)))
    console.print(table)


def print_prompts(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each model and task with a row for each prompt, where there are few enough of them to read."""
    several = [about for about in summaries if len(about["prompts"]) > 1]
    if sum(len(about["prompts"]) for about in several) > MOST_PROMPT_ROWS:
        return
    for about in several:
        title = f"{about['task']}, {about['model']}: each prompt"
        if about["kind"] == "rating":
            table = _table(title, ("prompt",), ("Pearson", "Spearman", "Kendall"))
            for row in about["prompts"]:
                table.add_row(row["prompt"], *(f"{row[name]:+.3f}" for name in ("pearson", "spearman", "kendall")))
        else:
            table = _table(title, ("prompt",), ("accuracy", "macro", "recall@5", "calibrated", "given most"))
            for row in about["prompts"]:
                names = ("accuracy", "macro_accuracy", "recall_at_5", "accuracy_calibrated")
                numbers = (_number(row.get(name)) for name in names)
                table.add_row(row["prompt"], *numbers, f"{row['most_given']} {row['most_given_share']:.0%}")
        console.print(table)


def print_summaries(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table for each task: mean and deviation over prompts first, the maximum beside them."""
    for task in dict.fromkeys(about["task"] for about in summaries):
        rows = [about for about in summaries if about["task"] == task]
        first = rows[0]
        rating = first["kind"] == "rating"
        facts = [f"{first['items']} items, {len(first['prompts'])} prompts"]
        facts += [] if rating else [f"chance {first['chance']:.3f}"]
        facts += [] if first["majority"] is None else [f"majority {first['majority']:.3f}"]
        metrics = ("Spearman",) if rating else ("accuracy", "max", "macro", "calibrated")
        table = _table(f"{task}: {', '.join(facts)}", ("model", "pooling"), (metrics[0], "95 % interval", *metrics[1:]))
        for about in rows:
            over = about["over_prompts"]
            main = over["spearman" if rating else "accuracy"]
            low, high = about["spearman_interval" if rating else "accuracy_interval"]
            others = [
                f"{main['max']:.3f}",
                _spread(over.get("macro_accuracy")),
                _spread(over.get("accuracy_calibrated")),
            ]
            cells = [_spread(main), f"{low:.3f} to {high:.3f}", *([] if rating else others)]
            table.add_row(about["model"], settings_text(about["settings"]), *cells)
        console.print(table)
    console.print(
        "mean ± standard deviation over prompts; interval: bootstrap over items; max: the best prompt, chosen on these "
        "items; calibrated: each option's scores standardised over items",
        style="dim",
    )


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def print_comparisons(comparisons: Sequence[Comparison], console: Console) -> None:
    """Paired differences between models."""
    if not comparisons:
        return
    right = ("difference", "95 % interval", "only 1st", "only 2nd", "p")
    table = _table("Paired differences on the same items and prompts", ("task", "first - second"), right)
    table.caption = (
        "accuracy, mean over prompts (Spearman for ratings). p: exact McNemar test of the answers by scores averaged "
        "over prompts, not corrected for many tests"
    )
    for row in comparisons:
        table.add_row(
            row.task,
            f"{row.first} - {row.second}",
            f"{row.difference:+.3f}",
            f"{row.interval[0]:+.3f} to {row.interval[1]:+.3f}",
            str(MISSING if row.only_first is None else row.only_first),
            str(MISSING if row.only_second is None else row.only_second),
            MISSING if row.p is None else f"{row.p:.4f}",
        )
    console.print(table)


def print_linear(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Cross-validated linear probes."""
    right = ("accuracy", "macro", "majority", "chance")
    table = _table("Logistic regression on the embeddings of the words, 5 folds", ("task", "model", "pooling"), right)
    for row in rows:
        numbers = (_number(row[name]) for name in ("accuracy", "macro_accuracy", "majority", "chance"))
        table.add_row(row["task"], row["model"], row["settings"]["pooling"], *numbers)
    console.print(table)


def settings_text(settings: Mapping[str, Any]) -> str:
    """How a text became a vector, or options were scored, in a few words."""
    if "policy" in settings:
        return str(settings["policy"])
    parts = [str(settings["pooling"])]
    if settings.get("neutral"):
        parts.append(f"neutral {settings['neutral']!r}")
    if not settings.get("attention_mask", True):
        parts.append("no mask")
    if not settings.get("normalize", True):
        parts.append("dot product")
    return ", ".join(parts)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def _spread(value: Mapping[str, float] | None) -> str:
    return MISSING if value is None else f"{value['mean']:.3f} ± {value['std']:.3f}"
