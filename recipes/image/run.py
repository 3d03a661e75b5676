"""The image recipe: pretrain on emoji and their names, find names for an art style never seen, tune with few labels.

    python recipes/image/run.py [--smoke | --demo] [--output RUN] [--seed N] [--data.path MINE] [...options of mmpt fit]

Default data: emoji in OpenMoji and Noto styles for training; Twemoji, drawn by other artists, for the test. With
--data.path, your own pictures with texts or classes: their test split takes the place of the unseen style.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from baseline import features, name_scores
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmpt.commands import embed_split, probe_metrics, retrieval_metrics
from mmpt.data import MultimodalData
from mmpt.datasets.emoji import Emoji
from mmpt.datasets.emoji_art import drawings
from mmpt.encoders.image_processor import read_image
from mmpt.evaluation.nearest import label_similarity
from mmpt.evaluation.projection import two_dimensional
from mmpt.evaluation.retrieval import retrieval
from mmpt.finetuning import rebuilt
from mmpt.model import TEXT, MultimodalModel
from mmpt.recipe import RecipeOptions, Stages, finish, fit_arguments, recipe_main, start
from mmpt.report import ExampleRow, write_embeddings, write_examples
from mmpt.training import train

HERE = Path(__file__).parent
DEMO = ["--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "4"]
SMOKE = ["--trainer.max_steps", "3", "--trainer.limit_val_batches", "1"]

SHOTS = 10
"""Emoji of each category that are tuned on; of own data all labels are."""


def run(options: RecipeOptions, console: Console) -> dict[str, float]:
    """Pretrain, evaluate, tune, report; the metrics."""
    start(options)
    torch.manual_seed(options.seed)
    stages = Stages(console)
    model, data = stages.run("pretraining", pretrain, options)
    own = options.data_path is not None
    metrics: dict[str, float] = {}
    if own:
        metrics |= stages.run("retrieval on your test split", own_retrieval, model, data)
    else:
        metrics |= stages.run("names for an unseen art style", emoji_retrieval, model, data, options)
    if not own or next(iter(data.sources.values())).label_names("class"):
        metrics |= stages.run("fine-tuning with few labels", fine_tuning, options, own)
    stages.run("examples and map", illustrate, model, data, options)
    metrics |= {f"minutes/{name}": seconds / 60 for name, seconds in stages.seconds.items()}
    finish(options.output, metrics, console, data)
    return metrics


def pretrain(options: RecipeOptions) -> tuple[MultimodalModel, MultimodalData]:
    """`mmpt fit` with pretrain.yaml."""
    extra = SMOKE if options.smoke else DEMO if options.demo else []
    finished = train(fit_arguments(HERE / "pretrain.yaml", options.output, options.seed) + extra + options.overrides)
    model = finished.model.model.eval()
    return model, finished.datamodule.attach(model.processors)


def own_retrieval(model: MultimodalModel, data: MultimodalData) -> dict[str, float]:
    """Texts of the user's test pictures, both directions, beside the same model before training."""
    metrics = retrieval_metrics(model, data, "image", "test")
    before = retrieval_metrics(rebuilt(model).eval(), data, "image", "test")
    return metrics | {f"{name}_untrained": before[name] for name in metrics if not name.endswith("_chance")}


def emoji_retrieval(model: MultimodalModel, data: MultimodalData, options: RecipeOptions) -> dict[str, float]:
    """Names of the unseen style's pictures among all names, beside gradients and colours, and an untrained model."""
    emoji = emoji_of(data)
    names = list(emoji.label_names("group"))
    shown = sorted({s.labels["group"] for part in ("train", "test") for s in samples(emoji.split(part))})
    place = {group: number for number, group in enumerate(shown)}
    candidates = [names[group] for group in shown]
    unseen, labels = embed_split(model, data, "test", ("image",))
    seen, seen_labels = embed_split(model, data, "validation", ("image",))
    target = torch.tensor([place[group] for group in labels["group"].tolist()])
    subsets = {
        "all": torch.ones(len(target), dtype=torch.bool),
        "without_flags": labels["flag"] == 0,
        "without_flags_and_tones": (labels["flag"] == 0) & (labels["tone"] == 0),
    }
    memory = training_drawings(emoji)
    memory_numbers = torch.tensor([place[number] for number, _ in memory])

    def ranks(model: MultimodalModel, pictures: Tensor) -> dict[str, Tensor]:
        by_text = pictures @ model.embed(TEXT, candidates).T
        gallery = model.embed("image", [drawing for _, drawing in memory], batch_size=256)
        similar = label_similarity(pictures, gallery, memory_numbers, len(candidates))
        return {"unseen_style": _ranks(by_text, target), "unseen_style_with_gallery": _ranks(by_text + similar, target)}

    fresh = rebuilt(model).eval()
    found = {"": ranks(model, unseen), "_untrained": ranks(fresh, embed_split(fresh, data, "test", ("image",))[0])}
    if not options.smoke:
        classic = _ranks(classic_scores(emoji, memory, memory_numbers, len(candidates)), target)
        found["_hog"] = dict.fromkeys(found[""], classic)
    chance = torch.arange(1, len(candidates) + 1)  # every rank equally often
    metrics: dict[str, float] = {}
    for task in found[""]:
        for subset, rows in subsets.items():
            metrics |= _recalls(f"{task}/{subset}", chance, "_chance")
            for suffix, tasks in found.items():
                metrics |= _recalls(f"{task}/{subset}", tasks[task][rows], suffix)
    seen_target = torch.tensor([place[group] for group in seen_labels["group"].tolist()])
    metrics |= _recalls("seen_style/all", _ranks(seen @ model.embed(TEXT, candidates).T, seen_target), "")
    return metrics | _recalls("seen_style/all", chance, "_chance")


def _ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Rank of the right name in each row of a (queries, names) score matrix."""
    # the cosine of a row of scores with a unit vector is the score, up to a factor of the row
    return retrieval(scores, torch.eye(scores.shape[1]), target, ks=(1, 5)).ranks


def _recalls(prefix: str, ranks: Tensor, suffix: str) -> dict[str, float]:
    """R@1 and R@5."""
    return {f"{prefix}/R@{k}{suffix}": float((ranks <= k).float().mean()) for k in (1, 5)}


def training_drawings(emoji: Emoji) -> list[tuple[int, Any]]:
    """Number and drawing of each emoji in each training style."""
    styles = [drawings(style, emoji.size) for family in emoji.families for style in family]
    return [(number, drawn[number]) for drawn in styles for number in drawn.numbers]


def classic_scores(emoji: Emoji, shown: list[tuple[int, Any]], numbers: Tensor, count: int) -> Tensor:
    """Scores of the names for the unseen style by the nearest training picture in gradients and colours."""
    queries = [sample.modalities["image"] for sample in samples(emoji.split("test"))]
    gallery = (read_image(drawing) for _, drawing in track(shown, description="baseline"))
    return name_scores(features(map(read_image, queries)), features(gallery), numbers, count)


def fine_tuning(options: RecipeOptions, own: bool) -> dict[str, float]:
    """Classification with few labels: the pretrained folder, its architecture from scratch, and gradients + colours."""
    run_folder = options.output
    metrics: dict[str, float] = {}
    extra = ["--trainer.max_steps", "3"] if options.smoke else []
    few = ["--data.sources.image.init_args.emoji.init_args.shots", str(SHOTS)]
    path = ["--data.path", str(options.data_path)] if own else few
    for suffix, scratch in (("", False), ("_scratch", True)):
        folder = run_folder / f"finetuned{suffix}"
        scratch_option = ["--model.from_scratch", json.dumps(scratch)]
        start_from = ["--model.pretrained", str(run_folder / "model"), *scratch_option]
        finished = train([*fit_arguments(HERE / "finetune.yaml", folder, options.seed), *start_from, *extra, *path])
        tested = finished.trainer.test(finished.model, finished.datamodule, verbose=False)[0]
        metrics[f"few_labels/accuracy{suffix}"] = tested["test/classification/accuracy"]
        metrics[f"few_labels/macro_f1{suffix}"] = tested["test/classification/macro_f1"]
    data = finished.datamodule
    model = MultimodalModel.from_pretrained(run_folder / "model")
    probed = probe_metrics(model, data.attach(model.processors), "image", "test", "class", neighbours=False)
    metrics["few_labels/accuracy_linear_probe"] = probed["linear_probe/class/accuracy"]
    metrics["few_labels/macro_f1_linear_probe"] = probed["linear_probe/class/macro_f1"]
    metrics["few_labels/accuracy_majority"] = probed["linear_probe/class/accuracy_majority"]
    return metrics


def illustrate(model: MultimodalModel, data: MultimodalData, options: RecipeOptions) -> None:
    """Pictures with the names that were found for them, and a map of pictures and names."""
    source = next(iter(data.sources.values()))
    tests = samples(source.split("test"))
    generator = torch.Generator().manual_seed(0)
    chosen = [tests[i] for i in torch.randperm(len(tests), generator=generator)[:24].tolist()]
    names = sorted({str(sample.modalities[TEXT]) for sample in tests})
    texts = model.embed(TEXT, names)
    images = model.embed("image", [sample.modalities["image"] for sample in chosen])
    rows: list[ExampleRow] = []
    for sample, scores in zip(chosen, images @ texts.T, strict=True):
        best = scores.topk(min(5, len(names)))
        rows.append(
            {
                "query": {"image": read_image(sample.modalities["image"]), "text": str(sample.modalities[TEXT])},
                "results": [
                    {"text": names[i], "score": float(s), "correct": names[i] == sample.modalities[TEXT]}
                    for s, i in zip(best.values, best.indices.tolist(), strict=True)
                ],
            }
        )
    write_examples(options.output, "Names found for pictures of the test split", rows)
    few = [tests[i] for i in torch.randperm(len(tests), generator=generator)[:300].tolist()]
    vectors = torch.cat(
        [
            model.embed("image", [sample.modalities["image"] for sample in few]),
            model.embed(TEXT, [str(sample.modalities[TEXT]) for sample in few]),
        ]
    )
    labels = [str(sample.modalities[TEXT]) for sample in few] * 2
    kinds = ["picture"] * len(few) + ["name"] * len(few)
    write_embeddings(options.output, two_dimensional(vectors, options.seed, "tsne"), labels, kinds)


def emoji_of(data: MultimodalData) -> Emoji:
    """The emoji behind the recipe's default data."""
    (source,) = data.sources.values()
    return source.emoji  # type: ignore[attr-defined]


def samples(examples: Any) -> list[Any]:
    """All samples of a split."""
    return [examples[index] for index in range(len(examples))]


if __name__ == "__main__":
    sys.exit(recipe_main(__doc__.splitlines()[0], run))
