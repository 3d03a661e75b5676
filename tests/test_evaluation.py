"""Retrieval, zero-shot classification, probes, intervals and projections of embeddings."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_reciprocal_rank

from mmpt.errors import DataError
from mmpt.evaluation.intervals import bootstrap_interval, macro_f1, macro_recall
from mmpt.evaluation.linear_probe import STRENGTHS, _hold_out, linear_probe
from mmpt.evaluation.nearest import label_similarity, nearest
from mmpt.evaluation.projection import TSNE_LIMIT, two_dimensional
from mmpt.evaluation.retrieval import retrieval
from mmpt.evaluation.zero_shot import ensemble, relative, zero_shot


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Candidates at 0, 30, 60 and 90 degrees, so a query's order of candidates is read from its angle.
ANGLES = torch.tensor([0.0, 30.0, 60.0, 90.0])


def at(*degrees: float) -> Tensor:
    radians = torch.tensor(degrees) * math.pi / 180
    return torch.stack([radians.cos(), radians.sin()], 1)


class TestRetrieval:
    def test_ranks_follow_the_angles(self):
        # 10 deg sorts 0, 30, 60, 90; 50 deg sorts 60, 30, 90, 0.
        result = retrieval(at(10, 10, 50, 50), at(*ANGLES), torch.tensor([0, 2, 1, 0]), ks=(1, 2, 3))
        assert result.ranks.tolist() == [1, 3, 2, 4]
        assert result.recall == {1: 0.25, 2: 0.5, 3: 0.75}
        assert result.median_rank == 2.5
        assert result.mean_reciprocal_rank == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 4) / 4)
        assert (result.n, result.m) == (4, 4)

    def test_the_other_direction_swaps_the_axes(self):
        queries, candidates = at(0, 40), at(30, 35, 50)
        positives = torch.tensor([[False, True, False], [False, True, True]])
        # 0 deg: 30 is nearer than 35. 40 deg: 35 is nearest.
        assert retrieval(queries, candidates, positives).ranks.tolist() == [2, 1]
        # 30 deg has no positive; 35 deg has both; 50 deg is nearest to 40.
        assert retrieval(candidates[1:], queries, positives.T[1:]).ranks.tolist() == [1, 1]

    def test_other_positives_do_not_push_the_rank_down(self):
        # 10 deg sorts 0, 30, 60, 90; both 30 and 60 are right: only 0 stands before the best of them.
        positives = torch.tensor([[False, True, True, False]])
        assert retrieval(at(10), at(*ANGLES), positives).ranks.tolist() == [2]

    def test_a_row_of_booleans_equals_an_index(self):
        queries, candidates = normal(50, 8), normal(30, 8, seed=1)
        target = torch.arange(50) % 30
        one_hot = torch.nn.functional.one_hot(target, 30).bool()
        assert torch.equal(retrieval(queries, candidates, target).ranks, retrieval(queries, candidates, one_hot).ranks)

    def test_half_of_the_ties_stand_before_the_positive(self):
        # Of the three candidates at 30 deg one is right; 0 deg is further from 20 deg, so two ties and nothing above.
        assert retrieval(at(20), at(30, 0, 30, 30), torch.tensor([2])).ranks.tolist() == [2.0]
        assert retrieval(at(20), at(30, 20, 30, 0), torch.tensor([2])).ranks.tolist() == [2.5]

    @pytest.mark.parametrize("constant", [torch.ones(16), torch.zeros(16), normal(16)])
    @pytest.mark.parametrize("scale", [1.0, torch.linspace(0.1, 3, 101)[:, None]])
    def test_constant_embeddings_land_in_the_middle(self, constant, scale):
        embeddings = constant.expand(101, 16) * scale  # with scales, the cosines differ by rounding
        result = retrieval(embeddings, embeddings, torch.arange(101))
        assert result.ranks.unique().tolist() == [51.0]
        assert result.recall[1] == result.recall[10] == 0.0

    def test_the_length_of_a_vector_plays_no_role(self):
        queries, candidates = normal(20, 6), normal(25, 6, seed=1)
        scaled = retrieval(queries * 7, candidates * torch.linspace(0.1, 9, 25)[:, None], torch.arange(20)).ranks
        assert torch.equal(scaled, retrieval(queries, candidates, torch.arange(20)).ranks)

    def test_it_agrees_with_torchmetrics(self):
        queries, candidates = normal(40, 8), normal(60, 8, seed=1)
        positives = torch.rand(40, 60, generator=torch.Generator().manual_seed(2)) < 0.1
        positives[:, 0] |= ~positives.any(1)
        result = retrieval(queries, candidates, positives, ks=(1, 5))
        # Shifted because torchmetrics ignores positives whose score is below 0.
        scores = 2 + torch.nn.functional.cosine_similarity(queries[:, None], candidates[None], dim=2)
        rows = list(zip(scores, positives, strict=True))
        assert result.mean_reciprocal_rank == pytest.approx(
            float(np.mean([retrieval_reciprocal_rank(s, p) for s, p in rows])), abs=1e-6
        )
        for k in (1, 5):
            expected = float(np.mean([retrieval_hit_rate(s, p, top_k=k) for s, p in rows]))
            assert result.recall[k] == pytest.approx(expected)

    def test_chance_is_the_hypergeometric_one(self):
        queries = normal(2, 4)
        positives = torch.tensor([[True] + [False] * 5, [True, True] + [False] * 4])
        chance = retrieval(queries, normal(6, 4, seed=1), positives, ks=(1, 3, 5, 10)).chance
        assert chance[1] == pytest.approx((1 / 6 + 2 / 6) / 2)
        assert chance[3] == pytest.approx((3 / 6 + 1 - math.comb(4, 3) / math.comb(6, 3)) / 2)
        assert chance[5] == pytest.approx((5 / 6 + 1) / 2)
        assert chance[10] == 1.0

    def test_random_embeddings_reach_chance_and_no_more(self):
        result = retrieval(normal(4000, 16), normal(20, 16, seed=1), torch.arange(4000) % 20, ks=(1, 5))
        assert result.recall[1] == pytest.approx(result.chance[1], abs=0.02)
        assert result.recall[5] == pytest.approx(result.chance[5], abs=0.03)

    @pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
    def test_the_chunk_changes_nothing(self, chunk):
        queries, candidates, target = normal(50, 8), normal(30, 8, seed=1), torch.arange(50) % 30
        whole, parts = retrieval(queries, candidates, target), retrieval(queries, candidates, target, chunk=chunk)
        assert torch.equal(whole.ranks, parts.ranks)
        assert whole.chance == pytest.approx(parts.chance)

    def test_memory_follows_the_chunk_and_not_the_queries(self):
        class Largest(TorchDispatchMode):
            elements = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, Tensor):
                    self.elements = max(self.elements, result.numel())
                return result

        with Largest() as largest:
            retrieval(normal(2000, 4), normal(100, 4, seed=1), torch.arange(2000) % 100, chunk=50)
        assert largest.elements <= 2000 * 4  # the queries themselves; all scores at once would be 200 000

    def test_metrics_stand_beside_chance(self):
        metrics = retrieval(at(10, 50), at(*ANGLES), torch.tensor([0, 1]), ks=(1,)).metrics("retrieval/new")
        assert metrics == {
            "retrieval/new/R@1": 0.5,
            "retrieval/new/R@1_chance": 0.25,
            "retrieval/new/median_rank": 1.5,
            "retrieval/new/mean_reciprocal_rank": 0.75,
        }

    def test_every_metric_has_an_interval_over_queries(self):
        found = retrieval(normal(40, 4), normal(40, 4, seed=1), torch.arange(40))
        named = found.evaluation("there", [f"q{i}" for i in range(40)])
        assert named.outcomes["there/R@5"].mean() == pytest.approx(found.recall[5])
        bare = found.evaluation("there")
        assert not bare.outcomes  # nothing to tell the queries by
        assert named.with_intervals().intervals == bare.with_intervals().intervals
        metrics = [name for name in named.metrics if not name.endswith("_chance")]
        assert sorted(named.intervals) == sorted(metrics)
        for name in metrics:
            low, high = named.intervals[name]
            assert low <= named.metrics[name] <= high
            assert low < high

    def test_what_can_not_be_ranked_is_refused(self):
        queries, candidates, target = normal(3, 4), normal(5, 4), torch.arange(3)
        damaged = queries.clone()
        damaged[1, 2] = torch.nan
        with pytest.raises(DataError, match=r"1 of 3 queries.*row 1"):
            retrieval(damaged, candidates, target)
        with pytest.raises(DataError, match="4 and 3 dimensions"):
            retrieval(queries, normal(5, 3), target)
        with pytest.raises(DataError, match="0 to 4"):
            retrieval(queries, candidates, torch.tensor([0, 1, 5]))
        with pytest.raises(DataError, match=r"1 of 3 queries have no right candidate.*query 2"):
            retrieval(queries, candidates, torch.eye(3, 5).bool() & (torch.arange(3) < 2)[:, None])
        with pytest.raises(DataError, match="bool"):
            retrieval(queries, candidates, torch.eye(3, 5))
        with pytest.raises(DataError, match="bool"):
            retrieval(queries, candidates, torch.eye(5, 3).bool())
        with pytest.raises(DataError, match="ks"):
            retrieval(queries, candidates, target, ks=(0, 1))
        with pytest.raises(DataError, match="none of them 0"):
            retrieval(queries, candidates[:0], target)


class TestZeroShot:
    # Predicted by angle: 0, 0, 1, 2, 1; true: 0, 0, 1, 1, 0 (class 3 has no example).
    result = zero_shot(at(5, 10, 40, 50, 30), at(*ANGLES), torch.tensor([0, 0, 1, 1, 0]))

    def test_counts_of_a_hand_worked_case(self):
        result = self.result
        assert result.predictions.tolist() == [0, 0, 1, 2, 1]
        assert result.confusion.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
        assert result.accuracy == pytest.approx(3 / 5)
        assert result.per_class[:2].tolist() == pytest.approx([2 / 3, 1 / 2])
        assert result.per_class[2:].isnan().all()
        assert result.macro_recall == pytest.approx((2 / 3 + 1 / 2) / 2)

    def test_baselines(self):
        assert self.result.majority == pytest.approx(3 / 5)
        assert self.result.chance == 0.25
        metrics = self.result.metrics("zero_shot")
        assert metrics["zero_shot/accuracy_majority"] == pytest.approx(3 / 5)
        assert metrics["zero_shot/macro_recall_chance"] == 0.25
        assert metrics["zero_shot/top5_chance"] == 1.0

    def test_top5_counts_the_five_nearest(self):
        classes = at(*range(0, 80, 10))
        # From 1 degree the fifth class is at 40 degrees, the sixth at 50.
        assert zero_shot(at(1), classes, torch.tensor([4])).top5 == 1.0
        assert zero_shot(at(1), classes, torch.tensor([5])).top5 == 0.0
        assert zero_shot(at(1, 1), classes, torch.tensor([4, 5])).in_top5.tolist() == [1.0, 0.0]

    def test_a_long_class_vector_gains_nothing(self):
        classes = at(*ANGLES) * torch.tensor([1.0, 50.0, 1.0, 1.0])[:, None]
        assert zero_shot(at(5, 88), classes, torch.tensor([0, 3])).accuracy == 1.0

    def test_the_chunk_changes_nothing(self):
        x, classes, labels = normal(50, 8), normal(7, 8, seed=1), torch.arange(50) % 7
        whole, parts = zero_shot(x, classes, labels), zero_shot(x, classes, labels, chunk=3)
        assert torch.equal(whole.predictions, parts.predictions)
        assert whole.top5 == parts.top5

    def test_an_ensemble_is_the_mean_of_directions(self):
        embeddings = ensemble([at(10, 30) * torch.tensor([[100.0], [1.0]]), at(80)])
        torch.testing.assert_close(embeddings, at(20, 80))

    def test_labels_outside_the_classes_are_refused(self):
        with pytest.raises(DataError, match="labels run from 0 to 4; expected 0 to 3"):
            zero_shot(at(5, 6), at(*ANGLES), torch.tensor([0, 4]))
        with pytest.raises(DataError, match="integers"):
            zero_shot(at(5, 6), at(*ANGLES), torch.tensor([0.0, 1.0]))
        with pytest.raises(DataError, match="one per example"):
            zero_shot(at(5, 6), at(*ANGLES), torch.tensor([0]))


def clusters(per_class: int, classes: int = 3, noise: float = 0.3, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(classes).repeat(per_class)
    return 3 * torch.eye(classes, 10)[labels] + noise * normal(len(labels), 10, seed=seed), labels


class TestLinearProbe:
    def test_separable_classes_are_read(self):
        result = linear_probe(*clusters(20), *clusters(10, seed=1))
        assert result.accuracy == result.macro_f1 == 1.0
        assert result.majority == pytest.approx(1 / 3)
        assert result.c in STRENGTHS

    def test_labels_without_relation_are_not_read(self):
        x, y = clusters(100, classes=2)
        shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(1))]
        assert linear_probe(x, shuffled, *clusters(100, classes=2, seed=1)).accuracy < 0.7

    def test_the_test_labels_choose_nothing(self):
        train, (test_x, test_y) = clusters(20, noise=3.0), clusters(30, noise=3.0, seed=1)
        result = linear_probe(*train, test_x, test_y)
        reversed_result = linear_probe(*train, test_x, 2 - test_y)
        assert result.c == reversed_result.c
        assert torch.equal(result.predictions, reversed_result.predictions)

    def test_validation_chooses_the_regularisation(self):
        # Every strength reads these, so the strongest wins.
        assert linear_probe(*clusters(20), *clusters(5, seed=1)).c == min(STRENGTHS)
        # Under the strongest regularisation the rare class drowns in the frequent one.
        y = torch.tensor([0] * 90 + [1] * 10)
        x = 4.0 * y[:, None] + 0.3 * normal(100, 2)
        result = linear_probe(x, y, x, y)
        assert result.c > min(STRENGTHS)
        assert result.accuracy == 1.0

    def test_the_scale_of_a_dimension_plays_no_role(self):
        (train_x, train_y), (test_x, test_y) = clusters(20, noise=2.0), clusters(20, noise=2.0, seed=1)
        scale, shift = torch.logspace(-3, 3, 10), torch.linspace(-5, 5, 10)
        plain = linear_probe(train_x, train_y, test_x, test_y)
        scaled = linear_probe(train_x * scale + shift, train_y, test_x * scale + shift, test_y)
        assert torch.equal(plain.predictions, scaled.predictions)

    def test_majority_is_that_of_the_training_part(self):
        x = normal(10, 4)
        result = linear_probe(x, torch.tensor([1] * 7 + [0] * 3), x, torch.tensor([0] * 8 + [1] * 2))
        assert result.majority == pytest.approx(0.2)
        # Always 1: precision 0.2, recall 1 for class 1, and nothing for class 0.
        assert result.majority_macro_f1 == pytest.approx((2 * 0.2 / 1.2) / 2)
        assert result.metrics("probe")["probe/accuracy_majority"] == pytest.approx(0.2)

    def test_held_out_examples_come_from_every_class_that_can_spare_one(self):
        labels = np.array([0] * 20 + [1] * 2 + [2])
        held_out = _hold_out(labels, seed=0)
        assert [int(held_out[labels == c].sum()) for c in range(3)] == [4, 1, 0]
        assert np.array_equal(held_out, _hold_out(labels, seed=0))
        assert not np.array_equal(held_out, _hold_out(labels, seed=1))

    def test_one_shot_per_class_works(self):
        assert linear_probe(*clusters(1), *clusters(10, seed=1)).c == 1.0

    def test_one_class_is_refused(self):
        with pytest.raises(DataError, match="all training labels are 4"):
            linear_probe(normal(5, 3), torch.full((5,), 4), normal(2, 3), torch.tensor([4, 4]))


class TestNearest:
    def test_the_vote_of_a_hand_worked_case(self):
        train, labels = at(0, 10, 20, 60, 70), torch.tensor([0, 1, 1, 2, 2])
        test = at(1, 65, 30)
        assert nearest(train, labels, test, torch.tensor([0, 2, 1]), k=1).predictions.tolist() == [0, 2, 1]
        assert nearest(train, labels, test, torch.tensor([0, 2, 1]), k=3).predictions.tolist() == [1, 2, 1]
        assert nearest(train, labels, test, torch.tensor([0, 2, 1]), k=3).accuracy == pytest.approx(2 / 3)

    def test_confidence_is_the_share_of_votes(self):
        train, labels = at(0, 10, 20, 60, 70), torch.tensor([0, 1, 1, 2, 2])
        found = nearest(train, labels, at(1, 65), torch.tensor([1, 2]), k=3)
        assert found.confidence.tolist() == pytest.approx([2 / 3, 2 / 3])

    def test_direction_counts_and_not_distance(self):
        # The vector at 0 degrees is far away but points as the query does.
        train = at(0, 40) * torch.tensor([[100.0], [1.0]])
        assert nearest(train, torch.tensor([0, 1]), at(5), torch.tensor([0]), k=1).accuracy == 1.0

    def test_majority_is_that_of_the_training_part(self):
        result = nearest(at(0, 1, 50), torch.tensor([1, 1, 0]), at(0, 50, 50, 50), torch.tensor([1, 0, 0, 0]), k=1)
        assert result.accuracy == 1.0
        assert result.metrics("nearest") == {"nearest/accuracy": 1.0, "nearest/accuracy_majority": 0.25}

    @pytest.mark.parametrize("k", [0, 4])
    def test_k_has_to_fit(self, k):
        with pytest.raises(DataError, match="expected 1 to 3"):
            nearest(at(0, 1, 2), torch.arange(3), at(0), torch.tensor([0]), k=k)


class TestBootstrapInterval:
    def test_it_has_the_width_of_the_normal_approximation(self):
        right = torch.tensor([1.0] * 300 + [0.0] * 100)
        low, high = bootstrap_interval(right, n=4000)
        half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
        assert low == pytest.approx(0.75 - half, abs=0.004)
        assert high == pytest.approx(0.75 + half, abs=0.004)

    def test_a_lower_level_is_narrower(self):
        values = normal(100)
        wide, narrow = bootstrap_interval(values), bootstrap_interval(values, level=0.5)
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    def test_the_seed_decides(self):
        values = normal(30)
        assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
        assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)

    def test_other_statistics_see_whole_rows(self):
        pairs = torch.stack([torch.arange(20.0), torch.arange(20.0)], 1)
        assert bootstrap_interval(pairs, lambda rows: float(np.abs(rows[:, 0] - rows[:, 1]).max())) == (0.0, 0.0)
        low, high = bootstrap_interval(torch.arange(101.0), np.median)
        assert 30 < low < 50 < high < 70

    def test_macro_means_by_hand_and_as_scikit_learn(self):
        # Class 0: 2 of 3 found, 1 of 3 answers wrong; class 1: 1 of 2 found, half of the answers wrong.
        pairs = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 0]])
        assert macro_recall(pairs) == pytest.approx((2 / 3 + 1 / 2) / 2)
        assert macro_f1(pairs) == pytest.approx((4 / 6 + 2 / 4) / 2)
        drawn = np.random.default_rng(0).integers(0, 6, (40, 2))
        assert macro_f1(drawn) == pytest.approx(f1_score(*drawn.T, average="macro", zero_division=0.0))
        assert macro_recall(drawn) == pytest.approx(balanced_accuracy_score(*drawn.T))

    def test_nothing_is_refused(self):
        with pytest.raises(DataError, match="at least one"):
            bootstrap_interval(torch.empty(0))
        with pytest.raises(DataError, match="level is 95"):
            bootstrap_interval(torch.ones(3), level=95)


class TestProjection:
    def test_pca_keeps_the_two_widest_directions(self):
        spread = torch.tensor([0.1, 5.0, 0.1, 2.0])
        points = torch.from_numpy(two_dimensional(normal(200, 4) * spread))
        assert points.shape == (200, 2)
        expected = normal(200, 4) * spread
        for axis, column in ((0, 1), (1, 3)):
            correlation = torch.corrcoef(torch.stack([points[:, axis], expected[:, column]]))[0, 1]
            assert abs(float(correlation)) > 0.99

    @pytest.mark.parametrize("shape", [(1, 5), (6, 1), (1, 1)])
    def test_too_little_for_two_axes_leaves_zeros(self, shape):
        points = two_dimensional(normal(*shape))
        assert points.shape == (shape[0], 2)
        assert (points[:, 1] == 0).all()

    def test_tsne_keeps_neighbours_together(self):
        x, labels = clusters(15)
        points = torch.from_numpy(two_dimensional(x, method="tsne"))
        assert nearest(points - points.mean(0), labels, points - points.mean(0), labels, k=3).accuracy > 0.9

    @pytest.mark.parametrize("method", ["pca", "tsne"])
    def test_it_repeats(self, method):
        x, _ = clusters(5)
        assert np.array_equal(two_dimensional(x, seed=1, method=method), two_dimensional(x, seed=1, method=method))

    def test_tsne_has_a_limit(self):
        with pytest.raises(DataError, match="2001 points"):
            two_dimensional(torch.zeros(TSNE_LIMIT + 1, 3), method="tsne")
        with pytest.raises(DataError, match="4 to 2000"):
            two_dimensional(normal(3, 3), method="tsne")


class TestLabelSimilarity:
    def test_each_label_counts_with_its_most_similar_example(self):
        gallery, labels = at(0, 60, 90), torch.tensor([2, 0, 2])
        got = label_similarity(5 * at(30, 80), gallery, labels, 3, chunk=1)
        cosine = lambda degrees: float(np.cos(np.deg2rad(degrees)))  # noqa: E731
        expected = torch.tensor([[cosine(30), -1, cosine(30)], [cosine(20), -1, cosine(10)]])
        torch.testing.assert_close(got, expected)

    def test_labels_outside_the_range_and_other_widths_are_refused(self):
        with pytest.raises(DataError):
            label_similarity(at(0), at(0, 1), torch.tensor([0, 2]), 2)
        with pytest.raises(DataError):
            label_similarity(at(0), torch.ones(2, 3), torch.tensor([0, 1]), 2)


def test_a_class_that_everything_resembles_wins_no_longer_by_that_alone():
    others = torch.tensor([[0.9, 0.1], [0.7, 0.1], [0.8, 0.4]])
    found = relative(torch.tensor([[0.8, 0.5], [0.95, 0.2]]), others)
    third = 0.03**0.5
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.3 / third], [1.5, 0.0]]))
    assert found.argmax(1).tolist() == [1, 0]
