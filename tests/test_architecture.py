"""Networks as graphs: what is read from a network, and what the encoder makes of it."""

import math
from collections import Counter

import pytest
import timm
import torch
from torch import nn

from mmpt.batches import Batch
from mmpt.config import from_config
from mmpt.encoder import MASK, RANDOM, Corruption
from mmpt.encoders import architecture_trace
from mmpt.encoders.architecture import (
    NAMED,
    ArchitectureEncoder,
    ArchitectureProcessor,
    GraphAttention,
    Standardize,
)
from mmpt.encoders.architecture_graph import (
    SUMMARY,
    ArchitectureGraph,
    condensed,
    contracted,
    module_words,
    shape_features,
    summary,
    vocabulary,
)
from mmpt.encoders.architecture_names import EmptyWeights, build, named_graph
from mmpt.encoders.architecture_trace import trace
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.features import Features
from mmpt.heads import SimilarityHead
from mmpt.masking import Uniform
from mmpt.naming import named_vectors
from mmpt.tokens import Tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path / "cache"))


def small_network(channels: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


PICTURE = (torch.empty(1, 3, 32, 32),)


def same(a: ArchitectureGraph, b: ArchitectureGraph) -> bool:
    return (a.types, a.shapes, a.edges) == (b.types, b.shapes, b.edges)


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


# The encoder


def test_graph_attention_equals_the_worked_example():
    layer = GraphAttention(1, 1)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.fill_(1.0)
    encoder = ArchitectureEncoder(8, attend="successors")
    edges = torch.zeros(1, 3, 3, dtype=torch.bool)
    edges[0, [0, 0, 1], [1, 2, 2]] = True
    edges = nn.functional.pad(edges, (0, 1, 0, 1))
    nodes = torch.tensor([[[1.0], [2.0], [-1.0], [100.0]]])
    out = layer(nodes, encoder.allowed(edges), torch.tensor([[True, True, True, False]]))
    # the last node has no successor: the mean of the real ones
    torch.testing.assert_close(out[0, :3, 0], torch.tensor([1.8577, -0.6321, 0.6667]), atol=1e-4, rtol=0)


def test_neighbours_are_seen_in_the_chosen_direction():
    edges = torch.zeros(1, 3, 3, dtype=torch.bool)
    edges[0, 0, 1] = True
    seen = {
        attend: ArchitectureEncoder(8, attend=attend).allowed(edges)[0].int().tolist()
        for attend in ("successors", "predecessors", "both")
    }
    assert seen["successors"] == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert seen["predecessors"] == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert seen["both"] == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_the_paper_size_has_the_papers_parameters():
    with torch.device("meta"):
        encoder = ArchitectureEncoder(768, 4, processor=ArchitectureProcessor(vocabulary="archbert_v1"))
    own = sum(p.numel() for n, p in encoder.named_parameters() if not n.startswith("predictor"))
    assert own == 86 * 768 + (392 + 9) * 192 + 4 * (768 * 768 + 2 * 768) + 3072 * 768 + 2 * 768 + 2 * 768


def test_the_mean_is_over_real_nodes():
    tokens = Tokens(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[True, True, False]]))
    assert tokens.mean().item() == 2.0


def test_masking_hides_types_and_leaves_shapes_and_edges():
    types = torch.randint(10, (100, 120))
    mask = torch.arange(120).expand(100, 120) < 100
    shapes = torch.zeros(100, 120, 4, dtype=torch.long)
    edges = torch.zeros(100, 120, 120, dtype=torch.bool)
    encoder = ArchitectureEncoder(8, 1)
    inputs = {"types": types.where(mask, vocabulary("mmpt").pad), "shapes": shapes, "edges": edges, "mask": mask}
    corruption = Uniform()(encoder.units(inputs), generator=torch.Generator().manual_seed(0))
    chosen = int(corruption.predicted.sum())
    assert abs(chosen - 1500) <= 107
    assert not corruption.predicted[~mask].any()
    seen = []
    encoder.types.register_forward_hook(lambda module, given, out: seen.append(given[0]))
    before = {name: value.clone() for name, value in inputs.items()}
    encoder(inputs, corruption)
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())
    assert (seen[0][corruption.action == MASK] == vocabulary("mmpt").hidden).all()
    drawn = seen[0][corruption.action == RANDOM]
    assert len(drawn.unique()) > 20
    assert (drawn < vocabulary("mmpt").pad).all()
    assert torch.equal(seen[0][corruption.action == 0], inputs["types"][corruption.action == 0])


def test_masked_types_are_scored_by_cross_entropy():
    encoder = ArchitectureEncoder(8, 1)
    inputs = {"types": torch.tensor([[1, 0]]), "mask": torch.ones(1, 2, dtype=torch.bool)}
    corruption = Corruption(torch.ones(1, 2, dtype=torch.uint8), torch.ones(1, 2, dtype=torch.bool))
    scores = torch.full((2, vocabulary("mmpt").size), -50.0)
    scores[:, :2] = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    part = encoder.reconstruction_loss(scores, inputs, corruption)
    assert part.loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-3))) / 2, abs=1e-5)
    assert part.logs["accuracy"].item() == 0.5


# The summary


def test_a_summary_counts_operators_kernels_and_sizes():
    types = ("input", "conv", "conv", "sep_conv", "conv", "relu")
    shapes = ((), (16, 3, 7, 7), (16, 16, 1, 3), (16, 1, 3, 3), (10, 16), ())
    graph = ArchitectureGraph(types, shapes, ((0, 1), (1, 2), (2, 3), (3, 4), (4, 5)), parameters=2_999)
    counts = summary(graph).expm1()
    known = vocabulary("mmpt").numbers
    assert {k: round(float(counts[i])) for k, i in known.items() if counts[i] > 0} == Counter(types)
    kernels = counts[len(known) : len(known) + 48].reshape(3, 2, 8).round().int()
    assert kernels[0].tolist() == [[1, 0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]]  # conv: height, then width
    assert kernels[1].tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]] * 2
    assert kernels[2].sum() == 0
    linear, parameters, nodes, widest, width, greatest, kernel = counts[len(known) + 48 :].tolist()
    assert len(counts) == SUMMARY
    assert [linear, nodes, widest, greatest] == pytest.approx([1, 6, 16, 7], rel=1e-4)
    assert [parameters, width, kernel] == pytest.approx([2999, 14.5, 13 / 3], rel=1e-4)


def test_a_summary_is_a_token_in_front_that_knows_the_whole_graph():
    encoder = ArchitectureEncoder(16, 2, processor=ArchitectureProcessor(8, summary=True)).eval()
    plain = ArchitectureEncoder(16, 2, processor=ArchitectureProcessor(8)).eval()
    plain.load_state_dict(encoder.state_dict(), strict=False)
    deep = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *[nn.ReLU() for _ in range(20)])
    networks = [trace(net, PICTURE) for net in (small_network(), deep, nn.Sequential(*deep[:9]))]
    inputs = encoder.processor(networks)
    tokens, without = encoder(inputs), plain(plain.processor(networks))
    assert tokens.mask[:, 0].all()
    torch.testing.assert_close(tokens.values[:, 1:][without.mask], without.values[without.mask])
    # both deep ones are condensed to the same nodes; only the summary tells them apart
    torch.testing.assert_close(without.values[1].sum(0), without.values[2].sum(0))
    assert (tokens.values[1, 0] - tokens.values[2, 0]).abs().max() > 1e-3
    torch.testing.assert_close(encoder(encoder.processor(networks[:1])).values[0, 0], tokens.values[0, 0])


def test_a_summary_is_hidden_while_types_are_and_is_never_predicted():
    torch.manual_seed(0)
    encoder = ArchitectureEncoder(16, 2, processor=ArchitectureProcessor(16, summary=True)).eval()
    inputs = encoder.processor([trace(small_network(c), PICTURE) for c in (8, 64)])
    units = encoder.units(inputs)
    assert not units[:, 0].any()
    corruption = Uniform(0.5)(units, generator=torch.Generator().manual_seed(0))
    tokens = encoder(inputs, corruption)
    assert torch.equal(tokens.values[0, 0], tokens.values[1, 0])
    predictions = encoder.reconstruct(tokens, corruption)
    targets = inputs["types"][corruption.predicted[:, 1:]]
    perfect = nn.functional.one_hot(targets, vocabulary("mmpt").size) * 50.0
    assert encoder.reconstruction_loss(predictions, inputs, corruption).loss > 1
    assert encoder.reconstruction_loss(perfect, inputs, corruption).loss < 1e-5


# Names of modules


class SqueezeExcite(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True).sigmoid() * x


class _Gates(nn.Sequential):
    pass


class ConvNormAct2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, 3, 3), _Gates(SqueezeExcite())

    def forward(self, x):
        return self.gate(self.conv(x))


def test_words_are_those_of_own_classes_but_private_ones():
    graph = trace(nn.Sequential(ConvNormAct2d(), nn.ReLU()), PICTURE)
    assert module_words(graph) == ["act", "conv", "excite", "norm", "squeeze"]
    assert module_words(trace(small_network(), PICTURE)) == []


def test_names_are_the_sum_of_a_vector_for_each_word_and_lose_some_in_training():
    processor = ArchitectureProcessor(16, summary=True, names=32)
    graphs = [trace(net, PICTURE) for net in (ConvNormAct2d(), small_network())]
    found = processor(graphs)["names"]
    words = named_vectors(["conv", "norm", "act", "squeeze", "excite"], 32)
    torch.testing.assert_close(found[0], words.sum(0) / (0.1 * 5**0.5))
    assert not found[1].any()
    torch.manual_seed(0)
    drawn = [processor(graphs[:1], training=True)["names"][0] for _ in range(8)]
    assert len({tuple(vector.tolist()) for vector in drawn}) > 1


def test_names_join_the_summary_and_are_hidden_with_it():
    processor = ArchitectureProcessor(16, summary=True, names=16)
    encoder = ArchitectureEncoder(16, 2, processor=processor).eval()
    inputs = processor([trace(net, PICTURE) for net in (ConvNormAct2d(), small_network())])
    assert encoder.summarize is not None
    expected = encoder.summarize(inputs["summary"]) + NAMED * inputs["names"]
    torch.testing.assert_close(encoder(inputs).values[:, 0], expected)
    hidden = encoder(inputs, Uniform(0.5)(encoder.units(inputs), generator=torch.Generator().manual_seed(0)))
    assert torch.equal(hidden.values[0, 0], hidden.values[1, 0])
    assert {"squeeze", "excite", "attention", "bottleneck", "patch"} <= set(encoder.unit_names())
    assert ArchitectureEncoder(16, 2, processor=ArchitectureProcessor(16, summary=True)).unit_names() == []


def test_names_need_a_summary_and_the_width_of_the_encoder():
    with pytest.raises(ConfigError, match="summary: true"):
        ArchitectureProcessor(16, names=16)
    with pytest.raises(ConfigError, match="make it the width, 32"):
        ArchitectureEncoder(32, 2, processor=ArchitectureProcessor(16, summary=True, names=16))


# The similarity head


class _Fixed(Features):
    def __init__(self, first, second, **labels):
        super().__init__(None, Batch({"a": {}, "text": {}}, labels, []))
        self.given = {"a": torch.tensor(first), "text": torch.tensor(second)}

    def embedding(self, modality, view=0):
        return self.given[modality]


@pytest.mark.parametrize(("label", "loss"), [(1, 0.16), (0, 0.36)])
def test_the_cosine_is_compared_with_the_label(label, loss):
    features = _Fixed([[1.0, 0.0]], [[0.6, 0.8]], match=torch.tensor([label]))
    output = SimilarityHead("a")(features)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert output.logs["accuracy"].item() == label


def test_pairs_without_a_label_are_compared_with_the_next_text():
    first, second = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]
    other = SimilarityHead("a")(_Fixed(first, second, group=torch.tensor([0, 1])))
    assert other.loss.item() == pytest.approx((0 + 0.2**2 + 0.6**2 + 0) / 4, abs=1e-6)
    alike = SimilarityHead("a")(_Fixed(first, second, group=torch.tensor([3, 3])))
    assert alike.loss.item() == pytest.approx((0 + 0.2**2 + 0.4**2 + 1) / 4, abs=1e-6)


def test_a_model_folder_gives_the_same_embedding_alone_and_in_a_batch(tmp_path):
    from contracts.cases import text_transformer

    from mmpt.model import Modality, MultimodalModel

    torch.manual_seed(0)
    modality = Modality(ArchitectureEncoder(32, 2, processor=ArchitectureProcessor(48)), through_text=True)
    model = MultimodalModel(text_transformer(), {"architecture": modality}, embed_dim=16).eval()
    nets = [small_network(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), "resnet18"]
    together = model.embed("architecture", nets)
    again = MultimodalModel.from_pretrained(model.save_pretrained(tmp_path / "model"), trust=["mmpt"])
    for row, net in zip(together, nets, strict=True):
        torch.testing.assert_close(model.embed("architecture", [net])[0], row, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(again.embed("architecture", [net])[0], row, atol=1e-5, rtol=1e-4)


def test_the_encoders_configuration_names_its_processor():
    config = ArchitectureEncoder(16, 2, attend="predecessors", processor=ArchitectureProcessor(7)).config()
    built = from_config(config)
    assert (built.attend, built.processor.max_nodes) == ("predecessors", 7)


def test_the_logistic_loss_asks_for_the_side_of_the_threshold():
    head = SimilarityHead("a", loss="logistic", threshold=0.5, temperature=0.1)
    output = head(_Fixed([[1.0, 0.0], [1.0, 0.0]], [[0.6, 0.8], [0.8, 0.6]], match=torch.tensor([1, 0])))
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(3.0))) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.logs["accuracy"].item() == 0.5
    with pytest.raises(ConfigError, match="hinge"):
        SimilarityHead("a", loss="hinge")


def test_texts_are_compared_with_every_sample_whose_facts_are_known():
    # text 0 states fact 1, text 1 none of the list, text 2 fact 0
    facts = torch.tensor([[1, 1], [0, 0], [1, 0]])
    labels = {"match": torch.tensor([1, 1, 1]), "facts": facts, "fact": torch.tensor([1, -1, 0])}
    first = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    second = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    loss = SimilarityHead("a")(_Fixed(first, second, **labels)).loss.item()
    true = 1.0  # sample 0 with text 2, cosine 0
    false = (0.6**2 + 0 + 0.8**2) / 3  # samples 1 and 2 with text 0, sample 1 with text 2
    assert loss == pytest.approx(0 + 0.5 * true + 0.5 * false, abs=1e-6)


def test_standardized_features_have_the_mean_and_spread_of_all_training_batches():
    layer = Standardize(2)
    batches = [torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 5.0], [6.0, 5.0]])]
    for batch in batches:
        layer(batch)
    layer.eval()
    mean, variance = 3.0, 2.0  # means 1 and 5, variances 2 and 2
    out = layer(torch.tensor([[3.0, 5.0], [3.0 + variance**0.5, 5.0], [1e3, 9.0]]))
    torch.testing.assert_close(out[:, 0], torch.tensor([(3 - mean), 1.0, 4.0]), atol=1e-3, rtol=0)
    assert out[:2, 1].abs().max() < 1e-4  # a feature that is always the same
    assert out[2, 1] == 4.0
    before = layer.running_mean.clone()
    layer(torch.tensor([[9.0, 9.0]]))
    assert torch.equal(layer.running_mean, before)


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
