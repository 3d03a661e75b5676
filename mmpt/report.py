"""What a run leaves behind for people: metrics, examples, a map, facts and skipped inputs, on one HTML page.

A run folder holds, besides the model and Lightning's logs:

| file | written by | holds |
|------|------------|-------|
| metrics.json | `write_metrics` | flat name -> number; `name_suffix` is a baseline of `name` |
| run.json | `write_run_facts` | what was trained on what |
| examples.json, examples/ | `write_examples` | queries and what was found for them |
| embeddings.npz | `write_embeddings` | points in the plane with labels and kinds |
| skipped.jsonl | `append_skipped` | inputs that could not be used |
| report.html | `build_report` | all of it as one page |

Files are written beside their place and moved there, so a killed process leaves the old file or the new one.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, TypedDict

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmpt.errors import DataError
from mmpt.report_data import MISSING, columns_of, metric_groups, number, read_run
from mmpt.report_page import page


class Item(TypedDict, total=False):
    """A query or a result; what it does not have is left out.

    Attributes:
        text: a name or caption.
        image: a picture.
        score: similarity to the query.
        correct: whether a result is a right answer.
    """

    text: str
    image: Image.Image
    score: float
    correct: bool


class ExampleRow(TypedDict):
    """A query and what was found for it, the best first."""

    query: Item
    results: Sequence[Item]


def write_metrics(run: Path, metrics: Mapping[str, SupportsFloat]) -> None:
    """Write RUN/metrics.json in place of an earlier one.

    Args:
        run: the run folder; made if it is not there.
        metrics: flat name -> number, baselines beside them (`retrieval/R@1`, `retrieval/R@1_chance`). Numbers that are
            not finite are kept as null: JSON has no other word for them.
    """
    plain = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
    sound = {name: value if math.isfinite(value) else None for name, value in plain.items()}
    _write(run / "metrics.json", _json(sound))


def write_run_facts(run: Path, facts: Mapping[str, Any]) -> None:
    """Write what was trained on what to RUN/run.json; facts of other names that stand there already stay.

    Args:
        run: the run folder; made if it is not there.
        facts: name -> value as the page shall show them, e.g. `title`, `model`, `data`, `steps`, `seconds`, `seed`,
            `versions`.

    Raises:
        DataError: the file that is there is damaged.
    """
    path = run / "run.json"
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error}); the file is damaged, restore or delete it") from error
    _write(path, _json({**known, **facts}))


def write_examples(run: Path, title: str, rows: Sequence[ExampleRow]) -> None:
    """Write RUN/examples.json, and the pictures as RUN/examples/001.png and so on.

    Args:
        run: the run folder; made if it is not there.
        title: what is looked for in what.
        rows: queries with their results. A picture that occurs several times is written once.
    """
    names: dict[int, str] = {}

    def plain(item: Item) -> dict[str, Any]:
        entry: dict[str, Any] = dict(item)
        if "image" in item:
            image = item["image"]
            if id(image) not in names:
                names[id(image)] = f"examples/{len(names) + 1:03d}.png"
                _write(run / names[id(image)], _png(image))
            entry["image"] = names[id(image)]
        if "score" in item:
            entry["score"] = float(item["score"])
        if "correct" in item:
            entry["correct"] = bool(item["correct"])
        return entry

    written = [{"query": plain(row["query"]), "results": [plain(item) for item in row["results"]]} for row in rows]
    _write(run / "examples.json", _json({"title": title, "rows": written}))


def write_embeddings(run: Path, points: Any, labels: Sequence[object], kinds: Sequence[object]) -> None:
    """Write RUN/embeddings.npz, from which the page draws the map.

    Args:
        run: the run folder; made if it is not there.
        points: (n, 2), a tensor or array, e.g. from `mmpt.evaluation.projection.two_dimensional`.
        labels: n names; up to twelve different ones are shown by colour.
        kinds: n names of what a point is, e.g. the modality or the split; shown by the marker.

    Raises:
        DataError: numbers that do not match.
    """
    array = np.asarray(points, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != 2 or not len(array) == len(labels) == len(kinds):
        raise DataError(
            f"points have the shape {array.shape}, with {len(labels)} labels and {len(kinds)} kinds; "
            "expected (n, 2), n and n"
        )
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        points=array,
        labels=np.array([str(label) for label in labels], dtype=str),
        kinds=np.array([str(kind) for kind in kinds], dtype=str),
    )
    _write(run / "embeddings.npz", buffer.getvalue())


def append_skipped(run: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add inputs that could not be used to RUN/skipped.jsonl.

    Args:
        run: the run folder; made if it is not there.
        records: with `sample`, `problem`, `expected` (`SampleError.as_record`) and `split`.
    """
    run.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(dict(record), ensure_ascii=False, default=str) + "\n" for record in records).encode()
    # Unbuffered and in append mode: the lines are one write at the end, so several processes of a run can add theirs.
    with (run / "skipped.jsonl").open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if size and file.read(1) != b"\n":  # a record that a killed process did not finish makes room
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines)


def build_report(run: Path) -> Path:
    """Make RUN/report.html from what the run folder holds; parts that are missing are named in one line.

    Args:
        run: a run folder with metrics.json or Lightning's CSV logs.

    Returns:
        The page: one file with the pictures inside, without scripts, that opens without network.

    Raises:
        DataError: not a run folder, or a damaged file in it (which one, and which line).
    """
    target = run / "report.html"
    _write(target, page(read_run(run)).encode("utf-8", "replace"))
    return target


def build_comparison(runs: Sequence[Path], output: Path) -> Path:
    """Write a page that shows several runs side by side, with differences and their intervals.

    Args:
        runs: run folders; differences are to the first.
        output: the page.

    Raises:
        DataError: not a run folder, or a damaged file in one.
    """
    from mmpt.report_compare import comparison_page

    _write(output, comparison_page(runs).encode("utf-8", "replace"))
    return output


def print_metrics(metrics: Mapping[str, float], console: Console | None = None) -> None:
    """Print metrics beside their baselines.

    Args:
        metrics: flat name -> number, as for `write_metrics`.
        console: where to; default the terminal.
    """
    console = console or Console()
    for group, rows in metric_groups(metrics).items():
        suffixes = columns_of(rows)
        table = Table(title=Text(group) if group else None, title_justify="left", title_style="bold")
        table.add_column("metric", overflow="fold")
        for title in ["this run", *suffixes, *(["difference"] if suffixes else [])]:
            table.add_column(Text(title.replace("_", " ")), justify="right", no_wrap=True)
        for row in rows:
            name = row.name.removeprefix(f"{group}/") if group else row.name
            cells = [Text(f"{name} ↓" if row.lower_is_better else name)]
            for value in [row.value, *(row.baselines.get(suffix) for suffix in suffixes)]:
                best = value is not None and bool(row.baselines) and value == row.best
                cells.append(Text(MISSING if value is None else number(value), style="bold" if best else ""))
            if suffixes and math.isnan(row.gain):
                cells.append(Text(MISSING))
            elif suffixes:
                style = "green" if row.gain > 0 else "red" if row.gain < 0 else ""
                cells.append(Text(f"{'+' if row.difference > 0 else ''}{number(row.difference)}", style=style))
            table.add_row(*cells)
        console.print(table)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGBA" if image.has_transparency_data else "RGB").save(buffer, "PNG")
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    """Write the whole file or leave what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
