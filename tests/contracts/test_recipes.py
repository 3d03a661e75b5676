"""What every recipe promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mmpt import MultimodalModel
from mmpt.catalogue import recipe_names, recipes_folder
from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.pretraining import Pretraining

RECIPES = [recipes_folder() / name for name in recipe_names()]
PAPERS = [path for folder in RECIPES for path in sorted(folder.glob("paper*.yaml"))]


def loaded(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_recipe_is_complete(folder):
    for name in ("about.yaml", "pretrain.yaml", "paper.yaml", "finetune.yaml", "run.py"):
        assert (folder / name).is_file(), name
    assert set(loaded(folder / "about.yaml")) == {"paper", "data", "measures"}


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_paper_configuration_is_built_at_full_size_on_the_meta_device(path):
    config = loaded(path)
    with torch.device("meta"):
        module = Pretraining(**from_config(config["model"]["init_args"]))
    assert sum(p.numel() for p in module.model.parameters()) > 50e6
    data = from_config(config["data"])
    assert isinstance(MultimodalData(**data), MultimodalData)


def test_clip_has_exactly_the_published_number_of_parameters():
    with torch.device("meta"):
        model = from_config(loaded(recipes_folder() / "image" / "paper.yaml")["model"]["init_args"]["model"])
    pad_row = 512  # mmpt pads with a token of its own
    logit_scale = 1  # belongs to the head
    assert sum(p.numel() for p in model.parameters()) == 151_277_313 + pad_row - logit_scale


@pytest.fixture
def pictures(tmp_path) -> Path:
    colours = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}
    for number, (name, colour) in enumerate(colours.items()):
        for index in range(16):
            path = tmp_path / "pictures" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + index, 40 + 2 * number), tuple(c + index % 4 for c in colour)).save(path)
    (tmp_path / "pictures" / "red" / "broken.png").write_bytes(b"not a picture")
    return tmp_path / "pictures"


def test_image_recipe_runs_on_own_pictures_and_leaves_a_report(pictures, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "image" / "run.py"), "--smoke", "--output", str(run)]
    result = subprocess.run(
        [*command, "--data.path", str(pictures)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("retrieval/image_to_text/R@1", "few_labels/accuracy"):
        assert 0 <= metrics[name] <= 1
    assert "retrieval/image_to_text/R@1_untrained" in metrics
    assert "few_labels/accuracy_scratch" in metrics
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "broken.png" in page
    assert "data:image/png;base64" in page
    model = MultimodalModel.from_pretrained(run / "model")
    assert model.zero_shot("image", [pictures / "red" / "0.png"], ["red", "blue"]).shape == (1, 2)


def test_architecture_recipe_runs_and_its_model_finds_networks(tmp_path):
    run = tmp_path / "run"
    environment = os.environ | {"MMPT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(recipes_folder() / "architecture" / "run.py"), "--smoke", "--output", str(run)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("search/network_to_text/R@5", "reasoning/hard/accuracy", "clones/auroc", "questions/accuracy"):
        assert 0 <= metrics[name] <= 1
    assert "search/network_to_text/R@5_bag_of_types" in metrics
    assert (run / "report.html").is_file()
    table = tmp_path / "mine.csv"
    table.write_text("network\nresnet18\nno_such_model\n")
    command = [sys.executable, "-m", "mmpt.cli", "search", "residual network", "--input", str(table)]
    command += ["--model", str(run / "model"), "--trust", "mmpt"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"^ *-?[01]\.\d{3}  resnet18$", result.stdout, re.MULTILINE)
    assert "skipped no_such_model" in result.stdout


@pytest.mark.slow
def test_image_recipe_runs_on_its_default_data(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "image" / "run.py"), "--smoke", "--output", str(run)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert "unseen_style/all/R@1_untrained" in metrics
