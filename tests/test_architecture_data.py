"""What is said about networks is true or false by their graphs, and no family is in two splits."""

import random
import re
from collections import Counter

import pytest
import torch

from mmpt.datasets import architecture_generated as generated_module
from mmpt.datasets.architecture import ModelZoo, family_folds, family_words, without_names, zoo
from mmpt.datasets.architecture_baselines import bag_of_types, jaccard, judge_statements, spectrum
from mmpt.datasets.architecture_generated import (
    GeneratedNetworks,
    Recipe,
    changed,
    clone_pairs,
    generated,
    graph_of_recipe,
    varied,
)
from mmpt.datasets.architecture_statements import (
    CAPTION,
    caption,
    description,
    facts,
    followers,
    layers,
    questions,
    statement,
    template_texts,
    vocabulary_of,
)
from mmpt.encoders.architecture_graph import ArchitectureGraph
from mmpt.encoders.architecture_names import build
from mmpt.errors import ConfigError, DataError, SampleError

COUNT = 30


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMPT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    generated.cache_clear()


@pytest.fixture(scope="module")
def graphs() -> list[ArchitectureGraph]:
    return [network.graph for network in generated(COUNT, 4, 0)]


def chain(*types: str) -> ArchitectureGraph:
    shapes = tuple((8, 8, 3, 3) if "conv" in t else () for t in types)
    return ArchitectureGraph(types, shapes, tuple((i, i + 1) for i in range(len(types) - 1)), parameters=1_200_000)


# Statements


def holds(text: str, graph: ArchitectureGraph) -> bool:
    """Read a statement and check it by other means than the generator's."""
    found = layers(graph)
    if match := re.fullmatch(r"the network uses (.+)", text):
        return match[1] in found
    if match := re.fullmatch(r"the network has (\d+) layers of (.+)", text):
        return found[match[2]] == int(match[1])
    if match := re.fullmatch(r"its (.+) has a kernel of (\d+x\d+)", text):
        return f"{match[2]} {match[1]}" in found
    if match := re.fullmatch(r"a (.+) is followed by (.+)", text):
        return (match[1], match[2]) in followers(graph)
    match = re.fullmatch(r"the network has about ([\d.]+) million parameters", text)
    assert match is not None, text
    return abs(float(match[1]) / (graph.parameters / 1e6) - 1) < 0.5


def test_every_statement_is_as_true_as_it_says(graphs):
    names = vocabulary_of(graphs)
    kinds = Counter()
    for number, graph in enumerate(graphs):
        for true in (True, False):
            for hard in (True, False):
                draw = random.Random(number)
                said = statement(graph, names, draw, true, hard)
                assert said is not None
                assert said.true == true
                assert said.hard == hard
                assert holds(said.text, graph) == true, said.text
                kinds[said.kind, true] += 1
    assert {kind for kind, _ in kinds} >= {"presence", "count", "size", "order"}


def test_easy_false_statements_name_a_layer_that_is_absent():
    graph = chain("input", "conv", "relu")
    said = statement(graph, ["relu", "gelu", "3x3 convolution"], random.Random(0), False, False)
    assert said is not None
    assert said.text == "the network uses gelu"
    assert statement(graph, ["relu"], random.Random(0), False, False) is None


def test_what_follows_what_is_read_from_the_edges():
    graph = chain("input", "conv", "bias", "bn", "view", "relu", "max_pool")
    conv = "3x3 convolution"
    assert followers(graph) == {
        (conv, "batch normalization"), ("batch normalization", "relu"), ("relu", "max pooling"),
    }  # fmt: skip


def test_questions_have_the_answers_of_the_graph():
    asked = {q.text: q.answer for q in questions(chain("input", "conv", "bn", "relu6", "sep_conv", "gelu", "glob_avg"))}
    assert asked == {
        "which pooling is used?": "global average pooling",
        "which normalization is used?": "batch normalization",
        "which activation is used?": "gelu, relu6",
        "which kernel sizes are used?": "3x3",
        "which normalization follows a convolution?": "batch normalization",
        "which activation follows a convolution?": "gelu",
    }
    without = {q.text: q.answer for q in questions(chain("input", "ln", "tanh"))}
    assert without["which pooling is used?"] == "none"
    assert "which activation follows a convolution?" not in without


def test_a_description_holds_facts_only(graphs):
    for seed, graph in enumerate(graphs):
        text = description(graph, random.Random(seed)).removeprefix("network with ")
        for fact in text.split(", "):
            if fact.endswith("million parameters"):
                continue
            count, name = re.fullmatch(r"(?:(\d+) )?(.+?)", fact).groups()
            name = name if name in layers(graph) else name.removesuffix("s")
            assert layers(graph)[name] == int(count) if count else layers(graph)[name] > 0


def test_all_facts_hold_and_true_statements_are_among_them(graphs):
    names = vocabulary_of(graphs)
    for number, graph in enumerate(graphs):
        said = facts(graph)
        assert all(holds(text, graph) for text in said)
        for hard in (True, False):
            for true in (True, False):
                found = statement(graph, names, random.Random(number), true, hard)
                assert found is None or found.kind == "size" or (found.text in said) == true


def test_a_caption_names_the_most_frequent_layers_in_falling_order():
    graph = chain("input", "conv", "relu", "conv", "relu", "conv", "bn", "max_pool", "gelu")
    assert caption(graph) == "3 3x3 convolutions, 2 relu, 1 batch normalization, 1 gelu"
    assert caption(graph, 1) == "3 3x3 convolutions"
    assert caption(chain("input", "view")) == "no layer with a name"


def test_questions_stand_in_front_of_their_answers_with_the_separator_between():
    source = GeneratedNetworks(COUNT, 4, about="questions")
    part = source.split("test")
    kinds = set()
    for index in range(len(part)):
        sample = part[index]
        graph = sample.modalities["architecture"]
        asked, answer = sample.modalities["text"].split("[SEP]")
        right = {question.text: question.answer for question in questions(graph)} | {CAPTION: caption(graph)}
        assert right[asked] == answer
        kinds.add(asked)
    assert CAPTION in kinds


def test_templates_name_every_layer_of_the_generated_networks(graphs):
    words = set(" ".join(template_texts()).split())
    assert set(" ".join(vocabulary_of(graphs)).split()) <= words


# Generated networks


def test_networks_are_the_same_for_the_same_seed_and_differ_within_it(graphs):
    generated.cache_clear()
    again = [network.graph for network in generated(COUNT, 4, 0)]  # from the cache file
    assert [g.to_json() for g in again] == [g.to_json() for g in graphs]
    assert len({(g.types, g.shapes, g.edges) for g in graphs}) == COUNT
    assert [n.graph.types for n in generated(5, 4, 1)] != [g.types for g in graphs[:5]]


def test_a_networks_layers_are_those_of_its_recipe():
    for network in generated(COUNT, 4, 0):
        drawn = Counter(layer for cell in network.recipe.cells for layer in cell)
        found = Counter(network.graph.types)
        assert found["max_pool"] == drawn["max"]
        assert found["scaled_dot_product"] == drawn["attention"]
        assert found["cse"] == drawn["se"]
        assert found["sum"] == sum(map(len, network.recipe.cells))
        assert found["sep_conv"] == drawn["sep3"] + drawn["sep5"]
        assert found["dil_conv"] == drawn["dil3"] + drawn["dil5"]


RECIPE = Recipe(3, 16, (("conv3", "attention"), ("max", "se")), (0,), "batch", "relu", 1)


def test_a_clone_has_other_widths_and_another_order_and_computes_the_same():
    for seed in range(20):
        clone = varied(RECIPE, random.Random(seed))
        assert clone.channels != RECIPE.channels
        assert [sorted(cell) for cell in clone.cells] == [sorted(cell) for cell in RECIPE.cells]
        assert clone.combination == RECIPE.combination
    graph, again = graph_of_recipe(RECIPE), graph_of_recipe(RECIPE, rewritten=True)
    told = Counter(again.types) - Counter(graph.types), Counter(graph.types) - Counter(again.types)
    # attention in products and a mean with nothing to flatten; dropout and identities leave no node
    assert told[0]["bias"] == 3  # stem, conv3, halving
    assert {"bmm", "softmax"} <= set(told[0])
    assert told[1]["scaled_dot_product"] == 1
    assert not {"dropout", "identity"} & set(again.types)


def test_a_changed_copy_differs_in_one_place():
    kinds = Counter()
    for seed in range(60):
        other = changed(RECIPE, random.Random(seed))
        before = Counter(layer for cell in RECIPE.cells for layer in cell)
        behind = Counter(layer for cell in other.cells for layer in cell)
        if len(other.cells) > len(RECIPE.cells):
            kinds["cell"] += 1
            assert not before - behind
            assert len(other.halve) == len(RECIPE.halve)
            assert graph_of_recipe(other).parameters > graph_of_recipe(RECIPE).parameters
        else:
            kinds["layer"] += 1
            assert (before - behind).total() == (behind - before).total() == 1
    assert min(kinds["cell"], kinds["layer"]) > 5


def test_pairs_of_networks_say_which_are_clones():
    networks = GeneratedNetworks(COUNT, 4).networks("train")
    pairs = clone_pairs(networks)
    assert [(pair.same, pair.near) for pair in pairs[:3]] == [(True, True), (False, True), (False, False)]
    assert len(pairs) == 3 * len(networks)
    told = 0
    for network, same, copy, other in zip(networks, pairs[::3], pairs[1::3], pairs[2::3], strict=True):
        assert same.first is copy.first is other.first is network.graph
        assert same.text == copy.text == other.text
        assert holds(same.text, network.graph)
        told += not holds(copy.text, copy.second)
        ends = [Counter(g.types)["sum"] for g in (network.graph, same.second)]
        assert ends[0] == ends[1]
    assert told > 0.9 * len(networks)
    assert [p.second.to_json() for p in clone_pairs(networks)] == [p.second.to_json() for p in pairs]


def test_no_combination_of_layers_is_in_two_splits():
    source = GeneratedNetworks(COUNT, 4)
    parts = {name: {n.recipe.combination for n in source.networks(name)} for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values()))
    assert sum(len(source.networks(name)) for name in parts) == COUNT


def test_statements_are_balanced_fixed_in_tests_and_new_in_training():
    source = GeneratedNetworks(COUNT, 4)
    train, test = source.split("train"), source.split("test")
    labels = [train[i].labels for i in range(len(train))]
    assert abs(sum(row["match"] for row in labels) / len(labels) - 0.5) < 0.05
    assert abs(sum(row["hard"] for row in labels) / len(labels) - 0.5) < 0.05
    torch.manual_seed(0)
    first = [train[i].modalities["text"] for i in range(40)]
    assert first != [train[i].modalities["text"] for i in range(40)]
    assert [test[i].modalities["text"] for i in range(4)] == [test[i].modalities["text"] for i in range(4)]


def test_counts_below_one_are_refused():
    with pytest.raises(ConfigError, match="per_network=0"):
        GeneratedNetworks(per_network=0)
    assert generated_module.LAYERS


# The zoo


def test_no_family_is_in_two_folds_and_folds_are_alike_in_size():
    folds = family_folds(5)
    sizes = Counter(folds[entry.family] for entry in zoo() if entry.text)
    assert max(sizes.values()) < 1.3 * min(sizes.values())
    source = ModelZoo(fold=2)
    families = [{e.family for e in source.entries(name)} for name in ("train", "validation", "test")]
    assert all(families)
    assert sum(map(len, families)) == len(set().union(*families))


def test_no_text_names_a_model_of_its_family():
    assert (
        without_names("SE-ResNeXt-50 32x4d model, see https://x.y/resnet", {"resnext", "resnet"}) == "32x4d model, see"
    )
    assert family_words("seresnext50_32x4d", "resnet") == {"seresnext", "resnet"}
    for entry in zoo():
        own = re.sub(r"[^a-z]", "", entry.name.rpartition("/")[2].split("_")[0].lower())
        if len(own) > 5:
            assert own not in re.sub(r"[^a-z ]", "", entry.text.lower()).split(), entry


def test_samples_of_the_zoo_carry_graph_text_and_size():
    source = ModelZoo(limit=60)
    sample = source.split("test")[0]
    assert isinstance(sample.modalities["architecture"], ArchitectureGraph)
    assert sample.labels["class"] == sum(sample.modalities["architecture"].parameters > n for n in (10e6, 30e6, 100e6))


def test_own_tables_keep_families_together_and_name_bad_rows(tmp_path):
    rows = [f"resnet18,text {i},family {i // 4}" for i in range(40)]
    table = tmp_path / "mine.csv"
    table.write_text("network,text,family\n" + "\n".join([*rows, "no_such_model,broken,family 0"]))
    source = ModelZoo()
    source.path = str(table)
    splits = [source.split(name) for name in ("train", "validation", "test")]
    assert sum(map(len, splits)) == 41
    seen = [{row.family for row in split.rows} for split in splits]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    everything = source.everything()
    assert everything[0].modalities["text"] == "text 0"
    with pytest.raises(SampleError, match="no_such_model"):
        everything[40]
    table.write_text("net,text\na,b")
    with pytest.raises(DataError, match="column network"):
        source.split("train")
    source.path = str(tmp_path)
    with pytest.raises(DataError, match=r"no \.onnx or \.json"):
        source.split("train")


def test_own_classes_need_no_texts(tmp_path):
    rows = [f"resnet18,{'bcad'[i % 4]},family {i}" for i in range(40)]
    (tmp_path / "mine.csv").write_text("network,class,family\n" + "\n".join([*rows, "resnet18,,family 40"]))
    source = ModelZoo(path=str(tmp_path / "mine.csv"))
    assert source.label_names("class") == ["a", "b", "c", "d"]
    assert sum(len(source.split(name)) for name in ("train", "validation", "test")) == 40
    assert len(source.everything()) == 41
    assert source.everything()[2].labels == {"class": 0}
    assert source.everything()[40].labels == {}


def test_a_table_cannot_name_files_outside_its_folder(tmp_path):
    (tmp_path / "t.csv").write_text("network,text\n../secret.json,x\n")
    source = ModelZoo()
    source.path = str(tmp_path / "t.csv")
    with pytest.raises(DataError, match="leads out"):
        source.split("train")


def test_impossible_folds_are_refused():
    with pytest.raises(ConfigError, match="fold is 5"):
        ModelZoo(fold=5)


def test_building_a_model_takes_no_memory():
    network, inputs = build("vit_giant_patch14_dinov2")
    assert all(p.is_meta for p in network.parameters())
    assert inputs[0].is_meta


# Baselines


def test_overlap_counts_nodes_and_edges_by_label():
    a, b = chain("input", "conv", "relu"), chain("input", "conv", "gelu")
    assert jaccard(a, a) == 1
    assert jaccard(a, b) == pytest.approx(3 / 7)  # input, conv, input-conv of 3 + 2 + 3 + 2 - 3


def test_overlap_may_leave_widths_or_whole_shapes_aside():
    def conv(*shape: int) -> ArchitectureGraph:
        return ArchitectureGraph(("input", "conv"), ((), shape), ((0, 1),))

    narrow, wide, other = conv(8, 3, 3, 3), conv(16, 3, 3, 3), conv(8, 3, 5, 5)
    assert [jaccard(narrow, wide, label) for label in ("shape", "kernel", "type")] == [1 / 5, 1, 1]
    assert [jaccard(narrow, other, label) for label in ("shape", "kernel", "type")] == [1 / 5, 1 / 5, 1]


def test_logistic_regression_gives_odds_for_what_is_true():
    with_relu, without = chain("input", "conv", "relu"), chain("input", "conv", "gelu")
    graphs, texts = [with_relu, without] * 10, ["the network uses relu"] * 20
    odds = judge_statements(graphs, texts, [1, 0] * 10, [with_relu, without], texts[:2])
    assert odds[0] > 0 > odds[1]


def test_the_spectrum_tells_shapes_of_graphs_apart_and_not_the_order_of_nodes():
    fork = ArchitectureGraph(("a",) * 4, ((),) * 4, ((0, 1), (0, 2), (0, 3)))
    other = ArchitectureGraph(("a",) * 4, ((),) * 4, ((0, 3), (1, 3), (2, 3)))
    line = ArchitectureGraph(("a",) * 4, ((),) * 4, ((0, 1), (1, 2), (2, 3)))
    assert (spectrum(fork) == spectrum(other)).all()
    assert (spectrum(fork) != spectrum(line)).any()
    assert spectrum(line).sum() == pytest.approx(1)


def test_bags_know_numbers_of_operators():
    rows = bag_of_types([chain("input", "conv", "conv"), chain("input", "conv")])
    assert rows.shape[0] == 2
    assert (rows[0] >= rows[1]).all()
    assert (rows[0] > rows[1]).any()


def test_lengths_are_the_nodes_of_each_sample():
    source = GeneratedNetworks(COUNT, 4)
    examples = source.split("train")
    nodes = [len(examples[i].modalities["architecture"].types) for i in range(len(examples))]
    assert source.lengths("train") == nodes
    assert len(set(nodes)) > 1


def test_facts_of_statements_say_what_else_is_true_of_a_network():
    source = GeneratedNetworks(COUNT, 4)
    for split in ("train", "test"):
        part = source.split(split)
        rows = [part[i] for i in range(min(len(part), 40))]
        assert len({len(row.labels["facts"]) for row in rows}) == 1
        for row in rows:
            fact = row.labels["fact"]
            if "million" in row.modalities["text"]:
                assert fact == -1
                continue
            assert row.labels["facts"][fact] <= row.labels["match"]  # a true one may be new in the test
            assert split == "test" or row.labels["facts"][fact] == row.labels["match"]
        true = [row for row in rows if row.labels["fact"] >= 0]
        texts = {row.labels["fact"]: row.modalities["text"] for row in true if row.labels["facts"][-1] == 0}
        for row in rows:
            said = facts(row.modalities["architecture"])
            for number, text in texts.items():
                if number < len(row.labels["facts"]) - 1:
                    assert row.labels["facts"][number] == (text in said)
