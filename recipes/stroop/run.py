"""The Stroop recipe: does training with pictures change what a text encoder knows of shapes, colors and sizes?

    python recipes/stroop/run.py [--smoke] [--output RUN] [--text minilm|scratch] [--items FILE] [--resume]

One text encoder, four arms with equal steps and captions, three seeds of each trained one:

    untouched    as it is (minilm: all-MiniLM-L6-v2; scratch: freshly initialised)
    image_text   contrastive training on emoji and their names
    text_only    the same names without pictures: two passes with different dropout are positives (SimCSE)
    shuffled     pictures with the names of other pictures

each with all names, and (but for the shuffled one) with the names without any option of a visual probe ("red").
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import yaml
from rich.console import Console
from torch import nn

from mmpt.commands import retrieval_metrics
from mmpt.data import MultimodalData
from mmpt.datasets.emoji import Emoji
from mmpt.encoders.image_drawing import DrawingEncoder
from mmpt.encoders.image_processor import ImageProcessor
from mmpt.errors import ConfigError, MmptError
from mmpt.files import write_atomically
from mmpt.heads import ContrastiveHead
from mmpt.huggingface import load_text
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.probing.callback import StroopCallback
from mmpt.probing.command import write_json
from mmpt.probing.comparison import Metric, compare_groups
from mmpt.probing.embedders import ModelEmbedder
from mmpt.probing.linear import FOLDS, LinearWordProbe
from mmpt.probing.loading import minilm_folder
from mmpt.probing.plots import bars, save
from mmpt.probing.scoring import summary
from mmpt.probing.stroop import ProbeResult, StroopProbe, StroopSettings
from mmpt.probing.task import Task, load_task, shipped_tasks
from mmpt.recipe import RecipeOptions, finish, parse_options, start
from mmpt.source import Examples, Sample, Source, Split
from mmpt.text import TextTransformer
from mmpt.tokenization import WordPieceSource

TRAINED = ("image_text", "text_only", "shuffled")
ARMS = ("untouched", *TRAINED)
Found = dict[tuple[str, str, int], dict[str, Any]]
"""(arm, captions, seed) -> scores of each task, right answers of the linear probe, facts of the training."""

CAPTIONS = ("all", "without_options")
WIDTH = 384
SETTINGS = StroopSettings(pooling="mean")  # MiniLM's own, and what the contrastive head compares


@dataclass(frozen=True)
class Plan:
    """What is trained and asked.

    Attributes:
        run: folder.
        text: "minilm" or "scratch".
        seeds: of the trained arms.
        steps: of each arm.
        batch_size: pictures and captions in a step.
        captions: of `CAPTIONS`.
        smoke: leave out what takes long: linear probes and retrieval.
        tasks: what is asked.
    """

    run: Path
    text: str
    seeds: tuple[int, ...]
    steps: int
    batch_size: int
    captions: tuple[str, ...]
    smoke: bool
    tasks: tuple[Task, ...]


class Captions(Source):
    """Emoji without skin tones and flags, with their names.

    Args:
        emoji: the drawings.
        leave_out: names that hold one of these words are left out.
        shuffle: every emoji gets the name of another one, the same one in all styles.
        pictures: whether samples carry the picture.
        seed: of the shuffling.
    """

    def __init__(
        self,
        emoji: Emoji,
        leave_out: Sequence[str] = (),
        shuffle: bool = False,
        pictures: bool = True,
        seed: int = 0,
    ) -> None:
        self.emoji, self.leave_out, self.shuffle, self.pictures, self.seed = emoji, leave_out, shuffle, pictures, seed

    def split(self, name: Split) -> Examples:
        """The samples of one split, with the label `group`."""
        return _Kept(self.emoji.split(name), self)

    def texts(self) -> Sequence[str]:
        """Each name once."""
        kept = self.split("train")
        return sorted({str(kept[index].modalities["text"]) for index in range(len(kept))})

    def admits(self, sample: Sample) -> bool:
        """Whether a sample is one of these."""
        words = set(re.findall(r"\w+", str(sample.modalities["text"]).lower()))
        return not sample.labels["tone"] and not sample.labels["flag"] and not words & set(self.leave_out)


class _Kept:
    def __init__(self, samples: Examples, source: Captions) -> None:
        everything = [samples[index] for index in range(len(samples))]
        self.samples, self.source = samples, source
        self.chosen = [index for index, sample in enumerate(everything) if source.admits(sample)]
        groups = sorted({int(everything[index].labels["group"]) for index in self.chosen})
        names = {int(s.labels["group"]): str(s.modalities["text"]) for s in everything}
        order = np.random.default_rng(source.seed).permutation(len(groups)) if source.shuffle else range(len(groups))
        self.caption = {group: names[groups[place]] for group, place in zip(groups, order, strict=True)}

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`."""
        sample = self.samples[self.chosen[index]]
        text = self.caption[int(sample.labels["group"])]
        image = {"image": sample.modalities["image"]} if self.source.pictures else {}
        return replace(sample, modalities={**image, "text": text}, labels={"group": sample.labels["group"]})


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe; 0 on success, 2 after an error that mmpt explains."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--text", choices=["minilm", "scratch"], default="minilm", help="the text encoder")
    parser.add_argument("--items", action="append", default=[], help="a task file of your own besides mmpt's")
    parser.add_argument("--captions", choices=["both", "all"], default="both", help="also without option words, or not")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each arm")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--prompts", type=int, default=2, help="at most so many prompts of each task")
    parser.add_argument("--resume", action="store_true", help="keep the arms that an earlier run has finished")
    own, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    options = parse_options(__doc__.splitlines()[0], rest)
    console = Console()
    try:
        if options.overrides:
            raise ConfigError(f"unknown options {options.overrides}; see --help")
        run(options, own, console)
    except MmptError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


def run(options: RecipeOptions, own: argparse.Namespace, console: Console) -> dict[str, float]:
    """Train and probe all arms; the metrics."""
    if not (own.resume and (options.output / "config.yaml").is_file()):
        start(options)
    plan = _plan(options, own)
    settings = {**vars(own), "smoke": options.smoke, "steps": plan.steps, "seeds": list(plan.seeds)}
    (options.output / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    began = time.perf_counter()
    found = dict(_arms(plan, console))
    metrics = evaluate(plan, found)
    metrics["minutes/arms"] = (time.perf_counter() - began) / 60
    finish(options.output, metrics, console)
    return metrics


def _plan(options: RecipeOptions, own: argparse.Namespace) -> Plan:
    smoke = options.smoke
    tasks = [load_task(name) for name in (["color", "sentiment"] if smoke else shipped_tasks())]
    tasks += [load_task(path) for path in own.items]
    prompts = 1 if smoke else own.prompts
    tasks = [_thinned(task.sample(12) if smoke else task, prompts) for task in tasks]
    steps, seeds = (2, (options.seed,)) if smoke else (own.steps, tuple(range(options.seed, options.seed + own.seeds)))
    captions = CAPTIONS[:1] if smoke or own.captions == "all" else CAPTIONS
    return Plan(options.output, own.text, seeds, steps, 8 if smoke else 32, captions, smoke, tuple(tasks))


def _thinned(task: Task, prompts: int) -> Task:
    """At most so many prompts, spread evenly over the list, so that none is chosen by its result."""
    if task.kind == "cloze":
        return task
    places = np.unique(np.linspace(0, len(task.prompts) - 1, min(prompts, len(task.prompts))).round().astype(int))
    return task.with_prompts([task.prompts[place] for place in places])


def _arms(plan: Plan, console: Console) -> Iterator[tuple[tuple[str, str, int], dict[str, Any]]]:
    """(arm, captions, seed) -> scores of each task as a list of arrays, and facts of the training."""
    everything = [("untouched", "all", plan.seeds[0])] if plan.text == "minilm" else []
    everything += [("untouched", "all", seed) for seed in plan.seeds] if plan.text == "scratch" else []
    everything += [
        (arm, own, seed)
        for own, arm, seed in product(plan.captions, TRAINED, plan.seeds)
        if not (arm == "shuffled" and own == "without_options")  # a control, once
    ]
    for arm, own, seed in everything:
        path = plan.run / "arms" / f"{arm}-{own}-{seed}.npz"
        if not path.is_file():
            console.rule(f"{arm}, captions {own}, seed {seed}", align="left")
            _train_and_probe(plan, arm, own, seed, path)
        with np.load(path) as file:
            content = {name: file[name] for name in file.files}
        yield (arm, own, seed), content


def _train_and_probe(plan: Plan, arm: str, own: str, seed: int, path: Path) -> None:
    L.seed_everything(seed, verbose=False)
    source = Captions(Emoji(size=48), option_words(plan.tasks) if own == "without_options" else ())
    source.shuffle, source.pictures, source.seed = arm == "shuffled", arm != "text_only", seed
    model = build(plan.text, source)
    facts: dict[str, float] = {}
    if arm != "untouched":
        facts = train(plan, model, source, arm, own, seed)
    probing = StroopProbe(ModelEmbedder(model, arm), SETTINGS)
    results = {task.name: probing.run(task) for task in plan.tasks}
    arrays: dict[str, Any] = {f"scores/{name}": np.stack(result.scores) for name, result in results.items()}
    if not plan.smoke and seed == plan.seeds[0]:
        for task in plan.tasks:
            if linear_fits(task):
                arrays[f"linear/{task.name}"] = LinearWordProbe(probing.encoder, "mean", 0).run(task).correct
    if arm == "image_text" and own == "all" and seed == plan.seeds[0]:
        model.save_pretrained(plan.run / "model")
    arrays |= {f"facts/{name}": np.array(value) for name, value in facts.items()}
    write_atomically(path, lambda file: np.savez(file, **arrays))


def linear_fits(task: Task) -> bool:
    """Whether a linear probe makes sense: words with fixed options, and enough of each for its folds."""
    if task.kind != "choice" or task.fixed_options is None or "TEXT" in task.items[0].slots:
        return False
    answers = [item.options[item.answer] for item in task.items]
    return min(answers.count(answer) for answer in set(answers)) >= FOLDS


def option_words(tasks: Sequence[Task]) -> list[str]:
    """Every word of an option of a visual task."""
    visual = [task for task in tasks if task.visual is not False and task.fixed_options is not None]
    words = {word.lower() for task in visual for option in task.fixed_options or () for word in option.split()}
    return sorted(words | {"grey", "big", "small", "large", "square"} if words else words)


def build(text: str, source: Captions) -> MultimodalModel:
    """The text encoder beside a new image encoder; the contrastive space is the text's mean-pooled space itself."""
    backbone = (
        load_text(minilm_folder(), max_length=64)
        if text == "minilm"
        else TextTransformer(WordPieceSource(source, 3000), width=WIDTH, depth=2, heads=6, max_length=64, dropout=0.1)
    )
    image = DrawingEncoder(48, place_width=WIDTH, processor=ImageProcessor(48, (0.5,) * 3, (0.5,) * 3))
    model = MultimodalModel(
        backbone, {"image": Modality(image, projection=False)}, embed_dim=WIDTH, text_pooling="mean"
    )
    projection = model.projections["text"]
    assert isinstance(projection, nn.Linear)
    nn.init.eye_(projection.weight)
    projection.requires_grad_(False)
    if text == "minilm":  # the lower layers stay as they are
        for name, parameter in backbone.named_parameters():
            if re.match(r"word\.|token_type|transformer\.(position|input_norm|layers\.[0-3])\.?", name):
                parameter.requires_grad_(False)
    return model


def train(plan: Plan, model: MultimodalModel, source: Captions, arm: str, own: str, seed: int) -> dict[str, float]:
    """Train one arm.

    Returns:
        Mean loss and accuracy of the contrastive head over the last tenth, and retrieval of names for pictures of
        an unseen style beside chance.
    """
    head = ContrastiveHead("text", "text") if arm == "text_only" else ContrastiveHead("image")
    if arm == "text_only":
        model.modality("image").requires_grad_(False)  # never asked, so it is not decayed towards zero either
    factors = {"model.modalities.text": 0.02} if plan.text == "minilm" else None
    module = Pretraining(model, {"contrastive": head}, lr=1e-3, warmup_steps=plan.steps // 10, lr_factors=factors)
    data = MultimodalData({"emoji": source}, batch_size=plan.batch_size, eval_batch_size=256, seed=seed)
    watch = _Watch(plan.steps)
    callbacks: list[Any] = [watch]
    if seed == plan.seeds[0] and own == "all":
        folder = str(plan.run / "probing" / arm)
        callbacks.append(
            StroopCallback(
                ["color", "sentiment"],
                max(1, plan.steps // 4),
                "mean",
                prompts=1,
                limit=12 if plan.smoke else 66,
                folder=folder,
            )
        )
    trainer = L.Trainer(
        accelerator="cpu", max_steps=plan.steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, gradient_clip_val=1.0, callbacks=callbacks,
        limit_val_batches=0, use_distributed_sampler=False, default_root_dir=str(plan.run),
    )  # fmt: skip
    trainer.fit(module, data)
    facts = {"accuracy": watch.mean("contrastive/accuracy"), "loss": watch.mean("contrastive/loss")}
    model.eval()
    if arm != "text_only" and not plan.smoke:
        held_out = MultimodalData({"emoji": Captions(source.emoji, source.leave_out)}, eval_batch_size=256)
        found = retrieval_metrics(model, held_out.attach(model.processors), "image", "test")
        facts |= {
            "R@5": found["retrieval/image_to_text/R@5"],
            "R@5_chance": found["retrieval/image_to_text/R@5_chance"],
        }
    return facts


class _Watch(L.Callback):
    """Keeps what the last tenth of the steps logged."""

    def __init__(self, steps: int) -> None:
        self.first = steps - max(1, steps // 10)
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step > self.first:
            self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def mean(self, name: str) -> float:
        return float(np.mean([row[f"train/{name}"] for row in self.rows]))


def evaluate(plan: Plan, found: Found) -> dict[str, float]:
    """Metrics beside baselines; paired differences, prompts and a plot go into files of the run."""
    metrics: dict[str, float] = {}
    differences: list[dict[str, Any]] = []
    for own, task in product(plan.captions, plan.tasks):
        results = results_of(found, own, task)
        abouts = {arm: [summary(result) for result in several] for arm, several in results.items()}
        for metric in metrics_of(task):
            key = f"{own}/{task.name}/{metric}"
            metrics |= _beside_baselines(key, metric, abouts)
            for other in abouts.keys() - {"image_text"}:
                resamples = 200 if task.kind == "rating" else 1000
                compared = compare_groups(results["image_text"], results[other], metric, resamples)
                differences.append({"captions": own, **asdict(compared)})
        for (arm, caption, _), content in found.items():
            if (caption == own or arm == "untouched") and f"linear/{task.name}" in content:
                metrics[f"{own}/{task.name}/linear_probe_{arm}"] = float(content[f"linear/{task.name}"].mean())
    for (arm, own, seed), content in found.items():
        facts = {name: float(value) for name, value in content.items() if name.startswith("facts/")}
        metrics |= {f"training/{arm}/{own}/{seed}/{name.removeprefix('facts/')}": v for name, v in facts.items()}
    write_json(plan.run / "differences.json", differences)
    write_json(plan.run / "prompts.json", {task.name: list(task.prompts) for task in plan.tasks})
    first = [summary(results_of(found, "all", task)[arm][0]) for task in plan.tasks for arm in ARMS]
    save(bars(first), plan.run / "probing" / "arms.png")
    return metrics


def results_of(found: Found, own: str, task: Task) -> dict[str, list[ProbeResult]]:
    """The results of each arm on a task, one for each seed; the untouched encoder belongs to all captions."""
    results: dict[str, list[ProbeResult]] = {}
    for (arm, caption, _), content in found.items():
        if caption == own or arm == "untouched":
            scores = tuple(content[f"scores/{task.name}"])
            results.setdefault(arm, []).append(ProbeResult(arm, "stroop", {"pooling": "mean"}, task, scores))
    return results


def metrics_of(task: Task) -> tuple[Metric, ...]:
    """What is reported of a task."""
    if task.kind == "rating":
        return ("spearman",)
    return ("accuracy",) if task.fixed_options is None else ("accuracy", "accuracy_calibrated")


def _beside_baselines(key: str, metric: str, abouts: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means over seeds of the arms, chance and majority; and the standard deviation over seeds."""
    values = {arm: [about["over_prompts"][metric]["mean"] for about in several] for arm, several in abouts.items()}
    metrics = {key if arm == "image_text" else f"{key}_{arm}": float(np.mean(v)) for arm, v in values.items()}
    about = abouts["untouched"][0]
    metrics |= {f"{key}_{name}": about[name] for name in ("chance", "majority") if about[name] is not None}
    return metrics | {f"spread/{key}/{arm}": float(np.std(v, ddof=1)) for arm, v in values.items() if len(v) > 1}


if __name__ == "__main__":
    sys.exit(main())
