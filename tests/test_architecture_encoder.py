"""What the encoder of networks makes of a graph: attention, masks, the summary, names of modules."""

import math
from collections import Counter

import pytest
import torch
from networks import PICTURE, small_network
from torch import nn

from mmpt.config import from_config
from mmpt.encoder import MASK, RANDOM, Corruption
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
    module_words,
    summary,
    vocabulary,
)
from mmpt.encoders.architecture_trace import trace
from mmpt.errors import ConfigError
from mmpt.masking import Uniform
from mmpt.naming import named_vectors
from mmpt.tokens import Tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPT_CACHE", str(tmp_path / "cache"))


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
