"""Rank agreement against its definitions in plain loops, and ties against every way to break them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from iclgd_lens.metrics.ranking import kendall_tau, shuffled_weights, spearman_rho, top_k_recall, weight_cosine

MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kendall": kendall_tau,
    "spearman": spearman_rho,
    "cosine": weight_cosine,
    "recall": lambda a, b: top_k_recall(a, b, k=1),
}
BY_RANK = ("kendall", "spearman")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tied(*shape: int, seed: int = 0) -> Tensor:
    """Weights of which many are alike."""
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).double()


def sign(x: float) -> int:
    return (x > 0) - (x < 0)


def tau_b(a: list[float], b: list[float]) -> float:
    """Kendall 1945, over all pairs: (concordant − discordant) / √(pairs untied in a · pairs untied in b)."""
    pairs = [(sign(a[i] - a[j]), sign(b[i] - b[j])) for i, j in combinations(range(len(a)), 2)]
    untied_a, untied_b = (sum(pair[side] != 0 for pair in pairs) for side in (0, 1))
    return sum(x * y for x, y in pairs) / math.sqrt(untied_a * untied_b)


def rho(a: list[float], b: list[float]) -> float:
    """Pearson's correlation of ranks, a rank being how many are below plus half of how many others are level."""
    ranks = [[sum(y < x for y in side) + (sum(y == x for y in side) - 1) / 2 for x in side] for side in (a, b)]
    centred = [[x - sum(side) / len(side) for x in side] for side in ranks]
    dot, aa, bb = (sum(x * y for x, y in zip(*pair, strict=True)) for pair in (centred, centred[:1] * 2, centred[1:] * 2))
    return dot / math.sqrt(aa * bb)


def heaviest(weights: list[float], k: int) -> list[frozenset[int]]:
    """The k heaviest under every order in which tokens could be looked at."""
    orders = permutations(range(len(weights)))
    return [frozenset(sorted(order, key=lambda i: -weights[i])[:k]) for order in orders]


@pytest.mark.parametrize("draw", [random, tied], ids=["distinct", "tied"])
@pytest.mark.parametrize(("measure", "reference"), [(kendall_tau, tau_b), (spearman_rho, rho)], ids=["kendall", "spearman"])
def test_rank_correlations_equal_their_definitions(measure, reference, draw):
    a, b = draw(3, 4, 9, seed=1), draw(3, 4, 9, seed=2)
    found = measure(a, b)
    assert found.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert float(found[i, j]) == pytest.approx(reference(a[i, j].tolist(), b[i, j].tolist()), abs=1e-12)


def test_weight_cosine_equals_its_formula():
    a, b = random(3, 9, seed=1), random(3, 9, seed=2)
    for x, y, found in zip(a.tolist(), b.tolist(), weight_cosine(a, b), strict=True):
        expected = sum(p * q for p, q in zip(x, y, strict=True)) / math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
        assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_recall_is_the_mean_over_all_ways_to_break_ties(k):
    a, b = tied(6, 5, seed=3), tied(6, 5, seed=5)
    found = top_k_recall(a, b, k)
    for row in range(len(a)):
        ours, theirs = heaviest(a[row].tolist(), k), heaviest(b[row].tolist(), k)
        expected = sum(len(x & y) for x in ours for y in theirs) / (k * len(ours) * len(theirs))
        assert float(found[row]) == pytest.approx(expected, abs=1e-12)


def test_recall_of_a_constant_weighting_is_chance_and_recall_of_all_tokens_is_one():
    weights = random(4, 8)
    torch.testing.assert_close(top_k_recall(weights, torch.ones(8).double(), k=3), torch.full((4,), 3 / 8).double())
    torch.testing.assert_close(top_k_recall(weights, random(4, 8, seed=1), k=8), torch.ones(4).double())


@pytest.mark.parametrize("name", MEASURES)
def test_a_weighting_agrees_fully_with_itself(name):
    weights = random(3, 7)
    torch.testing.assert_close(MEASURES[name](weights, weights), torch.ones(3).double())


@pytest.mark.parametrize("name", BY_RANK)
def test_rank_correlations_know_order_only_and_change_sign_with_it(name):
    a, b = random(5, 8, seed=1), random(5, 8, seed=2)
    torch.testing.assert_close(MEASURES[name](a.exp(), 3 * b + 1), MEASURES[name](a, b))
    torch.testing.assert_close(MEASURES[name](a, -b), -MEASURES[name](a, b))


@pytest.mark.parametrize("name", BY_RANK)
def test_two_tokens_are_enough(name):
    a = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 1.0]])
    found = MEASURES[name](a, torch.tensor([[3.0, 4.0], [4.0, 3.0], [3.0, 4.0]]))
    assert found[:2].tolist() == pytest.approx([1.0, -1.0])
    assert found[2].isnan()


@pytest.mark.parametrize("name", MEASURES)
def test_leading_axes_broadcast(name):
    a, b = random(2, 1, 6, seed=1), random(3, 6, seed=2)
    found = MEASURES[name](a, b)
    assert found.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(found[i, j], MEASURES[name](a[i, 0], b[j]))


@pytest.mark.parametrize("name", MEASURES)
def test_only_rows_with_an_entry_that_is_not_finite_are_undefined(name):
    a, b = random(4, 6, seed=1), random(4, 6, seed=2)
    a[1, 2], b[2, 0], b[3, 5] = math.nan, math.inf, -math.inf
    assert MEASURES[name](a, b).isnan().tolist() == [False, True, True, True]
    assert MEASURES[name](b, a).isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("name", BY_RANK)
def test_rank_correlation_with_a_constant_is_undefined(name):
    a, constant = random(6), torch.full((6,), 0.1, dtype=torch.float64)
    assert MEASURES[name](a, constant).isnan()
    assert MEASURES[name](constant, a).isnan()


def test_cosine_with_zero_is_undefined_and_with_another_constant_is_not():
    weights = random(6).abs()
    assert weight_cosine(weights, torch.zeros(6).double()).isnan()
    assert float(weight_cosine(weights, torch.ones(6).double())) > 0


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_measures_are_in_float32_or_better(name, dtype, expected):
    assert MEASURES[name](random(3, 5).to(dtype), random(3, 5, seed=1).to(dtype)).dtype == expected


@pytest.mark.parametrize("name", MEASURES)
def test_no_rows_give_no_values(name):
    assert MEASURES[name](torch.zeros(0, 2, 3), torch.zeros(0, 2, 3)).shape == (0, 2)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize(("n", "m"), [(3, 4), (1, 3), (1, 1)])
def test_weightings_of_other_or_too_few_tokens_are_refused(name, n, m):
    with pytest.raises(ValueError, match=f"same tokens, two or more; got {n} and {m}"):
        MEASURES[name](torch.ones(n), torch.ones(m))


@pytest.mark.parametrize("k", [0, -1, 6])
def test_a_k_that_tokens_do_not_have_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be between 1 and the number of tokens, 5; got {k}"):
        top_k_recall(random(5), random(5), k=k)


def test_shuffling_deals_each_row_out_by_itself_and_the_same_way_for_a_seed():
    weights = torch.arange(200.0).expand(50, 200)
    dealt = shuffled_weights(weights, seed=3)
    assert torch.equal(dealt.sort(dim=-1).values, weights)
    assert len({tuple(row) for row in dealt.tolist()}) == 50
    assert torch.equal(dealt, shuffled_weights(weights, seed=3))
    assert not torch.equal(dealt, shuffled_weights(weights, seed=4))


def test_every_token_is_as_likely_to_get_a_weight_as_another():
    n = 20_000
    places = shuffled_weights(torch.eye(4)[0].expand(n, 4), seed=1).mean(dim=0)
    # Five standard errors of a share of 1/4.
    torch.testing.assert_close(places, torch.full((4,), 0.25), atol=5 * math.sqrt(0.25 * 0.75 / n), rtol=0)


def test_shuffled_weights_agree_by_chance():
    weights = random(400, 30).abs()
    shuffled = shuffled_weights(weights)
    # Variances by chance are 2(2n + 5) / 9n(n − 1) for τ and 1/(n − 1) for ρ; the recall's is below ¼. Four standard errors.
    n = weights.shape[-1]
    variances = {"kendall": 2 * (2 * n + 5) / (9 * n * (n - 1)), "spearman": 1 / (n - 1)}
    for name, variance in variances.items():
        assert abs(float(MEASURES[name](weights, shuffled).mean())) < 4 * math.sqrt(variance / 400)
    assert float(top_k_recall(weights, shuffled, k=6).mean()) == pytest.approx(6 / 30, abs=4 * math.sqrt(0.25 / 400))


@pytest.mark.parametrize("n", [0, 1])
def test_there_is_no_shuffling_of_fewer_than_two_tokens(n):
    with pytest.raises(ValueError, match=f"two tokens or more to deal weights out among; got {n}"):
        shuffled_weights(torch.ones(3, n))


def test_a_seed_deals_the_same_under_every_default_of_torch_s():
    weights = torch.linspace(0, 1, 40).view(4, 10)
    expected = shuffled_weights(weights, seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        found = shuffled_weights(weights, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert torch.equal(shuffled_weights(weights, seed=3), expected)
    assert torch.equal(found, expected)
    for seed in (1.5, None, True, torch.tensor(1)):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            shuffled_weights(weights, seed=seed)


@pytest.mark.unchecked_shapes
def test_a_k_that_is_no_whole_number_and_weights_without_an_axis_are_refused():
    for k in (1.5, True, -1):
        with pytest.raises(ValueError, match="k must be between 1 and the number of tokens, 5"):
            top_k_recall(torch.rand(5), torch.rand(5), k=k)
    with pytest.raises(ValueError, match="two or more; got 1 and 1"):
        kendall_tau(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="got 1"):
        shuffled_weights(torch.tensor(1.0))
