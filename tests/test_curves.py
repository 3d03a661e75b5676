"""The script that measures learning curves."""

import importlib.util

import pytest
import torch
import toy
from points import make_model

from mmpt.catalogue import recipes_folder
from mmpt.study import Study


@pytest.fixture
def curves():
    spec = importlib.util.spec_from_file_location("curves", recipes_folder() / "curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_method_has_a_line_and_what_is_there_is_not_measured_again(curves, tmp_path, capsys):
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    make_model().save_pretrained(tmp_path / "model")
    config = toy.write(tmp_path, toy.FINETUNE, "finetune.yaml")
    (tmp_path / "baseline.py").write_text(
        "import numpy as np\n"
        "def classic_features(samples):\n"
        "    return np.array([np.ptp(s.modalities['points'], axis=0) for s in samples])\n"
    )
    output = tmp_path / "curves.jsonl"
    given = [
        "--config",
        config,
        "--pretrained",
        tmp_path / "model",
        "--output",
        output,
        "--steps",
        4,
        "--trust",
        "shapes",
    ]
    given = [str(argument) for argument in given] + ["--shots", "1", "4", "--seeds", "0"]
    curves.main(given)
    rows = Study(output).rows
    assert {(r["method"], r["shots"]) for r in rows} == {(m, s) for m in curves.METHODS for s in (1, 4)}
    assert all(0 <= r["metrics"]["accuracy"] <= 1 and r["metrics"]["accuracy_majority"] == 0.25 for r in rows)
    kept = output.read_text()
    lines = kept.splitlines(keepends=True)
    output.write_text("".join(lines[:-1]) + '{"dom')  # killed within a line
    curves.main(given)
    again = Study(output).rows
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
    assert again[:-1] == rows[:-1]
    assert "| tuned |" in capsys.readouterr().out
    torch.set_num_threads(threads)
