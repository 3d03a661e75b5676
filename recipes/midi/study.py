"""The recipe's comparison over seeds: random weights, masked and adversarial pretraining, simple baselines, few labels.

    python recipes/midi/study.py [--tasks class|part|velocity ...] [--data.path MINE] [--source '{"parts": ["MELODY"]}']
        [--seeds 0 1 2] [--pretraining 1600 800] [--tuning 300] [--few 10] [--few-tuning 100] [--starts masked scratch]
        [--few-rate 5e-4] [--output study.jsonl]

Each result is a line of the output as soon as it is known; what is there already is not done again, so the same command
goes on after an interruption. At the end means and standard deviations over the seeds. `--pretraining` gives the steps
of random and of adversarial masking, about equal in time at 2 to 1; `--few` is how many pieces of a class (or of all,
where a task labels notes) keep their labels in the second comparison; 0 leaves that out. There pretrained weights are
tuned at the rate `--few-rate`, whose default was the better one on validation songs for melody.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from baseline import FieldGuesses, fitted_predictions, note_features, piece_features
from evaluation import classification_scores, recoverability, recovery, tagging_labels

from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.datasets.midi import Excerpts, Music
from mmpt.datasets.midi_corpus import Corpus
from mmpt.encoders.midi import VELOCITY
from mmpt.evaluation.linear_probe import linear_probe
from mmpt.finetuning import FineTuning
from mmpt.pretraining import Pretraining
from mmpt.recipe import keep_freed_memory, precision
from mmpt.source import Examples, Source, Split
from mmpt.study import Study

HERE = Path(__file__).parent
EPOCH = 200
"""Batches that count as an epoch here: the masker's freezing and the weights of the fields go by epochs."""

STARTS = ("masked", "adversarial", "scratch")


class FewLabels(Source):
    """A source whose training split is a few of its pieces, drawn anew for each seed.

    Args:
        whole: all of it; validation and test stay.
        count: pieces of a class, or of all where there are no classes.
        seed: of the draw.
    """

    def __init__(self, whole: Music, count: int, seed: int) -> None:
        self.whole, self.count, self.seed = whole, count, seed

    def split(self, name: Split) -> Examples:
        """See `Source`."""
        examples = self.whole.split(name)
        if name != "train":
            return examples
        assert isinstance(examples, Excerpts)
        number = np.array([place[0] for place in examples.places])
        pieces = examples.collection.pieces
        styles = [pieces[n].style for n in number.tolist()]
        kept: set[int] = set()
        for style in dict.fromkeys(styles):
            own = np.unique(number[[s == style for s in styles]])
            kept.update(np.random.default_rng(self.seed).permutation(own)[: self.count].tolist())
        return [examples[i] for i, n in enumerate(number.tolist()) if n in kept]

    def label_names(self, label: str) -> Sequence[str]:
        """See `Source`."""
        return self.whole.label_names(label)


def data_of(source: Source, batch_size: int, seed: int) -> MultimodalData:
    """Batches of the only source."""
    return MultimodalData({"midi": source}, batch_size=batch_size, eval_batch_size=128, seed=seed)


def fitted(module: Pretraining | FineTuning, data: MultimodalData, steps: int, seed: int) -> L.Trainer:
    """Train for some steps, without logs."""
    torch.manual_seed(seed)
    batches = len(data.attach(module.model.processors).loader("train", training=True))
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", precision=precision(), gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0,
        num_sanity_val_steps=0, limit_train_batches=min(EPOCH, batches),
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def pretrained(config_name: str, source: Music, steps: int, seed: int) -> tuple[Pretraining, MultimodalData]:
    """One of the recipe's pretraining configurations on a source."""
    whole = yaml.safe_load((HERE / config_name).read_text(encoding="utf-8"))
    config = whole["model"]["init_args"]
    config["model"]["init_args"]["text"]["init_args"]["tokenizer"]["init_args"]["texts"] = source.config()
    torch.manual_seed(seed)
    module = Pretraining(**from_config(config))
    data = data_of(source, whole["data"]["batch_size"], seed)
    fitted(module, data, steps, seed)
    return module, data


def intrinsic(
    source: Music, masked: Pretraining, adversarial: Pretraining | None, data: MultimodalData
) -> dict[str, float]:
    """Recovery of hidden notes of test pieces by both, with the guesses, and what the masker knows."""
    encoder: Any = masked.model.modality("midi").encoder
    part = source.split("train")
    few = range(0, len(part), max(1, len(part) // 2000))
    guesses = FieldGuesses([encoder.tokenizer.encode(part[i].modalities["midi"]).words for i in few], encoder.values)
    record = recovery(encoder, data, guesses, 10)
    if adversarial is None:
        return record
    other = recovery(adversarial.model.modality("midi").encoder, data, guesses, 10)
    record |= {f"{key}_adversarial": value for key, value in other.items() if not key.endswith(("_frequent", "_after"))}
    return record | recoverability(adversarial.heads["adversarial"], adversarial.model, data, 20)


def tuned(
    folder: Path, source: Source, task: str, steps: int, seed: int, scratch: bool, rate: float | None
) -> dict[str, float]:
    """Test scores after fine-tuning with the recipe's configuration, at another learning rate if one is given."""
    whole = yaml.safe_load((HERE / ("finetune.yaml" if task == "class" else "finetune-notes.yaml")).read_text("utf-8"))
    options = from_config(whole["model"]["init_args"])
    torch.manual_seed(seed)
    options |= {"pretrained": str(folder), "label": task, "from_scratch": scratch}
    module = FineTuning(**options | ({} if rate is None else {"lr": rate}))
    data = data_of(source, whole["data"]["batch_size"], seed)
    trainer = fitted(module, data, steps, seed)
    if task != "class":
        tested = trainer.test(module, data, verbose=False)[0]
        return {key: tested[f"test/tagging/{key}"] for key in ("accuracy", "macro_f1")}
    module.eval()
    with torch.no_grad():
        batches = [(module(b).softmax(-1), b.labels["class"], b.labels["piece"]) for b in data.loader("test")]
    scores, labels, pieces = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    return _plain(classification_scores(scores, labels, pieces, ""))


def _plain(scores: dict[str, float]) -> dict[str, float]:
    return {key.removeprefix("class/"): value for key, value in scores.items()}


def simple(source: Source, task: str, seed: int) -> dict[str, dict[str, float]]:
    """Baselines: name -> test scores."""
    train_set, test_set = (
        [part[i] for i in range(len(part))] for part in (source.split("train"), source.split("test"))
    )
    if task == "class":
        x, test = (
            torch.from_numpy(np.stack([piece_features(s.modalities["midi"]) for s in part]))
            for part in (train_set, test_set)
        )
        y, target = (torch.tensor([s.labels["class"] for s in part]) for part in (train_set, test_set))
        pieces = np.array([s.labels["piece"] for s in test_set])
        count = len(source.label_names("class"))
        votes = np.eye(count)[linear_probe(x, y, test, target).predictions.numpy()]
        most = np.eye(count)[np.tile(np.bincount(y.numpy()).argmax(), len(target))]
        return {
            name: _plain(classification_scores(found, target.numpy(), pieces, ""))
            for name, found in (("features", votes), ("majority", most))
        }
    from sklearn.metrics import f1_score

    tables = []
    for part in (train_set, test_set):
        x_ = np.concatenate([note_features(s.modalities["midi"], task != VELOCITY) for s in part])
        y_ = np.concatenate([tagging_labels(s.modalities["midi"], task) for s in part])
        tables.append((x_[y_ >= 0], y_[y_ >= 0]))
    (x_, y_), (test_, target_) = tables
    guesses = {"majority": np.full(len(target_), np.bincount(y_).argmax())}
    guesses |= fitted_predictions(x_, y_, test_, 100_000, seed)
    return {
        name: {
            "accuracy": float((found == target_).mean()),
            "macro_f1": float(f1_score(target_, found, average="macro", zero_division=0.0)),
        }
        for name, found in guesses.items()
    }


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", choices=["class", "part", "velocity"], nargs="+", default=["class"])
    parser.add_argument("--data.path", dest="path")
    parser.add_argument("--source", type=json.loads, default={}, help="options of mmpt.datasets.midi.Music, as JSON")
    parser.add_argument("--pieces", type=int, help="pieces of a style of the default data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", type=int, nargs=2, default=[1600, 800])
    parser.add_argument("--tuning", type=int, default=300)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--few-tuning", type=int, default=100)
    parser.add_argument("--few-rate", type=float, default=5e-4, help="of tuning pretrained weights on few pieces")
    parser.add_argument("--starts", choices=STARTS, nargs="+", default=STARTS, help="what tuning starts from")
    parser.add_argument("--output", type=Path, default=Path("study.jsonl"))
    options = parser.parse_args()
    keep_freed_memory()
    if options.pieces:
        options.source["corpus"] = Corpus(options.pieces)
    source = Music(options.path, **options.source)
    study = Study(options.output)
    for seed in options.seeds:
        folder = options.output.with_suffix("") / str(seed)
        pretraining = partial(pretrain_both, source, options, seed, folder)
        study.measure(pretraining, task="recovery", seed=seed)
        for task in options.tasks:
            few = [(options.few, options.few_tuning)] if options.few else []
            for pieces, steps in [(0, options.tuning), *few]:
                labelled: Source = FewLabels(source, pieces, seed) if pieces else source
                facts = {"task": task, "labelled pieces": pieces or "all"}
                for start in options.starts:
                    place = folder / ("masked" if start == "scratch" else start)
                    rate = options.few_rate if pieces and start != "scratch" else None
                    tuning = partial(tuned, place, labelled, task, steps, seed, start == "scratch", rate)
                    study.measure(tuning, **facts, start=start, seed=seed)
                # With all labels the baselines depend on the seed hardly at all; with few, on which ones those are.
                if not study.has(**facts, start="majority", **({"seed": seed} if pieces else {})):
                    for name, scores in simple(labelled, task, seed).items():
                        study.add({**facts, "start": name, "seed": seed}, scores, 0.0)
    study.print(("task", "labelled pieces", "start"))


def pretrain_both(source: Music, options: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Keep the models of both pretrainings in a folder; what they know without labels."""
    masked, data = pretrained("pretrain.yaml", source, options.pretraining[0], seed)
    masked.model.save_pretrained(folder / "masked")
    adversarial = None
    if "adversarial" in options.starts:
        adversarial, _ = pretrained("adversarial.yaml", source, options.pretraining[1], seed)
        adversarial.model.save_pretrained(folder / "adversarial")
    return intrinsic(source, masked, adversarial, data)


if __name__ == "__main__":
    main()
