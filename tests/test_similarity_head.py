"""Cosines of pairs against what is said of them."""

import math

import pytest
import torch

from mmpt.batches import Batch
from mmpt.errors import ConfigError
from mmpt.features import Features
from mmpt.heads import SimilarityHead


class _Fixed(Features):
    def __init__(self, first, second, **labels):
        super().__init__(None, Batch({"a": {}, "text": {}}, labels, []))
        self.given = {"a": torch.tensor(first), "text": torch.tensor(second)}

    def embedding(self, modality, view=0):
        return self.given[modality]


@pytest.mark.parametrize(("label", "loss"), [(1, 0.16), (0, 0.36)])
def test_the_cosine_is_compared_with_the_label(label, loss):
    features = _Fixed([[1.0, 0.0]], [[0.6, 0.8]], match=torch.tensor([label]))
    output = SimilarityHead("a")(features)
    assert output.loss.item() == pytest.approx(loss, abs=1e-6)
    assert output.logs["accuracy"].item() == label


def test_pairs_without_a_label_are_compared_with_the_next_text():
    first, second = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.6, 0.8]]
    other = SimilarityHead("a")(_Fixed(first, second, group=torch.tensor([0, 1])))
    assert other.loss.item() == pytest.approx((0 + 0.2**2 + 0.6**2 + 0) / 4, abs=1e-6)
    alike = SimilarityHead("a")(_Fixed(first, second, group=torch.tensor([3, 3])))
    assert alike.loss.item() == pytest.approx((0 + 0.2**2 + 0.4**2 + 1) / 4, abs=1e-6)


def test_the_logistic_loss_asks_for_the_side_of_the_threshold():
    head = SimilarityHead("a", loss="logistic", threshold=0.5, temperature=0.1)
    output = head(_Fixed([[1.0, 0.0], [1.0, 0.0]], [[0.6, 0.8], [0.8, 0.6]], match=torch.tensor([1, 0])))
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(3.0))) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-5)
    assert output.logs["accuracy"].item() == 0.5
    with pytest.raises(ConfigError, match="hinge"):
        SimilarityHead("a", loss="hinge")


def test_texts_are_compared_with_every_sample_whose_facts_are_known():
    # text 0 states fact 1, text 1 none of the list, text 2 fact 0
    facts = torch.tensor([[1, 1], [0, 0], [1, 0]])
    labels = {"match": torch.tensor([1, 1, 1]), "facts": facts, "fact": torch.tensor([1, -1, 0])}
    first = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    second = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]
    loss = SimilarityHead("a")(_Fixed(first, second, **labels)).loss.item()
    true = 1.0  # sample 0 with text 2, cosine 0
    false = (0.6**2 + 0 + 0.8**2) / 3  # samples 1 and 2 with text 0, sample 1 with text 2
    assert loss == pytest.approx(0 + 0.5 * true + 0.5 * false, abs=1e-6)
