"""Scores of answers and tables against numbers worked out by hand."""

import itertools
import math

import pytest

from mmpt.errors import ConfigError, DataError
from mmpt.evaluation.answers import exact_match, parse_number, relaxed_match, share_right
from mmpt.evaluation.tables import Cell, rnss, table_f1, value_errors


@pytest.mark.parametrize(
    ("target", "prediction", "right"),
    [
        ("40", "42", True),
        ("40", "42.1", False),
        ("40", "38", True),
        ("-40", "-42", True),
        ("-40", "40", False),
        ("23.33", "24.4", True),
        ("23.33", "24.6", False),
        ("Jan", " jan", True),
        ("Jan", "Feb", False),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("0", "0.0", True),
        ("0", "0.001", False),
        ("40", "forty", False),
        ("40", "nan", False),
        ("inf", "1e400", False),
    ],
)
def test_relaxed_match_takes_numbers_within_a_twentieth_and_texts_as_they_are(target, prediction, right):
    assert relaxed_match(target, prediction) is right


def test_options_of_relaxed_match():
    assert relaxed_match("5%", "5", percent="lenient")
    assert relaxed_match("0.05", "5%")
    assert not relaxed_match("5", "5%")
    assert relaxed_match("5", "5%", percent="lenient")
    assert not relaxed_match("5%", "6", percent="lenient")
    assert not relaxed_match("0", "0.0", zero="text")
    assert relaxed_match("40", "48", tolerance=0.2)
    with pytest.raises(ConfigError, match="tolerance=-1"):
        relaxed_match("1", "1", tolerance=-1)
    assert share_right(["40", "Jan"], ["41", "Feb"]) == 0.5
    assert share_right(["40", "Jan"], ["41", "jan"], exact_match) == 0.5
    with pytest.raises(DataError, match="1 answers for 2"):
        share_right(["40", "Jan"], ["41"])


def test_exact_match_and_numbers():
    assert exact_match("Jan ", "jan")
    assert not exact_match("Jan", "jan", ignore_case=False)
    assert not exact_match("40", "40.0")
    assert [parse_number(text) for text in ("12.5%", "1e3", "1_000", "", "nan", "x")] == [0.125, 1000] + [None] * 4


@pytest.mark.parametrize(
    ("targets", "predictions", "released", "strict"),
    [
        ([10, 20, 40], [40, 11, 20], 1 - 0.1 / 3, 1 - 0.1 / 3),
        ([10, 20], [10], 1.0, 0.5),
        ([10, 20, 30], [10, 20, 30, 99], 1.0, 0.75),
        ([0], [0], 0.0, 1.0),
        ([0], [5], 1.0, 0.0),
        ([], [], 1.0, 1.0),
        ([1], [], 0.0, 0.0),
        ([1e308], [-1e308], 0.0, 0.0),
    ],
)
def test_rnss_of_both_modes(targets, predictions, released, strict):
    assert rnss(targets, predictions, "released") == pytest.approx(released, abs=1e-12)
    assert rnss(targets, predictions) == pytest.approx(strict, abs=1e-12)


def test_rnss_takes_the_cheapest_matching_of_all():
    targets, predictions = [3.0, 7.0, 1.0, 12.0], [2.0, 9.0, 6.5, 1.2]
    best = min(
        sum(min(1.0, abs(t - p) / t) for t, p in zip(targets, order, strict=True))
        for order in itertools.permutations(predictions)
    )
    assert rnss(targets, predictions) == pytest.approx(1 - best / 4)
    with pytest.raises(DataError, match="predictions hold nan"):
        rnss([1.0], [math.nan])
    with pytest.raises(ConfigError, match="'other'"):
        rnss([1.0], [1.0], "other")


MONTHS = [Cell("Jan", "mm", 40), Cell("Feb", "mm", 20)]


def test_table_f1_of_the_worked_examples():
    near = [Cell("Jan", "mm", 42), Cell("Feb", "mm", 20)]
    score = table_f1(MONTHS, near)
    assert (score.precision, score.recall, score.f1) == pytest.approx((0.975, 0.975, 0.975))
    score = table_f1(MONTHS, [*near, Cell("Mar", "mm", 7)])
    assert (score.precision, score.recall, score.f1) == pytest.approx((0.65, 0.975, 0.78))


def test_values_and_keys_count_up_to_their_thresholds():
    assert table_f1([Cell("a", "b", 40)], [Cell("a", "b", 44)]).f1 == 0  # a distance of 0.1 is too far
    assert table_f1([Cell("a", "b", 40)], [Cell("a", "b", 43)]).f1 == pytest.approx(1 - 3 / 40)
    assert table_f1([Cell("a", "b", 0)], [Cell("a", "b", 0.0)]).f1 == 1
    assert table_f1([Cell("a", "b", 0)], [Cell("a", "b", 1e-9)]).f1 == 0
    # "abcde x" and "abcfe x": one edit in seven characters; "ab x" and "cd x": two in four, which is half
    assert table_f1([Cell("abcde", "x", 1)], [Cell("abcfe", "x", 1)]).f1 == pytest.approx(6 / 7)
    assert table_f1([Cell("ab", "x", 1)], [Cell("cd", "x", 1)]).f1 == 0
    assert table_f1([Cell("a", "b", "north")], [Cell("a", "b", "nerth")]).f1 == pytest.approx(4 / 5)
    assert table_f1([Cell("a", "b", "7 km")], [Cell("a", "b", 7.0)]).f1 == 0


def test_a_transposed_table_is_as_good_and_empty_ones_have_the_extreme_scores():
    grid = [Cell("spring", "x1", 1), Cell("spring", "x2", 2), Cell("autumn", "x1", 3), Cell("autumn", "x2", 4)]
    turned = [Cell(column, row, value) for row, column, value in grid]
    assert table_f1(grid, turned).f1 == 1
    assert table_f1(grid, turned, transpose=False).f1 < 1
    assert table_f1([], []).f1 == 1
    assert table_f1(grid, []).f1 == table_f1([], grid).f1 == 0
    with pytest.raises(DataError, match="inf"):
        table_f1(grid, [Cell("a", "b", math.inf)])


def test_value_errors_are_shares_of_the_axis_over_matched_numbers():
    read = [Cell("Feb", "mm", 25), Cell("Jan", "mm", 39), Cell("zzz zzz", "q", 7)]
    assert sorted(value_errors(MONTHS, read, span=50)) == pytest.approx([1 / 50, 5 / 50])
    assert value_errors(MONTHS, [], span=50) == []
    assert value_errors(MONTHS, [Cell("Jan", "mm", "forty")], span=50) == []
    with pytest.raises(DataError, match="span is 0"):
        value_errors(MONTHS, read, span=0)
