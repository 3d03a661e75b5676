"""Measurements over seeds, kept line by line."""

import json

import pytest

from mmpt.errors import ConfigError
from mmpt.study import Study


def test_what_is_measured_is_kept_and_not_measured_again(tmp_path):
    study, calls = Study(tmp_path / "new" / "study.jsonl"), []

    def once(value):
        calls.append(value)
        return {"accuracy": value}

    for _ in range(2):
        study.measure(lambda: once(0.5), run="main", seed=0)
    study.measure(lambda: once(0.7), run="main", seed=1)
    again = Study(study.path)
    again.measure(lambda: once(0.9), run="main", seed=1)
    again.measure(lambda: once(0.1), run="other", seed=1)
    assert calls == [0.5, 0.7, 0.1]
    assert again.values("accuracy", run="main") == [0.5, 0.7]
    assert again.values("accuracy", seed=1) == [0.7, 0.1]
    assert again.values("f1") == []
    assert [json.loads(line)["seed"] for line in study.path.read_text().splitlines()] == [0, 1, 1]


def test_an_unfinished_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "study.jsonl"
    Study(path).measure(lambda: {"a": 1.0}, seed=0)
    with path.open("a") as file:
        file.write('{"seed": 1, "met')
    study = Study(path)
    assert not study.has(seed=1)
    study.measure(lambda: {"a": 3.0}, seed=1)
    assert [row["metrics"] for row in Study(path).rows] == [{"a": 1.0}, {"a": 3.0}]
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(ConfigError, match="line 1"):
        Study(path)


def test_nothing_begins_after_the_time_is_over(tmp_path):
    study = Study(tmp_path / "study.jsonl", minutes=-1)
    study.measure(lambda: pytest.fail("too late"), seed=0)
    assert not study.path.exists()


def test_means_are_over_what_is_not_told_apart(tmp_path, capsys):
    study = Study(tmp_path / "study.jsonl")
    for seed, value in enumerate((0.2, 0.4)):
        study.measure(lambda value=value: {"accuracy": value}, run="main", shots=5, seed=seed)
    study.measure(lambda: {"accuracy": 0.9}, run="main", shots=20, seed=0)
    capsys.readouterr()
    study.print(by=("run", "shots"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
    assert [line.split("│")[1:-1] for line in lines] == [
        [" main ", " 5     ", " accuracy ", " 0.300 ", " 0.141 ", " 2            "],
        [" main ", " 20    ", " accuracy ", " 0.900 ", "       ", " 1            "],
    ]
