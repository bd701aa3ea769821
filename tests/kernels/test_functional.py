"""Functional gradient descent against ridge regression, a naive loop and real SGD; alignment against every monotone match."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from iclgd_lens.kernels.functional import Alignment, align_trajectories, functional_gd
from iclgd_lens.updates.gradient import DivergedError

POINTS, QUERIES, LABELS, WIDTH = 7, 4, 3, 5


def problem(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A Gaussian kernel on random inputs, and one-hot targets."""
    generator = torch.Generator().manual_seed(seed)
    points, queries = torch.randn(POINTS, WIDTH, generator=generator), torch.randn(QUERIES, WIDTH, generator=generator)
    targets = F.one_hot(torch.arange(POINTS) % LABELS, LABELS)
    return gaussian(points, points).to(dtype), gaussian(queries, points).to(dtype), targets.to(dtype)


def gaussian(a: Tensor, b: Tensor) -> Tensor:
    return (-(a.double()[:, None] - b.double()[None]).square().sum(-1) / 8).exp()


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix_valued(seed: int = 1) -> tuple[Tensor, Tensor]:
    """A positive definite kernel over (point, label) pairs that is symmetric in neither axis by itself."""
    features = random(POINTS + QUERIES, LABELS, 40, seed=seed)
    kernel = torch.einsum("rcw, pdw -> rpcd", features, features[:POINTS]) / 40
    return kernel[:POINTS], kernel[POINTS:]


@pytest.mark.parametrize("started", [False, True])
def test_squared_loss_converges_to_kernel_ridge_regression_without_a_penalty(started: bool):
    between, to, targets = problem()
    starts = {"start_points": random(POINTS, LABELS), "start_queries": random(QUERIES, LABELS, seed=6)} if started else {}
    eigenvalues = torch.linalg.eigvalsh(between)
    lr = 1.9 / float(eigenvalues[-1])
    # The slowest component shrinks by 1 − lr λ_min a step.
    steps = math.ceil(math.log(1e-12) / math.log(1 - lr * float(eigenvalues[0])))
    found = functional_gd(between, to, targets, lr=lr, steps=steps, loss="squared", **starts)[-1]
    # A start that gradient descent does not see is left as it is: the kernel explains what the start leaves over.
    left_over = targets - starts.get("start_points", torch.zeros(POINTS, LABELS))
    ridge = KernelRidge(alpha=1e-8, kernel="precomputed").fit(between.numpy(), left_over.numpy())
    expected = ridge.predict(to.numpy()) + starts.get("start_queries", torch.zeros(QUERIES, LABELS)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_first_steps_from_zero_have_a_closed_form():
    between, to, targets = problem()
    for loss, centre in (("squared", 0.0), ("cross_entropy", 1 / LABELS)):
        iterates = functional_gd(between, to, targets, lr=0.3, steps=1, loss=loss)
        assert not iterates[0].any()
        torch.testing.assert_close(iterates[1], 0.3 * to @ (targets - centre))
    second = functional_gd(between, to, targets, lr=0.3, steps=2, loss="squared")[2]
    torch.testing.assert_close(second, 0.6 * to @ targets - 0.09 * to @ between @ targets)


def test_iterates_begin_with_the_start_and_do_not_depend_on_how_many_follow():
    between, to, targets = problem()
    start = {"start_points": random(POINTS, LABELS), "start_queries": random(QUERIES, LABELS, seed=6)}
    long = functional_gd(between, to, targets, lr=0.3, steps=6, **start)
    assert long.shape == (7, QUERIES, LABELS)
    assert torch.equal(long[0], start["start_queries"])
    torch.testing.assert_close(functional_gd(between, to, targets, lr=0.3, steps=2, **start), long[:3])


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_matrix_valued_kernel_of_identities_is_the_scalar_kernel(loss: str):
    between, to, targets = problem()
    identity = torch.eye(LABELS, dtype=torch.float64)
    lifted = [torch.einsum("rp, cd -> rpcd", kernel, identity) for kernel in (between, to)]
    found = functional_gd(*lifted, targets, lr=0.3, steps=5, loss=loss)
    torch.testing.assert_close(found, functional_gd(between, to, targets, lr=0.3, steps=5, loss=loss), atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
def test_matrix_valued_kernel_equals_a_loop_over_its_definition(loss: str):
    between, to = matrix_valued()
    targets = problem()[2]
    start_points, start_queries = random(POINTS, LABELS), random(QUERIES, LABELS, seed=6)
    found = functional_gd(between, to, targets, lr=0.1, steps=3, loss=loss, start_points=start_points, start_queries=start_queries)
    points, queries = start_points.clone(), start_queries.clone()
    for step in range(1, 4):
        gradient = (points if loss == "squared" else points.softmax(-1)) - targets
        for f, kernel in ((queries, to), (points, between)):
            for row, i, c, d in itertools.product(range(len(f)), range(POINTS), range(LABELS), range(LABELS)):
                f[row, c] -= 0.1 * kernel[row, i, c, d] * gradient[i, d]
        torch.testing.assert_close(found[step], queries, atol=1e-12, rtol=0)


def test_cross_entropy_with_a_linear_kernel_is_sgd_on_the_weights_of_a_softmax_classifier():
    points, queries = random(POINTS, WIDTH, seed=1), random(QUERIES, WIDTH, seed=2)
    targets = random(POINTS, LABELS, seed=3).softmax(-1)
    W = random(WIDTH, LABELS, seed=4).requires_grad_()
    found = functional_gd(
        points @ points.T,
        queries @ points.T,
        targets,
        lr=0.2,
        steps=20,
        start_points=(points @ W).detach(),
        start_queries=(queries @ W).detach(),
    )
    optimizer = torch.optim.SGD([W], lr=0.2)
    for iterate in found:
        torch.testing.assert_close(iterate, (queries @ W).detach(), atol=1e-10, rtol=0)
        optimizer.zero_grad()
        F.cross_entropy(points @ W, targets, reduction="sum").backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_iterates_are_in_the_widest_dtype_given_and_at_least_float32(dtype: torch.dtype):
    between, to, targets = problem(dtype=dtype)
    found = functional_gd(between, to, targets, lr=0.1, steps=3)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    exact = functional_gd(between.double(), to, targets, lr=0.1, steps=3)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=0)


def test_a_learning_rate_beyond_two_over_the_largest_eigenvalue_is_reported_as_divergence():
    between, to, targets = problem(dtype=torch.float32)
    with pytest.raises(DivergedError, match=r"lr=100 made .* non-finite at step \d+ of 200; use a smaller learning rate") as error:
        functional_gd(between, to, targets, lr=100.0, steps=200, loss="squared")
    step = int(str(error.value).partition("at step ")[2].split()[0])
    assert functional_gd(between, to, targets, lr=100.0, steps=step - 1, loss="squared").isfinite().all()
    # Points alone diverge too: a query that no point reaches is still where it was at that step.
    with pytest.raises(DivergedError, match=f"at step {step} of {step}"):
        functional_gd(between, torch.zeros_like(to), targets, lr=100.0, steps=step, loss="squared")


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "lr must be a number, finite and above 0; got 0.0"),
        ({"lr": math.inf}, "lr must be a number, finite and above 0; got inf"),
        ({"lr": "1"}, "lr must be a number"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, "steps must be at least 1, got 1.5"),
        ({"loss": "hinge"}, "loss must be one of 'squared', 'cross_entropy'; got 'hinge'"),
        ({"targets": torch.zeros(POINTS)}, r"targets must be \[point label\] and not empty"),
        ({"targets": torch.zeros(0, LABELS)}, r"targets must be \[point label\] and not empty"),
        ({"targets": torch.ones(POINTS + 1, 1)}, f"between_points must be .* with the {POINTS + 1} points and 1 labels"),
        ({"targets": torch.full((POINTS, LABELS), math.nan)}, "targets has 21 of 21 entries that are not finite"),
        ({"targets": torch.ones(POINTS, LABELS)}, "targets of the cross-entropy must be probabilities over labels"),
        ({"targets": torch.tensor([[2.0, -1.0, 0.0]]).expand(POINTS, -1)}, "no entry below 0"),
        ({"between_points": torch.ones(POINTS + 1, POINTS)}, "between_points must be square in the points"),
        ({"between_points": torch.ones(POINTS, POINTS, LABELS)}, "between_points must be"),
        ({"between_points": torch.ones(POINTS, POINTS, LABELS, 1)}, f"{LABELS} labels of targets"),
        ({"between_points": torch.full((POINTS, POINTS), math.inf)}, "between_points has 49 of 49 entries that are not finite"),
        ({"to_points": torch.ones(QUERIES, POINTS - 1)}, r"to_points must be \[query point\] or .* got \[4, 6\]"),
        ({"to_points": torch.full((QUERIES, POINTS), math.nan)}, "to_points has 28 of 28 entries that are not finite"),
        ({"to_points": torch.ones(QUERIES, POINTS, LABELS, LABELS)}, "must be of one kernel, scalar or matrix-valued"),
        (
            {"to_points": torch.full((QUERIES, POINTS, LABELS, LABELS), math.nan)},
            "to_points has 252 of 252 entries that are not finite",
        ),
        ({"start_points": torch.zeros(QUERIES, LABELS)}, r"start_points must have the shape \[7, 3\]; got \[4, 3\]"),
        ({"start_queries": torch.zeros(POINTS, LABELS)}, r"start_queries must have the shape \[4, 3\]; got \[7, 3\]"),
        ({"start_queries": torch.full((QUERIES, LABELS), math.inf)}, "start_queries has 12 of 12 entries"),
    ],
)
def test_what_gradient_descent_cannot_use_is_refused_by_name(change: dict, message: str):
    between, to, targets = problem()
    arguments = {"between_points": between, "to_points": to, "targets": targets, "lr": 0.1, "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        functional_gd(**arguments)


def test_squared_targets_need_not_be_distributions():
    between, to, targets = problem()
    found = functional_gd(between, to, -3 * targets, lr=0.1, steps=4, loss="squared")
    torch.testing.assert_close(found, -3 * functional_gd(between, to, targets, lr=0.1, steps=4, loss="squared"))


def distributions(*shape: int, seed: int) -> Tensor:
    return (2 * random(*shape, seed=seed)).softmax(-1)


def best_of_all_matches(similarity: Tensor) -> tuple[float, list[int]]:
    """The best of all non-decreasing matches, written out; of equal ones that with the earliest last, then last but one, ..."""
    layers, iterates = similarity.shape
    best, found = -math.inf, []
    for match in itertools.combinations_with_replacement(range(iterates), layers):
        total = float(sum(similarity[layer, iterate] for layer, iterate in enumerate(match)))
        if total > best or (total == best and match[::-1] < tuple(found[::-1])):
            best, found = total, list(match)
    return best / layers, found


@pytest.mark.parametrize("sizes", list(itertools.product([1, 2, 4], [1, 3, 5])))
@pytest.mark.parametrize("seed", range(4))
def test_the_match_is_the_best_of_all_monotone_ones(sizes: tuple[int, int], seed: int):
    layers, iterates = sizes
    found = align_trajectories(distributions(layers, 3, 4, seed=seed), distributions(iterates, 3, 4, seed=seed + 100))
    score, match = best_of_all_matches(found.similarity)
    assert found.match.tolist() == match
    assert found.score == pytest.approx(score)


@pytest.mark.parametrize("seed", range(20))
def test_of_equally_good_matches_the_earliest_at_every_layer_is_taken(seed: int):
    # One-hot rows and two queries: every similarity is 0, ½ or 1, and sums are exact.
    generator = torch.Generator().manual_seed(seed)
    layers, iterates = (F.one_hot(torch.randint(2, (n, 2), generator=generator), 2).float() for n in (4, 5))
    found = align_trajectories(layers, iterates)
    score, match = best_of_all_matches(found.similarity)
    assert found.match.tolist() == match
    equal = [
        other
        for other in itertools.combinations_with_replacement(range(5), 4)
        if float(sum(found.similarity[layer, t] for layer, t in enumerate(other))) == 4 * score
    ]
    assert match == [min(of_layer) for of_layer in zip(*equal, strict=True)]


def test_similarity_is_one_minus_the_mean_divergence_in_units_of_ln_2():
    layers, iterates = distributions(3, 6, 4, seed=0), distributions(5, 6, 4, seed=1)
    similarity = align_trajectories(layers, iterates).similarity
    assert similarity.shape == (3, 5)
    for layer, iterate in itertools.product(range(3), range(5)):
        expected = 1 - np.mean(jensenshannon(layers[layer], iterates[iterate], axis=-1, base=2) ** 2)
        assert float(similarity[layer, iterate]) == pytest.approx(expected)


def test_a_trajectory_is_matched_with_itself_step_by_step():
    trajectory = distributions(6, 10, 4, seed=0).float()
    found = align_trajectories(trajectory, trajectory)
    assert isinstance(found, Alignment)
    assert found.match.tolist() == list(range(6))
    assert found.score == pytest.approx(1.0, abs=1e-9)


def test_disjoint_distributions_have_similarity_zero():
    layers, iterates = torch.tensor([[[1.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.4, 0.6]]])
    assert align_trajectories(layers, iterates).score == pytest.approx(0.0, abs=1e-9)


def test_layers_that_skip_and_share_iterates_are_found():
    iterates = distributions(8, 10, 4, seed=0)
    found = align_trajectories(iterates[[1, 1, 4, 7]], iterates)
    assert found.match.tolist() == [1, 1, 4, 7]
    backwards = align_trajectories(iterates.flip(0), iterates)
    assert (backwards.match.diff() >= 0).all()
    assert backwards.score < 0.9


def test_the_iterates_of_functional_gradient_descent_align_with_themselves():
    iterates = functional_gd(*problem(), lr=0.3, steps=5).softmax(-1)
    found = align_trajectories(iterates[::2], iterates)
    assert found.match.tolist() == [0, 2, 4]
    assert found.score == pytest.approx(1.0)


GOOD = distributions(3, 4, 2, seed=0)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD[0], r"\[{} query label\] and not empty; got \[4, 2\]"),
        (GOOD[:0], r"\[{} query label\] and not empty; got \[0, 4, 2\]"),
        (GOOD[:, :0], r"\[{} query label\] and not empty; got \[3, 0, 2\]"),
        (GOOD.masked_fill(torch.arange(2) == 1, math.nan), "{}s has 12 of 24 entries that are not finite"),
        (GOOD.log(), "{}s must be probabilities over labels: no entry below 0"),
        (1.002 * GOOD, "every row with the sum 1"),
        (0.998 * GOOD, "every row with the sum 1"),
        (torch.tensor([1.5, -0.5]).expand(3, 4, 2), "no entry below 0"),
    ],
)
def test_what_is_not_a_trajectory_of_distributions_is_refused_by_name(bad: Tensor, message: str):
    with pytest.raises(ValueError, match=message.format("layer")):
        align_trajectories(bad, GOOD)
    with pytest.raises(ValueError, match=message.format("iterate")):
        align_trajectories(GOOD, bad)


@pytest.mark.unchecked_shapes
def test_trajectories_of_other_queries_or_labels_are_refused():
    for other in (distributions(3, 5, 2, seed=0), distributions(3, 4, 3, seed=0), distributions(3, 1, 2, seed=0)):
        with pytest.raises(ValueError, match="same queries and labels"):
            align_trajectories(GOOD, other)
    align_trajectories(1.0005 * GOOD, GOOD)  # rounding is let through
