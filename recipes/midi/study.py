"""Several seeds of one task in one process: random weights, masked and adversarial pretraining, and simple baselines.

    python recipes/midi/study.py --task class|part|velocity [--data.path MINE] [--source '{"parts": ["MELODY"]}']
        [--seeds 0 1 2] [--pretraining 300 150] [--tuning 100] [--output study.jsonl]

`run.py` is the recipe with a report; this repeats its comparison with fewer steps, and writes a line of numbers for
each seed. `--pretraining` gives the steps of random and of adversarial masking, about equal in time at 2 to 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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
from mmpt.datasets.midi import Music
from mmpt.datasets.midi_corpus import Corpus
from mmpt.encoders.midi import VELOCITY
from mmpt.evaluation.linear_probe import linear_probe
from mmpt.finetuning import FineTuning
from mmpt.pretraining import Pretraining
from mmpt.recipe import keep_freed_memory, precision

HERE = Path(__file__).parent


def fitted(module: L.LightningModule, data: MultimodalData, steps: int, seed: int) -> L.Trainer:
    """Train for some steps, without logs."""
    torch.manual_seed(seed)
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", precision=precision(), gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer


def pretrained(config_name: str, source: Music, steps: int, seed: int) -> tuple[Pretraining, MultimodalData]:
    """One of the recipe's pretraining configurations on a source."""
    config = yaml.safe_load((HERE / config_name).read_text(encoding="utf-8"))["model"]["init_args"]
    text = config["model"]["init_args"]["text"]["init_args"]["tokenizer"]["init_args"]
    torch.manual_seed(seed)
    module = Pretraining(**from_config(config | {"model": _with_texts(config["model"], text, source)}))
    data = MultimodalData({"midi": source}, batch_size=32, eval_batch_size=128, seed=seed)
    data.attach(module.model.processors)
    fitted(module, data, steps, seed)
    return module, data


def _with_texts(model: dict[str, Any], text: dict[str, Any], source: Music) -> dict[str, Any]:
    text["texts"] = source.config()
    return model


def tuned(folder: str, source: Music, task: str, steps: int, seed: int, scratch: bool) -> dict[str, float]:
    """Test scores after fine-tuning with the recipe's configuration."""
    name = "finetune.yaml" if task == "class" else "finetune-notes.yaml"
    options = from_config(yaml.safe_load((HERE / name).read_text(encoding="utf-8"))["model"]["init_args"])
    torch.manual_seed(seed)
    module = FineTuning(**options | {"pretrained": folder, "label": task, "from_scratch": scratch})
    data = MultimodalData({"midi": source}, batch_size=32, eval_batch_size=128, seed=seed)
    data.attach(module.model.processors)
    trainer = fitted(module, data, steps, seed)
    if task != "class":
        tested = trainer.test(module, data, verbose=False)[0]
        return {key: tested[f"test/tagging/{key}"] for key in ("accuracy", "macro_f1")}
    module.eval()
    with torch.no_grad():
        batches = [(module(b).softmax(-1), b.labels["class"], b.labels["piece"]) for b in data.loader("test")]
    scores, labels, pieces = (torch.cat(part).numpy() for part in zip(*batches, strict=True))
    return {
        key.removeprefix("class/"): value for key, value in classification_scores(scores, labels, pieces, "").items()
    }


def simple(source: Music, task: str) -> dict[str, float]:
    """Baselines, which no seed changes much."""
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
        votes = np.eye(int(y.max()) + 1)[linear_probe(x, y, test, target).predictions.numpy()]
        most = np.eye(int(y.max()) + 1)[np.tile(np.bincount(y.numpy()).argmax(), len(target))]
        return classification_scores(votes, target.numpy(), pieces, "_features") | classification_scores(
            most, target.numpy(), pieces, "_majority"
        )
    tables = []
    for part in (train_set, test_set):
        x_ = np.concatenate([note_features(s.modalities["midi"], task != VELOCITY) for s in part])
        y_ = np.concatenate([tagging_labels(s.modalities["midi"], task) for s in part])
        tables.append((x_[y_ >= 0], y_[y_ >= 0]))
    (x_, y_), (test_, target_) = tables
    guesses = {"majority": np.full(len(target_), np.bincount(y_).argmax())} | fitted_predictions(x_, y_, test_, 50_000)
    return {f"{task}/accuracy_{name}": float((found == target_).mean()) for name, found in guesses.items()}


def main() -> None:
    """Run the seeds one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=["class", "part", "velocity"], required=True)
    parser.add_argument("--data.path", dest="path")
    parser.add_argument("--source", type=json.loads, default={}, help="options of mmpt.datasets.midi.Music, as JSON")
    parser.add_argument("--pieces", type=int, help="pieces of a style of the default data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", type=int, nargs=2, default=[300, 150])
    parser.add_argument("--tuning", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("study.jsonl"))
    options = parser.parse_args()
    keep_freed_memory()
    if options.pieces:
        options.source["corpus"] = Corpus(options.pieces)
    source = Music(options.path, **options.source)

    def write(record: dict[str, Any]) -> None:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"task": options.task, **record}) + "\n")
        print(record, flush=True)

    for seed in options.seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            masked, data = pretrained("pretrain.yaml", source, options.pretraining[0], seed)
            adversarial, _ = pretrained("adversarial.yaml", source, options.pretraining[1], seed)
            record: dict[str, Any] = {"seed": seed}
            encoder: Any = masked.model.modality("midi").encoder
            part = source.split("train")
            few = range(0, len(part), max(1, len(part) // 2000))
            guesses = FieldGuesses(
                [encoder.tokenizer.encode(part[i].modalities["midi"]).words for i in few], encoder.values
            )
            found = recovery(encoder, data, guesses, 5)
            record |= {key: value for key, value in found.items() if key.startswith("recovery/")}
            record |= recoverability(adversarial.heads["adversarial"], adversarial.model, data, 10)
            for name, module in (("masked", masked), ("adversarial", adversarial)):
                module.model.save_pretrained(f"{folder}/{name}")
            for name, start in (("masked", "masked"), ("adversarial", "adversarial"), ("scratch", "masked")):
                scores = tuned(f"{folder}/{start}", source, options.task, options.tuning, seed, name == "scratch")
                record |= {f"{options.task}/{key}_{name}": value for key, value in scores.items()}
        write({**record, "seconds": round(time.perf_counter() - began)})
    write(simple(source, options.task))


if __name__ == "__main__":
    main()
