"""The commands of docs/fine-tuning.md, as they stand there."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from mmpt.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "fine-tuning.md"


@pytest.mark.slow
def test_five_commands_lead_from_pictures_to_predictions(tmp_path, monkeypatch):
    for name, colour in (("red", (220, 20, 20)), ("green", (20, 200, 20)), ("blue", (20, 20, 220))):
        for index in range(16):
            path = tmp_path / "pictures" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40 + index, 40), tuple(c + index % 4 for c in colour)).save(path)
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line)[1:] for line in block[1].splitlines()]
    assert [command[0] for command in commands] == ["recipes", "fit", "fit", "test", "predict"]
    for command in commands:
        short = ["--trainer.max_steps", "2"] if command[0] == "fit" else []
        assert main([*command, *short]) == 0, command
    lines = (tmp_path / "runs" / "tuned" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 48
    assert {line.split(",")[1] for line in lines[1:]} <= {"red", "green", "blue"}
    assert "Confusion" in (tmp_path / "runs" / "tuned" / "report.html").read_text(encoding="utf-8")
