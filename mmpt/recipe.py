"""What every recipe's run.py shares: its options, the training commands, seeds, and the end of a run."""

from __future__ import annotations

import argparse
import ctypes
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from mmpt.data import MultimodalData
from mmpt.errors import ConfigError, MmptError
from mmpt.model_card import write_card
from mmpt.report import build_report, print_metrics, write_metrics
from mmpt.run_folder import write_sizes


@dataclass(frozen=True)
class RecipeOptions:
    """The command line of a recipe.

    Attributes:
        output: run folder.
        seed: of everything.
        smoke: a few steps, to see that all parts work; the numbers mean nothing.
        demo: a shortened run with numbers that already mean something.
        overrides: further options, as `mmpt fit` takes them for pretraining (`--data.path mine/ --model.lr 1e-3`).
    """

    output: Path
    seed: int
    smoke: bool
    demo: bool
    overrides: list[str]

    @property
    def data_path(self) -> str | None:
        """The user's own data, if given."""
        return self.value_of("--data.path")

    def value_of(self, option: str) -> str | None:
        """The value of an override, or None."""
        for place, argument in enumerate(self.overrides):
            if argument == option and place + 1 < len(self.overrides):
                return self.overrides[place + 1]
            if argument.startswith(f"{option}="):
                return argument.partition("=")[2]
        return None


def parse_options(description: str, arguments: Sequence[str] | None = None) -> RecipeOptions:
    """Read the command line of a recipe.

    Args:
        description: what the recipe does, for `--help`.
        arguments: None is `sys.argv`.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Further options go to `mmpt fit` for pretraining, e.g. --data.path mine/ --trainer.max_steps 500",
    )
    parser.add_argument("--output", type=Path, help="run folder; default: runs/DOMAIN-DATE-TIME")
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--smoke", action="store_true", help="a few steps, to see that all parts work")
    length.add_argument("--demo", action="store_true", help="a shortened run of a few minutes")
    options, overrides = parser.parse_known_args(arguments)
    output = options.output or Path("runs") / f"recipe-{time.strftime('%Y%m%d-%H%M%S')}"
    return RecipeOptions(output, options.seed, options.smoke, options.demo, overrides)


def recipe_main(
    description: str, run: Callable[[RecipeOptions, Console], Any], arguments: Sequence[str] | None = None
) -> int:
    """Run a recipe from its command line.

    Args:
        description: what the recipe does, for `--help`.
        run: the recipe.
        arguments: None is `sys.argv`.

    Returns:
        Exit status: 0, or 2 after an error that mmpt explains.
    """
    options = parse_options(description, arguments)
    console = Console()
    try:
        run(options, console)
    except MmptError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    return 0


def fit_arguments(config: Path, output: Path, seed: int) -> list[str]:
    """The command line of `mmpt fit` for a configuration, in the fastest safe precision."""
    arguments = ["fit", "--config", str(config), "--output", str(output)]
    return [*arguments, "--seed_everything", str(seed), "--data.seed", str(seed), "--trainer.precision", precision()]


def precision() -> Literal["bf16-mixed", "32-true"]:
    """Lightning's name of the fastest safe precision here: bfloat16 where the device computes with it."""
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"


def start(options: RecipeOptions) -> None:
    """Make the run folder.

    Raises:
        ConfigError: it holds something that is not an earlier run.
    """
    if options.output.exists() and any(options.output.iterdir()):
        if not (options.output / "config.yaml").is_file():
            raise ConfigError(f"{options.output} holds other files; give a new folder with --output")
        shutil.rmtree(options.output)  # an earlier run of this recipe
    options.output.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of asking the kernel for fresh pages at every step.

    Training on the CPU frees and takes the same large tensors again and again; clearing new pages for them costs a
    quarter of the time of a small model's step. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping, which would be given back when freed
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink
    mallopt(-2, 2**28)  # M_TOP_PAD: and grows in steps of 256 MiB


def finish(run: Path, metrics: Mapping[str, float], console: Console, data: MultimodalData | None = None) -> Path:
    """Write RUN/metrics.json, the model card and RUN/report.html; print the metrics beside their baselines.

    Args:
        run: the run folder.
        metrics: flat name -> number.
        console: printed to.
        data: what was evaluated on, for the sizes of its splits.
    """
    write_metrics(run, metrics)
    if data is not None:
        write_sizes(run, data)
    write_card(run)
    print_metrics(metrics, console)
    page = build_report(run)
    console.print(f"model   {run / 'model'}\nreport  {page}", highlight=False, soft_wrap=True)
    return page


class Stages:
    """Prints what a recipe is at, and how long each part took.

    Args:
        console: printed to.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    def run(self, name: str, part: Callable[..., Any], *arguments: Any) -> Any:
        """Run one part and return its result."""
        self.console.rule(name, align="left")
        began = time.perf_counter()
        result = part(*arguments)
        self.seconds[name] = time.perf_counter() - began
        self.console.print(f"{self.seconds[name]:.0f} s", style="dim")
        return result
