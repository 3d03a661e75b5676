"""Writing with kept keys and values: the same text as without, and one position of work for each token."""

import pytest
import torch
from test_generation import END, MASK, PROMPTS, small_build
from test_huggingface import SMALL, WRAPPED, save
from test_text import build
from test_transformer import POSITIONS, batch
from transformers import BertConfig

from mmpt.errors import ConfigError
from mmpt.generation import generate
from mmpt.huggingface import HuggingFaceText, load_text
from mmpt.tokens import Tokens, full

SEARCHES = {"greedy": {}, "sampling": {"temperature": 1.0, "top_p": 0.9}, "beams": {"beams": 3}}
CAUSAL = [name for name in WRAPPED if "MaskedLM" not in name]


def both(text, search, ids=PROMPTS, **options):
    """(text, scores of every step) with a cache, and without."""
    results = []
    for use_cache in (True, False):
        scores = []
        hook = text.register_forward_hook(lambda _m, _a, output, scores=scores: scores.append(output.last()))
        drawn = {"generator": torch.Generator().manual_seed(3)} if search == "sampling" else {}
        written = generate(text, ids, MASK, use_cache=use_cache, **SEARCHES[search], **drawn, **options)
        hook.remove()
        results.append((written, [text.lm_logits(values) for values in scores]))
    return results


def assert_equal(text, search, **options):
    (cached, _), (plain, _) = both(text, search, **options)
    assert torch.equal(cached, plain)
    (cached, kept), (plain, rerun) = both(text, search, **options | {"end_id": None})
    assert torch.equal(cached, plain)
    assert len(kept) == len(rerun) == options["max_new_tokens"]
    for ours, theirs in zip(kept, rerun, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_the_text_is_that_of_running_everything_each_time(positions, norm, search, attention):
    text, _ = small_build(positions=positions, norm=norm, cross_attention=[1], token_types=True)
    context = batch(3, 1, 2, seed=9)
    context.mask[1] = False  # a row without a context
    options = {"context": context, "attention": attention, "max_new_tokens": 7, "end_id": END}
    assert_equal(text, search, prefix=batch(1, 4, 2, seed=8), **options)


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_wrapped_language_models_write_the_same_with_their_cache(name, search, attention, tmp_path):
    save(name, WRAPPED[name], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    front = Tokens(torch.randn(3, 4, 32), torch.arange(4) < torch.tensor([[1], [4], [2]]))
    options = {"prefix": front, "attention": attention, "max_new_tokens": 6, "end_id": 3}
    assert_equal(text, search, ids=PROMPTS % 20, **options)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_a_bert_decoder_with_a_context_writes_the_same_in_ours_and_wrapped(beams, tmp_path):
    save("BertLMHeadModel", BertConfig(**SMALL, is_decoder=True, add_cross_attention=True), tmp_path)
    ours, wrapped = load_text(tmp_path, cross_attention=True).eval(), HuggingFaceText(tmp_path).eval()
    context = Tokens(torch.randn(3, 7, 32), torch.arange(7) < torch.tensor([[7], [2], [4]]))
    options = {"context": context, "max_new_tokens": 8, "beams": beams}
    texts = [
        generate(text, PROMPTS % 20, MASK, use_cache=kept, **options)
        for text in (ours, wrapped)
        for kept in (True, False)
    ]
    assert all(torch.equal(texts[0], other) for other in texts[1:])


@torch.no_grad()
def test_greedy_text_is_that_of_transformers_on_the_same_weights(tmp_path):
    model = save("GPT2LMHeadModel", WRAPPED["GPT2LMHeadModel"], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    ids = torch.tensor([[2, 9, 8, 7], [2, 11, 12, 13]])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), bad_words_ids=[[0]], **options)[:, 4:]
    assert torch.equal(generate(text, ids, torch.ones_like(ids).bool(), max_new_tokens=12), theirs)


@torch.no_grad()
@pytest.mark.parametrize("positions", POSITIONS)
def test_reading_in_pieces_is_reading_at_once_and_rows_can_be_chosen(positions):
    text, tokens = build(positions=positions), batch(9, 6, 9)
    expected = text(tokens, "causal").values
    cache = text.new_cache()
    pieces = [
        text(Tokens(tokens.values[:, start:end], tokens.mask[:, start:end]), "causal", cache=cache).values
        for start, end in ((0, 4), (4, 5))
    ]
    order = torch.tensor([2, 1, 1, 0])
    cache.select(order)
    rest = text(Tokens(tokens.values[order, 5:], tokens.mask[order, 5:]), "causal", cache=cache)
    torch.testing.assert_close(torch.cat(pieces, 1), expected[:, :5], atol=1e-5, rtol=0)
    torch.testing.assert_close(rest.values[rest.mask], expected[order, 5:][rest.mask], atol=1e-5, rtol=0)
    assert cache.length == 9


@pytest.mark.parametrize("beams", [1, 2])
def test_each_token_costs_one_position(beams):
    text = build(max_length=40)
    lengths = []
    text.register_forward_hook(lambda _m, arguments, _o: lengths.append(arguments[0].length))
    generate(text, PROMPTS, MASK, max_new_tokens=4, beams=beams)
    assert lengths == [4, 1, 1, 1]
    lengths.clear()
    generate(text, PROMPTS, MASK, max_new_tokens=4, beams=beams, use_cache=False)
    assert lengths == [4, 5, 6, 7]


def test_the_context_is_read_once():
    text = build(max_length=40, cross_attention=True)
    calls = []
    text.transformer.layers[0].cross.key.register_forward_hook(lambda *_: calls.append(1))
    generate(text, PROMPTS, MASK, context=batch(3, 2, 1), max_new_tokens=5, beams=2)
    assert len(calls) == 1


def test_nothing_is_written_where_no_token_is_asked_for():
    assert generate(build(), PROMPTS, MASK, max_new_tokens=0).shape == (3, 0)


def test_what_a_cache_can_t_do_is_refused_and_leaves_it_as_it_was(tmp_path):
    text, tokens = build(), batch(3)
    cache = text.new_cache()
    text(tokens, "causal", cache=cache)
    with pytest.raises(ConfigError, match="bidirectional' behind a filled cache"):
        text(tokens, "bidirectional", cache=cache)
    with pytest.raises(ConfigError, match="max_length=24"):
        text(full(torch.randn(1, 22, 16)), "causal", cache=cache)
    assert cache.length == 3
    save("GPT2LMHeadModel", WRAPPED["GPT2LMHeadModel"], tmp_path)
    wrapped = HuggingFaceText(tmp_path).eval()
    cache = wrapped.new_cache()
    wrapped(full(torch.randn(1, 40, 32)), "causal", cache=cache)
    with pytest.raises(ConfigError, match="behind a filled cache"):
        wrapped(full(torch.randn(1, 1, 32)), "bidirectional", cache=cache)
    with pytest.raises(ConfigError, match="49 tokens"):
        wrapped(full(torch.randn(1, 9, 32)), "causal", cache=cache)
    assert cache.length == 40


def test_encoders_of_transformers_have_no_cache_and_write_all_the_same(tmp_path):
    save("BertForMaskedLM", WRAPPED["BertForMaskedLM"], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    assert text.new_cache() is None
    assert generate(text, PROMPTS % 20, MASK, max_new_tokens=3).shape == (3, 3)
