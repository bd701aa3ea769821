"""Label regression, kernels and ridge against scikit-learn and direct solves; head choice on planted heads."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from sklearn.metrics import pairwise
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from iclgd_lens.kernels.labels import (
    choose_head,
    hidden_kernel,
    kernel_ridge,
    label_agreement,
    label_correlation,
    label_kernel,
    label_regression,
    median_bandwidth,
    one_hot_labels,
)

LABELS = torch.tensor([0, 2, 1, 2, 0, 0])
PLANTED = (1, 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def halves(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The queries that change which head is chosen, and the others, found by asking: a head that is right on one query only wins
    where, and only where, that query is looked at."""
    target = torch.full((n, 2), 0.5, dtype=torch.float64)
    target[:, 0] += 0.4 * random(n, seed=9).tanh()
    target[:, 1] = 1 - target[:, 0]
    looked_at = []
    for query in range(n):
        estimates = torch.full((1, 2, n, 2), 0.5, dtype=torch.float64)
        estimates[0, 1, query] = target[query]
        looked_at.append(choose_head(estimates, target, seed).head == 1)
    chosen = torch.tensor(looked_at)
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def planted(n: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Estimates of noise but for one head, which is near the target."""
    target = random(n, 3, seed=seed).softmax(dim=-1)
    estimates = random(3, 4, n, 3, seed=seed + 1).softmax(dim=-1)
    estimates[PLANTED] = 0.9 * target + 0.1 * estimates[PLANTED]
    return estimates, target


def test_labels_become_rows_of_zeros_and_a_one():
    for dtype in (torch.long, torch.int32):
        found = one_hot_labels(torch.tensor([2, 0], dtype=dtype), 3)
        assert found.dtype == torch.float32
        assert found.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match=rf"class indices from 0 to 2; got \[0, {label}\]"):
        one_hot_labels(torch.tensor([0, label]), 3)
    with pytest.raises(ValueError, match="class indices from 0 to 2"):
        label_regression(torch.ones(1, 2), torch.tensor([0, label]), 3)


def test_label_regression_is_scikit_learns_weighted_neighbours():
    kernel = random(2, 3, len(LABELS)).exp()
    found = label_regression(kernel, LABELS, n_labels=3)
    assert found.shape == (2, 3, 3)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(2, 3).double(), atol=1e-12, rtol=0)
    for batch in range(2):
        # Distances are 1/κ, so that the weights, their inverses, are the kernel.
        neighbours = KNeighborsRegressor(n_neighbors=len(LABELS), metric="precomputed", weights=lambda distances: 1 / distances)
        neighbours.fit(torch.zeros(len(LABELS), len(LABELS)).numpy(), torch.eye(3, dtype=torch.float64)[LABELS].numpy())
        expected = torch.from_numpy(neighbours.predict((1 / kernel[batch]).numpy()))
        torch.testing.assert_close(found[batch], expected, atol=1e-12, rtol=0)


def test_label_regression_of_half_precision_is_in_float32_and_undefined_without_weight():
    found = label_regression(torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16), torch.tensor([1, 0]), 2)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [0.75, 0.25]
    assert found[1].isnan().all()


@pytest.mark.unchecked_shapes
def test_a_kernel_that_does_not_fit_the_labels_is_refused():
    with pytest.raises(ValueError, match=r"kernel must have the shape .* with 6 points; got \[2, 5\]"):
        label_regression(torch.ones(2, 5), LABELS, 3)
    with pytest.raises(ValueError, match="1 of 6 entries that are not finite"):
        label_regression(torch.tensor([[1.0, 1.0, 1.0, math.nan, 1.0, 1.0]]), LABELS, 3)


def test_the_label_kernel_is_one_for_equal_labels_and_so_finds_the_answer():
    queries = torch.tensor([2, 0])
    kernel = label_kernel(queries, LABELS)
    assert kernel.tolist() == [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 1, 1]]
    assert torch.equal(label_regression(kernel, LABELS, 3), one_hot_labels(queries, 3))


def test_the_label_kernel_refuses_unknown_labels_by_name_place_and_value():
    with pytest.raises(ValueError, match="labels of queries must be known; number 1 is -1"):
        label_kernel(torch.tensor([0, -1, -7]), LABELS)
    with pytest.raises(ValueError, match="labels of demonstrations must be known; number 0 is -2"):
        label_kernel(torch.tensor([0]), torch.tensor([-2, 1]))


@pytest.mark.parametrize("kind", ["linear", "cosine", "rbf"])
def test_hidden_kernels_are_scikit_learns(kind):
    queries, points, bandwidth = random(2, 3, 5, seed=1), random(2, 4, 5, seed=2), 1.7
    found = hidden_kernel(queries, points, kind, bandwidth if kind == "rbf" else None)
    assert found.shape == (2, 3, 4)
    reference = {
        "linear": pairwise.linear_kernel,
        "cosine": pairwise.cosine_similarity,
        "rbf": lambda a, b: pairwise.rbf_kernel(a, b, gamma=1 / (2 * bandwidth**2)),
    }[kind]
    expected = torch.stack([torch.from_numpy(reference(a.numpy(), b.numpy())) for a, b in zip(queries, points, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "rbf"])
def test_queries_broadcast_against_points_and_half_precision_is_widened(kind):
    queries, points = random(2, 3, 5, seed=1).bfloat16(), random(4, 5, seed=2).bfloat16()
    found = hidden_kernel(queries, points, kind)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1], hidden_kernel(queries[1], points, kind))


def test_cosine_is_undefined_where_a_state_is_zero():
    found = hidden_kernel(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.eye(2), "cosine")
    assert found.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("n", [4, 6], ids=["even number of distances", "odd number of distances"])
def test_the_bandwidth_is_the_median_distance_of_different_points_in_each_batch_element(n):
    points = random(2, n, 3)
    found = median_bandwidth(points)
    assert found.shape == (2,)
    for batch in range(2):
        distances = sorted(math.dist(a, b) for a, b in combinations(points[batch].tolist(), 2))
        middle = (distances[(len(distances) - 1) // 2] + distances[len(distances) // 2]) / 2
        assert float(found[batch]) == pytest.approx(middle, rel=1e-12)


def test_without_a_bandwidth_every_batch_element_has_its_own_median():
    queries, points = random(2, 3, 5, seed=1), random(2, 4, 5, seed=2)
    points[1] *= 3
    found = hidden_kernel(queries, points, "rbf")
    for batch in range(2):
        width = float(median_bandwidth(points[batch]))
        torch.testing.assert_close(found[batch], hidden_kernel(queries[batch], points[batch], "rbf", width))


def test_points_near_each_other_and_far_from_zero_keep_their_distance():
    """Beyond 25 points torch would take the difference of squared lengths, and find nothing left of it in float32."""
    points = 1000 + torch.arange(60.0)[:, None] / 64
    between = hidden_kernel(points, points, "rbf", bandwidth=0.5)
    expected = torch.exp(-(points.double() - points.double().T).square() / 0.5)
    torch.testing.assert_close(between.double(), expected, atol=1e-6, rtol=0)


def test_a_small_bandwidth_tells_equal_states_from_others():
    """Its square is zero in float32."""
    points = torch.tensor([[0.0], [1.0]])
    assert hidden_kernel(points, points, "rbf", bandwidth=1e-30).tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_a_bandwidth_that_is_none_is_refused_with_its_value(bandwidth):
    with pytest.raises(ValueError, match=f"bandwidth must be a finite number above 0; bandwidth={bandwidth}"):
        hidden_kernel(random(2, 3), random(4, 3), "rbf", bandwidth)


def test_hidden_kernels_refuse_what_they_cannot_do():
    queries, points = random(2, 3), random(4, 3)
    with pytest.raises(ValueError, match="kind must be one of 'linear', 'cosine', 'rbf'; got 'laplacian'"):
        hidden_kernel(queries, points, "laplacian")
    with pytest.raises(ValueError, match=r"only the 'rbf' kernel has a bandwidth; got bandwidth=1\.0 with 'linear'"):
        hidden_kernel(queries, points, "linear", 1.0)
    with pytest.raises(ValueError, match="bandwidth must be a finite number above 0; the median distance between the points is 0"):
        hidden_kernel(queries, torch.ones(4, 3).double(), "rbf")
    one_batch_alike = torch.stack([random(4, 3), torch.ones(4, 3).double()])
    with pytest.raises(ValueError, match="the median distance between the points is 0"):
        hidden_kernel(queries, one_batch_alike, "rbf")
    with pytest.raises(ValueError, match="needs two of them, got 1; give a bandwidth"):
        hidden_kernel(queries, points[:1], "rbf")
    for kind in ("linear", "cosine", "rbf"):
        with pytest.raises(ValueError, match="queries has 1 of 6 entries that are not finite"):
            hidden_kernel(queries.index_fill(0, torch.tensor([0]), 0.0) + torch.tensor([[0, math.inf, 0], [0, 0, 0]]), points, kind)
        with pytest.raises(ValueError, match="points has 12 of 12 entries that are not finite"):
            hidden_kernel(queries, points * math.nan, kind)


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 100.0])
def test_kernel_ridge_is_the_direct_solve(ridge):
    points, queries = random(6, 4, seed=1), random(3, 4, seed=2)
    between, to = (hidden_kernel(x, points, "rbf") for x in (points, queries))
    values = torch.eye(3, dtype=torch.float64)[LABELS]
    expected = to @ torch.linalg.solve(between + ridge * torch.eye(6, dtype=torch.float64), values)
    found = kernel_ridge(between, to, values, ridge)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    single = kernel_ridge(between.float(), to.float(), values.float(), ridge)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.inf, math.nan])
def test_a_ridge_that_is_none_is_refused(ridge):
    with pytest.raises(ValueError, match=f"ridge must be a number, finite and above 0; got {ridge}"):
        kernel_ridge(torch.eye(2), torch.ones(1, 2), torch.eye(2), ridge)


@pytest.mark.unchecked_shapes
def test_kernel_ridge_refuses_kernels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"between_points must have the shape .* with 2 points; got \[3, 3\]"):
        kernel_ridge(torch.eye(3), torch.ones(1, 2), torch.eye(2), 1.0)
    with pytest.raises(ValueError, match=r"to_points must have the shape .* with 2 points; got \[1, 3\]"):
        kernel_ridge(torch.eye(2), torch.ones(1, 3), torch.eye(2), 1.0)
    with pytest.raises(ValueError, match=r"between_points must be square; got \[3, 2\]"):
        kernel_ridge(torch.ones(3, 2), torch.ones(1, 2), torch.eye(2), 1.0)
    with pytest.raises(ValueError, match="to_points has 1 of 2 entries that are not finite"):
        kernel_ridge(torch.eye(2), torch.tensor([[math.nan, 1.0]]), torch.eye(2), 1.0)


def test_agreement_is_one_for_the_targets_label_and_shared_among_tied_ones():
    target = torch.tensor([[0.1, 0.7, 0.2]]).expand(5, 3)
    estimates = torch.tensor([[0.2, 0.5, 0.3], [0.5, 0.2, 0.3], [0.4, 0.4, 0.2], [0.4, 0.2, 0.4], [1 / 3] * 3])
    assert label_agreement(estimates, target).tolist() == pytest.approx([1, 0, 1 / 2, 0, 1 / 3])
    batched = label_agreement(estimates.expand(2, 3, 5, 3), target)
    assert batched.shape == (2, 3, 5)
    assert torch.equal(batched[1, 2], label_agreement(estimates, target))


def test_agreement_is_undefined_where_an_entry_is_not_finite():
    estimates, target = torch.eye(4), torch.eye(4).clone()
    estimates[1, 0], estimates[2, 3], target[3, 0] = math.nan, math.inf, math.nan
    assert label_agreement(estimates, target).isnan().tolist() == [False, True, True, True]


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 3, 3), (3,)])
def test_agreement_refuses_other_queries_or_labels(shape):
    with pytest.raises(ValueError, match="not of the same queries and labels"):
        label_agreement(torch.ones(shape), torch.ones(4, 3))


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_head_is_chosen(seed):
    estimates, target = planted(seed=seed)
    chosen = choose_head(estimates, target, seed)
    assert (chosen.layer, chosen.head) == PLANTED
    assert (chosen.chosen_on, chosen.scored_on) == (20, 20)
    assert chosen.correlation > 0.9
    assert chosen.agreement > 0.9


@pytest.mark.parametrize("n", [4, 7, 10])
def test_the_queries_are_split_into_halves(n):
    estimates, target = planted(n)
    chosen = choose_head(estimates, target)
    assert (chosen.chosen_on, chosen.scored_on) == (n // 2, n - n // 2)


def test_the_half_that_is_scored_is_not_looked_at_and_the_other_is_not_scored():
    estimates, target = planted(n=12)
    chosen_on, scored_on = halves(12)
    assert (len(chosen_on), len(scored_on)) == (6, 6)
    found = choose_head(estimates, target)
    layer, head = found.layer, found.head
    expected = torch.corrcoef(torch.stack([estimates[layer, head, scored_on].flatten(), target[scored_on].flatten()]))[0, 1]
    assert found.correlation == pytest.approx(float(expected), abs=1e-10)
    same = estimates[layer, head, scored_on].argmax(dim=-1) == target[scored_on].argmax(dim=-1)
    assert found.agreement == pytest.approx(float(same.double().mean()), abs=1e-6)

    # The scored half's targets point elsewhere: the score falls, the choice stays.
    turned = target.clone()
    turned[scored_on] = turned[scored_on].roll(1, dims=-1)
    moved = choose_head(estimates, turned)
    assert (moved.layer, moved.head) == (layer, head)
    assert moved.correlation < found.correlation - 0.5
    assert moved.agreement < found.agreement

    # Another head is right on the half that chooses: the choice moves, and is scored where it is wrong.
    rival = estimates.clone()
    rival[0, 1, chosen_on] = target[chosen_on]
    tempted = choose_head(rival, target)
    assert (tempted.layer, tempted.head) == (0, 1)
    assert tempted.correlation < 0.9


def test_the_head_of_the_highest_correlation_is_chosen_not_of_the_largest():
    """Over queries and labels of the half at once: against numpy's correlation, head by head."""
    estimates, target = random(3, 4, 20, 2, seed=5).softmax(dim=-1), random(20, 2, seed=6).softmax(dim=-1)
    chosen_on, _ = halves(20)
    wanted = target[chosen_on].flatten()
    correlations = {
        (layer, head): float(torch.corrcoef(torch.stack([estimates[layer, head, chosen_on].flatten(), wanted]))[0, 1])
        for layer in range(3)
        for head in range(4)
    }
    chosen = choose_head(estimates, target)
    assert (chosen.layer, chosen.head) == max(correlations, key=correlations.__getitem__)


def test_a_seed_means_one_split_and_seeds_mean_several():
    estimates, target = planted(20)
    assert choose_head(estimates, target, seed=1) == choose_head(estimates, target, seed=1)
    splits = {tuple(halves(12, seed)[0].tolist()) for seed in range(4)}
    assert len(splits) == 4


def test_ties_go_to_the_lower_layer_then_to_the_lower_head():
    estimates, target = planted()
    estimates[1, 3] = estimates[2, 0] = estimates[PLANTED]
    chosen = choose_head(estimates, target)
    assert (chosen.layer, chosen.head) == PLANTED
    estimates[0, 3] = estimates[PLANTED]
    assert choose_head(estimates, target) == replace(chosen, layer=0, head=3)


def test_a_head_without_a_correlation_is_not_chosen_while_another_has_one():
    estimates, target = planted()
    estimates[:] = 1 / 3
    estimates[0, 0] = math.nan
    estimates[2, 3] = 1 - target  # As wrong as can be, and still defined.
    chosen = choose_head(estimates, target)
    assert (chosen.layer, chosen.head) == (2, 3)
    assert chosen.correlation == pytest.approx(-1)


def test_what_rounding_leaves_of_a_constant_is_no_correlation():
    estimates, target = planted()
    estimates[0, 1] = 1 / 3 + 1e-8 * target
    chosen = choose_head(estimates, target)
    assert (chosen.layer, chosen.head) == PLANTED


def test_where_no_head_has_a_correlation_the_first_is_scored_at_chance():
    _, target = planted()
    chosen = choose_head(torch.full((2, 3, 40, 3), 1 / 3, dtype=torch.float64), target)
    assert (chosen.layer, chosen.head) == (0, 0)
    assert math.isnan(chosen.correlation)
    assert chosen.agreement == pytest.approx(1 / 3)


@pytest.mark.unchecked_shapes
def test_head_choice_refuses_too_few_queries_and_other_shapes():
    estimates, target = planted(n=5)
    with pytest.raises(ValueError, match="needs at least 4, got 3"):
        choose_head(estimates[:, :, :3], target[:3])
    with pytest.raises(ValueError, match="not of the same queries and labels"):
        choose_head(estimates, target[:4])
    with pytest.raises(ValueError, match="not of the same queries and labels"):
        choose_head(estimates, target[:, :2])
    with pytest.raises(ValueError, match=r"shape \[layer, head, query, label\]; got \[4, 5, 3\]"):
        choose_head(estimates[0], target)


@pytest.mark.unchecked_shapes
def test_labels_are_class_indices():
    for labels in (torch.tensor([0.5, 1.0]), torch.tensor([True, False]), torch.tensor(1)):
        with pytest.raises(ValueError, match="must be class indices, one row of whole numbers"):
            label_regression(torch.ones(1, 2), labels, n_labels=2)
        with pytest.raises(ValueError, match="labels of queries must be class indices"):
            label_kernel(labels, torch.tensor([0, 1]))
    for count in (0, -1, True):
        with pytest.raises(ValueError, match="n_labels must be at least 1"):
            label_regression(torch.ones(1, 2), torch.tensor([0, 0]), n_labels=count)


@pytest.mark.unchecked_shapes
def test_what_is_not_finite_or_of_other_queries_is_refused():
    with pytest.raises(ValueError, match="points has 1 of 6 entries that are not finite"):
        median_bandwidth(torch.tensor([[0.0, 1.0], [2.0, 3.0], [torch.nan, 4.0]]))
    with pytest.raises(ValueError, match="values has 2 of 4 entries that are not finite"):
        kernel_ridge(torch.eye(2), torch.ones(1, 2), torch.tensor([[1.0, 0.0], [torch.nan, torch.nan]]), ridge=1.0)
    with pytest.raises(ValueError, match="not of the same queries and labels"):
        label_correlation(torch.rand(3, 2), torch.rand(2, 3))


@pytest.mark.parametrize("seed", [1.5, None, "a", True], ids=repr)
def test_a_seed_that_is_none_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        choose_head(torch.rand(1, 2, 4, 2), torch.rand(4, 2), seed=seed)
