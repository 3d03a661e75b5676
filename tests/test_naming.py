"""Vectors from names."""

import torch

from mmpt.naming import NAMED_STD, named_vectors


def test_equal_names_give_equal_vectors_whatever_stands_beside_them():
    first, second = named_vectors(["LYZ", "CD4"], 64), named_vectors(["x", "cd4", "lyz"], 64)
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[1])
    assert first.dtype == torch.float32


def test_different_names_are_nearly_orthogonal_and_of_one_length():
    vectors = named_vectors([f"g{i}" for i in range(50)], 512)
    cosine = torch.nn.functional.normalize(vectors, dim=1)
    assert (cosine @ cosine.T - torch.eye(50)).abs().max() < 0.25
    assert abs(float(vectors.std()) - NAMED_STD) < 0.005


def test_a_name_of_several_parts_is_their_sum():
    whole = named_vectors(["HLA-DRA"], 32)[0]
    parts = named_vectors(["hla", "-", "dra"], 32).sum(0) / 3**0.5
    torch.testing.assert_close(whole, parts)
