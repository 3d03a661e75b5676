"""Generation: rows don't disturb each other, and the search finds what it should."""

import itertools

import pytest
import torch
from test_text import TOKENIZER, build
from test_transformer import POSITIONS, batch
from torch import Tensor

from mmpt.errors import ConfigError
from mmpt.generation import generate
from mmpt.tokens import Tokens, full

END = TOKENIZER.sep_token_id
PROMPTS = torch.tensor([[2, 40, 41, 42], [2, 50, 0, 0], [2, 61, 62, 0]])
MASK = PROMPTS != 0


def log_probabilities(text, ids: list[int], vocabulary: list[int]) -> Tensor:
    """Of the next token after unpadded ids, among a small vocabulary."""
    logits = text.lm_logits(text(text.embed(torch.tensor([ids])), "causal").values[:, -1])[0]
    logits[0] = -torch.inf
    return logits.log_softmax(-1)[vocabulary]


def small_build(**options):
    """A model whose texts end now and then: every token but a few is made very unlikely."""
    text = build(lm_head="transform", max_length=40, **options)
    allowed = torch.tensor([END, 40, 41, 50])
    with torch.no_grad():
        text.lm_head.bias.fill_(-50.0)
        text.lm_head.bias[allowed] = torch.tensor([0.5, 0.3, 0.0, 0.2])
    return text, allowed.tolist()


@torch.no_grad()
def test_greedy_writes_the_most_probable_token_each_time():
    text = build(max_length=40)
    written = generate(text, PROMPTS[:1], MASK[:1], max_new_tokens=6)
    ids = PROMPTS[0].tolist()
    for token in written[0].tolist():
        assert token == log_probabilities(text, ids, list(range(100))).argmax().item()
        ids.append(token)
    assert written.shape == (1, 6)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_a_row_gives_the_same_text_alone_as_in_a_batch(positions, beams, attention):
    text, _ = small_build(positions=positions, cross_attention=[0])
    prefix, context = batch(1, 4, 2, seed=8), batch(3, 1, 2, seed=9)
    options = {"attention": attention, "max_new_tokens": 6, "end_id": END, "beams": beams}
    together = generate(text, PROMPTS, MASK, prefix=prefix, context=context, **options)
    for row, (ahead, length, seen) in enumerate(((1, 4, 3), (4, 2, 1), (2, 3, 2))):
        alone = generate(
            text,
            PROMPTS[row : row + 1, :length],
            MASK[row : row + 1, :length],
            prefix=full(prefix.values[row : row + 1, :ahead]),
            context=full(context.values[row : row + 1, :seen]),
            **options,
        )
        width = alone.shape[1]
        assert together[row, :width].tolist() == alone[0].tolist()
        assert (together[row, width:] == 0).all()


def test_prompts_padded_on_the_left_give_the_same_text():
    text = build(max_length=40)
    left = torch.tensor([[2, 40, 41, 42], [0, 0, 2, 50], [0, 2, 61, 62]])
    options = {"max_new_tokens": 5}
    assert torch.equal(generate(text, left, left != 0, **options), generate(text, PROMPTS, MASK, **options))


def test_padding_follows_the_end_token_and_writing_stops_when_all_rows_ended():
    text, _ = small_build()
    prompts = torch.randint(5, 100, (16, 3), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts, dtype=torch.bool)
    calls = []
    text.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    written = generate(text, prompts, mask, max_new_tokens=30, end_id=END, temperature=1.0)
    assert len(calls) == written.shape[1] < 30
    lengths = [(row == END).nonzero()[0, 0].item() + 1 for row in written]
    assert len(set(lengths)) > 1
    for row, length in zip(written, lengths, strict=True):
        assert (row[length:] == 0).all()
        assert (row[:length] != 0).all()


def test_the_pad_token_is_never_written():
    text, _ = small_build()
    with torch.no_grad():
        text.lm_head.bias[0] = 100.0
    for options in ({}, {"beams": 2}, {"temperature": 2.0}):
        assert (generate(text, PROMPTS, MASK, max_new_tokens=4, **options) != 0).all()


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[2, 40, 41, 42], [2, 50], [2]])
def test_a_wide_beam_finds_the_text_of_highest_mean_log_probability(prompt):
    text, vocabulary = small_build()
    candidates = {}
    for tokens in itertools.product(range(4), repeat=3):
        ids, total = list(prompt), 0.0
        for choice in tokens:
            total += log_probabilities(text, ids, vocabulary)[choice].item()
            ids.append(vocabulary[choice])
            if vocabulary[choice] == END:
                break
        written = tuple(ids[len(prompt) :])
        candidates[written] = total / len(written)
    best = max(candidates, key=candidates.__getitem__)
    mask = torch.ones(1, len(prompt), dtype=torch.bool)
    found = generate(text, torch.tensor([prompt]), mask, max_new_tokens=3, end_id=END, beams=64)[0].tolist()
    assert tuple(token for token in found if token) == best


@torch.no_grad()
@pytest.mark.parametrize("beams", [2, 3, 4])
def test_a_narrow_beam_keeps_the_best_distinct_texts_of_each_step(beams):
    text, vocabulary = small_build()
    for start in range(60, 72):
        prompt = [2, start]
        kept = [((), 0.0)]
        for _ in range(4):
            grown = []
            for written, score in kept:
                if END in written:
                    grown.append((written, score))
                    continue
                gains = log_probabilities(text, [*prompt, *written], vocabulary).tolist()
                grown += [((*written, token), score + gain) for token, gain in zip(vocabulary, gains, strict=True)]
            kept = sorted(grown, key=lambda item: -item[1])[:beams]
        best = max(kept, key=lambda item: item[1] / len(item[0]))[0]
        mask = torch.ones(1, 2, dtype=torch.bool)
        found = generate(text, torch.tensor([prompt]), mask, max_new_tokens=4, end_id=END, beams=beams)[0]
        assert tuple(token for token in found.tolist() if token) == best


def test_sampling_follows_the_softmax_at_the_temperature_and_the_generator():
    text, vocabulary = small_build()
    count = 3000
    ids, mask = PROMPTS[:1].expand(count, -1), MASK[:1].expand(count, -1)
    with torch.no_grad():
        expected = log_probabilities(text, PROMPTS[0].tolist(), vocabulary)
    for temperature in (1.0, 0.5):
        options = {"max_new_tokens": 1, "temperature": temperature}
        drawn = generate(text, ids, mask, generator=torch.Generator().manual_seed(0), **options)
        share = torch.tensor([(drawn == token).float().mean() for token in vocabulary])
        torch.testing.assert_close(share, (expected / temperature).softmax(-1), atol=0.04, rtol=0)
        again = generate(text, ids, mask, generator=torch.Generator().manual_seed(0), **options)
        assert torch.equal(drawn, again)


def test_top_p_keeps_the_smallest_set_that_holds_the_share():
    text, vocabulary = small_build()
    with torch.no_grad():
        probabilities = log_probabilities(text, PROMPTS[0].tolist(), vocabulary).exp()
    order = probabilities.argsort(descending=True)
    ids, mask = PROMPTS[:1].expand(500, -1), MASK[:1].expand(500, -1)
    cumulative = probabilities[order].cumsum(0)
    for kept in (1, 2, 3):
        share = (cumulative[kept - 1] - 0.01).item()
        drawn = generate(text, ids, mask, max_new_tokens=1, temperature=1.0, top_p=share)
        assert set(drawn.flatten().tolist()) == {vocabulary[i] for i in order[:kept].tolist()}


def test_prefix_and_context_change_the_text_and_a_prompt_may_be_empty_behind_a_prefix():
    text = build(max_length=40, cross_attention=True)
    results = set()
    for seed in range(4):
        for options in ({"prefix": batch(3, seed=seed)}, {"context": batch(3, seed=seed)}):
            results.add(tuple(generate(text, PROMPTS[:1], MASK[:1], max_new_tokens=5, **options)[0].tolist()))
    assert len(results) > 4
    nothing = torch.zeros(1, 0, dtype=torch.long)
    assert generate(text, nothing, nothing.bool(), prefix=batch(3), max_new_tokens=2).shape == (1, 2)


def test_prefix_attention_differs_from_causal_attention_over_the_same_vectors():
    text, prefix = build(max_length=40), batch(5)
    seen = []
    text.register_forward_hook(lambda _module, _arguments, output: seen.append(output.values[0, 0]))
    for attention in ("causal", "prefix"):
        generate(text, PROMPTS[:1], MASK[:1], prefix=prefix, attention=attention, max_new_tokens=1)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_only_the_vectors_in_front_are_a_prefix_and_prompt_and_text_stay_causal():
    text, prefix = build(max_length=40), batch(5)
    seen = []
    text.register_forward_hook(lambda _module, _arguments, output: seen.append(output.values[0]))
    written = generate(text, PROMPTS[:1], MASK[:1], prefix=prefix, attention="prefix", max_new_tokens=2)
    ids = torch.cat([PROMPTS[:1], written[:, :1]], dim=1)
    joined = full(torch.cat([prefix.values, text.embed(ids).values], dim=1))
    expected = text(joined, "prefix", prefix=(torch.arange(10) < 5).unsqueeze(0)).values[0]
    torch.testing.assert_close(seen[0], expected[:9], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[1], expected[9:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "bidirectional"}, "can't generate"),
        ({"attention": "prefix"}, "without prefix"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"beams": 0}, "beams=0"),
        ({"beams": 2, "temperature": 1.0}, "deterministic"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        generate(build(), PROMPTS, MASK, **options)


def test_a_row_with_nothing_to_continue_is_refused():
    with pytest.raises(ConfigError, match="row 1 has neither"):
        generate(build(), PROMPTS, MASK & torch.tensor([[True], [False], [True]]))
    empty = Tokens(torch.zeros(3, 2, 16), torch.zeros(3, 2, dtype=torch.bool))
    assert generate(build(), PROMPTS, MASK, prefix=empty, max_new_tokens=1).shape == (3, 1)
