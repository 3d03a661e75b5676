"""Tokens: pooling ignores padding wherever it stands, rows and concatenation keep mask and values together."""

import torch

from mmpt.tokens import Tokens, concatenate, full

VALUES = torch.arange(24, dtype=torch.float32).view(2, 4, 3)
MASK = torch.tensor([[True, True, False, False], [False, True, True, True]])


def test_sizes():
    tokens = Tokens(VALUES, MASK)
    assert (tokens.length, tokens.width) == (4, 3)


def test_mean_is_over_real_positions_only():
    mean = Tokens(VALUES, MASK).mean()
    assert mean.tolist() == [[1.5, 2.5, 3.5], [18.0, 19.0, 20.0]]


def test_pooling_does_not_depend_on_what_stands_at_padding():
    other = torch.where(MASK.unsqueeze(-1), VALUES, torch.full_like(VALUES, -1e6))
    assert torch.equal(Tokens(other, MASK).mean(), Tokens(VALUES, MASK).mean())
    assert torch.equal(Tokens(other, MASK).last(), Tokens(VALUES, MASK).last())


def test_mean_of_a_row_without_real_positions_is_zero():
    assert Tokens(VALUES, torch.zeros_like(MASK)).mean().abs().sum() == 0


def test_first_and_last():
    tokens = Tokens(VALUES, MASK)
    assert torch.equal(tokens.first(), VALUES[:, 0])
    assert torch.equal(tokens.last(), torch.stack([VALUES[0, 1], VALUES[1, 3]]))


def test_last_of_one_real_position():
    mask = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert torch.equal(Tokens(VALUES, mask).last(), torch.stack([VALUES[0, 0], VALUES[1, 2]]))


def test_rows_may_repeat_and_change_order():
    picked = Tokens(VALUES, MASK).rows(torch.tensor([1, 0, 1]))
    assert torch.equal(picked.values, VALUES[[1, 0, 1]])
    assert torch.equal(picked.mask, MASK[[1, 0, 1]])


def test_concatenate_is_along_the_length():
    joined = concatenate(Tokens(VALUES, MASK), full(-VALUES[:, :1]))
    assert joined.values.shape == (2, 5, 3)
    assert torch.equal(joined.values[:, 4], -VALUES[:, 0])
    assert joined.mask.tolist() == [[True, True, False, False, True], [False, True, True, True, True]]
