"""Packing: every real token once, and nothing changes but the work."""

import math

import pytest
import torch
from points import TEXTS, make_batch, make_pretraining, text_transformer
from test_transformer import batch, build, everything, run

from mmpt.errors import ConfigError
from mmpt.heads import CaptioningHead, ContrastiveHead, MaskedHead, MatchingHead
from mmpt.masking import Exact
from mmpt.packing import pack, plan
from mmpt.tokens import Tokens

LENGTHS = (9, 5, 4, 2, 0, 3)


def test_first_fit_decreasing_of_a_worked_example():
    assert plan([2, 5, 4, 7, 1, 3], 8) == ([[3, 4], [1, 5], [2, 0]], [])


def test_short_sequences_fill_gaps_and_then_stand_in_rows_of_a_quarter():
    assert plan([2, 7, 8, 1, 2, 1, 1, 1], 8) == ([[2], [1, 3]], [[0], [4], [5, 6], [7]])


def test_every_sequence_is_planned_once_and_no_row_overflows():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(0, 33, (50,), generator=generator).tolist()
        rows, short = plan(lengths, 32)
        assert all(sum(lengths[n] for n in row) <= 8 for row in short)
        rows = rows + short
        assert sorted(n for row in rows for n in row) == [n for n, length in enumerate(lengths) if length]
        assert all(sum(lengths[n] for n in row) <= 32 for row in rows)
        assert len(rows) <= 11 / 9 * math.ceil(sum(lengths) / 32) + 2


def test_a_sequence_longer_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="sequence 1 has 9 tokens and does not fit into rows of 8"):
        plan([3, 9], 8)


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [(LENGTHS, [(3, 8)]), ((9, 2, 1, 2, 0, 1, 2), [(1, 8), (4, 2)])],  # instead of 6 and 7 rows of 9
)
def test_each_real_token_appears_once_with_its_position_and_comes_back(lengths, shapes):
    tokens = batch(*lengths)
    mask = tokens.mask.clone()
    mask[0, 3] = False  # padding may stand anywhere
    tokens = Tokens(tokens.values.masked_fill(~mask.unsqueeze(-1), math.nan), mask)
    number = torch.arange(mask.numel()).view(mask.shape)
    packed = pack(Tokens(tokens.values, mask), prefix=number % 2 == 0)
    assert [rows.tokens.mask.shape for rows in packed.parts] == shapes
    everywhere = []
    for rows in packed.parts:
        real = rows.tokens.mask
        found = rows.segments[real] * 9 + rows.position_ids[real]
        everywhere += found.tolist()
        assert torch.equal(rows.tokens.values[real], tokens.values.flatten(0, 1)[found])
        assert torch.equal(rows.prefix[real], found % 2 == 0)
        assert (rows.segments[~real] == -1).all()
    assert sorted(everywhere) == number[mask].tolist()
    back = packed.unpack([rows.tokens.values for rows in packed.parts])
    assert torch.equal(back.mask, mask)
    assert torch.equal(back.values, torch.where(mask.unsqueeze(-1), tokens.values, 0.0))


def test_a_batch_without_any_token_packs_and_unpacks():
    packed = pack(batch(0, 0, 1).rows(torch.tensor([0, 1])))
    (rows,) = packed.parts
    assert not rows.tokens.mask.any()
    assert packed.unpack([rows.tokens.values]).values.shape == (2, 1, 16)


@everything
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
@pytest.mark.parametrize("lengths", [LENGTHS, (9, 2, 1, 2, 0, 1, 2)])
def test_a_packed_transformer_equals_the_unpacked_one_in_outputs_and_gradients(positions, norm, attention, lengths):
    tokens = batch(*lengths)
    weight = torch.randn(tokens.values.shape, generator=torch.Generator().manual_seed(2))
    results = []
    for packing in (False, True):
        model = build(positions, norm, packing=packing)
        values = tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), math.nan).requires_grad_()
        output = run(model, Tokens(values, tokens.mask), attention)[tokens.mask]
        (output * weight[tokens.mask]).sum().backward()
        gradients = [values.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
        results.append((output.detach(), gradients))
    (plain, plain_gradients), (packed, packed_gradients) = results
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=0)
    assert len(packed_gradients) == len(plain_gradients)
    for ours, theirs in zip(packed_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@everything
def test_position_ids_of_the_caller_travel_with_the_tokens(positions, norm):
    tokens = batch(*LENGTHS)
    ids = torch.arange(9).flip(0).expand(6, 9)  # the other way round than the columns
    plain, packed = (build(positions, norm, packing=p)(tokens, position_ids=ids).values for p in (False, True))
    torch.testing.assert_close(packed[tokens.mask], plain[tokens.mask], atol=1e-5, rtol=0)


def test_packing_works_on_fewer_positions_and_leaves_a_batch_with_context_alone():
    model = build(packing=True, cross_attention=True)
    shapes = []
    model.layers[0].register_forward_pre_hook(lambda _module, arguments: shapes.append(tuple(arguments[0].shape[:2])))
    tokens, context = batch(*LENGTHS), batch(2, 2, 2, 2, 2, 2)
    model(tokens)
    with_context = model(tokens, context=context)
    assert shapes == [(3, 9), (6, 9)]
    model.packing = False
    assert torch.equal(with_context.values, model(tokens, context=context).values)


HEADS = {
    "contrastive": lambda: ContrastiveHead("points"),
    "masked text": lambda: MaskedHead("text", Exact(0.5, 0.8, 0.1)),
    "masked points": lambda: MaskedHead("points", Exact(0.5, 0.8, 0.1)),
    "matching": lambda: MatchingHead("points"),
    "caption": lambda: CaptioningHead("points"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_have_the_same_loss_and_gradients_with_packing_in_both_towers(name):
    torch.manual_seed(0)
    module = make_pretraining({"head": HEADS[name]()}).double()
    batch = make_batch(module.model)
    texts = [" ".join([TEXTS[n % 4]] * (1 + n % 3)) for n in range(8)]  # of several lengths, as the points are
    batch.inputs["text"] = module.model.processors["text"](texts)
    batch.inputs["points"]["points"] = batch.inputs["points"]["points"].double()
    assert len(set(batch.inputs["text"]["mask"].sum(1).tolist())) > 1
    found = []
    for packing in (False, True):
        module.model.text.transformer.packing = packing
        module.model.modality("points").encoder.transformer.packing = packing
        module.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss, _ = module(batch)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-11)
    assert any("layers" in parameter for parameter in found[0][1])


@pytest.mark.parametrize("lengths", [LENGTHS, (9, 2, 1, 2, 0, 1, 2)])
def test_token_types_are_added_to_every_real_token_packed_or_not(lengths):
    torch.manual_seed(0)
    text = text_transformer(width=16, token_types=True)
    tokens = batch(*lengths)
    outputs = []
    for packing, kind in ((False, 1.0), (True, 1.0), (False, 0.0)):
        text.transformer.packing = packing
        with torch.no_grad():
            text.token_type.fill_(kind)
            text.token_type[::2] = 0.0  # a shift of all parts alike would vanish in the norms
            outputs.append(text(tokens).values[tokens.mask])
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)
    assert (outputs[2] - outputs[0]).abs().max() > 0.1
