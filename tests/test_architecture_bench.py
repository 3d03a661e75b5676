"""NAS-Bench-Graph: networks from their numbers, and tables that can't run code."""

import io
import pickle
from importlib.util import find_spec

import numpy as np
import pytest

from mmpt.datasets import architecture_bench
from mmpt.datasets.architecture_bench import GraphNetworkBench, network_of
from mmpt.encoders.architecture_graph import UNKNOWN, vocabulary
from mmpt.errors import ConfigError, DataError

installed = pytest.mark.skipif(find_spec("nas_bench_graph") is None, reason="needs nas-bench-graph")


def test_a_number_is_a_graph_of_operators():
    # links 0 0 1 3: gcn and skip read the input, fc reads gcn, gin reads fc; leaves are skip and gin
    graph = network_of(41872)
    assert graph.types == (
        "input", "conv", "mm", "bias", "identity", "conv", "bias", "mm", "sum", "conv", "bias", "concat", "conv",
    )  # fmt: skip
    assert graph.edges == (
        (0, 1), (1, 2), (2, 3), (0, 4), (3, 5), (5, 6), (6, 7), (7, 8), (6, 8), (8, 9), (9, 10), (4, 11), (10, 11),
        (11, 12),
    )  # fmt: skip
    chain = network_of(81111)  # one leaf, so nothing to join
    assert chain.types == ("input", *("conv", "mm", "bias") * 4, "conv")
    assert chain.edges == tuple((i, i + 1) for i in range(13))


def test_every_operation_has_another_graph_of_known_operators():
    graphs = [network_of(80000 + 1111 * digit) for digit in range(9)]
    assert len({(graph.types, graph.edges) for graph in graphs}) == 9
    assert not {kind for graph in graphs for kind in graph.types} - set(vocabulary("mmpt").numbers)
    assert all(UNKNOWN not in graph.types and all(a < b for a, b in graph.edges) for graph in graphs)


@pytest.mark.parametrize("number", [90000, 9, 123456])
def test_other_numbers_are_refused(number):
    with pytest.raises(DataError, match=str(number)):
        network_of(number)


@installed
def test_no_network_is_in_two_splits_and_a_limit_thins_them_out_evenly():
    source = GraphNetworkBench(limit=1000)
    parts = {name: source.split(name) for name in ("train", "validation", "test")}
    names = [row.name for part in parts.values() for row in part]
    assert len(names) == len(set(names)) == 1000
    assert 650 < len(parts["train"]) < 750
    assert 150 < len(parts["test"]) < 250
    assert {row.name for row in parts["test"]} <= {row.name for row in GraphNetworkBench().split("test")}


@installed
def test_labels_are_those_of_the_table():
    rows = {row.name: row for row in GraphNetworkBench("cora", limit=None).split("train")}
    rows |= {row.name: row for row in GraphNetworkBench("cora").split("test")}
    rows |= {row.name: row for row in GraphNetworkBench("cora").split("validation")}
    assert len(rows) == 26_206
    row = rows["nas_bench_graph-00000"]
    assert row.labels["accuracy"] == pytest.approx(0.797)
    assert row.modalities["architecture"].parameters == 1_736_711


def test_another_task_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="proteins"):
        GraphNetworkBench("proteins")
    monkeypatch.setattr(architecture_bench, "PACKAGE", "no_such_package")
    architecture_bench._table.cache_clear()
    with pytest.raises(DataError, match="pip install"):
        GraphNetworkBench("cs").split("test")


def test_a_table_that_would_run_code_is_refused():
    numbers = {0: {"perf": np.float64(0.5)}}
    assert architecture_bench._Numbers(io.BytesIO(pickle.dumps(numbers))).load() == numbers
    with pytest.raises(pickle.UnpicklingError, match="no number"):
        architecture_bench._Numbers(io.BytesIO(pickle.dumps({0: print}))).load()
