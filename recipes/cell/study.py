"""Measure the cell recipe over seeds: types left out, transfer between two studies, and what each loss adds.

    python recipes/cell/study.py --output study.jsonl [--other other.h5ad] [--seeds 0 1 2] [--parts main splits
    unseen cross ablation]
        [--minutes 9] [--smoke]

Every finished run is a line of the output file; what is there already is not run again. `--minutes` starts no new run
after that time. The other study needs a column of types; transfer is measured over the genes that both have. At the
end the means and standard deviations over the seeds are printed.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from baseline import log_expression, logistic_regression, marker_scores, ranks
from evaluation import (
    best_share,
    drawn,
    few_shot_metrics,
    scores,
    supervised_baselines,
    typed,
    typing_metrics,
    unseen_metrics,
    zero_shot,
)
from few_shot import tune

from mmpt.commands import retrieval_metrics
from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.datasets.cell import Cells
from mmpt.evaluation.zero_shot import relative
from mmpt.finetuning import FineTuning, rebuilt
from mmpt.heads import MatchingHead
from mmpt.model import MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.recipe import keep_freed_memory
from mmpt.study import Study

HERE = Path(__file__).parent
CELLS = "mmpt.datasets.cell.Cells"
UNSEEN = {
    "B and NK": ("CD19+ B", "CD56+ NK"),
    "monocyte and CD34": ("CD14+ Monocyte", "CD34+"),
    "dendritic and CD8": ("Dendritic", "CD8+ Cytotoxic T"),
}
COARSE = {
    "B cell": "B",
    "dendritic cell": "DC",
    "CD14-positive monocyte": "Mono",
    "FCGR3A-positive monocyte": "Mono",
    "natural killer cell": "NK",
    "cytotoxic CD8-positive T cell": "T",
    "naive CD8-positive T cell": "T",
    "naive CD4-positive T cell": "T",
    "memory CD4-positive T cell": "T",
    "regulatory CD4-positive T cell": "T",
}
"""Types of the definitions by what two studies have in common; others are left out of that comparison."""


@dataclass
class Variant:
    """What differs from the recipe.

    Attributes:
        source: arguments of every source of cells.
        vocabulary: arguments of the gene vocabulary.
        weights: of the heads, in both stages.
        same_group: of the cell-text contrast.
        labelled: whether descriptions are trained on; otherwise sentences.yaml, sentences alone.
        second: whether the second stage is run.
    """

    source: dict[str, Any] = field(default_factory=dict)
    vocabulary: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    same_group: str = "soft"
    labelled: bool = True
    second: bool = True


@dataclass
class Trained:
    """A model after its stages."""

    model: MultimodalModel
    head: MatchingHead | None
    data: MultimodalData
    losses: dict[str, float]

    @property
    def source(self) -> Cells:
        """Its described cells."""
        source = self.data.sources["described"]
        assert isinstance(source, Cells)
        return source


def pretrained(variant: Variant, seed: int, steps: int = -1) -> Trained:
    """One or both stages of the recipe in this process, without a run folder."""
    first = loaded("pretrain.yaml" if variant.labelled else "sentences.yaml")
    adapt(first, variant)
    L.seed_everything(seed, verbose=False)
    module = Pretraining(**from_config(first["model"]["init_args"]))
    data = MultimodalData(**{**from_config(first["data"]), "seed": seed})
    losses = fit(module, data, first["trainer"]["max_epochs"], steps, "first")
    head = None
    if variant.second:
        second = loaded("align.yaml")
        adapt(second, variant)
        merged = {**first["model"]["init_args"], **second["model"]["init_args"]}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged["pretrained"] = str(module.model.save_pretrained(folder))
            module = Pretraining(**from_config(merged))
        losses |= fit(module, data, second["trainer"]["max_epochs"], steps, "second")
        found = module.heads["matching"]
        assert isinstance(found, MatchingHead)
        head = found if variant.weights.get("matching", 1.0) else None
    model = module.model.eval()
    return Trained(model, head, data.attach(model.processors), losses)


def fit(module: Pretraining, data: MultimodalData, epochs: int, steps: int, stage: str) -> dict[str, float]:
    """Train, and give the validation losses before and after."""
    trainer = quiet_trainer(epochs, steps)
    before = validation_losses(module, data)
    trainer.fit(module, data)
    after = validation_losses(module, data)
    return {f"loss/{stage}/{name}": after[name] for name in after} | {
        f"loss/{stage}/{name}_before": before[name] for name in before
    }


def quiet_trainer(epochs: int, steps: int) -> L.Trainer:
    """Trains without logs, checkpoints and validation."""
    return L.Trainer(
        max_epochs=epochs,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def validation_losses(module: Pretraining, data: MultimodalData) -> dict[str, float]:
    """Mean of each head's loss over the validation split, with the same masks and dropout every time."""
    data.attach(module.model.processors)
    module.eval()
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.train()  # without it two passes of a cell are one, and the cell-cell loss says nothing
    sums: dict[str, list[float]] = {}
    with torch.no_grad(), torch.random.fork_rng([]):
        for batch in data.loader("validation"):
            torch.manual_seed(batch.seed)
            for name, value in module(batch)[1].items():
                if name.endswith("/loss"):
                    sums.setdefault(name.removesuffix("/loss"), []).append(float(value))
    module.train()
    return {name: float(np.mean(values)) for name, values in sums.items()}


def loaded(name: str) -> dict[str, Any]:
    """A configuration of this recipe."""
    tree: dict[str, Any] = yaml.safe_load((HERE / name).read_text(encoding="utf-8"))
    return tree


def adapt(node: Any, variant: Variant) -> None:
    """Change a configuration as the variant says, wherever the classes stand."""
    if isinstance(node, list):
        for part in node:
            adapt(part, variant)
    if not isinstance(node, dict):
        return
    if node.get("class_path") == CELLS:
        node.setdefault("init_args", {}).update(variant.source)
    if node.get("class_path") == "mmpt.encoders.cell.GeneVocabulary":
        node["init_args"].update(variant.vocabulary)
    if isinstance(node.get("weights"), dict):
        node["weights"] |= {name: value for name, value in variant.weights.items() if name in node["weights"]}
    if isinstance(node.get("heads"), dict):
        node["heads"]["cell_text"]["init_args"]["same_group"] = variant.same_group
    for part in node.values():
        adapt(part, variant)


def main_run(seed: int, steps: int) -> dict[str, float]:
    """The recipe itself, and a model without labels for few-shot typing."""
    trained = pretrained(Variant(), seed, steps)
    source, test = trained.source, typed(trained.source, "test")
    share = best_share(trained.model, trained.head, source, described(source))
    metrics = typing_metrics(trained.model, trained.head, source, share, test, "zero_shot")
    fresh = typing_metrics(rebuilt(trained.model).eval(), None, source, 1.0, test, "zero_shot")
    metrics |= {f"{name}_untrained": fresh[name] for name in ("zero_shot/accuracy", "zero_shot/macro_f1")}
    metrics |= {"share": share, **trained.losses}
    metrics |= retrieval_metrics(trained.model, trained.data, "cell", "test")
    metrics |= few_shot_metrics({"": trained.model}, source, (5,), "probe")
    blind = pretrained(Variant(labelled=False, second=False), seed, steps)
    metrics |= typing_metrics(blind.model, None, source, 1.0, test, "sentences_alone")
    models = {"": blind.model, "_untrained": rebuilt(blind.model).eval()}
    metrics |= few_shot_metrics(models, source, (1, 5, 20, None), "few_labels")
    metrics |= supervised_baselines(typed(source, "train"), test, "all_labels")
    for suffix, model, scratch in (("", trained.model, False), ("_sentences_alone", blind.model, False),
                                   ("_scratch", trained.model, True)):  # fmt: skip
        metrics |= fine_tuned(model, seed, steps, scratch, "all_labels", suffix)
    return metrics


def splits_run(seed: int, steps: int) -> dict[str, float]:
    """All labels of two thirds of the cells, the other third typed, after sentences alone; mean of three divisions."""
    divisions = [division_run(3 * seed + number, seed, steps) for number in (1, 2, 3)]
    return {name: float(np.mean([metrics[name] for metrics in divisions])) for name in divisions[0]}


def division_run(division: int, seed: int, steps: int) -> dict[str, float]:
    """One division of the cells."""
    cells = {"seed": division, "test_fraction": 0.33, "validation_fraction": 0.03}
    variant = Variant(cells, labelled=False, second=False)
    blind = pretrained(variant, seed, steps)
    metrics = fine_tuned(blind.model, seed, steps, False, "splits", "", variant)
    metrics |= fine_tuned(blind.model, seed, steps, True, "splits", "_scratch", variant)
    metrics |= few_shot_metrics({"": blind.model}, blind.source, (None,), "splits")
    train, test = typed(blind.source, "train"), typed(blind.source, "test")
    return metrics | supervised_baselines(train, test, "splits") | {"splits/test_cells": float(len(test.labels))}


def fine_tuned(
    model: MultimodalModel,
    seed: int,
    steps: int,
    scratch: bool,
    prefix: str,
    suffix: str,
    variant: Variant | None = None,
) -> dict[str, float]:
    """A classifier on all training labels, from the model's weights or from its architecture alone."""
    tree = loaded("finetune.yaml")
    adapt(tree, variant or Variant())
    L.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"pretrained": str(model.save_pretrained(folder)), "from_scratch": scratch}
        module = FineTuning(**{**from_config(tree["model"]["init_args"]), **settings})
    data = MultimodalData(**{**from_config(tree["data"]), "seed": seed})
    trainer = quiet_trainer(tree["trainer"]["max_epochs"], steps)
    trainer.fit(module, data)
    tested = trainer.test(module, data, verbose=False)[0]
    return {f"{prefix}/{name}{suffix}": tested[f"test/classification/{name}"] for name in ("accuracy", "macro_f1")}


def unseen_run(variant: Variant, seed: int, steps: int) -> dict[str, float]:
    """Types that neither stage saw."""
    trained = pretrained(variant, seed, steps)
    types = variant.source["exclude"]
    share = best_share(trained.model, trained.head, trained.source, described(trained.source))
    metrics = unseen_metrics(trained.model, trained.head, trained.source, types, share, "unseen")
    return metrics | {"share": share}


def cross_run(own: str | None, other: str | None, genes: str, seed: int, steps: int) -> dict[str, float]:
    """Train on one study, type the other: by description, as coarse types, and with few labels."""
    variant = Variant(source={"path": own}, vocabulary={"genes": genes})
    trained = pretrained(variant, seed, steps)
    blind = pretrained(replace(variant, labelled=False, second=False), seed, steps)
    here, there = trained.source, Cells(other)
    metrics = typed_elsewhere(trained.model, here, there, "cross")
    metrics |= typed_elsewhere(blind.model, here, there, "cross/sentences_alone")
    shared = Path(genes).read_text(encoding="utf-8").split()
    known, test = everything(here), everything(there)
    own_kinds, kinds = (
        np.array(coarse(s, s.label_names("class")))[c.labels] for s, c in ((here, known), (there, test))
    )
    inside, outside = (ranks(log_expression(cells, shared)) for cells in (known.cells, test.cells))
    fitted = logistic_regression(inside[own_kinds >= 0], own_kinds[own_kinds >= 0], outside[kinds >= 0])
    metrics |= scores(kinds[kinds >= 0], fitted, "cross/coarse", "_ranks")
    metrics |= few_shot_metrics({"": trained.model}, there, (1, 5, 20), "cross", 5)
    metrics |= few_shot_metrics({"": blind.model}, there, (1, 5, 20), "cross/sentences_alone", 5)
    return metrics | few_shot_tuned(trained, there, seed, steps)


def typed_elsewhere(model: MultimodalModel, here: Cells, there: Cells, prefix: str) -> dict[str, float]:
    """All cells of another study by description, among all of its types and among coarse ones.

    Suffix `_standardised`: relative to these cells; `_calibrated`: relative to those of the own study.
    """
    test, texts = everything(there), described(there)
    names = list(there.label_names("class"))
    kinds = np.array(coarse(there, names))
    kept = kinds[test.labels] >= 0
    cosines = zero_shot(model, None, test.cells, texts).cosines
    reference = zero_shot(model, None, everything(here).cells, texts).cosines
    metrics: dict[str, float] = {}
    for suffix, values in (
        ("", cosines.numpy()),
        ("_standardised", relative(cosines, cosines).numpy()),
        ("_calibrated", relative(cosines, reference).numpy()),
        ("_markers", marker_scores(test.cells, [there.definitions.find(name) for name in names])),
    ):
        metrics |= scores(test.labels, values.argmax(1), f"{prefix}/all_types", suffix)
        metrics |= scores(kinds[test.labels][kept], kinds[values.argmax(1)][kept], f"{prefix}/coarse", suffix)
    return metrics


def few_shot_tuned(trained: Trained, there: Cells, seed: int, steps: int) -> dict[str, float]:
    """LangCell's few-shot tuning on another study, one draw for each seed, and the baselines on the same draw."""
    metrics: dict[str, float] = {}
    train, test = typed(there, "train"), typed(there, "test")
    log = log_expression(train.cells), log_expression(test.cells)
    texts = described(there)
    for count in (1, 5):
        rows = drawn(train.labels, count, seed)
        model, head = copy.deepcopy((trained.model, trained.head))
        assert head is not None
        cells, labels = [train.cells[row] for row in rows], train.labels[rows]
        tune(model, head, cells, labels.tolist(), texts, epochs=10 if steps < 0 else 1, seed=seed)
        found = zero_shot(model, head, test.cells, texts)
        prefix = f"cross/{count}_shot_tuned"
        metrics |= scores(test.labels, found.mixed(0.5).argmax(1).numpy(), prefix)
        metrics |= scores(test.labels, found.cosines.argmax(1).numpy(), prefix, "_similarity_alone")
        for suffix, (inside, outside) in (("_log_expression", log), ("_ranks", (ranks(log[0]), ranks(log[1])))):
            metrics |= scores(test.labels, logistic_regression(inside[rows], labels, outside), prefix, suffix)
    return metrics


def ablation_run(variant: Variant, seed: int, steps: int) -> dict[str, float]:
    """Zero-shot typing and 5-shot typing after a changed training."""
    trained = pretrained(variant, seed, steps)
    source, test = trained.source, typed(trained.source, "test")
    share = best_share(trained.model, trained.head, source, described(source))
    metrics = typing_metrics(trained.model, trained.head, source, share, test, "zero_shot")
    metrics |= few_shot_metrics({"": trained.model}, source, (5,), "probe")
    return metrics | retrieval_metrics(trained.model, trained.data, "cell", "test")


def described(source: Cells) -> list[str]:
    """The texts of a source's types."""
    return [source.definitions.describe(name) for name in source.label_names("class")]


def everything(source: Cells) -> Any:
    """All labelled cells of a study."""
    parts = [typed(source, split) for split in ("train", "validation", "test")]
    return type(parts[0])([c for p in parts for c in p.cells], np.concatenate([p.labels for p in parts]))


def coarse(source: Cells, names: Sequence[str]) -> list[int]:
    """For each type the number of its coarse type, -1 where there is none."""
    order = sorted(set(COARSE.values()))
    kinds = [COARSE.get(source.definitions.find(name).name) for name in names]
    return [-1 if kind is None else order.index(kind) for kind in kinds]


def shared_genes(own: str | None, other: str, folder: Path) -> str:
    """Write the genes that both studies have."""
    both = [set(everything(Cells(path)).cells[0].expression.genes["index"].tolist()) for path in (own, other)]
    path = folder / "shared_genes.txt"
    path.write_text("\n".join(sorted(both[0] & both[1])), encoding="utf-8")
    return str(path)


def plan(options: argparse.Namespace) -> dict[str, Any]:
    """Name of each run -> function of seed and steps."""
    runs: dict[str, Any] = {}
    if "main" in options.parts:
        runs["main"] = main_run
    if "splits" in options.parts:
        runs["splits"] = splits_run
    if "unseen" in options.parts:
        for name, types in UNSEEN.items():
            hidden = {"exclude": list(types)}
            variants = {
                name: Variant(hidden, second=False),
                f"{name}, sentences alone": Variant(hidden, labelled=False, second=False),
            }
            for title, variant in variants.items():
                runs[f"unseen: {title}"] = lambda seed, steps, variant=variant: unseen_run(variant, seed, steps)
    if "cross" in options.parts and options.other:
        genes = shared_genes(None, options.other, options.output.parent)
        runs["cross: to the other"] = lambda seed, steps: cross_run(None, options.other, genes, seed, steps)
        runs["cross: from the other"] = lambda seed, steps: cross_run(options.other, None, genes, seed, steps)
    if "ablation" in options.parts:
        variants = {
            "without masked genes": Variant(weights={"masked_genes": 0.0}),
            "without cell-cell": Variant(weights={"cell_cell": 0.0}),
            "without cell-text": Variant(weights={"cell_text": 0.0}),
            "without matching": Variant(weights={"matching": 0.0}),
            "same text ignored": Variant(same_group="ignore"),
        }
        for name, variant in variants.items():
            runs[f"ablation: {name}"] = lambda seed, steps, variant=variant: ablation_run(variant, seed, steps)
    return runs


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--other", help="h5ad of another study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=["main", "splits", "unseen", "cross", "ablation"])
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--smoke", action="store_true", help="two steps in each stage")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    study, runs = Study(options.output, options.minutes), plan(options)
    # the recipe itself over all seeds first, then everything else seed by seed
    for seed, name in sorted(product(options.seeds, runs), key=lambda pair: (pair[1] != "main", pair[0])):
        study.measure(partial(runs[name], seed, 2 if options.smoke else -1), run=name, seed=seed)
    study.print()


if __name__ == "__main__":
    main()
