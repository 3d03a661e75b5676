"""Masking policies: how many units, which of them, what happens to them, and what is left alone."""

import math

import pytest
import torch
from points import TEXTS, text_transformer

from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.errors import ConfigError
from mmpt.masking import Exact, Span, Uniform
from mmpt.text import TextEncoder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ones(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


def three_sigma(rate, n):
    return 3 * math.sqrt(rate * (1 - rate) / n)


POLICIES = [Uniform(), Exact(), Span(), Uniform(0.5, 1.0, 0.0), Exact(0.75, 1.0, 0.0), Span(0.3, 0.5, 0.5)]
NAMED = pytest.mark.parametrize("policy", POLICIES, ids=lambda p: f"{type(p).__name__}-{p.rate}")


@NAMED
def test_only_units_are_chosen_and_only_chosen_units_change(policy):
    units = torch.rand(40, 37, generator=generator(1)) < 0.7
    corruption = policy(units, generator=generator())
    assert not (corruption.predicted & ~units).any()
    assert not ((corruption.action != KEEP) & ~corruption.predicted).any()
    assert corruption.action.dtype == torch.uint8
    assert corruption.predicted.shape == corruption.action.shape == units.shape


@NAMED
def test_same_generator_same_choice(policy):
    units = ones(4, 50)
    first, again, other = (policy(units, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.action, again.action)
    assert torch.equal(first.predicted, again.predicted)
    assert not torch.equal(first.predicted, other.predicted)


@NAMED
def test_rows_without_units_are_left_alone(policy):
    units = torch.stack([torch.zeros(20, dtype=torch.bool), ones(1, 20)[0]])
    assert not policy(units, generator=generator()).predicted[0].any()


def test_uniform_shares():
    # 10,000 units at 15 %: 1,500 +- 107; of them 80 % hidden, 10 % replaced, 10 % kept
    units = torch.zeros(100, 120, dtype=torch.bool)
    units[:, 10:110] = True
    corruption = Uniform()(units, generator=generator())
    chosen = int(corruption.predicted.sum())
    assert abs(chosen - 1500) <= 107
    actions = corruption.action[corruption.predicted]
    for action, share in ((MASK, 0.8), (RANDOM, 0.1), (KEEP, 0.1)):
        assert abs((actions == action).float().mean() - share) < three_sigma(share, chosen)


@pytest.mark.parametrize(
    ("length", "chosen", "hidden", "replaced", "kept"), [(512, 77, 62, 8, 7), (1024, 154, 123, 15, 16)]
)
def test_exact_counts_of_midibert(length, chosen, hidden, replaced, kept):
    corruption = Exact(0.15, 0.8, 0.1)(ones(5, length), generator=generator())
    assert corruption.predicted.sum(1).tolist() == [chosen] * 5
    assert (corruption.action == MASK).sum(1).tolist() == [hidden] * 5
    assert (corruption.action == RANDOM).sum(1).tolist() == [replaced] * 5
    assert (corruption.predicted & (corruption.action == KEEP)).sum(1).tolist() == [kept] * 5
    assert corruption.hidden == hidden


def test_exact_counts_are_of_the_row_not_of_the_batch():
    units = torch.arange(20) < torch.tensor([[20], [10], [1]])
    corruption = Exact(0.5, 1.0, 0.0)(units, limit=20, generator=generator())
    assert corruption.predicted.sum(1).tolist() == [10, 5, 0]  # half of one rounds to even
    assert corruption.hidden == 10


def test_exact_choice_is_even_over_units():
    corruption = Exact(0.25, 1.0, 0.0)(ones(4000, 8), generator=generator())
    share = corruption.predicted.float().mean(0)
    assert (share - 0.25).abs().max() < three_sigma(0.25, 4000)


@pytest.mark.parametrize("rate", [0.15, 0.34, 0.35, 0.55, 0.6, 0.7, 0.75])
@pytest.mark.parametrize("mask", [1.0, 0.8])
def test_hidden_is_the_number_of_masked_units_of_a_full_row(rate, mask):
    # encoders that drop units cut their tensors to this length: off by one loses or invents a unit
    for length in range(1, 240):
        corruption = Exact(rate, mask, 0.0)(ones(1, length), generator=generator())
        assert corruption.hidden == int((corruption.action == MASK).sum()), length


def test_hidden_is_unknown_where_the_policy_does_not_fix_it():
    assert Uniform()(ones(2, 9)).hidden is None
    assert Span()(ones(2, 9)).hidden is None


def test_whole_groups_are_chosen_and_treated_together():
    groups = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 5, 5]).expand(2000, -1)
    units = ones(2000, 10)
    units[:, 0] = False
    corruption = Uniform(0.3, 0.5, 0.3, whole_groups=True)(units, groups, generator=generator())
    for group in range(1, 6):
        members = (groups[0] == group).nonzero().squeeze(1)
        assert (corruption.predicted[:, members] == corruption.predicted[:, members[:1]]).all()
        assert (corruption.action[:, members] == corruption.action[:, members[:1]]).all()
        share = corruption.predicted[:, members[0]].float().mean()
        assert abs(share - 0.3) < three_sigma(0.3, 2000)
    assert {KEEP, MASK, RANDOM} == set(corruption.action.unique().tolist())


def test_whole_words_of_text():
    encoder = TextEncoder(text_transformer())
    inputs = encoder.processor(["a spiralzigzag circlexx", "zzzz a"] * 300)
    words, units = inputs["words"], encoder.units(inputs)
    assert (words[:, 1:] == words[:, :-1])[units[:, 1:] & units[:, :-1]].any()  # some words have several tokens
    corruption = Uniform(0.5, whole_groups=True)(units, encoder.groups(inputs), generator=generator())
    together = units[:, 1:] & units[:, :-1] & (words[:, 1:] == words[:, :-1])
    assert (corruption.action[:, 1:] == corruption.action[:, :-1])[together].all()
    assert (corruption.predicted[:, 1:] == corruption.predicted[:, :-1])[together].all()
    special = torch.isin(inputs["ids"], encoder.processor.special_ids)
    assert not corruption.predicted[special].any()


def test_whole_groups_without_groups_is_refused():
    with pytest.raises(ConfigError, match="belong together"):
        Uniform(whole_groups=True)(ones(1, 4))


def test_span_coverage_is_the_rate_at_every_unit():
    policy = Span(0.15)
    predicted = policy(ones(4000, 60), generator=generator()).predicted.float()
    # units of a row depend on each other over max_length at most: rows are the independent draws
    spread = 3 * float(predicted.mean(1).std()) / math.sqrt(4000)
    assert abs(float(predicted.mean()) - 0.15) < spread
    assert (predicted.mean(0) - 0.15).abs().max() < 3.5 * math.sqrt(0.15 * 0.85 / 4000)  # also the first and the last


def test_span_lengths_are_geometric_and_cut():
    # at a low rate runs hardly ever touch; runs at the edges are incomplete and left out
    policy = Span(0.005, 1.0, 0.0, mean_length=3.8, max_length=10)
    predicted = policy(ones(300, 2000), generator=generator()).predicted
    predicted[:, 0] = False
    edges = torch.nn.functional.pad(predicted.int(), (1, 1)).diff(dim=1)
    begin, end = (edges == 1).nonzero(), (edges == -1).nonzero()
    lengths = (end[:, 1] - begin[:, 1])[end[:, 1] < 2000]
    share = 1 / 3.8
    probability = torch.tensor([share * (1 - share) ** k for k in range(9)] + [(1 - share) ** 9])
    expected = float((probability * torch.arange(1, 11)).sum())
    assert abs(float(lengths.float().mean()) - expected) < 0.25  # 3.62 where the cut keeps the rest at 10
    once = lengths[lengths <= 10]
    measured = torch.bincount(once, minlength=11)[1:] / len(lengths)
    assert (measured - probability).abs().max() < 0.03


def test_a_run_has_one_fate():
    policy = Span(0.01, 0.5, 0.5)
    corruption = policy(ones(100, 1000), generator=generator())
    inside = corruption.predicted[:, 1:] & corruption.predicted[:, :-1]
    differing = (corruption.action[:, 1:] != corruption.action[:, :-1]) & inside
    assert inside.sum() > 500
    assert differing.sum() < 0.05 * inside.sum()  # two runs that touch


def test_policies_are_made_on_the_meta_device_too():
    with torch.device("meta"):
        made = [Uniform(), Exact(), Span()]
    for policy in made:
        assert policy(ones(2, 20)).predicted.shape == (2, 20)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 15])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ConfigError, match="rate"):
        Uniform(rate)


def test_impossible_shares_are_refused():
    with pytest.raises(ConfigError, match="add up"):
        Exact(0.5, mask=0.8, random=0.3)
    with pytest.raises(ConfigError, match="mean_length"):
        Span(mean_length=0.5)


def test_hidden_text_cannot_influence_its_prediction():
    torch.manual_seed(0)
    encoder = TextEncoder(text_transformer()).eval()
    inputs = encoder.processor(TEXTS[:2])
    hide = torch.zeros_like(inputs["mask"])
    hide[:, 2] = True
    corruption = Corruption(hide.to(torch.uint8) * MASK, hide)
    predictions = encoder.reconstruct(encoder(inputs, corruption), corruption)
    other = inputs | {"ids": inputs["ids"].clone()}
    other["ids"][:, 2] = other["ids"][:, 1]
    assert torch.equal(encoder.reconstruct(encoder(other, corruption), corruption), predictions)
    before = encoder.reconstruction_loss(predictions, inputs, corruption).loss
    assert encoder.reconstruction_loss(predictions, other, corruption).loss != before
