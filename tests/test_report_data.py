"""Reading a run folder: baselines beside their metrics, and losses from logs."""

import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from mmpt.errors import DataError
from mmpt.report_data import MetricRow, metric_rows, number, read_run


def log(run: Path, text: str, where: str = "logs") -> None:
    (run / where).mkdir(parents=True, exist_ok=True)
    (run / where / "metrics.csv").write_text(text)


class TestBaselines:
    def test_a_suffix_makes_a_baseline(self):
        rows = metric_rows({"a/R@1": 0.4, "a/R@10": 0.9, "a/R@1_chance": 0.1, "a/R@10_no_flags": 0.8, "b_hog": 0.3})
        assert rows == [
            MetricRow("a/R@1", 0.4, {"chance": 0.1}),
            MetricRow("a/R@10", 0.9, {"no_flags": 0.8}),
            MetricRow("b_hog", 0.3, {}),
        ]

    def test_the_order_of_names_plays_no_role(self):
        assert metric_rows({"x_chance": 0.1, "x": 0.4}) == [MetricRow("x", 0.4, {"chance": 0.1})]

    def test_a_baseline_of_two_words_is_not_a_baseline_of_a_baseline(self):
        rows = metric_rows({"acc": 0.5, "acc_hog": 0.3, "acc_hog_color": 0.4})
        assert rows == [MetricRow("acc", 0.5, {"hog": 0.3, "hog_color": 0.4})]

    def test_a_longer_metric_with_the_same_baseline_is_its_own_row(self):
        rows = metric_rows({"acc": 0.5, "acc_top5": 0.9, "acc_chance": 0.1, "acc_top5_chance": 0.5})
        assert rows == [MetricRow("acc", 0.5, {"chance": 0.1}), MetricRow("acc_top5", 0.9, {"chance": 0.5})]

    def test_a_suffix_ends_at_a_slash(self):
        assert [row.name for row in metric_rows({"a": 1.0, "a_b/c": 2.0})] == ["a", "a_b/c"]

    @pytest.mark.parametrize(
        ("name", "lower"),
        [
            ("masked/loss", True),
            ("retrieval/median_rank", True),
            ("retrieval/mean_reciprocal_rank", False),
            ("loss/accuracy", False),
            ("R@1", False),
            ("text/perplexity", True),
        ],
    )
    def test_direction(self, name, lower):
        assert MetricRow(name, 1.0, {}).lower_is_better is lower

    def test_the_difference_is_to_the_best_baseline(self):
        accuracy = MetricRow("accuracy", 0.6, {"chance": 0.1, "hog": 0.7, "blind": math.nan})
        assert (accuracy.best, accuracy.difference, accuracy.gain) == (0.7, pytest.approx(-0.1), pytest.approx(-0.1))
        rank = MetricRow("median_rank", 5.0, {"chance": 100.0, "hog": 8.0})
        assert (rank.best, rank.difference, rank.gain) == (5.0, -3.0, 3.0)
        assert math.isnan(MetricRow("accuracy", 0.6, {}).gain)
        assert math.isnan(MetricRow("accuracy", math.nan, {"chance": 0.1}).gain)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.41, "0.410"), (0, "0.000"), (0.0005, "0.0005"), (-0.02, "\N{MINUS SIGN}0.020"), (12.345, "12.35"),
            (911.5, "911.5"), (14.0, "14"), (12345.6, "12\N{NARROW NO-BREAK SPACE}346"), (math.nan, "NaN"),
        ],
    )  # fmt: skip
    def test_numbers_are_short(self, value, text):
        assert number(value) == text


class TestLogs:
    def curves(self, run: Path) -> dict[tuple[str, str, str], list[tuple[int, float]]]:
        return {
            (c.stage, c.head, split): list(zip(curve.steps.tolist(), curve.values.tolist(), strict=True))
            for c in read_run(run).curves
            for split, curve in c.splits.items()
        }

    def test_lightnings_own_log_is_read(self, tmp_path):
        logger = CSVLogger(str(tmp_path), name="logs", version="")
        logger.log_metrics({"train/masked/loss": 3.0, "train/masked/accuracy": 0.1, "train/loss": 4.0}, step=1)
        logger.log_metrics({"lr-AdamW": 0.1, "train/masked/loss": 2.0, "train/loss": 3.5}, step=2)
        logger.log_metrics({"validation/masked/loss": 2.5, "validation/loss": 3.25}, step=2)
        logger.save()
        assert self.curves(tmp_path) == {
            ("", "", "train"): [(1, 4.0), (2, 3.5)],
            ("", "", "validation"): [(2, 3.25)],
            ("", "masked", "train"): [(1, 3.0), (2, 2.0)],
            ("", "masked", "validation"): [(2, 2.5)],
        }

    def test_a_resumed_run_is_one_run(self, tmp_path):
        header = "step,train/loss\n"
        log(tmp_path, header + "0,4\n10,3\n20,9\n", "logs/version_2")
        log(tmp_path, header + "20,2\n30,1\n", "logs/version_10")
        assert self.curves(tmp_path) == {("", "", "train"): [(0, 4), (10, 3), (20, 2), (30, 1)]}

    def test_stages_stay_apart(self, tmp_path):
        log(tmp_path, "step,train/loss\n0,4\n", "logs/pretrain/version_0")
        log(tmp_path, "step,train/a/loss\n0,2\n", "logs/finetune")
        assert self.curves(tmp_path) == {("pretrain", "", "train"): [(0, 4)], ("finetune", "a", "train"): [(0, 2)]}

    def test_values_that_are_not_finite_and_an_unfinished_row_are_left_out(self, tmp_path):
        log(tmp_path, "step,train/loss,validation/loss\n0,4,\n1,nan,\n2,inf,\n3,3,\n4,2.1")
        assert self.curves(tmp_path) == {("", "", "train"): [(0, 4), (3, 3)]}

    def test_a_head_that_had_nothing_to_compare_has_no_curve(self, tmp_path):
        log(tmp_path, "step,train/a/loss,validation/a/loss\n0,4,\n1,0,0\n2,3,0\n")
        assert self.curves(tmp_path) == {("", "a", "train"): [(0, 4), (1, 0), (2, 3)]}

    def test_a_damaged_cell_is_named(self, tmp_path):
        log(tmp_path, "step,train/loss\n0,4\n1,tensor(3)\n")
        with pytest.raises(DataError, match=r"metrics\.csv, line 3: step '1' with train/loss 'tensor\(3\)'"):
            read_run(tmp_path)
