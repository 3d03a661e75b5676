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
  mmpt evaluate retrieval --model RUN/model --config my-recipe/pretrain.yaml
  mmpt embed --model RUN/model --modality image --input my-pictures/ --output vectors.npz
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
    evaluate.add_argument("task", choices=["retrieval", "zero-shot", "linear-probe", "knn"])
    _model_option(evaluate)
    evaluate.add_argument("--config", type=Path, required=True, help="a configuration; its `data` section is used")
    evaluate.add_argument("--data-path", help="your own data instead of the configuration's")
    evaluate.add_argument("--modality", help="default: the one that the model has besides text")
    evaluate.add_argument("--split", choices=["train", "validation", "test"], default="test")
    evaluate.add_argument("--label", default="class", help="label for zero-shot, linear-probe and knn")
    evaluate.add_argument("--template", action="append", help="zero-shot prompt with one {}; may be repeated")
    evaluate.add_argument("--neighbours", type=int, default=5, help="k of knn")
    evaluate.add_argument("--output", type=Path, help="also write the numbers as JSON")
    evaluate.set_defaults(command=_evaluate)

    embed = commands.add_parser("embed", help="embed files of one modality")
    _model_option(embed)
    embed.add_argument("--modality", required=True)
    embed.add_argument(
        "--input", required=True, help="what the modality's recipe reads: a folder, table, archive or file"
    )
    embed.add_argument("--output", type=Path, required=True, help=".npz with `embeddings` and `names`")
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

    export = commands.add_parser("export", help="turn a training checkpoint into a model folder")
    export.add_argument("--checkpoint", type=Path, required=True, help="RUN/checkpoints/NAME.ckpt")
    export.add_argument("--output", type=Path, required=True, help="the new model folder")
    export.set_defaults(command=_export)

    report = commands.add_parser("report", help="make the HTML page of a run folder")
    report.add_argument("run", type=Path)
    report.set_defaults(command=_report)
    return parser


def _model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="model folder, e.g. RUN/model")
    parser.add_argument(
        "--trust", action="append", default=[], metavar="PACKAGE", help="allow the folder to name classes of PACKAGE"
    )


def _train(arguments: list[str]) -> None:
    from mmpt.report import build_report
    from mmpt.training import train

    finished = train(arguments)
    if arguments[0] == "fit":
        print(f"model   {finished.run_folder / 'model'}")
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
    from mmpt.commands import export

    print(export(options.checkpoint, options.output))


def _report(options: argparse.Namespace) -> None:
    from mmpt.report import build_report

    print(build_report(options.run))


if __name__ == "__main__":
    sys.exit(main())
