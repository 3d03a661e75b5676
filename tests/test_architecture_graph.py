"""Networks as graphs: what is read from a network, a name or a file."""

import math
from collections import Counter

import pytest
import timm
import torch
from networks import PICTURE, same, small_network
from torch import nn

from mmpt.encoders import architecture_trace
from mmpt.encoders.architecture import (
    ArchitectureProcessor,
)
from mmpt.encoders.architecture_graph import (
    ArchitectureGraph,
    condensed,
    contracted,
    shape_features,
    vocabulary,
)
from mmpt.encoders.architecture_names import EmptyWeights, build, named_graph
from mmpt.encoders.architecture_trace import trace
from mmpt.errors import DataError, SampleError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path / "cache"))


# The graph of a network


def test_a_small_network_is_a_chain_of_nine_nodes():
    graph = trace(small_network(), PICTURE)
    assert graph.types == ("input", "conv", "bias", "bn", "relu", "glob_avg", "view", "conv", "bias")
    assert graph.shapes == ((), (8, 3, 3, 3), (8,), (8,), (), (), (), (10, 8), (10,))
    assert graph.edges == tuple((i, i + 1) for i in range(8))
    assert graph.parameters == 8 * 27 + 8 + 16 + 90


def test_weights_are_neither_read_nor_changed():
    network = small_network()
    before = trace(network, PICTURE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3).fill_(float("nan"))
    network[1].train()
    network[5].eval()
    assert same(before, trace(network, PICTURE))
    assert network[1].training
    assert not network[5].training
    assert int(network[1].num_batches_tracked) == 0
    assert all(p.device.type == "cpu" for p in network.parameters())


def test_other_widths_change_shapes_only():
    narrow, wide = trace(small_network(8), PICTURE), trace(small_network(16), PICTURE)
    assert (narrow.types, narrow.edges) == (wide.types, wide.edges)
    assert narrow.shapes != wide.shapes


class Shortcuts(nn.Module):
    """Calls whose output is like their input, as people write them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm([8, 6, 6])])

    def forward(self, x):
        y = self.conv(x)
        for norm in self.norms:
            y = norm(y)
        kept = y
        nn.functional.relu(y, True)  # in place, by position: `kept` is what it gives
        z = nn.functional.silu(kept, inplace=True)
        return nn.functional.gelu(z, approximate="tanh") + kept.sigmoid() + (kept > 0)


def test_what_is_not_called_leaves_the_same_graph(monkeypatch):
    picture = (torch.empty(1, 3, 8, 8),)
    quick = trace(Shortcuts(), picture)
    monkeypatch.setattr(architecture_trace, "_KEEPS_SHAPE", frozenset())
    assert trace(Shortcuts(), picture).to_json() == quick.to_json()
    assert quick.types[3:8] == ("bn", "gn", "ln", "relu", "silu")


def test_grouped_and_dilated_convolutions_have_their_own_types():
    layers = [nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 6, 3, groups=2, dilation=2)]
    network = nn.Sequential(*layers, nn.Conv2d(6, 6, 3, dilation=2))
    assert [t for t in trace(network, PICTURE).types if t != "bias"] == [
        "input",
        "conv",
        "sep_conv",
        "dil_conv",
        "conv",
    ]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.gate = nn.Conv2d(4, 4, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.place = nn.Parameter(torch.zeros(1, 4, 8, 8))

    def forward(self, x):
        x = x + self.place
        y = self.conv(x) * 0.5
        y = y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()
        return {"out": x + y * self.scale, "unused": [x.shape]}


def test_joins_gates_scales_and_positions_are_told_apart():
    graph = trace(Residual(), (torch.empty(1, 4, 8, 8),))
    assert graph.types == ("input", "pos_enc", "conv", "glob_avg", "conv", "sigmoid", "cse", "mul", "sum")
    assert graph.shapes[1] == (1, 4, 8, 8)
    assert graph.shapes[7] == (4, 1, 1)
    assert set(graph.edges) == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (2, 6), (5, 6), (6, 7), (1, 8), (7, 8)}


class Shared(nn.Module):
    """One layer used again and again, in a loop whose length depends on the input's shape."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        for _ in range(x.shape[1]):
            x = self.layer(x).relu_()
        return x


def test_shared_weights_and_loops_make_no_cycle():
    graph = trace(Shared(), (torch.empty(1, 3, 4),))
    assert graph.types == ("input", *("conv", "relu") * 3)
    assert graph.edges == tuple((i, i + 1) for i in range(6))
    assert graph.parameters == 16


def test_what_leads_to_no_output_is_left_out():
    class Idle(nn.Module):
        def forward(self, x):
            x.softmax(1)
            return x.relu()

    assert trace(Idle(), PICTURE).types == ("input", "relu")


def test_writing_into_a_slice_is_part_of_the_flow():
    class Shift(nn.Module):
        def forward(self, x):
            y = torch.zeros_like(x)
            y[:, 1:] = x[:, :-1].tanh()
            return y

    assert "tanh" in trace(Shift(), PICTURE).types


def test_text_networks_take_their_own_inputs():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    network = nn.Sequential(nn.Embedding(100, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    graph = trace(network, (torch.zeros(1, 7, dtype=torch.long),))
    counts = Counter(graph.types)
    assert (counts["embedding"], counts["msa"], counts["ln"], counts["sum"]) == (1, 2, 4, 4)
    assert (48, 16) in graph.shapes


def test_flow_that_depends_on_values_is_a_clear_error():
    class Choice(nn.Module):
        def forward(self, x):
            return x.relu() if x.sum() > 0 else x

    with pytest.raises(DataError, match="depends? on values"):
        trace(Choice(), PICTURE)
    with pytest.raises(DataError, match="3, 32, 32"):
        trace(nn.Linear(5, 5), PICTURE)


def test_unknown_operators_are_counted_by_name():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.special.i0(x).relu()

    graph = trace(Odd(), PICTURE)
    assert graph.types == ("input", "unknown_op", "relu")
    assert sum(graph.unknown.values()) == 1


SOME = [
    "resnet18", "vit_tiny_patch16_224", "coat_tiny", "swin_tiny_patch4_window7_224", "efficientnet_b0", "nfnet_f0",
    "mobilenetv3_small_100", "levit_128s", "convnext_atto", "mixer_s32_224", "xcit_nano_12_p16_224", "gmlp_s16_224",
    "torchvision/regnet_y_400mf", "torchvision/googlenet", "torchvision/swin_t", "torchvision/mc3_18",
]  # fmt: skip


@pytest.mark.parametrize("name", SOME)
def test_models_of_the_zoos_are_read_whole(name):
    graph = named_graph(name)
    assert not graph.unknown
    ends = {a for a, _ in graph.edges}
    assert sum(node not in ends for node in range(len(graph))) == 1  # everything flows into one output
    assert {b for _, b in graph.edges} == set(range(1, len(graph)))  # and comes from the input
    assert same(graph, named_graph(name))  # from the cache


@pytest.mark.slow
def test_every_model_of_the_zoos_is_read():
    from mmpt.encoders.architecture_names import zoo_names

    failed = {}
    for name in zoo_names():
        try:
            named_graph(name)
        except DataError as error:
            failed[name] = str(error)
    assert not failed


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"])
def test_layers_are_those_of_torch_export(name):
    with torch.device("meta"):
        network = timm.create_model(name).eval()
        exported = torch.export.export(network, (torch.empty(1, 3, 224, 224),))
    calls = Counter(getattr(n.target, "__name__", "").split(".")[0] for n in exported.graph.nodes)
    types = Counter(trace(network).types)
    assert types["conv"] + types["sep_conv"] == calls["conv2d"] + calls["linear"]
    assert types["bn"] == calls["batch_norm"] + calls["_native_batch_norm_legit_no_training"]
    assert types["ln"] == calls["layer_norm"]
    assert types["scaled_dot_product"] == calls["scaled_dot_product_attention"]
    assert types["sum"] + types["pos_enc"] == calls["add"] + calls["add_"]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_products_are_those_of_torchs_counter(name):
    from torch.utils.flop_counter import FlopCounterMode

    network, inputs = build(name)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.eval()(*inputs)
    assert trace(network, inputs).macs == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def test_an_unknown_name_is_an_error_with_suggestions():
    with pytest.raises(DataError, match="resnet18"):
        named_graph("resnet1")
    with pytest.raises(DataError, match="torchvision has no"):
        named_graph("torchvision/none")


# Numbers


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((8, 3, 3, 3), [2, 1, 1, 1]), ((8,), [2, 0, 0, 0]), ((10, 8), [3, 2, 0, 0]), ((), [391, 391, 8, 8])],
)
def test_shapes_become_four_numbers(shape, numbers):
    assert shape_features([shape]).tolist() == [numbers]


@pytest.mark.parametrize(
    ("channels", "number"),
    [(1, 0), (2, 0), (4, 2), (7, 2), (9, 2), (20, 4), (100, 12), (512, 38), (1000, 68), (4096, 262), (9000, 390)],
)
def test_channels_go_to_the_nearest_entry(channels, number):
    assert shape_features([(channels, channels, 1, 1)])[0, :2].tolist() == [number, number]


@pytest.mark.parametrize(("kernel", "number"), [(1, 0), (2, 1), (4, 1), (13, 6), (15, 6), (16, 7), (17, 7)])
def test_kernels_go_to_the_nearest_entry(kernel, number):
    assert shape_features([(1, 1, kernel, 1)])[0, 2] == number
    assert shape_features([(1, 1, 1, kernel)])[0, 3] == number


def test_released_numbers_are_kept_and_what_they_lack_is_taken_out():
    known = vocabulary("archbert_v1")
    assert (known.size, known.pad, known.hidden) == (86, 84, 85)
    assert [known.numbers[n] for n in ("max_pool", "conv", "input", "pos_enc", "embedding", "gn", "droppath")] == [
        0, 4, 9, 13, 38, 40, 77,
    ]  # fmt: skip
    graph = ArchitectureGraph(
        ("input", "conv", "silu", "conv"), ((), (8, 3, 3, 3), (), (8, 8, 1, 1)), ((0, 1), (1, 2), (2, 3))
    )
    inputs = ArchitectureProcessor(vocabulary="archbert_v1")([graph])
    assert inputs["types"].tolist() == [[9, 4, 4]]
    assert inputs["edges"][0].nonzero().tolist() == [[0, 1], [1, 2]]


# Coarser graphs


def test_what_was_around_a_removed_operator_is_joined():
    graph = ArchitectureGraph(
        ("input", "conv", "relu", "conv", "sum"), ((),) * 5, ((0, 1), (1, 2), (2, 3), (2, 4), (3, 4))
    )
    coarse = contracted(graph, lambda kind: kind == "relu")
    assert coarse.types == ("input", "conv", "conv", "sum")
    assert coarse.edges == ((0, 1), (1, 2), (1, 3), (2, 3))
    assert coarse.removed == {"relu": 1}


def test_condensing_keeps_the_ends_and_counts_what_it_took():
    graph = named_graph("coat_tiny")
    assert len(graph) > 1000
    small = condensed(graph, 128)
    assert len(small) <= 128
    assert len(small) + sum(small.removed.values()) == len(graph)
    assert small.types[0] == "input"
    assert small.types[-1] == "conv"
    assert small.shapes[-1] == (1000, graph.shapes[-2][1])
    assert {b for _, b in small.edges} == set(range(1, len(small)))
    assert same(condensed(graph, len(graph)), graph)


def test_repetitions_go_before_layers_that_occur_once():
    blocks = [(8, 8, 3, 3)] * 20 + [(16, 8, 3, 3)] + [(16, 16, 1, 1)]
    graph = ArchitectureGraph(("input", *["conv"] * 22), ((), *blocks), tuple((i, i + 1) for i in range(22)))
    small = condensed(graph, 10)
    assert len(small) == 10
    assert set(small.shapes) == {(), *blocks}
    assert small.edges == tuple((i, i + 1) for i in range(9))
    smaller = condensed(graph, 3)
    assert smaller.shapes == ((), (8, 8, 3, 3), (16, 16, 1, 1))  # what is alike but for its width
    with pytest.raises(DataError, match="3 kinds of layers"):
        condensed(graph, 2)


# Samples


def test_graphs_of_different_forms_are_the_same_sample(tmp_path):
    graph = trace(small_network(), None)
    path = tmp_path / "net.json"
    path.write_text(graph.to_json())
    inputs = ArchitectureProcessor()([graph, small_network(), path, str(path)])
    for value in inputs.values():
        assert all(torch.equal(value[0], row) for row in value[1:])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "can't be read"),
        ('{"types": ["conv"], "shapes": [], "edges": []}', "1 types and 0 shapes"),
        ('{"types": ["input", "conv"], "shapes": [[], []], "edges": [[1, 0]]}', "from < to"),
        ('{"types": ["input"], "shapes": [[]], "edges": [[0, 5]]}', "from < to"),
    ],
)
def test_a_damaged_graph_file_is_named(tmp_path, content, problem):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(SampleError, match=problem) as error:
        ArchitectureProcessor()([small_network(), path])
    assert error.value.index == 1


def test_onnx_files_give_the_same_chain(tmp_path):
    onnx = pytest.importorskip("onnx")
    make = onnx.helper
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "s": (8,), "o": (8,), "m": (8,), "v": (8,), "f": (10, 8), "c": (10,)}
    weights = [make.make_tensor(n, 1, s, [0.0] * math.prod(s)) for n, s in shapes.items()]
    calls = [
        make.make_node("Conv", ["x", "w", "b"], ["1"], kernel_shape=[3, 3]),
        make.make_node("BatchNormalization", ["1", "s", "o", "m", "v"], ["2"]),
        make.make_node("Relu", ["2"], ["3"]),
        make.make_node("GlobalAveragePool", ["3"], ["4"]),
        make.make_node("Flatten", ["4"], ["5"]),
        make.make_node("Gemm", ["5", "f", "c"], ["y"], transB=1),
    ]
    graph = make.make_graph(
        calls,
        "net",
        [make.make_tensor_value_info("x", 1, [1, 3, 32, 32])],
        [make.make_tensor_value_info("y", 1, [1, 10])],
        weights,
    )
    path = tmp_path / "net.onnx"
    onnx.save(make.make_model(graph), str(path))
    inputs = ArchitectureProcessor()([path, trace(small_network(), PICTURE)])
    for value in inputs.values():
        assert torch.equal(value[0], value[1])
    path.write_bytes(b"not a network")
    with pytest.raises(SampleError, match=r"net\.onnx"):
        ArchitectureProcessor()([path])


def test_what_weights_and_real_tensors_make_has_no_memory_and_other_faults_stay_faults():
    with EmptyWeights():
        weights, widths = torch.rand(3), torch.arange(3.0)
        assert (widths * weights).is_meta
        assert torch.cat([weights, widths]).shape == (6,)
        assert not widths.is_meta
        with pytest.raises(RuntimeError):
            torch.cat([widths, torch.arange(4.0).view(2, 2)])
    network, _ = build("vit_small_patch16_rope_mixed_224")  # random rotations times real frequencies
    assert all(parameter.is_meta for parameter in network.parameters())
