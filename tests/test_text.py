"""The text side: the seam for foreign vectors, text as a modality, saving and rebuilding."""

import pickle
import warnings

import pytest
import torch
from test_tokenization import TEXTS
from test_transformer import batch, everything, perturb

from mmpt.config import from_config
from mmpt.encoder import KEEP, MASK, RANDOM, Corruption
from mmpt.errors import ConfigError, SampleError
from mmpt.text import TextEncoder, TextProcessor, TextTransformer, TruncationWarning, ranks
from mmpt.tokenization import WordPieceSource, train_wordpiece
from mmpt.tokens import Tokens, concatenate, full

TOKENIZER = train_wordpiece(TEXTS, 100)
SAMPLES = ["the players evaluate statements", "", "class"]


def build(**options: object) -> TextTransformer:
    model = TextTransformer(TOKENIZER, width=16, depth=2, heads=2, **{"max_length": 24, **options})
    perturb(model)
    return model.eval()


def inputs(samples: list[str] = SAMPLES) -> dict[str, torch.Tensor]:
    return TextProcessor(TOKENIZER, 24)(samples)


def spliced(model: TextTransformer, positions: list[list[int]], vectors: torch.Tensor) -> Tokens:
    ids = inputs(["the class statement object", "the for sequence"])
    return model.splice(model.embed(ids["ids"], ids["mask"]), torch.tensor(positions), vectors)


def test_splice_changes_the_named_rows_only():
    model, data = build(), inputs(["the class object"])
    plain = model.embed(data["ids"], data["mask"])
    result = model.splice(plain, torch.tensor([[3]]), torch.full((1, 1, 16), 7.0))
    assert [bool(d) for d in (result.values != plain.values).any(-1)[0]] == [i == 3 for i in range(plain.length)]
    assert (result.values[0, 3] == 7).all()
    assert torch.equal(result.mask, plain.mask)


def test_splice_puts_each_vector_at_its_own_position_and_row():
    vectors = torch.randn(2, 3, 16)
    result = spliced(build(), [[1, 4, 2], [3, 1, 2]], vectors)
    assert torch.equal(result.values[0, [1, 4, 2]], vectors[0])
    assert torch.equal(result.values[1, [3, 1, 2]], vectors[1])


def test_the_gradient_of_a_splice_flows_to_the_vectors_and_to_the_words_that_stay():
    model, vectors, data = build(), torch.randn(2, 1, 16, requires_grad=True), inputs(["class", "object"])
    words = model.embed(data["ids"], data["mask"])
    words.values.retain_grad()
    model(model.splice(words, torch.tensor([[1], [1]]), vectors)).values.square().sum().backward()
    assert (vectors.grad.abs().sum(-1) > 0).all()
    assert (words.values.grad[:, 1] == 0).all()
    assert (words.values.grad[:, 0].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("shape", [(2, 2, 16), (1, 3, 16), (2, 3, 15)])
def test_a_splice_of_another_count_or_width_is_refused(shape):
    with pytest.raises(ConfigError, match="splice"):
        spliced(build(), [[1, 4, 2], [3, 1, 2]], torch.randn(shape))


def test_word_vectors_are_looked_up_and_the_pad_vector_is_zero():
    model, data = TextTransformer(TOKENIZER, width=16, depth=1, heads=2), inputs()
    words = model.embed(data["ids"])
    assert torch.equal(words.mask, data["mask"])
    assert torch.equal(words.values, model.word.weight[data["ids"]])
    assert (words.values[~data["mask"]] == 0).all()


@everything
@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_where_the_padding_stands_changes_nothing(positions, norm, attention):
    model = build(positions=positions, norm=norm, token_types=True)
    front, back = batch(5, 2, seed=4), batch(6, 3)
    joined = concatenate(front, back)
    prefix = (torch.arange(joined.length) < 5).expand(joined.mask.shape) if attention == "prefix" else None
    together = model(joined, attention, prefix=prefix).values
    compact = full(torch.cat([front.values[1:, :2], back.values[1:, :3]], dim=1))
    prefix = (torch.arange(5) < 2).unsqueeze(0) if attention == "prefix" else None
    alone = model(compact, attention, prefix=prefix).values
    torch.testing.assert_close(together[1][joined.mask[1]], alone[0], atol=1e-5, rtol=0)


def test_ranks_count_the_real_tokens_before():
    mask = torch.tensor([[False, True, True, False, True]])
    assert ranks(mask).tolist() == [[0, 0, 1, 1, 2]]


def test_the_token_type_is_added_to_every_vector_before_the_positions():
    model, tokens = build(token_types=True), batch(4)
    with_type = model(tokens).values
    shifted = Tokens(tokens.values + model.token_type, tokens.mask)
    model.token_type.data.zero_()
    torch.testing.assert_close(model(shifted).values, with_type)
    assert not torch.allclose(model(tokens).values, with_type, atol=1e-3)


def test_text_mode_ignores_cross_attention_and_context_mode_reads_the_context():
    model, tokens = build(cross_attention=True, context_width=6), batch(5, 3)
    text = model(tokens).values
    for layer in model.transformer.layers:
        layer.cross.query.weight.data.normal_()
    assert torch.equal(model(tokens).values, text)
    one, other = (model(tokens, context=batch(4, 2, width=6, seed=seed)).values for seed in (3, 4))
    assert not torch.allclose(one, other, atol=1e-3)
    assert not torch.allclose(one, text, atol=1e-3)


def test_context_has_the_width_of_the_seam_by_default():
    model = build(cross_attention=True, input_width=6, lm_head="transform")
    assert model(batch(3, width=6), context=batch(2, width=6)).width == 16


def test_tied_logits_are_products_with_the_word_vectors():
    model, values = build(), torch.randn(3, 2, 16)
    torch.testing.assert_close(model.lm_logits(values), values @ model.word.weight.T)


def test_transformed_logits_go_through_dense_activation_norm_and_bias():
    model, values = build(lm_head="transform", input_width=6), torch.randn(3, 16)
    head = model.lm_head
    expected = head.norm(torch.nn.functional.gelu(head.dense(values))) @ model.word.weight.T + head.bias
    torch.testing.assert_close(model.lm_logits(values), expected)
    assert model.lm_logits(values).shape == (3, len(TOKENIZER))


def test_options_that_can_t_work_are_refused():
    with pytest.raises(ConfigError, match="lm_head='transform'"):
        build(input_width=6)
    with pytest.raises(ConfigError, match="vocabulary_size=5"):
        build(vocabulary_size=5)
    with pytest.raises(ConfigError, match="max_length=24"):
        build()(batch(25))


def test_a_saved_configuration_rebuilds_the_model_with_equal_outputs(tmp_path):
    model, data = build(positions="disentangled", relative_buckets=4, lm_head="transform"), inputs()
    config = model.config(tmp_path)
    assert config["init_args"]["tokenizer"] == "${folder}/tokenizer"
    rebuilt = from_config(config, folder=tmp_path).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert rebuilt.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    again = TextEncoder(rebuilt).processor(SAMPLES)
    assert all(torch.equal(again[name], data[name]) for name in data)
    assert torch.equal(rebuilt(rebuilt.embed(data["ids"])).values, model(model.embed(data["ids"])).values)


def test_a_model_can_train_its_tokenizer_from_a_file(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    model = TextTransformer(WordPieceSource(tmp_path / "texts.txt", 100), width=8, depth=1, heads=1)
    assert model.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert model.word.weight.shape == (len(TOKENIZER), 8)
    rebuilt = from_config(model.config(tmp_path), folder=tmp_path)  # from the saved tokenizer, not from the text
    assert rebuilt.tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_processor_pads_to_the_longest_and_numbers_words():
    data = inputs()
    pieces = TOKENIZER.tokenize(SAMPLES[0])
    length = len(pieces) + 2
    assert data["ids"].shape == (3, length)
    assert data["ids"][1].tolist() == [2, 3] + [0] * (length - 2)
    assert data["mask"].sum(1).tolist() == [length, 2, len(TOKENIZER.tokenize("class")) + 2]
    words = [sum(not p.startswith("##") for p in pieces[: i + 1]) for i in range(len(pieces))]
    assert data["words"][0].tolist() == [0, *words, max(words) + 1]
    assert data["words"][1].tolist() == [0, 1] + [2] * (length - 2)
    assert (data["words"].diff(dim=1) >= 0).all()
    assert data["special"][0].tolist() == [True, *[False] * len(pieces), True]
    assert data["special"][1].all()


def test_a_special_token_written_in_a_text_counts_as_special():
    data = inputs(["class [MASK] object"])
    assert data["special"][data["ids"] == TOKENIZER.mask_token_id].all()


def test_an_empty_batch_gives_empty_tensors():
    assert {name: value.shape for name, value in inputs([]).items()} == dict.fromkeys(
        ("ids", "mask", "words", "special"), (0, 0)
    )


def test_a_sample_that_is_no_text_is_named():
    with pytest.raises(SampleError, match="expected a text") as caught:
        inputs(["fine", None])
    assert caught.value.index == 1


def test_a_text_that_is_too_long_keeps_its_final_sep_with_one_warning():
    long = " ".join(TEXTS[:2])
    whole = TextProcessor(TOKENIZER, 500)([long])["ids"][0].tolist()
    with pytest.warns(TruncationWarning) as caught:
        data = TextProcessor(TOKENIZER, 8)([long, "class", long])
    assert len(caught) == 1
    assert data["ids"][0].tolist() == [*whole[:7], TOKENIZER.sep_token_id]
    assert data["ids"][1].tolist()[:1] == [TOKENIZER.cls_token_id]
    assert data["mask"].sum(1).tolist()[0] == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextProcessor(TOKENIZER, len(whole))([long])


def test_a_text_that_is_too_long_is_refused_on_demand():
    with pytest.raises(SampleError, match="at most 8 tokens") as caught:
        TextProcessor(TOKENIZER, 8, too_long="error")(["class", TEXTS[1]])
    assert caught.value.index == 1


def test_the_processor_survives_pickling():
    copy = pickle.loads(pickle.dumps(TextProcessor(TOKENIZER, 24)))
    assert torch.equal(copy(SAMPLES)["ids"], inputs()["ids"])


def corruption(action: torch.Tensor, predicted: torch.Tensor | None = None) -> Corruption:
    return Corruption(action.to(torch.uint8), action > 0 if predicted is None else predicted)


def seen_ids(encoder: TextEncoder, data: dict[str, torch.Tensor], what: Corruption) -> torch.Tensor:
    seen = []
    original = encoder.text.embed
    encoder.text.embed = lambda ids, mask=None: seen.append(ids) or original(ids, mask)
    encoder(data, what)
    del encoder.text.embed
    return seen[0]


def test_units_are_the_real_tokens_that_are_not_special_and_groups_the_words():
    encoder, data = TextEncoder(build()), inputs()
    units = encoder.units(data)
    assert units[0].tolist() == [False, *[True] * (units.shape[1] - 2), False]
    assert not units[1].any()
    assert torch.equal(encoder.groups(data), data["words"])


def test_hidden_tokens_become_the_mask_token_and_random_ones_any_ordinary_token():
    encoder, data = TextEncoder(build()), inputs(["the class statement"] * 400)
    action = torch.full(data["ids"].shape, KEEP)
    action[:, 1], action[:, 2] = MASK, RANDOM
    torch.manual_seed(0)
    ids = seen_ids(encoder, data, corruption(action))
    assert (ids[:, 1] == TOKENIZER.mask_token_id).all()
    assert torch.equal(ids[:, 3:], data["ids"][:, 3:])
    drawn = set(ids[:, 2].tolist())
    assert drawn <= set(range(5, len(TOKENIZER)))
    assert len(drawn) > 80
    assert {5, len(TOKENIZER) - 1} <= drawn
    torch.manual_seed(0)
    assert torch.equal(seen_ids(encoder, data, corruption(action)), ids)


def test_random_tokens_step_over_special_ids_in_the_middle_of_the_vocabulary():
    tokenizer = train_wordpiece(TEXTS, 60)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    tokenizer.add_tokens(["wordafter"])
    encoder = TextEncoder(TextTransformer(tokenizer, width=8, depth=1, heads=1))
    data = encoder.processor(["the class"] * 500)
    ids = seen_ids(encoder, data, corruption(torch.full(data["ids"].shape, RANDOM)))
    assert set(ids.flatten().tolist()) == set(range(5, len(tokenizer))) - {tokenizer.convert_tokens_to_ids("[ENC]")}


def test_logits_stand_at_predicted_tokens_only_in_row_major_order_and_never_at_pads():
    encoder, data = TextEncoder(build()), inputs()
    action = torch.zeros_like(data["ids"])
    predicted = torch.zeros_like(data["mask"])
    predicted[2, 1] = predicted[0, 1] = predicted[0, 3] = predicted[1, -1] = True  # the last one is padding
    what = corruption(action, predicted)
    tokens = encoder(data, what)
    logits = encoder.reconstruct(tokens, what)
    every = encoder.text.lm_logits(tokens.values)
    torch.testing.assert_close(logits, torch.stack([every[0, 1], every[0, 3], every[2, 1]]))
    part = encoder.reconstruction_loss(logits, data, what)
    targets = torch.stack([data["ids"][0, 1], data["ids"][0, 3], data["ids"][2, 1]])
    torch.testing.assert_close(part.loss, torch.nn.functional.cross_entropy(logits, targets))
    perfect = encoder.reconstruction_loss(torch.nn.functional.one_hot(targets, 100) * 50.0, data, what)
    assert (perfect.loss.item(), perfect.logs["accuracy"].item()) == (pytest.approx(0, abs=1e-6), 1.0)


def test_with_nothing_predicted_the_loss_is_zero_and_still_has_a_gradient():
    encoder, data = TextEncoder(build()), inputs()
    what = corruption(torch.zeros_like(data["ids"]))
    part = encoder.reconstruction_loss(encoder.reconstruct(encoder(data, what), what), data, what)
    assert part.loss.item() == 0
    assert part.logs["accuracy"].item() == 0
    part.loss.backward()
    assert all((p.grad == 0).all() for p in encoder.parameters() if p.grad is not None)


def test_hiding_needs_a_mask_token():
    tokenizer = train_wordpiece(TEXTS, 60)
    tokenizer.mask_token = None
    encoder = TextEncoder(TextTransformer(tokenizer, width=8, depth=1, heads=1))
    data = encoder.processor(["class"])
    assert encoder(data).mask.all()
    with pytest.raises(ConfigError, match="no mask token"):
        encoder(data, corruption(torch.ones_like(data["ids"])))


def test_a_tiny_model_learns_to_fill_in_words():
    torch.manual_seed(0)
    encoder = TextEncoder(TextTransformer(TOKENIZER, width=32, depth=1, heads=2, max_length=32, dropout=0.0))
    data = encoder.processor(TEXTS[:4])
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        what = corruption((torch.rand(data["ids"].shape) < 0.3) & encoder.units(data))
        loss = encoder.reconstruction_loss(encoder.reconstruct(encoder(data, what), what), data, what).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[:3]) / 3 > 4
    assert sum(losses[-5:]) / 5 < 1.5


def test_a_configuration_file_can_name_every_form_of_tokenizer(tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    from mmpt.text import TextBackbone

    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    TOKENIZER.save_pretrained(str(tmp_path / "saved"))
    source = {
        "class_path": "mmpt.tokenization.WordPieceSource",
        "init_args": {"texts": str(tmp_path / "texts.txt"), "vocabulary_size": 100},
    }
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--text", type=TextBackbone)
    for tokenizer in (source, str(tmp_path / "saved")):
        arguments = {"tokenizer": tokenizer, "width": 8, "depth": 1, "heads": 1, "cross_attention": [0]}
        config = parser.parse_object({"text": {"class_path": "mmpt.text.TextTransformer", "init_args": arguments}})
        text = parser.instantiate(config).text
        assert text.tokenizer.get_vocab() == TOKENIZER.get_vocab()
        assert text.transformer.layers[0].cross is not None


def test_losses_of_single_tokens_add_up_to_the_reconstruction_loss():
    from contracts.cases import TEXTS, text_transformer

    from mmpt.masking import Exact
    from mmpt.text import TextEncoder

    encoder = TextEncoder(text_transformer()).eval()
    inputs = encoder.processor(TEXTS)
    corruption = Exact(0.5)(encoder.units(inputs), generator=torch.Generator().manual_seed(0))
    logits = encoder.reconstruct(encoder(inputs, corruption), corruption)
    found = encoder.unit_losses(logits, inputs, corruption)
    part = encoder.reconstruction_loss(logits, inputs, corruption)
    torch.testing.assert_close(found.losses.mean(), part.loss)
    torch.testing.assert_close(found.correct.float().mean(), part.logs["accuracy"])
