"""What every head promises, over every encoder."""

import pytest
import torch
from contracts.cases import ENCODERS, HEADS, text_transformer

from mmpt.batches import Batch
from mmpt.checkpoint import load_heads
from mmpt.connectors import LinearConnector
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads import MaskedHead
from mmpt.masking import Exact
from mmpt.model import Modality, MultimodalModel
from mmpt.pretraining import Pretraining

CASES = [case for case in ENCODERS if case.name != "text"]
TEXTS = ["red", "a blue square", "red", "green dots beside a large circle"]


def model_and_batch(case) -> tuple[MultimodalModel, Batch]:
    torch.manual_seed(0)
    model = MultimodalModel(
        text_transformer(), {"thing": Modality(case.make(), connector=LinearConnector())}, embed_dim=16
    )
    inputs = {
        name: processor(case.samples() if name == "thing" else TEXTS) for name, processor in model.processors.items()
    }
    return model, Batch(inputs, {"group": torch.tensor([0, 1, 0, 2])}, ["a", "b", "c", "d"])


@pytest.mark.parametrize(("name", "make"), HEADS, ids=[name for name, _ in HEADS])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_head_trains_the_encoder_whichever_it_is(case, name, make):
    model, batch = model_and_batch(case)
    head = make("thing")
    head.bind(model)
    output = head(Features(model, batch))
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)
    assert all(value.ndim == 0 and not value.requires_grad for value in output.logs.values())
    output.loss.backward()
    encoder = model.modality("thing").encoder
    assert any(p.grad is not None and p.grad.any() for p in encoder.parameters())
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(("name", "make"), HEADS, ids=[name for name, _ in HEADS])
def test_head_refuses_a_modality_that_the_model_lacks(name, make):
    head = make("smell")
    with pytest.raises(ConfigError, match="smell"):
        head.bind(MultimodalModel(text_transformer()))


def test_masked_head_serves_text_like_any_modality():
    model, batch = model_and_batch(CASES[-1])
    head = MaskedHead("text", Exact(0.5))
    head.bind(model)
    head(Features(model, batch)).loss.backward()
    assert model.text.word.weight.grad.any()


def test_an_encoding_is_computed_once_for_all_heads():
    model, batch = model_and_batch(CASES[-1])
    calls = []
    model.modality("thing").encoder.register_forward_hook(lambda *a: calls.append(1))
    features = Features(model, batch)
    for _, make in HEADS:
        head = make("thing")
        head.bind(model)
        head(features)
    # one for the plain tokens, one for the second pass, one for the masked head
    assert len(calls) == 3


@pytest.mark.parametrize(("name", "make"), HEADS, ids=[name for name, _ in HEADS])
def test_a_saved_head_comes_back_with_equal_losses(name, make, tmp_path):
    model, batch = model_and_batch(CASES[-1])
    head = make("thing")
    module = Pretraining(model, {"head": head})
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3)
    module.eval().save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path, trust=["shapes"])
    (again,) = load_heads(tmp_path, loaded, trust=["shapes"]).values()
    torch.manual_seed(1)
    expected = head(Features(model, batch)).loss
    torch.manual_seed(1)
    torch.testing.assert_close(again(Features(loaded, batch)).loss, expected)


def test_what_a_head_remembers_of_its_run_is_not_part_of_the_folder(tmp_path):
    model, _ = model_and_batch(CASES[-1])
    Pretraining(model, {"head": Remembering()}).save_pretrained(tmp_path)
    loaded = MultimodalModel.from_pretrained(tmp_path, trust=["shapes"])
    (again,) = load_heads(tmp_path, loaded, trust=["tests"]).values()
    assert again.seen == {}


class Remembering(MaskedHead):
    def __init__(self) -> None:
        super().__init__("thing")
        self.seen = {}

    def get_extra_state(self):
        return {"a": torch.ones(1)}

    def set_extra_state(self, state):
        self.seen = state
