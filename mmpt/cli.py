"""The `mmpt` command. Only what a command needs is imported, so that help and lists come at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TRAINER_COMMANDS = {
    "fit": "train what a configuration describes (pretraining or fine-tuning)",
    "validate": "compute the losses and metrics of the validation split",
    "test": "compute the losses and metrics of the test split",
    "predict": "write predictions or embeddings of the test split",
}

EPILOG = """\
examples:
  mmpt recipes
  mmpt recipes copy image my-recipe
  mmpt fit --config my-recipe/pretrain.yaml --data.path my-pictures/ --trainer.max_steps 500
  mmpt fit --resume RUN
  mmpt evaluate retrieval --model RUN/model --config my-recipe/pretrain.yaml
  mmpt embed --model RUN/model --modality image --input my-pictures/ --output vectors.npz
  mmpt probe stroop --model bert-folder/ --model RUN/model --task shape --task color --output probe.json
  mmpt search "a red bicycle" --model RUN/model --input my-pictures/
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, or 2 after an error that mmpt explains (set MMPT_TRACEBACK=1 to see where it was raised).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    from mmpt.errors import MmptError

    try:
        if arguments and arguments[0] in TRAINER_COMMANDS:
            _train(arguments)
            return 0
        options = _parser().parse_args(arguments)
        options.command(options)
    except MmptError as error:
        if os.environ.get("MMPT_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmpt",
        description="Pretrain, evaluate and fine-tune multimodal models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=f"{text}; `mmpt {name} --help` lists its options")

    recipes = commands.add_parser("recipes", help="list the recipes, or copy one to change it")
    recipes.set_defaults(command=_recipes)
    actions = recipes.add_subparsers(metavar="ACTION")
    copy = actions.add_parser("copy", help="copy a recipe's files into a new folder")
    copy.add_argument("domain")
    copy.add_argument("folder", type=Path)
    copy.set_defaults(command=_copy_recipe)

    evaluate = commands.add_parser("evaluate", help="measure a model folder on a recipe's data")
    evaluate.add_argument("task", choices=["retrieval", "zero-shot", "linear-probe", "knn", "n-shot"])
    _model_option(evaluate)
    evaluate.add_argument("--config", type=Path, required=True, help="a configuration; its `data` section is used")
    evaluate.add_argument("--data-path", help="your own data instead of the configuration's")
    evaluate.add_argument("--modality", help="default: the one that the model has besides text")
    evaluate.add_argument("--split", choices=["train", "validation", "test"], default="test")
    evaluate.add_argument("--label", default="class", help="label of all tasks but retrieval")
    evaluate.add_argument("--template", action="append", help="zero-shot prompt with one {}; may be repeated")
    evaluate.add_argument("--neighbours", type=int, default=5, help="k of knn")
    evaluate.add_argument("--shots", type=int, nargs="+", help="examples of each class for n-shot; default 1 5 20 100")
    evaluate.add_argument("--output", type=Path, help="NAME.json for the numbers, or a folder for a report as well")
    evaluate.set_defaults(command=_evaluate)

    embed = commands.add_parser("embed", help="embed files of one modality")
    _model_option(embed)
    embed.add_argument("--modality", required=True)
    embed.add_argument(
        "--input", required=True, help="what the modality's recipe reads: a folder, table, archive or file"
    )
    embed.add_argument(
        "--output", type=Path, required=True, help=".npz, .parquet or .h5ad with `embeddings` and `names`"
    )
    embed.add_argument("--config", type=Path, help="a configuration whose data section reads the input")
    embed.add_argument("--batch-size", type=int, default=64)
    embed.set_defaults(command=_embed)

    search = commands.add_parser("search", help="find the samples of one modality that fit a text best")
    search.add_argument("text")
    _model_option(search)
    search.add_argument("--modality", help="default: the one that the model has besides text")
    search.add_argument("--input", help="what the modality's recipe reads; default: all of the recipe's own data")
    search.add_argument("--config", type=Path, help="a configuration whose data section reads the input")
    search.add_argument("--top", type=int, default=10, help="how many to show")
    search.add_argument("--batch-size", type=int, default=64)
    search.set_defaults(command=_search)

    export = commands.add_parser("export", help="turn a training checkpoint or a model folder into one to hand on")
    origin = export.add_mutually_exclusive_group(required=True)
    origin.add_argument("--checkpoint", type=Path, help="RUN/checkpoints/NAME.ckpt")
    origin.add_argument("--model", type=Path, help="a model folder, e.g. RUN/model")
    export.add_argument("--output", type=Path, required=True, help="the new model folder")
    _trust_option(export)
    export.add_argument("--license", help="of the model, for its card, e.g. apache-2.0; default: the run's, or unknown")
    export.add_argument("--onnx", action="store_true", help="also write each tower as MODALITY.onnx; needs --config")
    export.add_argument("--config", type=Path, help="a configuration whose data give the example that is traced")
    export.add_argument("--data-path", help="your own data instead of the configuration's")
    export.set_defaults(command=_export)

    _probe_options(commands.add_parser("probe", help="ask text encoders what they know of shapes, colours, sizes, ..."))

    report = commands.add_parser("report", help="make the HTML page of a run folder, or of several runs side by side")
    report.add_argument("run", type=Path, nargs="+", help="one run folder, or several to compare with the first")
    report.add_argument("--output", type=Path, help="page of a comparison; default: comparison.html")
    report.set_defaults(command=_report)
    return parser


def _probe_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="PROBE", required=True)
    stroop = kinds.add_parser("stroop", help="the option that changes a sentence's embedding least is the answer")
    masked = kinds.add_parser("masked-lm", help="the option that a masked language model expects most is the answer")
    linear = kinds.add_parser("linear", help="what logistic regression reads from the embeddings of the words alone")
    kinds.add_parser("tasks", help="list the tasks that ship with mmpt").set_defaults(command=_probe_tasks)
    for kind, probe in (("stroop", stroop), ("masked-lm", masked), ("linear", linear)):
        probe.add_argument(
            "--model",
            action="append",
            required=True,
            help="Hugging Face, sentence-transformers or mmpt folder, open_clip:ARCHITECTURE:CHECKPOINT, "
            "python:MODULE:FUNCTION or minilm; NAME=... names it in the table. Repeat it to compare models",
        )
        probe.add_argument(
            "--task",
            action="append",
            required=True,
            help="shape, color, size, concreteness, ... (`mmpt probe tasks` lists them), or a .csv, .tsv, .jsonl "
            "or .yaml of your own; may be repeated",
        )
        probe.add_argument("--limit", type=int, help="at most so many items of each task, drawn with --seed")
        probe.add_argument("--seed", type=int, default=0, help="of --limit, the bootstrap and the folds")
        probe.add_argument("--output", type=Path, help="NAME.json for all numbers, or a folder for a report as well")
        probe.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help="see `mmpt embed --help`")
        probe.set_defaults(command=_probe, probe=kind)
    for probe in (stroop, masked):
        probe.add_argument("--prompt", action="append", help="used instead of the task's own; may be repeated")
    for probe in (stroop, linear):
        probe.add_argument(
            "--pooling", choices=["auto", "pooler", "cls", "eos", "mean", "projected"], default="auto",
            help="how a text becomes a vector; auto is the encoder's own, which the table names",
        )  # fmt: skip
        probe.add_argument("--precision", choices=["32", "bf16"], default="32", help="bf16 is faster and less exact")
    stroop.add_argument("--neutral", default="", help="stands for MASK in the base sentence; default: nothing")
    stroop.add_argument(
        "--no-attention-mask", action="store_true", help="let the encoder see the padding within an item's sentences"
    )
    stroop.add_argument("--preset", choices=["released"], help="the released code: pooler, no neutral word, no mask")
    stroop.add_argument("--grid", action="store_true", help="every pooling, with and without a neutral word and mask")
    masked.add_argument(
        "--policy",
        choices=["error", "first_piece", "pseudo_likelihood"],
        default="error",
        help="for options of several word pieces: refuse, take the first piece (released code), or score all pieces",
    )


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="model folder, e.g. RUN/model")
    _trust_option(parser)


def _trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="allow the folder to name classes of PACKAGE"
    )


def _train(arguments: list[str]) -> None:
    from mmpt.report import build_report
    from mmpt.training import train

    finished = train(arguments)
    if arguments[0] == "fit":
        print(f"model   {finished.run_folder / 'model'}")
    if arguments[0] in ("fit", "test"):
        print(f"report  {build_report(finished.run_folder)}")


def _recipes(options: argparse.Namespace) -> None:
    from mmpt.catalogue import print_recipes

    print_recipes()


def _copy_recipe(options: argparse.Namespace) -> None:
    from mmpt.catalogue import copy_recipe

    for path in copy_recipe(options.domain, options.folder):
        print(path)


def _evaluate(options: argparse.Namespace) -> None:
    from mmpt.commands import evaluate

    evaluate(options)


def _embed(options: argparse.Namespace) -> None:
    from mmpt.commands import embed

    embed(options)


def _search(options: argparse.Namespace) -> None:
    from mmpt.commands import search

    search(options)


def _export(options: argparse.Namespace) -> None:
    from mmpt.errors import ConfigError
    from mmpt.export import export, export_folder, export_onnx

    if options.onnx and options.config is None:
        raise ConfigError("--onnx traces an example; give --config with a data section")
    if options.checkpoint is not None:
        print(export(options.checkpoint, options.output, options.license, options.trust))
    else:
        print(export_folder(options.model, options.output, options.license, options.trust))
    if options.onnx:
        for path in export_onnx(options.output, options.config, options.data_path, options.trust):
            print(path)


def _probe(options: argparse.Namespace) -> None:
    from mmpt.probing.command import probe

    probe(options)


def _probe_tasks(options: argparse.Namespace) -> None:
    from rich.console import Console

    from mmpt.probing.tables import print_tasks

    print_tasks(Console())


def _report(options: argparse.Namespace) -> None:
    from mmpt.report import build_comparison, build_report

    if len(options.run) == 1:
        print(build_report(options.run[0]))
    else:
        print(build_comparison(options.run, options.output or Path("comparison.html")))


if __name__ == "__main__":
    sys.exit(main())
