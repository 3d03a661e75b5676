"""Learning curves: accuracy after 1, 5, 20, 100 examples of each class, tuned and by simpler means.

One domain at a time, through its finetune.yaml:

    python recipes/curves.py --domain cell --pretrained runs/cell/model --output curves.jsonl

Each result is a line of JSON as soon as it is there; started again, what the file has is not computed again. Methods:
tuned (all weights), lora, linear_probe (of the pretrained embeddings), from_scratch, and classic (logistic regression
on what `classic_features` of the recipe's baseline.py gives, where it has one). `--summary` prints means and spreads.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml

from mmpt.adapters import LoRA
from mmpt.commands import embed_split
from mmpt.config import from_config, packages
from mmpt.data import MultimodalData
from mmpt.errors import SampleError
from mmpt.evaluation.linear_probe import linear_probe
from mmpt.finetuning import FineTuning
from mmpt.labels import FewShot
from mmpt.model import MultimodalModel
from mmpt.source import Around, Examples, Sample, Source, Split
from mmpt.study import Study, spread

METHODS = ("tuned", "lora", "linear_probe", "from_scratch", "classic")
HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", help="name of a recipe; its finetune.yaml is used")
    parser.add_argument("--config", type=Path, help="a finetune.yaml of your own instead")
    parser.add_argument("--pretrained", type=Path, help="model folder")
    parser.add_argument("--data-path", help="your own data")
    parser.add_argument("--output", type=Path, required=True, help="lines of JSON, added to")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=100, help="of tuning")
    parser.add_argument("--most", type=int, default=1000, help="samples of the test split, evenly over it, at most")
    parser.add_argument("--trust", nargs="*", default=[], help="packages that the folder may name classes of")
    parser.add_argument("--summary", action="store_true", help="only print what the file holds")
    options = parser.parse_args(arguments)
    if not options.summary:
        if options.pretrained is None or (options.domain is None) == (options.config is None):
            parser.error("give --pretrained, and either --domain or --config")
        torch.set_num_threads(1)
        measure(options)
    summarize(Study(options.output))
    return 0


class Kept(Around):
    """A source that is read once however often it is asked, with a part of a large test split.

    Args:
        source: gives the samples.
        most: samples of the test split, evenly over it.
    """

    def __init__(self, source: Source, most: int) -> None:
        self.source, self.most = source, most
        self.splits: dict[Split, Examples] = {}
        self.places: dict[tuple[str, Split], Sequence[tuple[int, Any]]] = {}

    def split(self, name: Split) -> Examples:
        """See `Source`."""
        if name not in self.splits:
            samples = self.source.split(name)
            if name == "test" and len(samples) > self.most:
                samples = [samples[i] for i in np.linspace(0, len(samples) - 1, self.most).round().astype(int).tolist()]
            self.splits[name] = samples
        return self.splits[name]

    def label_names(self, label: str) -> Sequence[str]:
        """See `Source`."""
        return self.source.label_names(label)

    def label_places(self, label: str, name: Split) -> Sequence[tuple[int, Any]]:
        """See `Source`."""
        if (label, name) not in self.places:
            self.places[label, name] = self.source.label_places(label, name)
        return self.places[label, name]


def measure(options: argparse.Namespace) -> None:
    """Write a line for each method, number of shots and seed that has none."""
    config = options.config or HERE / options.domain / "finetune.yaml"
    domain = options.domain or config.parent.name
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    given = from_config(content["data"]["sources"], trust=sorted(packages(content)))
    sources: dict[str, Source] = {name: Kept(source, options.most) for name, source in given.items()}
    study = Study(options.output)
    classic = classic_of(config.parent / "baseline.py")
    methods = [method for method in options.methods if method != "classic" or classic is not None]
    for seed, shots, method in product(options.seeds, options.shots, methods):
        numbers = partial(result, options, content, sources, method, shots, seed, classic)
        study.measure(numbers, domain=domain, method=method, shots=shots, seed=seed)


def result(
    options: argparse.Namespace,
    content: dict[str, Any],
    sources: dict[str, Source],
    method: str,
    shots: int,
    seed: int,
    classic: Callable[[Sequence[Sample]], Any] | None,
) -> dict[str, float]:
    """Accuracy and macro F1 on the test split of one method after so many examples of each class."""
    trust = sorted(packages(content) | set(options.trust))
    settings = from_config(content["model"]["init_args"], trust=trust) | {
        "pretrained": str(options.pretrained),
        "trust": options.trust,
    }
    label = settings.get("label", "class")
    data = from_config({name: value for name, value in content["data"].items() if name != "sources"}, trust=trust)
    data["sources"] = {name: FewShot(source, shots, label, seed) for name, source in sources.items()}
    if options.data_path is not None:
        data["path"] = options.data_path
    module = MultimodalData(**data | {"seed": seed, "drop_last": False})
    if method == "classic":
        assert classic is not None
        return classic_numbers(list(module.sources.values()), label, classic, seed)
    if method == "linear_probe":
        model = MultimodalModel.from_pretrained(options.pretrained, trust=options.trust)
        module.attach(model.processors)
        train_x, train_y = embed_split(model, module, "train", (settings["modality"],))
        test_x, test_y = embed_split(model, module, "test", (settings["modality"],))
        found = linear_probe(train_x, train_y[label], test_x, test_y[label], seed)
        majority = largest(test_y[label].numpy())
        return {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "accuracy_majority": majority}
    torch.manual_seed(seed)
    own = {"lora": {"adapter": LoRA()}, "from_scratch": {"from_scratch": True}}.get(method, {})
    tuner = FineTuning(**settings | own)
    trainer = L.Trainer(
        max_steps=options.steps, accelerator="cpu", logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(tuner, module)
    tested = trainer.test(tuner, module, verbose=False)[0]
    return {name: tested[f"test/{tuner.task.name}/{name}"] for name in ("accuracy", "macro_f1", "accuracy_majority")}


def classic_numbers(
    sources: Sequence[Source], label: str, features: Callable[[Sequence[Sample]], Any], seed: int
) -> dict[str, float]:
    """The same for logistic regression on features that nothing was trained for."""
    train, test = (
        [sample for source in sources for sample in labelled(source.split(name), label)] for name in ("train", "test")
    )
    count = len(train)
    values = np.asarray(features([*train, *test]), dtype=np.float32)
    train_y, test_y = (np.array([sample.labels[label] for sample in part]) for part in (train, test))
    found = linear_probe(values[:count], train_y, values[count:], test_y, seed)
    return {"accuracy": found.accuracy, "macro_f1": found.macro_f1, "accuracy_majority": largest(test_y)}


def labelled(samples: Examples, label: str) -> list[Sample]:
    """The samples that can be read and have the label."""
    found = []
    for index in range(len(samples)):
        with contextlib.suppress(SampleError):
            sample = samples[index]
            if label in sample.labels:
                found.append(sample)
    return found


def largest(labels: np.ndarray) -> float:
    """Share of the most frequent class of the test split: the same baseline for all methods."""
    return float(np.unique(labels, return_counts=True)[1].max() / len(labels))


def classic_of(path: Path) -> Callable[[Sequence[Sample]], Any] | None:
    """`classic_features` of a recipe's baseline.py, if it has one."""
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location(f"baseline_of_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module).get("classic_features")


def summarize(study: Study) -> None:
    """Print mean and standard deviation over seeds as a table of Markdown."""
    for domain in dict.fromkeys(row["domain"] for row in study.rows):
        shots = sorted({row["shots"] for row in study.rows if row["domain"] == domain})
        print(f"\n| {domain}: accuracy | " + " | ".join(f"{s} per class" for s in shots) + " |")
        print("|---" * (len(shots) + 1) + "|")
        for method in METHODS:
            cells = [study.values("accuracy", domain=domain, method=method, shots=s) for s in shots]
            if any(cells):
                shown = [f"{np.mean(c):.3f} ± {spread(c)}".removesuffix(" ± ") if c else "–" for c in cells]  # noqa: RUF001
                print(f"| {method} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    sys.exit(main())
