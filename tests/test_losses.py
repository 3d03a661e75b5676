"""Contrastive losses: hand-worked numbers, independent loops, groups, precision, and rows of other processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmpt.losses.contrastive import grouped_contrastive, sigmoid_contrastive, softmax_contrastive

I2 = torch.eye(2)
LANGCELL = I2, torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor(20.0)


def rows(n, width=6, seed=0):
    return F.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def near(value, abs=1e-5):
    return pytest.approx(value, abs=abs)


class TestSoftmax:
    def test_langcell_example(self):
        # S = [[20, 12], [0, 16]]
        result = softmax_contrastive(*LANGCELL)
        assert result.loss_a.item() == near(0.000167759, 1e-7)
        assert result.loss_b.item() == near(0.009074980, 1e-6)
        assert result.loss.item() == near(0.004621370, 1e-6)
        assert result.accuracy.item() == 1.0

    @pytest.mark.parametrize(
        ("same_group", "loss_a", "loss_b"),
        [("soft", 6.000168, 6.009075), ("mask", 0.0, 0.0), ("ignore", 0.000167759, 0.009074980)],
    )
    def test_langcell_example_with_one_text_for_both_cells(self, same_group, loss_a, loss_b):
        result = softmax_contrastive(*LANGCELL, groups=torch.tensor([5, 5]), same_group=same_group)
        assert result.loss_a.item() == near(loss_a)
        assert result.loss_b.item() == near(loss_b)
        assert result.loss.item() == near((loss_a + loss_b) / 2)

    def test_odm_examples(self):
        same = F.normalize(torch.ones(4, 3), dim=-1)
        for scale in (1.0, 100.0):
            assert softmax_contrastive(same, same, torch.tensor(scale)).loss.item() == near(math.log(4))
        assert softmax_contrastive(I2, I2, torch.tensor(1.0)).loss.item() == near(0.313262)
        images = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        assert softmax_contrastive(images, I2, torch.tensor(2.0)).loss.item() == near(0.298736)

    def test_hicl_example(self):
        # rows of similarities (.9, .1) and (.2, .8), at temperatures .5 and .05; double precision for the second
        similarity = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
        keys = torch.eye(2, dtype=torch.float64)
        for temperature, expected in ((0.5, 0.223592), (0.05, 3.128e-6)):
            result = softmax_contrastive(similarity, keys, torch.tensor(1 / temperature, dtype=torch.float64))
            assert result.loss_a.item() == pytest.approx(expected, rel=2e-4)

    def test_directions_swap_with_the_arguments(self):
        a, b, scale = rows(5), rows(5, seed=1), torch.tensor(7.0)
        there, back = softmax_contrastive(a, b, scale), softmax_contrastive(b, a, scale)
        assert there.loss_a.item() == near(back.loss_b.item())
        assert abs(there.loss_a - there.loss_b) > 1e-3

    @pytest.mark.parametrize("same_group", ["soft", "mask", "ignore"])
    def test_against_a_loop(self, same_group):
        a, b, scale = rows(7), rows(7, seed=1), 5.0
        groups = [0, 1, 0, 2, 2, 2, 3]
        expected = []
        for queries, keys in ((a, b), (b, a)):
            losses = []
            for i in range(7):
                logits = [scale * float(queries[i] @ keys[j]) for j in range(7)]
                together = [j for j in range(7) if groups[j] == groups[i]]
                kept = [j for j in range(7) if same_group != "mask" or j == i or j not in together]
                total = math.log(sum(math.exp(logits[j]) for j in kept))
                targets = together if same_group == "soft" else [i]
                losses.append(sum(total - logits[j] for j in targets) / len(targets))
            expected.append(sum(losses) / 7)
        result = softmax_contrastive(a, b, torch.tensor(scale), groups=torch.tensor(groups), same_group=same_group)
        assert [result.loss_a.item(), result.loss_b.item()] == [near(expected[0]), near(expected[1])]

    @pytest.mark.parametrize("same_group", ["soft", "mask", "ignore"])
    def test_groups_of_one_change_nothing(self, same_group):
        a, b, scale = rows(6), rows(6, seed=1), torch.tensor(9.0)
        plain = softmax_contrastive(a, b, scale).loss
        assert softmax_contrastive(a, b, scale, groups=torch.arange(6) * 3, same_group=same_group).loss.item() == near(
            plain.item()
        )

    def test_accuracy_counts_a_member_of_the_group_as_right(self):
        a, b = I2, I2.flip(0)  # each row's best match is the other one
        assert softmax_contrastive(a, b, torch.tensor(5.0)).accuracy == 0.0
        assert softmax_contrastive(a, b, torch.tensor(5.0), groups=torch.tensor([1, 1])).accuracy == 1.0


class TestSigmoid:
    @pytest.mark.parametrize("same_group", ["soft", "mask", "ignore"])
    def test_against_a_loop(self, same_group):
        a, b, scale, bias = rows(6), rows(6, seed=1), 5.0, -2.0
        groups = [0, 1, 0, 2, 2, 2]
        total = 0.0
        for i in range(6):
            for j in range(6):
                together = groups[i] == groups[j]
                if same_group == "mask" and together and i != j:
                    continue
                sign = 1 if i == j or (same_group == "soft" and together) else -1
                total += math.log1p(math.exp(-sign * (scale * float(a[i] @ b[j]) + bias)))
        result = sigmoid_contrastive(
            a, b, torch.tensor(scale), torch.tensor(bias), groups=torch.tensor(groups), same_group=same_group
        )
        assert result.loss.item() == near(total / 6)

    def test_pairs_are_on_the_diagonal(self):
        # without groups: four pairs at logits 10 * I + (-5): two at +5 matched, two at -5 not matched
        result = sigmoid_contrastive(I2, I2, torch.tensor(10.0), torch.tensor(-5.0))
        assert result.loss.item() == near(2 * math.log1p(math.exp(-5)))
        assert result.accuracy == 1.0


class TestGrouped:
    GROUPS = torch.tensor([0, 1, 0, 2, 0, 1, 3])

    def test_against_a_loop(self):
        a, scale, groups = rows(7), 4.0, self.GROUPS.tolist()
        losses = []
        for i in range(7):
            others = [j for j in range(7) if j != i]
            positives = [j for j in others if groups[j] == groups[i]]
            if not positives:
                continue
            total = math.log(sum(math.exp(scale * float(a[i] @ a[j])) for j in others))
            losses.append(sum(total - scale * float(a[i] @ a[j]) for j in positives) / len(positives))
        result = grouped_contrastive(a, torch.tensor(scale), self.GROUPS)
        assert len(losses) == 5
        assert result.loss.item() == near(sum(losses) / 5)

    def test_two_views_are_nt_xent(self):
        # E2S2's contrast: two views of two sentences, both the identity, temperature 1; its sum over two is 1.102889
        both = torch.cat([I2, I2])
        loss = grouped_contrastive(both, torch.tensor(1.0), torch.tensor([0, 1, 0, 1])).loss.item()
        assert loss == near(0.551445)
        assert 2 * loss == near(1.102889)

    def test_accuracy_is_over_the_rows_that_have_positives(self):
        a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        result = grouped_contrastive(a, torch.tensor(3.0), torch.tensor([0, 0, 1, 2]))
        assert result.accuracy.item() == near(1.0)
        # 0 and 2 are positives, but 0 is nearest to 1, and 2 to 3
        assert grouped_contrastive(a, torch.tensor(3.0), torch.tensor([0, 1, 0, 2])).accuracy.item() == 0.0

    def test_without_positives_the_loss_is_zero_and_differentiable(self):
        a = rows(4).requires_grad_()
        result = grouped_contrastive(a, torch.tensor(3.0), torch.arange(4))
        result.loss.backward()
        assert result.loss.item() == 0.0
        assert torch.isfinite(a.grad).all()

    def test_a_row_alone_is_finite(self):
        assert grouped_contrastive(rows(1), torch.tensor(3.0), torch.zeros(1, dtype=torch.long)).loss.item() == 0.0


def losses_of(a, b, groups, scale, bias, **others):
    all_a, all_b, all_groups, offset = (others.get(k) for k in ("all_a", "all_b", "all_groups", "offset"))
    given = {} if all_a is None else {"all_groups": all_groups, "offset": offset}
    with_a = {} if all_a is None else {"all_a": all_a}
    with_b = {} if all_a is None else {"all_b": all_b}
    yield softmax_contrastive(a, b, scale, groups=groups, same_group="soft", **with_a, **with_b, **given).loss
    yield softmax_contrastive(a, b, scale, groups=groups, same_group="mask", **with_a, **with_b, **given).loss
    yield sigmoid_contrastive(a, b, scale, bias, groups=groups, same_group="soft", **with_b, **given).loss
    yield sigmoid_contrastive(a, b, scale, bias, groups=groups, same_group="mask", **with_b, **given).loss
    yield grouped_contrastive(a, scale, groups, **with_a, **given).loss


def test_mean_over_parts_is_the_whole_batch():
    # two processes with three rows each; the groups lie unevenly: 3 rows with positives against 1
    a, b, groups = rows(6), rows(6, seed=1), torch.tensor([0, 0, 1, 2, 1, 3])
    scale, bias = torch.tensor(6.0), torch.tensor(-3.0)
    whole = list(losses_of(a, b, groups, scale, bias))
    parts = [
        list(
            losses_of(
                a[o : o + 3],
                b[o : o + 3],
                groups[o : o + 3],
                scale,
                bias,
                all_a=a,
                all_b=b,
                all_groups=groups,
                offset=o,
            )
        )
        for o in (0, 3)
    ]
    for full, first, second in zip(whole, *parts, strict=True):
        assert ((first + second) / 2).item() == near(full.item(), 1e-6)


def test_permuting_the_batch_changes_nothing():
    a, b, groups = rows(6), rows(6, seed=1), torch.tensor([0, 0, 1, 2, 1, 3])
    scale, bias, order = torch.tensor(6.0), torch.tensor(-3.0), torch.tensor([3, 1, 5, 0, 2, 4])
    for before, after in zip(
        losses_of(a, b, groups, scale, bias), losses_of(a[order], b[order], groups[order], scale, bias), strict=True
    ):
        assert before.item() == near(after.item(), 1e-6)


def test_autocast_does_not_round_the_logits():
    a, b, groups = rows(16, 32), rows(16, 32, seed=1), torch.arange(16) // 2
    scale, bias = torch.tensor(100.0), torch.tensor(-10.0)
    exact = list(losses_of(a, b, groups, scale, bias))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = list(losses_of(a, b, groups, scale, bias))
    for one, other in zip(exact, mixed, strict=True):
        assert other.item() == pytest.approx(one.item(), rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    a, b, groups = rows(5).double(), rows(5, seed=1).double(), torch.tensor([0, 1, 0, 2, 1])
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (a, b, scale, bias)]
    assert torch.autograd.gradcheck(lambda a, b, s, t: tuple(losses_of(a, b, groups, s, t)), inputs)


class TestChunks:
    GROUPS = torch.tensor([0, 0, 1, 2, 1, 3, 0, 4, 4, 5, 5])

    @pytest.fixture(params=["plain", "soft", "mask", "ignore", "sigmoid", "sigmoid soft", "sigmoid mask", "grouped"])
    def loss(self, request):
        """(a, b, scale, bias, others) -> result, for each variant."""
        kind, _, same_group = request.param.rpartition(" ")
        if request.param == "grouped":
            return lambda a, b, scale, bias, groups, all_b=None, **o: grouped_contrastive(a, scale, groups, **o)
        if "sigmoid" in request.param:
            with_groups = {"same_group": same_group} if kind else None
            return lambda a, b, scale, bias, groups, all_a=None, all_groups=None, **o: sigmoid_contrastive(
                a, b, scale, bias, **o, **(with_groups | {"groups": groups, "all_groups": all_groups} if kind else {})
            )
        if request.param == "plain":
            return lambda a, b, scale, bias, groups, all_groups=None, **o: softmax_contrastive(a, b, scale, **o)
        return lambda a, b, scale, bias, groups, **o: softmax_contrastive(
            a, b, scale, groups=groups, same_group=request.param, **o
        )

    def inputs(self, dtype, scale=6.0):
        tensors = [rows(11).to(dtype), rows(11, seed=1).to(dtype)]
        return [
            t.requires_grad_() for t in (*tensors, torch.tensor(scale, dtype=dtype), torch.tensor(-3.0, dtype=dtype))
        ]

    def measure(self, loss, inputs, factor=1.0, **options):
        for tensor in inputs:
            tensor.grad = None
        result = loss(*inputs, self.GROUPS, **options)
        (factor * result.loss).backward()
        return result, [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
    @pytest.mark.parametrize("chunk", [1, 4, 10])
    def test_value_and_gradients_are_those_of_the_whole_matrix(self, loss, dtype, tolerance, chunk):
        inputs = self.inputs(dtype)
        whole, expected = self.measure(loss, inputs, factor=3.0)
        result, gradients = self.measure(loss, inputs, factor=3.0, chunk=chunk)
        for name, value in whole._asdict().items():
            assert getattr(result, name).item() == pytest.approx(value.item(), rel=tolerance), name
        assert result.accuracy == whole.accuracy
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())

    def test_gradients_of_chunks_are_those_of_finite_differences(self, loss):
        inputs = self.inputs(torch.float64, 2.0)
        assert torch.autograd.gradcheck(lambda *given: loss(*given, self.GROUPS, chunk=3).loss, inputs)

    def test_rows_of_other_processes_count_as_before(self, loss):
        inputs = self.inputs(torch.float64)
        others = {"all_a": rows(22, seed=3).double(), "all_b": rows(22, seed=4).double(), "offset": 7}
        others["all_groups"] = torch.arange(22) % 6
        others["all_groups"][7:18] = self.GROUPS
        whole, expected = self.measure(loss, inputs, **others)
        result, gradients = self.measure(loss, inputs, chunk=4, **others)
        assert result.loss.item() == pytest.approx(whole.loss.item(), rel=1e-13)
        assert result.accuracy == whole.accuracy
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)

    def test_large_scales_stay_finite(self, loss):
        inputs = self.inputs(torch.float32, 1000.0)
        whole, expected = self.measure(loss, inputs)
        result, gradients = self.measure(loss, inputs, chunk=4)
        assert result.loss.item() == pytest.approx(whole.loss.item(), rel=1e-5)
        for ours, theirs in zip(gradients, expected, strict=True):
            assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() + 1e-6

    def test_autocast_does_not_round_the_logits(self, loss):
        inputs = self.inputs(torch.float32, 100.0)
        exact, expected = self.measure(loss, inputs, chunk=4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed, gradients = self.measure(loss, inputs, chunk=4)
        assert mixed.loss.item() == exact.loss.item()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))

    def test_without_gradient_there_is_none(self, loss):
        inputs = self.inputs(torch.float32)
        with torch.no_grad():
            result = loss(*inputs, self.GROUPS, chunk=4)
        assert not result.loss.requires_grad
        assert result.loss.item() == pytest.approx(loss(*inputs, self.GROUPS).loss.item(), rel=1e-6)

    def test_no_tensor_is_as_large_as_the_matrix(self, loss):
        class Largest(TorchDispatchMode):
            entries = 0

            def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
                output = function(*arguments, **(keywords or {}))
                for tensor in output if isinstance(output, tuple | list) else [output]:
                    if isinstance(tensor, torch.Tensor):
                        self.entries = max(self.entries, tensor.numel())
                return output

        a, b = rows(512, 8).requires_grad_(), rows(512, 8, seed=1).requires_grad_()
        scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        with Largest() as largest:
            loss(a, b, scale, bias, torch.arange(512) // 2, chunk=32).loss.backward()
        assert largest.entries == 32 * 512
