"""The transformer: who sees whom, what padding may not do, and how positions enter."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mmpt.attention import DisentangledAttention, Geometry, RelativeKeyQueryAttention, attend, attention_mask
from mmpt.blocks import recompute_activations
from mmpt.errors import ConfigError
from mmpt.positions import log_buckets
from mmpt.tokens import Tokens, full
from mmpt.transformer import Transformer

POSITIONS = ("none", "absolute", "rotary", "relative_key_query", "disentangled")
NORMS = ("pre", "post")
WIDTH, LENGTH = 16, 9
everything = pytest.mark.parametrize(("positions", "norm"), list(itertools.product(POSITIONS, NORMS)))


def perturb(module: nn.Module, seed: int = 0) -> None:
    """Weights, biases and norms away from their initial values: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1.0 if "norm" in name and name.endswith("weight") else noise)


def build(positions: str = "absolute", norm: str = "pre", **options: object) -> Transformer:
    settings = {"max_length": 12, "relative_buckets": 4, "input_norm": norm == "post", **options}
    model = Transformer(WIDTH, 2, 2, positions=positions, norm=norm, **settings)
    perturb(model)
    return model.eval()


def batch(*lengths: int, width: int = WIDTH, seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lengths), max(lengths), width, generator=generator)
    return Tokens(values, torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1))


def front(count: int, like: Tokens) -> Tensor:
    return (torch.arange(like.length) < count).expand(like.mask.shape)


def run(model: Transformer, tokens: Tokens, attention: str, **options: object) -> Tensor:
    prefix = front(3, tokens) if attention == "prefix" else None
    return model(tokens, attention, prefix=prefix, **options).values


def changed(model: Transformer, tokens: Tokens, at: int, attention: str) -> list[bool]:
    """Which positions of the first row answer to a change of the token at one position."""
    values = tokens.values.clone()
    values[:, at] = torch.randn(WIDTH, generator=torch.Generator().manual_seed(7))
    difference = run(model, tokens, attention) - run(model, Tokens(values, tokens.mask), attention)
    return [bool(step > 1e-6) for step in difference[0].abs().amax(-1)]


@everything
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
@pytest.mark.parametrize("garbage", [1e4, math.nan])
def test_padding_and_what_stands_there_never_change_a_real_token(positions, norm, attention, garbage):
    model, tokens = build(positions, norm), batch(LENGTH, 5, 4)
    dirty = Tokens(tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), garbage), tokens.mask)
    together = run(model, dirty, attention)
    for row, length in enumerate((LENGTH, 5, 4)):
        alone = run(model, full(tokens.values[row : row + 1, :length]), attention)
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=0)


@everything
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
def test_a_row_without_real_tokens_is_finite_and_gives_finite_gradients(positions, norm, attention):
    model, tokens = build(positions, norm), batch(LENGTH, 0)
    values = tokens.values.masked_fill(~tokens.mask.unsqueeze(-1), math.nan).requires_grad_()
    output = run(model, Tokens(values, tokens.mask), attention)
    assert output.isfinite().all()
    output[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert (values.grad[1] == 0).all()


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0), (0, 0), (2, 1)])
def test_empty_batches_keep_their_shape(positions, packing, rows, length):
    model = build(positions, packing=packing)
    assert model(full(torch.randn(rows, length, WIDTH)), "causal").values.shape == (rows, length, WIDTH)


@everything
def test_bidirectional_attention_sees_both_sides(positions, norm):
    assert changed(build(positions, norm), batch(LENGTH), 4, "bidirectional") == [True] * LENGTH


@everything
@pytest.mark.parametrize("at", [0, 4, LENGTH - 1])
def test_causal_attention_answers_from_the_changed_token_on(positions, norm, at):
    assert changed(build(positions, norm), batch(LENGTH), at, "causal") == [i >= at for i in range(LENGTH)]


@everything
def test_a_prefix_is_seen_by_all_and_the_rest_is_causal(positions, norm):
    model, tokens = build(positions, norm), batch(LENGTH)
    assert changed(model, tokens, 2, "prefix") == [True] * LENGTH
    for at in (3, 5):
        assert changed(model, tokens, at, "prefix") == [i >= at for i in range(LENGTH)]


def test_nothing_leaks_through_a_prefix_behind_the_text():
    model, tokens = build(), batch(6)
    prefix = torch.tensor([[False, False, False, True, True, False]])
    before = model(tokens, "prefix", prefix=prefix).values
    values = tokens.values.clone()
    values[:, 2] += torch.randn(WIDTH)
    after = model(Tokens(values, tokens.mask), "prefix", prefix=prefix).values
    assert [bool(d > 1e-6) for d in (before - after)[0].abs().amax(-1)] == [False, False, True, False, False, True]


def test_attention_mask_is_the_written_one():
    mask = torch.tensor([[True, True, True, False]])
    prefix = torch.tensor([[True, True, False, False]])
    rows = ["".join("x" if seen else "." for seen in row) for row in attention_mask(mask, "prefix", prefix)[0, 0]]
    assert rows == ["xx..", "xx..", "xxx.", "xxxx"]
    rows = ["".join("x" if seen else "." for seen in row) for row in attention_mask(mask, "causal")[0, 0]]
    assert rows == ["x...", "xx..", "xxx.", "xxxx"]
    assert attention_mask(mask, "bidirectional").shape == (1, 1, 1, 4)


@everything
@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_segments_of_one_row_equal_separate_rows(positions, norm, attention):
    model, tokens = build(positions, norm), batch(5, 4)
    joined = full(torch.cat([tokens.values[:1, :5], tokens.values[1:, :4]], dim=1))
    output = run(
        model,
        joined,
        attention,
        segments=torch.tensor([[0] * 5 + [1] * 4]),
        position_ids=torch.tensor([[*range(5), *range(4)]]),
    )
    apart = run(model, tokens, attention)
    torch.testing.assert_close(output[0, :5], apart[0, :5], atol=1e-5, rtol=0)
    torch.testing.assert_close(output[0, 5:], apart[1, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_context_the_model_equals_one_without_cross_attention_bit_for_bit(norm):
    model, plain, tokens = build(norm=norm, cross_attention=[1], context_width=5), build(norm=norm), batch(LENGTH, 4)
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if ".cross" not in name})
    assert torch.equal(model(tokens).values, plain(tokens).values)
    assert not torch.allclose(model(tokens, context=batch(3, 2, width=5)).values, plain(tokens).values, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
def test_padded_context_positions_change_nothing(norm, attention):
    model, tokens = build(norm=norm, cross_attention=True, context_width=5), batch(LENGTH, 4)
    context = batch(6, 2, width=5, seed=3)
    dirty = Tokens(context.values.masked_fill(~context.mask.unsqueeze(-1), math.nan), context.mask)
    together = run(model, tokens, attention, context=dirty)
    alone = run(model, tokens.rows(torch.tensor([1])), attention, context=full(context.values[1:, :2]))
    torch.testing.assert_close(together[1, :4], alone[0, :4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_whose_context_is_all_padding_is_treated_as_if_without(norm):
    model, tokens = build(norm=norm, cross_attention=True), batch(LENGTH, 4)
    mixed = model(tokens, context=batch(3, 0, seed=3)).values
    torch.testing.assert_close(mixed[1], model(tokens).values[1], atol=1e-6, rtol=0)
    assert not torch.allclose(mixed[0], model(tokens).values[0], atol=1e-3)


def test_relative_key_query_scores_of_the_worked_example():
    attention = RelativeKeyQueryAttention(1, 1, 0.0, max_length=2)
    with torch.no_grad():  # queries (1, 2), keys (3, 4), values (1, 2)
        for linear, bias in (
            (attention.query, 0.0),
            (attention.key, 2.0),
            (attention.value, 0.0),
            (attention.output, 0.0),
        ):
            linear.weight.fill_(1.0)
            linear.bias.fill_(bias)
        attention.distance.copy_(torch.tensor([[0.1], [0.2], [0.3]]))
    query, key = torch.tensor([[[[1.0], [2.0]]]]), torch.tensor([[[[3.0], [4.0]]]])
    geometry = Geometry(
        torch.ones(1, 1, 1, 2, dtype=torch.bool), relative_rows=torch.tensor([[[[1, 0], [2, 1]]]]), reach=1
    )
    scores = query @ key.mT + attention.bias(query, key, geometry)
    torch.testing.assert_close(scores[0, 0], torch.tensor([[3.8, 4.5], [7.5, 9.2]]), atol=1e-6, rtol=0)
    mixed = attention(torch.tensor([[[1.0], [2.0]]]), geometry)
    torch.testing.assert_close(mixed.flatten(), torch.tensor([1.6682, 1.8455]), atol=5e-5, rtol=0)


def naive_attention(attention, values: Tensor, extra) -> Tensor:
    """One sequence, head by head and pair by pair; `extra(query, key, l, r, head)` is the position term."""
    length, width = values.shape
    size = width // attention.heads
    query, key, value = attention.query(values), attention.key(values), attention.value(values)
    columns = []
    for head in range(attention.heads):
        part = slice(head * size, (head + 1) * size)
        scores = torch.stack(
            [
                torch.stack(
                    [
                        query[i, part] @ key[j, part] + extra(query[i, part], key[j, part], i, j, part)
                        for j in range(length)
                    ]
                )
                for i in range(length)
            ]
        )
        columns.append((scores * attention.scale).softmax(-1) @ value[:, part])
    return attention.output(torch.cat(columns, dim=-1))


@pytest.mark.parametrize("length", [4, 12])
def test_relative_key_query_equals_the_formula_pair_by_pair(length):
    model = Transformer(8, 1, 2, positions="relative_key_query", max_length=12)
    perturb(model)
    attention, values = model.layers[0].attention, batch(length, width=8).values

    def extra(query, key, i, j, _part):
        return query @ attention.distance[i - j + 11] + key @ attention.distance[i - j + 11]

    positions = torch.arange(length).unsqueeze(0)
    allowed = attention_mask(torch.ones(1, length, dtype=torch.bool), "bidirectional")
    assert attention.scale == pytest.approx(4**-0.5)
    for limit in (length, None):  # the table may be cut to the distances that occur
        output = attention(values, model._geometry(allowed, positions, limit))
        torch.testing.assert_close(output[0], naive_attention(attention, values[0], extra), atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("terms", [("c2p", "p2c"), ("c2p",), ("p2c",)])
@pytest.mark.parametrize("buckets", [0, 4])
def test_disentangled_attention_equals_the_formula_with_delta_of_i_and_j_in_both_terms(share, terms, buckets):
    options = {"relative_buckets": buckets, "relative_terms": terms, "relative_share": share, "relative_distance": 7}
    model = Transformer(8, 1, 2, positions="disentangled", **options)
    perturb(model)
    attention, values = model.layers[0].attention, batch(12, width=8).values
    span = buckets or 7

    def relative(i, j):
        distance = log_buckets(torch.tensor(i - j), buckets, 7).item() if buckets else i - j
        return model.relative_norm(model.relative.weight[min(max(distance + span, 0), 2 * span - 1)])

    def formula(transposed):
        def extra(query, key, i, j, part):
            to_key = attention.key if share else getattr(attention, "position_key", None)
            to_query = attention.query if share else getattr(attention, "position_query", None)
            total = torch.zeros(())
            if "c2p" in terms:
                total = total + query @ to_key(relative(i, j))[part]
            if "p2c" in terms:
                total = total + key @ to_query(relative(j, i) if transposed else relative(i, j))[part]
            return total

        return naive_attention(attention, values[0], extra)

    assert attention.scale == pytest.approx((4 * (1 + len(terms))) ** -0.5)
    allowed = attention_mask(torch.ones(1, 12, dtype=torch.bool), "bidirectional")
    for limit in (12, None):
        output = attention(values, model._geometry(allowed, torch.arange(12).unsqueeze(0), limit))[0]
        torch.testing.assert_close(output, formula(transposed=False), atol=1e-5, rtol=0)
    if "p2c" in terms:
        assert (output - formula(transposed=True)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("buckets", "longest", "table"),
    [
        (256, 512, {128: 128, 129: 129, 140: 137, 200: 169, 256: 192, 300: 207, 400: 233, 511: 255, -129: -129, 5: 5}),
        (8, 64, {0: 0, 4: 4, 5: 5, 8: 5, 12: 6, 16: 6, 32: 7, 63: 7, -4: -4, -5: -5, -63: -7}),
    ],
)
def test_log_buckets_are_the_tabulated_ones(buckets, longest, table):
    distances = torch.tensor(list(table))
    assert log_buckets(distances, buckets, longest).tolist() == list(table.values())


def test_a_disentangled_model_without_relative_vectors_is_permutation_equivariant():
    model, tokens, order = build("disentangled", relative_norm=False), batch(LENGTH), torch.randperm(LENGTH)
    shuffled = full(tokens.values[:, order])
    assert not torch.allclose(model(shuffled).values, model(tokens).values[:, order], atol=1e-3)
    nn.init.zeros_(model.relative.weight)
    for attention in (layer.attention for layer in model.layers):
        assert isinstance(attention, DisentangledAttention)
        nn.init.zeros_(attention.query.bias)  # a projected zero is the bias
        nn.init.zeros_(attention.key.bias)
    torch.testing.assert_close(model(shuffled).values, model(tokens).values[:, order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["rotary", "relative_key_query", "disentangled"])
def test_relative_positions_don_t_change_when_all_positions_shift(positions):
    model, tokens, ids = build(positions, max_length=30), batch(LENGTH), torch.arange(LENGTH).unsqueeze(0)
    here, there = model(tokens, position_ids=ids).values, model(tokens, position_ids=ids + 7).values
    torch.testing.assert_close(here, there, atol=1e-5, rtol=0)
    assert not torch.allclose(here, model(tokens, position_ids=ids * 2).values, atol=1e-3)
    assert not torch.allclose(here, model(tokens, position_ids=ids.flip(1)).values, atol=1e-3)  # direction matters


def test_absolute_positions_change_when_all_positions_shift_and_no_positions_never():
    tokens, ids = batch(LENGTH), torch.arange(LENGTH).unsqueeze(0)
    model, without = build("absolute"), build("none")
    assert not torch.allclose(model(tokens).values, model(tokens, position_ids=ids + 2).values, atol=1e-3)
    assert torch.equal(without(tokens).values, without(tokens, position_ids=ids + 2).values)


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_position_limit_changes_nothing(positions):
    model, tokens = build(positions), batch(LENGTH, 4)
    ids = torch.arange(LENGTH).expand(2, LENGTH)
    limited = model(tokens, position_ids=ids, position_limit=LENGTH).values
    torch.testing.assert_close(limited, model(tokens, position_ids=ids).values, atol=1e-5, rtol=0)


def test_layers_follow_the_formulas_of_pre_and_post_norm():
    tokens = batch(LENGTH)
    for norm in NORMS:
        model = build("none", norm, input_norm=False)
        layer = model.layers[0]
        geometry = model._geometry(attention_mask(tokens.mask, "bidirectional"), torch.arange(LENGTH)[None], LENGTH)
        x = tokens.values

        def feedforward(y, layer=layer):
            return layer.contract(nn.functional.gelu(layer.expand(y)))

        if norm == "pre":
            x = x + layer.attention(layer.attention_norm(x), geometry)
            x = x + feedforward(layer.feedforward_norm(x))
        else:
            x = layer.attention_norm(x + layer.attention(x, geometry))
            x = layer.feedforward_norm(x + feedforward(x))
        torch.testing.assert_close(layer(tokens.values, geometry, None), x, atol=1e-6, rtol=0)
        assert (model.final_norm is not None) == (norm == "pre")


def test_the_input_stage_adds_positions_then_norms_then_projects():
    model, tokens = build(input_width=6, input_norm=True), batch(4, width=6)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    model(tokens)
    expected = model.projection(model.input_norm(tokens.values + model.position.weight[:4]))
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)
    assert model(tokens).width == WIDTH


def test_pre_norm_shrinks_what_writes_into_the_residual_stream_with_depth():
    torch.manual_seed(0)
    deep = Transformer(128, 8, 2, norm="pre")
    assert deep.layers[3].contract.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert deep.layers[3].attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert deep.layers[3].expand.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert Transformer(128, 8, 2, norm="post").layers[3].contract.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("positions", POSITIONS)
def test_checkpointing_gives_the_same_gradients(positions):
    gradients = []
    for checkpointing in (False, True):
        model = build(positions, dropout=0.3, attention_dropout=0.3).train()
        if checkpointing:
            recompute_activations(model)
        torch.manual_seed(3)
        model(batch(LENGTH, 4)).values.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_dropout_acts_in_training_only():
    for option in ("dropout", "attention_dropout"):
        model, tokens = build(**{option: 0.5}), batch(LENGTH)
        assert torch.equal(model(tokens).values, model(tokens).values)
        model.train()
        assert not torch.allclose(model(tokens).values, model(tokens).values)


@pytest.mark.parametrize("positions", POSITIONS)
def test_compiles_in_one_piece_and_runs_in_bfloat16_and_on_the_meta_device(positions):
    model, tokens = build(positions, cross_attention=[0]), batch(LENGTH, 4)
    context = batch(3, 2, seed=5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, "causal", context).values, model(tokens, "causal", context).values)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(tokens, "causal", context).values
    assert (rough.float() - model(tokens, "causal", context).values)[tokens.mask].abs().mean() < 0.1
    with torch.device("meta"):
        empty = Transformer(WIDTH, 2, 2, positions=positions)
        output = empty(full(torch.empty(2, LENGTH, WIDTH)), "causal")
    assert output.values.shape == (2, LENGTH, WIDTH)
    assert output.values.is_meta


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 3},
        {"norm": "sandwich"},
        {"positions": "sinusoid"},
        {"positions": "rotary", "heads": 16},
        {"cross_attention": [2]},
        {"activation": "swish"},
        {"positions": "disentangled", "relative_buckets": 40, "max_length": 12},
    ],
)
def test_options_that_can_t_work_are_refused(options):
    with pytest.raises(ConfigError):
        Transformer(**{"width": WIDTH, "depth": 2, "heads": 2, **options})


def test_inputs_that_can_t_work_are_refused():
    model, tokens = build(), batch(LENGTH)
    with pytest.raises(ConfigError, match="max_length=12"):
        model(batch(13))
    with pytest.raises(ConfigError, match="connector"):
        model(batch(4, width=5))
    with pytest.raises(ConfigError, match="without cross-attention"):
        model(tokens, context=batch(3))
    with pytest.raises(ConfigError, match="expected \\(1, length, 7\\)"):
        build(cross_attention=True, context_width=7)(tokens, context=batch(3))
    with pytest.raises(ConfigError, match="without prefix="):
        model(tokens, "prefix")
    with pytest.raises(ConfigError, match="with prefix="):
        model(tokens, "causal", prefix=front(2, tokens))
    with pytest.raises(ConfigError, match="unknown"):
        model(tokens, "backwards")
    build("rotary")(batch(40))  # unlimited


@pytest.mark.parametrize("length", [1, 2, 7, 9])
def test_positions_in_order_need_no_index(length):
    torch.manual_seed(0)
    model = Transformer(16, 2, 4, positions="relative_key_query", max_length=9)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.distance.normal_()
    tokens = Tokens(torch.randn(3, length, 16), torch.arange(length) < torch.tensor([[length], [1], [length]]))
    named = torch.arange(length).expand(3, length)
    torch.testing.assert_close(
        model(tokens).values, model(tokens, position_ids=named, position_limit=length).values, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("added", [False, True])
def test_attention_in_16_bits_is_rounded_once(added):
    query, key, value = torch.randn(3, 2, 2, 7, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    given = torch.where(mask, 0.0, float("-inf")).bfloat16() if added else mask
    scores = (query.float() @ key.float().transpose(-1, -2) / math.sqrt(8)).masked_fill(~mask, float("-inf"))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(query, key, value, given, 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, (scores.softmax(-1) @ value.float()).bfloat16(), rtol=1e-2, atol=1e-4)
