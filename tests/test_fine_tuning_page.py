"""The commands of the pages "From own files to a tuned model", as they stand there, on small files."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmpt.cli import main

DOCS = Path(__file__).parent.parent / "docs"
SECTION = re.compile(r"## From own files to a tuned model\n.*?```bash\n(.*?)```", re.DOTALL)


def pictures(folder: Path) -> set[str]:
    for name, colour in (("red", (220, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 220))):
        for index in range(16):
            path = folder / "pictures" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + index, 40), tuple(c + index % 4 for c in colour)).save(path)
    return {"red", "green", "blue"}


def cells(folder: Path) -> set[str]:
    cells = pytest.importorskip("cells")
    adata = cells.adata(60)
    adata.obs["cell_type"] = [None if i % 10 == 9 else kind for i, kind in enumerate(adata.obs["cell_type"])]
    adata.write_h5ad(folder / "mine.h5ad")
    return set(cells.TYPES)


def tunes(folder: Path) -> set[str]:
    midi_pieces = pytest.importorskip("midi_pieces")
    for style, (low, high) in (("low", (30, 50)), ("high", (70, 90))):
        for index in range(12):
            path = folder / "tunes" / style / f"{style}{index}.mid"
            path.parent.mkdir(parents=True, exist_ok=True)
            midi_pieces.piece(24, seed=index, low=low, high=high).write(path)
    return {"low", "high"}


def tables(folder: Path) -> set[str]:
    chart_records = pytest.importorskip("mmpt.datasets.chart_records")
    (folder / "tables").mkdir()
    generator = np.random.default_rng(0)
    for index in range(6):
        rows = "".join(f"town {i},{generator.integers(10, 99)},{generator.integers(10, 99)}\n" for i in range(6))
        (folder / "tables" / f"t{index}.csv").write_text(f"place,rain {index},sun {index}\n{rows}")
    return set(chart_records.CHART_TYPES)


def networks(folder: Path) -> set[str]:
    import torch
    from torch import nn

    from mmpt.encoders.architecture_trace import trace

    lines = ["network,text,class"]
    for index in range(30):
        activation = (nn.ReLU, nn.Sigmoid)[index % 2]
        layers = [nn.Linear(8, 8), activation()] * (1 + index // 6)
        (folder / f"n{index}.json").write_text(trace(nn.Sequential(*layers), (torch.zeros(1, 8),)).to_json())
        lines.append(f"n{index}.json,{activation.__name__} net of {1 + index // 6} layers,{activation.__name__}")
    (folder / "networks.csv").write_text("\n".join(lines) + "\n")
    return {"ReLU", "Sigmoid"}


@dataclass
class Domain:
    """A page and what its commands are tried with.

    Attributes:
        write: makes small files in a folder; returns the labels that predictions may have.
        rows: number of predictions for them.
        words: some of them stand in the files' texts only.
        short: options of both trainings that make them short.
    """

    name: str
    write: Callable[[Path], set[str]]
    rows: int
    words: tuple[str, ...]
    short: tuple[str, ...] = ()


FEW_CHARTS = ("--data.sources.charts.init_args.charts", "24", "--data.sources.charts.init_args.held_out", "6")
DOMAINS = [
    Domain("image", pictures, 48, ('"green"',)),
    Domain("cell", cells, 60, ('"gene12"',)),
    Domain("midi", tunes, 24, ('"high"',)),
    Domain("chart", tables, 36, ('"rain"', '"Ġrain"', '"town"'), FEW_CHARTS),
    Domain("architecture", networks, 30, ('"sigmoid"',)),
]
QUICK = "architecture"


@pytest.mark.parametrize(
    "domain", [pytest.param(d, id=d.name, marks=[] if d.name == QUICK else pytest.mark.slow) for d in DOMAINS]
)
def test_five_commands_lead_from_own_files_to_predictions(domain, tmp_path, monkeypatch):
    labels = domain.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    block = SECTION.search((DOCS / f"{domain.name}.md").read_text(encoding="utf-8"))
    commands = [shlex.split(line)[1:] for line in block[1].splitlines()]
    assert [command[0] for command in commands] == ["recipes", "fit", "fit", "test", "predict"]
    tokenizer = tmp_path / "runs" / "pretrained" / "model" / "tokenizer" / "tokenizer.json"
    for command in commands:
        short = ["--trainer.max_steps", "2", *domain.short] if command[0] == "fit" else []
        assert main([*command, *short]) == 0, command
    words = tokenizer.read_text(encoding="utf-8")
    assert any(word in words for word in domain.words)  # it was trained on the own files, not on the default data
    lines = (tmp_path / "runs" / "tuned" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + domain.rows
    assert {line.split(",")[-2] for line in lines[1:]} <= labels
    page = (tmp_path / "runs" / "tuned" / "report.html").read_text(encoding="utf-8")
    assert "Confusion" in page
    assert "Calibration" in page
    card = (tmp_path / "runs" / "tuned" / "model" / "README.md").read_text(encoding="utf-8")
    assert "| test/classification/accuracy |" in card


def test_the_general_page_leads_to_each_of_them():
    text = (DOCS / "fine-tuning.md").read_text(encoding="utf-8")
    for domain in DOMAINS:
        assert f"]({domain.name}.md#from-own-files-to-a-tuned-model)" in text
