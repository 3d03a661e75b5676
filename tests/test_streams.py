"""Rows that are written as they come."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmpt.errors import ConfigError
from mmpt.streams import RowStream


def fill(output, count=10, rows=3, start=0):
    stream = RowStream(output, {"model": "a"}, rows)
    assert stream.consumed == start
    for number in range(start, count):
        bad = [{"sample": str(number), "problem": "p", "expected": "e"}] if number == 4 else []
        columns = (
            {} if bad else {"names": [f"n{number}"], "score": [number / 2], "v": torch.full((1, 2), float(number))}
        )
        stream.add(columns, 1, bad)
    return stream


EXPECTED = [n for n in range(10) if n != 4]


@pytest.mark.parametrize("suffix", [".parquet", ".npz", ".csv", ".h5ad"])
def test_every_format_holds_the_rows_in_order(tmp_path, suffix):
    output = tmp_path / f"z{suffix}"
    stream = fill(output)
    assert len(stream.parts) == 3
    stream.finish()
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    names = [f"n{n}" for n in EXPECTED]
    vectors = np.repeat(np.array(EXPECTED, dtype=np.float32)[:, None], 2, 1)
    if suffix == ".parquet":
        table = pq.read_table(output)
        assert table["names"].to_pylist() == names
        assert np.array_equal(np.array(table["v"].to_pylist()), vectors)
    elif suffix == ".npz":
        found = np.load(output)
        assert found["names"].tolist() == names
        assert np.array_equal(found["v"], vectors)
    elif suffix == ".csv":
        rows = list(csv.reader(output.open()))
        assert rows[0] == ["names", "score"]
        assert [row[0] for row in rows[1:]] == names
    else:
        anndata = pytest.importorskip("anndata")
        found = anndata.read_h5ad(output)
        assert found.obs_names.tolist() == names
        assert np.array_equal(np.asarray(found.X), vectors)
        assert found.obs["score"].tolist() == [n / 2 for n in EXPECTED]


def test_a_killed_stream_goes_on_behind_its_last_part(tmp_path):
    fill(tmp_path / "z.npz", count=8)  # never finished: 7 rows, of which 6 are in parts
    stream = fill(tmp_path / "z.npz", start=7)
    assert [row["sample"] for row in stream.skipped] == ["4"]
    stream.finish()
    assert np.load(tmp_path / "z.npz")["names"].tolist() == [f"n{n}" for n in EXPECTED]


def test_parts_of_another_model_are_not_used(tmp_path):
    fill(tmp_path / "z.npz")
    assert RowStream(tmp_path / "z.npz", {"model": "b"}).consumed == 0


def test_other_formats_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.parquet"):
        RowStream(tmp_path / "z.txt", {})
