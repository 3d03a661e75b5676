"""What `mmpt evaluate`, `mmpt embed` and `mmpt search` do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track
from torch import Tensor

from mmpt.batches import Batch
from mmpt.catalogue import recipe_folder, recipe_names
from mmpt.config import from_config, packages
from mmpt.data import MultimodalData
from mmpt.errors import ConfigError, DataError
from mmpt.evaluation.calibration import calibration
from mmpt.evaluation.intervals import macro_f1, macro_recall
from mmpt.evaluation.linear_probe import linear_probe
from mmpt.evaluation.nearest import nearest
from mmpt.evaluation.record import Evaluation, classified
from mmpt.evaluation.retrieval import retrieval
from mmpt.evaluation.shots import shot_curve
from mmpt.evaluation.zero_shot import ensemble, zero_shot
from mmpt.model import TEXT, MultimodalModel, evaluating
from mmpt.report import build_report, print_metrics, write_metrics, write_run_facts
from mmpt.source import Sample, Source, Split
from mmpt.streams import RowStream, fingerprint


def evaluate(options: argparse.Namespace) -> None:
    """`mmpt evaluate TASK`: print the numbers beside their baselines, and write them on request."""
    model = MultimodalModel.from_pretrained(options.model, trust=options.trust)
    data = data_of(options.config, options.data_path).attach(model.processors)
    modality = options.modality or _only_modality(model)
    if options.task == "n-shot":
        train_x, train_y = embed_split(model, data, "train", (modality,))
        test_x, test_y = embed_split(model, data, options.split, (modality,))
        label = options.label
        curve = shot_curve(
            train_x, _label(train_y, label), test_x, _label(test_y, label), options.shots or (1, 5, 20, 100)
        )
        found = Evaluation({f"n_shot/{label}/{name}": value for name, value in curve.items()})
    elif options.task == "retrieval":
        found = retrieval_evaluation(model, data, modality, options.split)
    elif options.task == "zero-shot":
        templates = options.template or ["{}"]
        found = zero_shot_evaluation(model, data, modality, options.split, options.label, templates)
    else:
        neighbours = options.task == "knn"
        found = probe_evaluation(model, data, modality, options.split, options.label, neighbours, options.neighbours)
    print_metrics(found.metrics)
    for name, (low, high) in found.with_intervals().intervals.items():
        print(f"{name}: 95 % of resampled test sets between {low:.3f} and {high:.3f}")
    if options.output is None:
        return
    if options.output.suffix == ".json":
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(found.metrics, indent=1), encoding="utf-8")
        return
    write_metrics(options.output, found.metrics)
    facts = {"task": f"evaluation: {options.task}", "model": str(options.model), "split": options.split}
    write_run_facts(options.output, facts | {"data": options.data_path or str(options.config)})
    found.write(options.output)
    print(f"report  {build_report(options.output)}")


def retrieval_metrics(model: MultimodalModel, data: MultimodalData, modality: str, split: Split) -> dict[str, float]:
    """The numbers of `retrieval_evaluation`."""
    return retrieval_evaluation(model, data, modality, split).metrics


def retrieval_evaluation(model: MultimodalModel, data: MultimodalData, modality: str, split: Split) -> Evaluation:
    """Find the text of a sample among all texts of the split, and the other way round.

    Samples with the same text (the same `group`, where the data has groups) are all right answers.
    """
    samples, texts, labels = embed_split(model, data, split, (modality, TEXT))
    groups = labels.get("group", torch.arange(len(samples)))
    unique, first = _first_of_each(groups)
    candidates = texts[first]
    right = groups[:, None] == unique[None, :]  # (samples, texts)
    found = retrieval(samples, candidates, right).evaluation(f"retrieval/{modality}_to_text", sample_names(data, split))
    backward = retrieval(candidates, samples, right.T).evaluation(f"retrieval/text_to_{modality}")
    return replace(found, metrics=found.metrics | backward.metrics, statistics=found.statistics | backward.statistics)


def zero_shot_metrics(
    model: MultimodalModel, data: MultimodalData, modality: str, split: Split, label: str, templates: Sequence[str]
) -> dict[str, float]:
    """The numbers of `zero_shot_evaluation`."""
    return zero_shot_evaluation(model, data, modality, split, label, templates).metrics


def zero_shot_evaluation(
    model: MultimodalModel, data: MultimodalData, modality: str, split: Split, label: str, templates: Sequence[str]
) -> Evaluation:
    """Classify samples by the most similar label name.

    Raises:
        DataError: the data does not name the label's values.
    """
    names = [name for source in data.sources.values() for name in source.label_names(label)]
    if not names:
        raise DataError(f"the data names no values of the label {label!r}, so there is nothing to choose from")
    samples, labels = embed_split(model, data, split, (modality,))
    prompts = model.embed(TEXT, [t.format(name) for name in names for t in templates])
    classes = ensemble(prompts.unflatten(0, (len(names), len(templates))))
    result, prefix = zero_shot(samples, classes, _label(labels, label)), f"zero_shot/{label}"
    targets, answers = _label(labels, label).numpy(), result.predictions.numpy()
    found = classified(targets, answers, names, sample_names(data, split), macro_recall=macro_recall)
    found.outcomes["top5"] = result.in_top5.numpy()
    return replace(found.prefixed(prefix), metrics=result.metrics(prefix))


def probe_metrics(
    model: MultimodalModel,
    data: MultimodalData,
    modality: str,
    split: Split,
    label: str,
    neighbours: bool,
    k: int = 5,
) -> dict[str, float]:
    """The numbers of `probe_evaluation`."""
    return probe_evaluation(model, data, modality, split, label, neighbours, k).metrics


def probe_evaluation(
    model: MultimodalModel,
    data: MultimodalData,
    modality: str,
    split: Split,
    label: str,
    neighbours: bool,
    k: int = 5,
) -> Evaluation:
    """Classify embeddings of `split` by logistic regression or nearest neighbours fitted on the training split."""
    train_x, train_labels = embed_split(model, data, "train", (modality,))
    test_x, test_labels = embed_split(model, data, split, (modality,))
    train_y, test_y = _label(train_labels, label), _label(test_labels, label)
    prefix = f"knn/{label}" if neighbours else f"linear_probe/{label}"
    result = (
        nearest(train_x, train_y, test_x, test_y, k) if neighbours else linear_probe(train_x, train_y, test_x, test_y)
    )
    names = [name for source in data.sources.values() for name in source.label_names(label)]
    statistics = {} if neighbours else {"macro_f1": macro_f1}
    answers = result.predictions
    found = classified(test_y.numpy(), answers.numpy(), names, sample_names(data, split), **statistics).prefixed(prefix)
    calibrated = calibration(result.confidence, answers == test_y)
    return replace(found, metrics=result.metrics(prefix) | {f"{prefix}/ece": calibrated.ece}, calibration=calibrated)


def sample_names(data: MultimodalData, split: Split) -> list[str]:
    """Names of the usable samples of a split, in the order of `embed_split`."""
    return [name for batch in data.loader(split) for name in batch.names]


def embed_split(
    model: MultimodalModel, data: MultimodalData, split: Split, modalities: Sequence[str]
) -> tuple[Any, ...]:
    """Embed a split.

    Returns:
        One (samples, embed_dim) tensor for each modality, and last the labels: name -> (samples,).
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in modalities}
    labels: dict[str, list[Tensor]] = {}
    for batch in usable_batches(model, data.loader(split)):
        for name in modalities:
            if name not in batch.inputs:
                raise DataError(f"the {split} split has no {name}; it has {', '.join(batch.inputs)}")
            parts[name].append(model.embed(name, batch.inputs[name]).cpu())
        for name, values in batch.labels.items():
            labels.setdefault(name, []).append(values.cpu())
    joined = {name: torch.cat(values) for name, values in labels.items()}
    return (*(torch.cat(parts[name]) for name in modalities), joined)


def usable_batches(model: MultimodalModel, loader: Iterable[Batch]) -> Iterable[Batch]:
    """The usable batches on the model's device, with the model in evaluation mode."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in loader:
            if batch.inputs:
                inputs = {
                    name: {key: value.to(device) for key, value in tensors.items()}
                    for name, tensors in batch.inputs.items()
                }
                yield replace(batch, inputs=inputs)


def embed(options: argparse.Namespace) -> None:
    """`mmpt embed`: every sample of the input to a row of the output, in order; unusable ones are listed.

    The rows stream to the disk; the same command goes on where a killed one stopped.
    """
    model = MultimodalModel.from_pretrained(options.model, trust=options.trust)
    modality = options.modality
    model.modality(modality)
    data = data_of(options.config or _recipe_of(modality), options.input, first_source=True).attach(model.processors)
    data.eval_batch_size = options.batch_size
    ((name, source),) = data.sources.items()
    settings = {
        "model": fingerprint(model),
        "modality": modality,
        "input": options.input,
        "source": type(source).__name__,
    }
    stream = RowStream(options.output, settings)
    data.sources = {name: OneModality(source, modality, stream.consumed)}
    if stream.consumed < len(source.everything()):
        with evaluating(model), torch.no_grad():
            for batch in track(data.loader("test"), description=f"embedding {modality}"):
                rows = (
                    {"names": batch.names, "embeddings": model.embed(modality, batch.inputs[modality])}
                    if batch.inputs
                    else {}
                )
                stream.add(rows, len(batch) + len(batch.skipped), batch.skipped)
    if not stream.count:
        problem = stream.skipped[0]["problem"]
        raise DataError(f"no sample of {options.input} could be embedded; the first problem: {problem}")
    stream.finish()
    print(f"{options.output}: {stream.count} x {model.embed_dim}")
    _print_skipped(stream.skipped)


def search(options: argparse.Namespace) -> None:
    """`mmpt search`: the samples of the input (or of the recipe's data) that are most similar to a text."""
    model = MultimodalModel.from_pretrained(options.model, trust=options.trust)
    modality = options.modality or _only_modality(model)
    names, rows, skipped = embed_everything(model, modality, options.config, options.input, options.batch_size)
    best = (rows @ model.embed(TEXT, [options.text])[0].cpu()).topk(min(options.top, len(names)))
    for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        print(f"{score:6.3f}  {names[place]}")
    _print_skipped(skipped)


def embed_everything(
    model: MultimodalModel, modality: str, config: Path | None, path: str | None, batch_size: int
) -> tuple[list[str], Tensor, list[dict[str, Any]]]:
    """Embed all samples of the first source of a configuration.

    Args:
        model: embeds.
        modality: of the samples.
        config: says how files are read; None is the recipe with the modality's name.
        path: replaces the source's default data.
        batch_size: samples at once.

    Returns:
        Names, embeddings (samples, embed_dim), and what could not be used.

    Raises:
        DataError: nothing could be embedded.
    """
    model.modality(modality)
    data = data_of(config or _recipe_of(modality), path, first_source=True).attach(model.processors)
    data.eval_batch_size = batch_size
    data.sources = {name: OneModality(source, modality) for name, source in data.sources.items()}
    names: list[str] = []
    rows: list[Tensor] = []
    skipped: list[dict[str, Any]] = []
    loader = data.loader("test")
    with evaluating(model), torch.no_grad():
        for batch in track(loader, description=f"embedding {modality}"):
            skipped += batch.skipped
            if batch.inputs:
                rows.append(model.embed(modality, batch.inputs[modality]).cpu())
                names += batch.names
    if not rows:
        raise DataError(f"no sample of {path} could be embedded; the first problem: {skipped[0]['problem']}")
    return names, torch.cat(rows), skipped


def _print_skipped(skipped: Sequence[dict[str, Any]]) -> None:
    for row in skipped:
        print(f"skipped {row['sample']}: {row['problem']}; expected {row['expected']}")


class OneModality(Source):
    """A source's samples in order, reduced to one modality; every split is all of them.

    Args:
        source: read from here.
        modality: kept; samples need not carry anything else.
        start: leave out so many at the beginning.
    """

    def __init__(self, source: Source, modality: str, start: int = 0) -> None:
        self.source, self.modality, self.path, self.start = source, modality, source.path, start

    def split(self, name: Split) -> _Reduced:
        """All samples."""
        return _Reduced(self.source, self.modality, self.start)


class _Reduced:
    def __init__(self, source: Source, modality: str, start: int) -> None:
        self.samples, self.modality, self.start = source.everything(), modality, start

    def __len__(self) -> int:
        return len(self.samples) - self.start

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[self.start + index]
        return Sample({self.modality: sample.modalities[self.modality]}, sample.name)


def data_of(config: Path, path: str | None = None, first_source: bool = False) -> MultimodalData:
    """The data of a training configuration, which the caller trusts to name classes.

    Args:
        config: YAML with a `data` section.
        path: replaces the sources' default data.
        first_source: use the first source alone, which is the one that reads the user's files.

    Raises:
        ConfigError: the file has no such section.
    """
    if not config.is_file():
        raise ConfigError(f"{config} does not exist; recipes: {', '.join(recipe_names())} (`mmpt recipes copy`)")
    section = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("data")
    if not isinstance(section, dict) or "sources" not in section:
        raise ConfigError(f"{config} has no data section with sources")
    if first_source:
        name = next(iter(section["sources"]))
        section = section | {"sources": {name: section["sources"][name]}, "weights": None}
    options = from_config(section, trust=sorted(packages(section)))
    if path is not None:
        options["path"] = path
    return MultimodalData(**options)


def _recipe_of(modality: str) -> Path:
    if modality not in recipe_names():
        raise ConfigError(
            f"there is no recipe named {modality!r} to say how its files are read; give --config with a data section"
        )
    return recipe_folder(modality) / "pretrain.yaml"


def _only_modality(model: MultimodalModel) -> str:
    others = [name for name in model.modalities if name != TEXT]
    if len(others) != 1:
        raise ConfigError(f"the model has the modalities {', '.join(model.modalities)}; say which with --modality")
    return others[0]


def _label(labels: dict[str, Tensor], name: str) -> Tensor:
    if name not in labels:
        raise DataError(f"the data has no label {name!r}; it has {', '.join(labels) or 'none'}")
    return labels[name]


def _first_of_each(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct groups in order of appearance, and where each appears first."""
    first: dict[int, int] = {}
    for place, group in enumerate(groups.tolist()):
        first.setdefault(group, place)
    return torch.tensor(list(first)), torch.tensor(list(first.values()))
