"""A probing as a run folder: flat metrics, intervals, and the report page that every run has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpt.evaluation.record import Evaluation
from mmpt.probing.tables import settings_text
from mmpt.report import build_report, write_metrics, write_run_facts

OF_CHOICES = {"accuracy": "accuracy", "macro_accuracy": "macro_accuracy", "accuracy_calibrated": "calibrated/accuracy"}
"""Number of a summary -> the metric on the page; a suffix of `accuracy` would be taken for a baseline of it."""


def write_page(folder: Path, kind: str, summaries: Sequence[Mapping[str, Any]]) -> Path:
    """Write metrics.json, evaluation.json, run.json and report.html.

    Args:
        folder: the run folder; made if it is not there.
        kind: of the probe: "stroop", "masked-lm" or "linear".
        summaries: of each model and task, as `mmpt.probing.scoring.summary` and `LinearWordProbe` give them.

    Returns:
        The page.
    """
    found = Evaluation()
    for about in summaries:
        several = sum(other["task"] == about["task"] and other["model"] == about["model"] for other in summaries) > 1
        name = str(about["model"]).replace("/", "-")
        model = f"{name} ({settings_text(about['settings'])})" if several else name
        prefix = f"{about['task']}/{model}"
        metrics, intervals = numbers(about)
        found.metrics |= {f"{prefix}/{name}": value for name, value in metrics.items()}
        found.intervals |= {f"{prefix}/{name}": interval for name, interval in intervals.items()}
    write_metrics(folder, found.metrics)
    models = list(dict.fromkeys(str(about["model"]) for about in summaries))
    tasks = {str(about["task"]): f"{about['items']} items" for about in summaries}
    settings = list(dict.fromkeys(settings_text(about["settings"]) for about in summaries))
    write_run_facts(
        folder, {"title": f"Probe: {kind}", "task": f"{kind} probe", "models": models, "tasks": tasks, "read": settings}
    )
    found.write(folder)
    return build_report(folder)


def numbers(about: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """The metrics of one summary with their baselines, means over prompts, and their intervals over items."""
    over = about.get("over_prompts", about)

    def mean(name: str) -> float | None:
        value = over.get(name)
        return value["mean"] if isinstance(value, Mapping) else value

    names = {"spearman": "spearman"} if about.get("kind") == "rating" else OF_CHOICES
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name, shown in names.items():
        value = mean(name)
        if value is None:
            continue
        metrics[shown] = float(value)
        metrics |= {f"{shown}_{base}": float(about[base]) for base in ("chance", "majority") if about[base] is not None}
        if about.get(f"{name}_interval") is not None:
            low, high = about[f"{name}_interval"]
            intervals[shown] = float(low), float(high)
    return metrics, intervals
