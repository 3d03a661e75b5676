"""Which heads never wait for the device: no value is read, and no shape depends on values."""

import pytest
import torch
from points import make_batch, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.features import Features
from mmpt.heads import CaptioningHead, ContrastiveHead, GroupContrastiveHead, MaskedHead, MatchingHead

READING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}


class Waits(TorchDispatchMode):
    """Collects the operations that on a GPU would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function._schema.name
        if name in READING:
            self.found.append(name)
        indices = arguments[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else []
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.found.append("boolean index")
        return function(*arguments, **(keywords or {}))


def waits(head) -> list[str]:
    """What one step of a head waits for."""
    torch.manual_seed(0)
    model = make_model(batch_norm=True)
    head.bind(model)
    batch = make_batch(model)
    with Waits() as mode:
        head(Features(model, batch)).loss.backward()
    return mode.found


@pytest.mark.parametrize(
    "head",
    [
        ContrastiveHead("points"),
        ContrastiveHead("points", chunk=3),
        ContrastiveHead("points", same_group="mask", chunk=3),
        ContrastiveHead("points", loss="sigmoid"),
        ContrastiveHead("points", loss="sigmoid", chunk=3),
        ContrastiveHead("points", "points"),
        GroupContrastiveHead("points"),
        GroupContrastiveHead("points", chunk=3),
        MatchingHead("points"),
    ],
)
def test_heads_that_compare_samples_never_wait(head):
    assert waits(head) == []


@pytest.mark.parametrize("head", [MaskedHead("text"), CaptioningHead("points")])
def test_heads_that_predict_tokens_ask_which_ones_and_nothing_else(head):
    # logits at predicted tokens only: their number is a shape
    found = waits(head)
    assert found
    assert set(found) == {"boolean index"}


def test_reading_is_noticed():
    with Waits() as mode:
        torch.ones(2)[torch.tensor([True, False])]
        torch.ones(1).item()
        torch.ones(2).nonzero()
    assert {"boolean index", "aten::_local_scalar_dense", "aten::nonzero"} <= set(mode.found)
