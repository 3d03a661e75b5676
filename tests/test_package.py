"""What is shipped, and that the documentation's example works as it is printed."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_installs_one_top_level_name(wheel):
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"mmpt"}


def test_the_wheel_holds_encoders_datasets_recipes_and_types(wheel):
    names = set(wheel.namelist())
    for folder, inside in (("mmpt", "mmpt"), ("encoders", "mmpt/encoders"), ("datasets", "mmpt/datasets")):
        expected = {f"{inside}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected <= names
    for path in (ROOT / "recipes").rglob("*.yaml"):
        assert f"mmpt/recipes/{path.relative_to(ROOT / 'recipes')}" in names
    assert "mmpt/recipes/image/run.py" in names
    assert "mmpt/py.typed" in names
    for path in (ROOT / "mmpt" / "probing" / "tasks").iterdir():
        assert f"mmpt/probing/tasks/{path.name}" in names


def test_the_framework_knows_no_modality():
    for path in (ROOT / "mmpt").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(from|import) mmpt\.(encoders|datasets|recipes)", text), path


def test_encoders_do_not_import_each_other():
    modalities = {path.stem.split("_")[0] for path in (ROOT / "encoders").glob("*.py")} - {""}
    for path in (ROOT / "encoders").glob("*.py"):
        own = path.stem.split("_")[0]
        imported = re.findall(r"mmpt\.encoders\.(\w+)", path.read_text(encoding="utf-8"))
        assert not {name.split("_")[0] for name in imported} & (modalities - {own}), path


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_add_a_modality_runs_as_printed(tmp_path):
    page = ROOT / "docs" / "add-a-modality.md"
    (code,), (config,), (commands,) = (blocks(page, language) for language in ("python", "yaml", "console"))
    (tmp_path / "motion.py").write_text(code, encoding="utf-8")
    (tmp_path / "motion.yaml").write_text(config, encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "runs/motion/report.html").is_file()
    accuracy = [float(line.split("│")[2]) for line in result.stdout.splitlines() if line.startswith("│ class/accuracy")]
    assert len(accuracy) == 2
    assert min(accuracy) > 0.5  # four activities
