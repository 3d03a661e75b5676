"""The model card of a model folder: README.md as the Hugging Face Hub reads it.

It says what the run has recorded and nothing else; what nobody recorded is said to be unknown. The folder can be
uploaded as it is: `huggingface_hub.HfApi().upload_folder(repo_id=..., folder_path=RUN / "model")`.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from mmpt.config import packages
from mmpt.files import write_atomically
from mmpt.report_data import MISSING, metric_groups, number, read_numbers
from mmpt.source import Around, Source

CARD, CONFIG, WEIGHTS = "README.md", "config.yaml", "model.safetensors"
CLASSIFIER, TASK = "classifier.safetensors", "task.json"
"""The layers of the task that a model was tuned for, and what they are."""
UNKNOWN = "unknown"
NOT_OF_THE_MODEL = ("minutes", "best_step")
"""First parts of names in metrics.json that say something of the run and not of the model."""


@dataclass(frozen=True)
class Known:
    """What is known of a model beyond its folder.

    Attributes:
        name: of the model.
        facts: as in RUN/run.json: `about`, `data`, `samples`, `steps`, `license`, ....
        metrics: flat name -> number, baselines beside them.
        details: as in RUN/evaluation.json; its `intervals` are used.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


def about_source(source: Source) -> str:
    """What a source is, in its class's own words, and what it reads from: nothing but the last part of a path."""
    inner = f"; around {about_source(source.source)}" if isinstance(source, Around) else ""
    line = (inspect.getdoc(type(source)) or "").partition("\n")[0].rstrip(".")
    if inner:
        return f"{type(source).__name__}: {line}{inner}"
    origin = f"own files `{Path(source.path).name}`" if source.path else "the source's default data"
    return f"{type(source).__name__}: {line}; {origin}"


def write_card(run: Path) -> Path | None:
    """Write the card of RUN/model from what the run folder holds by now; None where there is no model.

    Args:
        run: the run folder.

    Raises:
        DataError: a damaged file in it.
    """
    folder = run / "model"
    if not (folder / WEIGHTS).is_file():
        return None
    facts, metrics, details = read_numbers(run)
    name = str(facts.get("title") or run.resolve().name)
    return save_card(folder, card_text(folder, Known(name, facts, metrics, details)))


def save_card(folder: Path, text: str) -> Path:
    """Write README.md whole or not at all."""
    write_atomically(folder / CARD, lambda file: file.write(text.encode()))
    return folder / CARD


def card_text(folder: Path, known: Known | None = None, weights: Path | None = None) -> str:
    """The card.

    Args:
        folder: of the model, with config.yaml.
        known: what is known besides; None is nothing.
        weights: the safetensors file, if it is not in its place yet.
    """
    folder = folder.resolve()
    known = known or Known(folder.parent.name if folder.name == "model" else folder.name)
    config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    task = json.loads((folder / TASK).read_text(encoding="utf-8")) if (folder / TASK).is_file() else None
    modalities = [*(config.get("init_args", {}).get("modalities") or {}), "text"]
    parts = [
        f"---\n{_front_matter(known, modalities, task)}\n---\n",
        f"# {known.name}\n",
        _model(weights or folder / WEIGHTS, config, modalities, task),
        f"## How to load\n\n{_loading(config, task)}",
        f"## Training\n\n{_training(known.facts)}",
        f"## Training data\n\n{_data(known.facts)}",
        f"## Metrics\n\n{_metrics(known)}",
        f"## Licence\n\n{_licence(known.facts)}",
    ]
    return "\n".join(parts)


def licensed(text: str, license: str) -> str:
    """A card with another licence."""
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    card.data["license"] = license
    section = re.compile(r"(?<=\n## Licence\n\n).*?(?=\n#|\Z)", re.DOTALL)
    return section.sub(lambda _: _licence({"license": license}), str(card))


def _front_matter(known: Known, modalities: Sequence[str], task: Mapping[str, Any] | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = known.facts.get("data")
    source = "; ".join(f"{name}: {_public(str(text))}" for name, text in data.items()) if isinstance(data, dict) else ""
    results = [
        EvalResult(
            task_type=name.removeprefix("test/").removeprefix("validation/").partition("/")[0],
            dataset_type="mmpt",
            dataset_name=source or UNKNOWN,
            dataset_split=name.partition("/")[0] if name.startswith(("test/", "validation/")) else None,
            metric_type=name.rpartition("/")[2],
            metric_name=name,
            metric_value=round(value, 6),
        )
        for name, value in _measured(known.metrics).items()
    ]
    card = ModelCardData(
        license=str(known.facts.get("license") or UNKNOWN),
        library_name="mmpt",
        tags=["multimodal", *modalities, *([str(task["task"])] if task else [])],
        model_name=known.name if results else None,
        eval_results=results or None,
    )
    return card.to_yaml()


def _model(weights: Path, config: Mapping[str, Any], modalities: Sequence[str], task: Mapping[str, Any] | None) -> str:
    with safe_open(str(weights), framework="pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    width = config.get("init_args", {}).get("embed_dim", UNKNOWN)
    text = (
        f"A multimodal model of {', '.join(modalities)}: {count / 1e6:.2f} M numbers in its weights, embeddings of "
        f"{width} dimensions.\n"
    )
    if task is not None:
        text += f"\nTuned for {task['task']} of {task['modality']}, label `{task['label']}`.\n"
        names = task.get("label_names") or []
        if len(names) > 1:
            shown = ", ".join(f"`{name}`" for name in names[:50])
            text += f"Labels: {shown}{f' and {len(names) - 50} more' if len(names) > 50 else ''}.\n"
    return text


def _loading(config: Mapping[str, Any], task: Mapping[str, Any] | None) -> str:
    foreign = sorted(packages(config) - {"mmpt"})
    trust = f", trust={json.dumps(foreign)}" if foreign else ""
    text = (
        "```python\nfrom mmpt import MultimodalModel\n\n"
        f'model = MultimodalModel.from_pretrained("this folder"{trust})\n'
        'vectors = model.embed("text", ["a text"])\n```\n'
    )
    if task is not None:
        text += (
            "\nPredictions for files of your own, with a configuration that says how they are read (a recipe's "
            "finetune.yaml, or the run's config.yaml):\n\n"
            "```bash\nmmpt predict --config finetune.yaml --model.pretrained FOLDER --data.path FILES "
            "--data.predict everything\n```\n"
        )
    return text


def _training(facts: Mapping[str, Any]) -> str:
    if not facts:
        return f"{UNKNOWN.capitalize()}: the folder was not written by a run.\n"
    names = ("task", "starts from", "steps", "epochs", "trained parameters", "seed", "precision", "versions")
    rows = {name: facts[name] for name in names if facts.get(name) is not None}
    if isinstance(rows.get("versions"), dict):
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in rows["versions"].items())
    return "".join(f"- {name}: {value}\n" for name, value in rows.items()) or f"{UNKNOWN.capitalize()}.\n"


def _data(facts: Mapping[str, Any]) -> str:
    about, samples = facts.get("about"), facts.get("samples")
    if not isinstance(about, dict) or not isinstance(samples, dict):
        return f"{UNKNOWN.capitalize()}.\n"
    rows = ["| source | what it is | train | validation | test |", "|---|---|---|---|---|"]
    for name, text in about.items():
        sizes = samples.get(name, {})
        cells = (str(sizes.get(split, UNKNOWN)) for split in ("train", "validation", "test"))
        rows.append(f"| {_cell(name)} | {_cell(text)} | {' | '.join(cells)} |")
    skipped = facts.get("samples skipped")
    note = f"Samples that could not be used and were skipped: {UNKNOWN if skipped is None else skipped}.\n"
    return "\n".join(rows) + f"\n\n{note}The licence of the data, and whom it speaks of: {UNKNOWN}.\n"


def _metrics(known: Known) -> str:
    if not _measured(known.metrics):
        return f"{UNKNOWN.capitalize()}: nothing was measured on this model.\n"
    intervals = known.details.get("intervals") or {}
    rows = ["| metric | value | 95 % interval | baselines |", "|---|---|---|---|"]
    for group in metric_groups(known.metrics).values():
        for row in group:
            if row.name.partition("/")[0] in NOT_OF_THE_MODEL:
                continue
            interval = " to ".join(number(end) for end in intervals[row.name]) if row.name in intervals else MISSING
            baselines = ", ".join(f"{name.replace('_', ' ')} {number(v)}" for name, v in row.baselines.items())
            rows.append(f"| {_cell(row.name)} | {number(row.value)} | {interval} | {_cell(baselines) or MISSING} |")
    note = "Intervals are 95 % percentile bootstrap intervals over examples; they do not speak of other training seeds."
    return "\n".join(rows) + f"\n\n{note}\n"


def _licence(facts: Mapping[str, Any]) -> str:
    if facts.get("license"):
        return f"`{facts['license']}`, as stated by whoever made the model.\n"
    return f"{UNKNOWN.capitalize()}: whoever made the model did not state one (`mmpt fit --license`).\n"


def _measured(metrics: Mapping[str, float]) -> dict[str, float]:
    """The finite metrics of the model, without baselines."""
    return {
        row.name: row.value
        for group in metric_groups(metrics).values()
        for row in group
        if math.isfinite(row.value) and row.name.partition("/")[0] not in NOT_OF_THE_MODEL
    }


def _public(text: str) -> str:
    """`Class: path` with the last part of the path alone: where files lay is nobody's business."""
    kind, separator, path = text.partition(": ")
    return f"{kind}{separator}{Path(path).name}"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
