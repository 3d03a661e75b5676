"""Reading and answering: which tokens carry loss, rows without a picture, and how a model is asked."""

import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from test_huggingface import WRAPPED, save
from torch import nn

from mmpt.batches import Batch
from mmpt.catalogue import recipes_folder
from mmpt.connectors import LinearConnector
from mmpt.datasets.chart import EXTRACT
from mmpt.datasets.chart_answers import Answered, answer, extract, values_of
from mmpt.datasets.chart_records import parse
from mmpt.encoders.image_chart import ChartEncoder, ChartProcessor
from mmpt.errors import ConfigError, DataError, SampleError
from mmpt.features import Features
from mmpt.heads import AnsweringHead
from mmpt.heads.answering import answer_mask
from mmpt.huggingface import HuggingFaceText
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining
from mmpt.text import TextTransformer
from mmpt.tokenization import ByteLevelSource, train_bytelevel_bpe

TEXTS = [
    "Extract the data of this chart.",
    "bar|Rain|month|mm|rain|Jan=40|Feb=20",
    "Q: What is the mm of Jan? A:",
    "3.5",
]
TOKENIZER = train_bytelevel_bpe(TEXTS * 3, 300, single_digits=True)
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4}


def model(seed: int = 0) -> MultimodalModel:
    torch.manual_seed(seed)
    text = TextTransformer(TOKENIZER, width=32, depth=2, heads=4, max_length=128, dropout=0.0)
    chart = Modality(ChartEncoder(size=16, backbone_args=SMALL), connector=LinearConnector())
    return MultimodalModel(text, {"chart": chart}, embed_dim=16)


def pictures(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (20 + 5 * n, 30), (40 * n, 90, 200)) for n in range(count)]


def batch(owner: MultimodalModel, charts: list, texts: list[str]) -> Batch:
    inputs = {"chart": owner.processors["chart"](charts), "text": owner.processors["text"](texts)}
    return Batch(inputs, {}, [str(n) for n in range(len(texts))])


def loss_of(owner: MultimodalModel, charts: list, texts: list[str]) -> torch.Tensor:
    head = AnsweringHead("chart")
    head.bind(owner)
    return head(Features(owner, batch(owner, charts, texts))).loss


def test_digits_are_tokens_of_their_own_and_texts_come_back_unchanged(tmp_path):
    for text in ("Jan=40", "12345", '{"data":[["雨",3.5]]}', " a  b "):
        ids = TOKENIZER(text)["input_ids"]
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
        pieces = [TOKENIZER.decode([i]) for i in ids]
        assert all(len(piece) == 1 for piece in pieces if any(c.isdigit() for c in piece))
    (tmp_path / "texts.txt").write_text("Jan=40\nFeb=41")
    assert len(ByteLevelSource(tmp_path / "texts.txt", 300).train()) >= 261
    (tmp_path / "texts.txt").write_text("\n")
    with pytest.raises(DataError, match="no text"):
        ByteLevelSource(tmp_path / "texts.txt").train()


def test_answers_and_the_separators_behind_them_carry_the_loss():
    separator = TOKENIZER.sep_token_id
    ids = torch.tensor([[2, 7, separator, 8, 9, separator, 0, 0], [2, 7, separator, 8, separator, 9, separator, 0]])
    mask = torch.tensor([[1] * 6 + [0] * 2, [1] * 7 + [0]]).bool()
    expected = [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]
    assert answer_mask(ids, mask, separator).int().tolist() == expected
    ids = torch.tensor([[2, 5, separator, 6, 6, separator, 7, 7, separator, 8, separator]])
    assert answer_mask(ids, torch.ones_like(ids).bool(), separator).int().tolist() == [
        [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    ]


def test_a_record_of_40_and_an_answer_of_2_tokens_have_44_places_with_loss():
    record = TOKENIZER.decode(TOKENIZER("1234567890" * 4)["input_ids"], skip_special_tokens=True)
    text = f"{EXTRACT}[SEP]{record}[SEP]Q: x A:[SEP]20"
    inputs = model().processors["text"]([text])
    assert answer_mask(inputs["ids"], inputs["mask"], TOKENIZER.sep_token_id).sum() == 44
    inputs = model().processors["text"](["<data>x</data> Q: y A:[SEP]123"])
    assert answer_mask(inputs["ids"], inputs["mask"], TOKENIZER.sep_token_id).sum() == 4


def test_the_loss_of_a_uniform_model_is_the_logarithm_of_the_vocabulary():
    owner = model()
    nn.init.zeros_(owner.text.word.weight)
    loss = loss_of(owner, pictures(2), ["a[SEP]b", "a b[SEP]c d"])
    assert loss.item() == pytest.approx(math.log(len(TOKENIZER)), abs=1e-5)


def test_the_loss_is_that_of_each_answer_token_by_itself():
    owner = model().eval()
    texts, charts = ["a b[SEP]40[SEP]c[SEP]7", "d[SEP]123"], pictures(2)
    total, count = 0.0, 0
    separator = TOKENIZER.sep_token_id
    for chart, text in zip(charts, texts, strict=True):
        inputs = owner.process("text", [text])
        context = owner.connect("chart", owner.modality("chart").encoder(owner.process("chart", [chart])))
        values = owner.fuse_tokens(inputs, [context], "prefix").values
        logits = owner.text.lm_logits(values)[0].log_softmax(-1)
        turn = 0
        for place, token in enumerate(inputs["ids"][0].tolist()):
            if turn % 2:
                total, count = total - logits[place - 1, token].item(), count + 1
            turn += token == separator
    assert loss_of(owner, charts, texts).item() == pytest.approx(total / count, abs=1e-5)


def test_prompts_without_answers_have_no_loss():
    loss = loss_of(model(), pictures(1), ["only a prompt"])
    assert loss.item() == 0
    loss.backward()


def test_rows_without_a_picture_have_no_real_tokens_and_are_not_computed():
    encoder = ChartEncoder(size=16, backbone_args=SMALL).eval()
    charts = [None, *pictures(2), None]
    seen = []
    encoder.backbone.register_forward_hook(lambda *_: None)
    encoder.backbone.patch_embed.register_forward_hook(lambda _m, arguments, _o: seen.append(len(arguments[0])))
    tokens = encoder(encoder.processor(charts))
    assert seen == [2]
    assert tokens.mask.any(1).tolist() == [False, True, True, False]
    alone = encoder(encoder.processor(pictures(2)))
    torch.testing.assert_close(tokens.values[1:3], alone.values, atol=1e-5, rtol=0)
    assert not encoder(encoder.processor([None])).mask.any()


def test_where_all_pictures_are_replaced_no_gradient_reaches_the_encoder_or_the_connector():
    owner = model()
    loss_of(owner, [None, None], ["<data>Jan=40</data> Q: Jan? A:[SEP]40", "<data>x</data> Q[SEP]7"]).backward()
    chart = owner.modality("chart")
    for name, parameter in chart.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert owner.text.word.weight.grad.any()
    owner.zero_grad()
    loss_of(owner, [pictures(1)[0], None], ["a[SEP]b", "c[SEP]d"]).backward()
    assert all(parameter.grad.any() for parameter in chart.connector.parameters())


def test_the_text_of_a_row_without_picture_is_read_as_text_alone():
    owner = model().eval()
    text = "<data>Jan=40</data> Q: Jan? A:[SEP]40"
    both = owner.fuse([text, "x"], "prefix", chart=[None, pictures(1)[0]]).values[0]
    alone = owner.fuse([text], "causal").values[0]
    torch.testing.assert_close(both[: len(alone)], alone, atol=1e-5, rtol=0)


def test_charts_keep_their_shape_on_white():
    pixels = ChartProcessor(20)([Image.new("RGB", (40, 20), (0, 0, 0))])["pixels"][0]
    assert (pixels[:, :5] == 1).all()
    assert (pixels[:, 15:] == 1).all()
    assert (pixels[:, 6:14] == -1).all()
    with pytest.raises(SampleError, match="does not exist"):
        ChartProcessor(20)(["absent.png"])


def test_in_training_a_chart_moves_and_changes_colours_and_loses_nothing():
    processor = ChartProcessor(size=64, mean=(0.0,) * 3, std=(1.0,) * 3)
    chart = Image.new("RGB", (64, 64), (255, 200, 200))
    chart.paste((0, 0, 0), (16, 16, 48, 48))
    torch.manual_seed(0)
    drawn = processor([chart] * 40, training=True)["pixels"]
    black = drawn.amax(1) < 0.4  # (40, 64, 64)
    for picture in black:
        rows, columns = picture.any(1).nonzero(), picture.any(0).nonzero()
        height, width = (int(places.max() - places.min()) + 1 for places in (rows, columns))
        assert 25 <= height <= 32  # half of 54 to 64 pixels, without grey edges
        assert abs(height - width) <= 2
        assert int(picture.sum()) >= 0.9 * height * width
    assert len({tuple(picture.any(1).nonzero()[0].tolist()) for picture in black}) > 3  # places
    colours = drawn[:, :, 12, 32]
    assert {int(place) for place in colours.argmax(1)} == {0, 1, 2}
    assert torch.equal(processor([chart])["pixels"], processor([chart])["pixels"])


def test_a_part_of_a_modality_can_be_locked():
    owner = model()
    (encoder,) = owner.parts("chart.encoder")
    assert encoder is owner.modality("chart").encoder
    assert owner.parts("chart.connector") == [owner.modality("chart").connector]
    with pytest.raises(ConfigError, match="no part 'tail'"):
        owner.parts("chart.tail")
    with pytest.raises(ConfigError, match="no part 'connector'"):
        owner.parts("text.connector")


def test_heads_need_a_separator():
    owner = model()
    tokenizer = train_bytelevel_bpe(TEXTS, 300)
    tokenizer.sep_token = None
    owner.text.tokenizer = tokenizer
    with pytest.raises(ConfigError, match="no \\[SEP\\] token"):
        AnsweringHead("chart").bind(owner)


@pytest.fixture(scope="module")
def taught() -> MultimodalModel:
    """A model that knows three charts by heart: blue tells which one."""
    owner = model()
    data = ["bar|t|x|y|s|Jan=40|Feb=20", "bar|t|x|y|s|Jan=7|Feb=3", "bar|t|x|y|s|Jan=15|Feb=6"]
    answers = ["40", "7", "15"]
    charts = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    turns = [f"{EXTRACT}[SEP]{d}[SEP]Q: What is the y of Jan? A:[SEP]{a}" for d, a in zip(data, answers, strict=True)]
    turns += [f"Q: What is the y of Jan? A:[SEP]{a}" for a in answers]
    head = AnsweringHead("chart")
    head.bind(owner)
    optimiser = torch.optim.AdamW(owner.parameters(), 3e-3)
    features = batch(owner, charts * 2, turns)
    for _ in range(150):
        loss = head(Features(owner, features)).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.05
    owner.eval()
    owner.charts, owner.data, owner.answers = charts, data, answers
    return owner


@pytest.mark.parametrize("beams", [1, 3])
def test_a_model_writes_the_data_and_the_answers_that_it_was_taught(taught, beams):
    assert extract(taught, taught.charts, beams=beams, batch_size=2) == taught.data
    assert parse(taught.data[0], "compact").values == [40, 20]
    asked = ["What is the y of Jan?"] * 3
    assert answer(taught, taught.charts, asked, beams=beams) == [Answered(a) for a in taught.answers]
    prompted = answer(taught, taught.charts, asked, data_prompting=True, beams=beams)
    assert prompted == [Answered(a, d) for a, d in zip(taught.answers, taught.data, strict=True)]


def test_a_list_of_values_is_read_or_refused_as_a_whole():
    assert values_of("40, 20,-1.5e3") == [40, 20, -1500]
    assert [values_of(text) for text in ("", "40, ", "bar|40", "40, nan", "1e999")] == [None] * 5


def test_given_data_stand_in_place_of_what_would_be_read(taught):
    asked = ["What is the y of Jan?"] * 3
    given = answer(taught, taught.charts, asked, data=taught.data)
    assert [g.answer for g in given] == taught.answers
    assert [g.data for g in given] == taught.data
    with pytest.raises(DataError, match="expected equal numbers"):
        answer(taught, taught.charts, asked[:2])


@pytest.mark.slow
def test_the_recipe_runs_and_leaves_a_report(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(recipes_folder() / "chart" / "run.py"), "--smoke", "--output", str(run)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["reading/rnss"] <= 1
    assert "reading/rnss_blind" in metrics
    assert "answering/literal_data_prompting" in metrics
    assert (run / "report.html").is_file()
    assert MultimodalModel.from_pretrained(run / "model").modality("chart")


def test_a_hugging_face_language_model_reads_charts_through_the_connector(tmp_path):
    save("GPT2LMHeadModel", WRAPPED["GPT2LMHeadModel"], tmp_path)
    chart = Modality(ChartEncoder(size=16, backbone_args=SMALL), connector=LinearConnector())
    owner = MultimodalModel(HuggingFaceText(tmp_path), {"chart": chart}, embed_dim=16)
    module = Pretraining(owner, {"answers": AnsweringHead("chart")}, freeze=["text", "chart.encoder"])
    loss, _ = module(batch(owner, [*pictures(1), None], ["a b[SEP]c d[SEP]e[SEP]f", "a[SEP]b"]))
    loss.backward()
    trained = {name for name, parameter in owner.named_parameters() if parameter.grad is not None}
    assert trained == {"modalities.chart.connector.linear.weight", "modalities.chart.connector.linear.bias"}
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    written = extract(owner, [red, blue, None], max_new_tokens=6)
    assert len(written) == 3
    assert extract(owner, [blue], max_new_tokens=6) == written[1:2]
