"""The MIDI recipe: pretrain on notes hidden at random and by a masker, then classify pieces and tag notes.

    python recipes/midi/run.py [--smoke | --demo] [--output RUN] [--seed N] [--data.path MINE] [...options of mmpt fit]

Default data: six styles from music21's corpus. Options that begin with --data.path or --data.sources go to
fine-tuning too:

    --data.path songs.zip --data.sources.midi.init_args.parts "[MELODY, BRIDGE, PIANO]"

Every task is learned from the randomly masked model, the adversarial one and random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baseline import FieldGuesses, fitted_predictions, highest_note, note_features, piece_features
from evaluation import classification_scores, recoverability, recovery, tagging_labels
from rich.console import Console
from rolls import new_notes, piano_roll

from mmpt.data import MultimodalData
from mmpt.encoders.midi import VELOCITY, MidiEncoder
from mmpt.encoders.midi_infilling import bar_of, infill_bar
from mmpt.encoders.midi_notes import PART
from mmpt.errors import MmptError
from mmpt.evaluation.linear_probe import linear_probe
from mmpt.model import MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, fit_arguments, recipe_main, start
from mmpt.report import ExampleRow, write_examples
from mmpt.training import TrainingCLI, train

HERE = Path(__file__).parent
DEMO = ["--trainer.max_steps", "60"]
SMOKE = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
STARTS = {"": "model", "_adversarial": "adversarial/model", "_scratch": "model"}
"""Suffix of a metric -> the folder that fine-tuning starts from."""


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Pretrain twice, compare, tune, write a bar anew, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    metrics: dict[str, float] = {}
    masked = stages.run("pretraining, notes hidden at random", pretrain, options, "pretrain.yaml", options.output)
    adversarial = stages.run(
        "pretraining, notes hidden by a masker", pretrain, options, "adversarial.yaml", options.output / "adversarial"
    )
    data = masked.datamodule.attach(masked.model.model.processors)
    metrics |= stages.run("recovery of hidden notes", compare_recovery, masked, adversarial, data, options)
    source = next(iter(data.sources.values()))
    if len(source.label_names("class")) > 1:
        metrics |= stages.run("classification of pieces", classify, options, data)
    for label, name in ((PART, "part"), (VELOCITY, "velocity")):
        if len(source.label_names(label)) > 1 and has_label(data, label):
            metrics |= stages.run(f"tagging of notes: {name}", tag, options, data, label)
    stages.run("a bar written anew", illustrate, masked.model.model.eval(), data, options)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(options.output, metrics, console, data)
    return metrics


def pretrain(options: RecipeOptions, config: str, output: Path) -> TrainingCLI:
    """`mmpt fit` with one of the pretraining configurations."""
    # Options that belong to one of the two heads can't go to the other configuration.
    heads = ("--model.heads.masked", "--model.heads.adversarial")
    own = "--model.heads.masked" if config == "pretrain.yaml" else "--model.heads.adversarial"
    overrides = forwarded(options.overrides, lambda name: name.startswith(own) or not name.startswith(heads))
    return train(fit_command(config, output, options) + overrides)


def fit_command(config: str, output: Path, options: RecipeOptions) -> list[str]:
    """The command line of `mmpt fit` for one of this recipe's configurations, shortened where the recipe is."""
    extra = SMOKE if options.smoke else DEMO if options.demo else []
    return [*fit_arguments(HERE / config, output, options.seed), *extra]


def forwarded(overrides: list[str], wanted: Any) -> list[str]:
    """The overrides whose names are wanted, with their values."""
    kept: list[str] = []
    keeping = False
    for argument in overrides:
        if argument.startswith("--"):
            keeping = wanted(argument.partition("=")[0])
        if keeping:
            kept.append(argument)
    return kept


def samples(data: MultimodalData, split: Any) -> list[Any]:
    """All readable samples of a split."""
    found = []
    for source in data.sources.values():
        examples = source.split(split)
        for index in range(len(examples)):
            try:
                found.append(examples[index])
            except MmptError:
                continue  # listed in the report by the run itself
    return found


def has_label(data: MultimodalData, label: str) -> bool:
    """Whether notes differ in a label. Velocities count from three classes on: many files have one or two."""
    values = [tagging_labels(sample.modalities["midi"], label) for sample in samples(data, "train")[:50]]
    return len(np.unique(np.concatenate(values))) > (2 if label == VELOCITY else 1)


def compare_recovery(
    masked: TrainingCLI, adversarial: TrainingCLI, data: MultimodalData, options: RecipeOptions
) -> dict[str, float]:
    """Accuracy of each field at hidden notes of test pieces, and what the masker has learned."""
    encoder = masked.model.model.modality("midi").encoder
    rows = [encoder.tokenizer.encode(sample.modalities["midi"]).words for sample in samples(data, "train")]
    guesses = FieldGuesses(rows, encoder.values)
    batches = 2 if options.smoke else 10
    metrics = recovery(encoder, data, guesses, batches)
    other = recovery(adversarial.model.model.modality("midi").encoder, data, guesses, batches)
    metrics |= {
        f"{name}_adversarial": other[name] for name in list(metrics) if not name.endswith(("_frequent", "_after"))
    }
    head = adversarial.model.heads["adversarial"]
    return metrics | recoverability(head, adversarial.model.model, data, batches)


def tune(options: RecipeOptions, config: str, suffix: str, label: str) -> TrainingCLI:
    """Fine-tuning from one of the starting points."""
    folder = options.output / f"{label}{suffix}"
    start_from = ["--model.pretrained", str(options.output / STARTS[suffix])]
    scratch = ["--model.from_scratch", str(suffix == "_scratch").lower()]
    shared = forwarded(options.overrides, lambda name: name.startswith(("--data.path", "--data.sources")))
    arguments = fit_command(config, folder, options)
    return train([*arguments, "--model.label", label, *start_from, *scratch, *shared])


def classify(options: RecipeOptions, data: MultimodalData) -> dict[str, float]:
    """Classes of test excerpts, and of pieces by the vote of their excerpts."""
    metrics: dict[str, float] = {}
    for suffix in STARTS:
        finished = tune(options, "finetune.yaml", suffix, "class")
        module, loader = finished.model.eval(), finished.datamodule
        scores, labels, pieces = [], [], []
        with torch.no_grad():
            for batch in loader.attach(module.model.processors).loader("test"):
                scores.append(module(batch).softmax(-1))
                labels.append(batch.labels["class"])
                pieces.append(batch.labels["piece"])
        metrics |= classification_scores(
            torch.cat(scores).numpy(), torch.cat(labels).numpy(), torch.cat(pieces).numpy(), suffix
        )
    train_set, test_set = samples(data, "train"), samples(data, "test")
    x, test = (np.stack([piece_features(s.modalities["midi"]) for s in part]) for part in (train_set, test_set))
    y, target, pieces_ = (
        np.array([s.labels[name] for s in part])
        for part, name in ((train_set, "class"), (test_set, "class"), (test_set, "piece"))
    )
    probed = linear_probe(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(test), torch.from_numpy(target))
    votes = np.eye(y.max() + 1)[probed.predictions.numpy()]
    majority = np.tile(np.eye(y.max() + 1)[np.bincount(y).argmax()], (len(target), 1))
    metrics |= classification_scores(votes, target, pieces_, "_features")
    return metrics | classification_scores(majority, target, pieces_, "_majority")


def tag(options: RecipeOptions, data: MultimodalData, label: str) -> dict[str, float]:
    """Labels of the notes of test pieces."""
    metrics: dict[str, float] = {}
    for suffix in STARTS:
        finished = tune(options, "finetune-notes.yaml", suffix, label)
        tested = finished.trainer.test(finished.model, finished.datamodule, verbose=False)[0]
        metrics[f"{label}/accuracy{suffix}"] = tested["test/tagging/accuracy"]
        metrics[f"{label}/macro_f1{suffix}"] = tested["test/tagging/macro_f1"]
    parts = []
    for split in ("train", "test"):
        excerpts = [sample.modalities["midi"] for sample in samples(data, split)]
        if options.smoke:
            excerpts = excerpts[:20]
        x = np.concatenate([note_features(notes, label != VELOCITY) for notes in excerpts])
        y = np.concatenate([tagging_labels(notes, label) for notes in excerpts])
        top = np.concatenate([highest_note(notes) for notes in excerpts])
        parts.append((x[y >= 0], y[y >= 0], top[y >= 0]))
    (x, y, _), (test, target, top) = parts
    from sklearn.metrics import f1_score

    guesses = {"majority": np.full(len(target), np.bincount(y).argmax())}
    guesses |= fitted_predictions(x, y, test, seed=options.seed)
    if label == PART:
        others = np.bincount(y[y != 0], minlength=2).argmax()
        guesses["highest"] = np.where(top, 0, others)
    for name, predictions in guesses.items():
        metrics[f"{label}/accuracy_{name}"] = float((predictions == target).mean())
        metrics[f"{label}/macro_f1_{name}"] = float(f1_score(target, predictions, average="macro", zero_division=0.0))
    return metrics


def illustrate(model: MultimodalModel, data: MultimodalData, options: RecipeOptions) -> None:
    """Piano rolls of test excerpts with a bar hidden and written anew, and the MIDI files of them."""
    encoder = model.modality("midi").encoder
    assert isinstance(encoder, MidiEncoder)
    rows: list[ExampleRow] = []
    tests = samples(data, "test")
    for number in np.random.default_rng(0).permutation(len(tests))[:40].tolist():
        notes = tests[number].modalities["midi"]
        bars = bar_of(encoder.tokenizer.encode(notes).words, encoder)
        inner = [bar for bar in np.unique(bars)[2:-2].tolist() if (bars == bar).sum() > 3]
        if not inner or len(rows) == 6:
            continue
        original, context, written = infill_bar(encoder, notes, inner[len(inner) // 2])
        folder = options.output / "infilled"
        folder.mkdir(exist_ok=True)
        for name, part in (("original", original), ("context", context), ("infilled", written)):
            part.write(folder / f"{len(rows)}-{name}.mid")
        hidden, new = new_notes(original, context), new_notes(written, context)
        window = (0.0, max(original.quarters, written.quarters))
        rows.append(
            {
                "query": {"image": piano_roll(original, hidden, window), "text": f"{tests[number].name}: original"},
                "results": [
                    {"image": piano_roll(context, None, window), "text": "what the model sees"},
                    {"image": piano_roll(context, new, window), "text": "a bar written anew"},
                ],
            }
        )
    if rows:
        write_examples(options.output, "A hidden bar of test pieces (red), written anew by the pretrained model", rows)


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
