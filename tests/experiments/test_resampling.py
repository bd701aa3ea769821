"""Intervals that cover, p-values that do not lie, and corrections, against loops, enumeration, hand-made numbers and scipy."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from iclgd_lens.experiments import resampling
from iclgd_lens.experiments.resampling import Stratum, bootstrap_interval, effect_size, holm, permutation_p

EFFECT = 0.3


def drawn(
    rng: np.random.Generator,
    shape: tuple[int, int] = (10, 32),
    crossed: bool = False,
    sds: tuple[float, float, float] = (1.0, 0.0, 2.0),
    skewed: bool = False,
) -> Stratum:
    """Differences around the effect, with draws, queries and the rest varying by these standard deviations."""
    n_draws, n_queries = shape
    of_draws = rng.exponential(1, n_draws) - 1 if skewed else rng.normal(size=n_draws)
    of_queries = rng.normal(size=n_queries)
    draw, query, rest = sds
    values = EFFECT + draw * of_draws[:, None] + query * of_queries + rest * rng.normal(size=shape)
    return Stratum(values, crossed)


def with_gaps(stratum: Stratum, rng: np.random.Generator, share: float = 0.3) -> Stratum:
    return Stratum(np.where(rng.random(stratum.values.shape) < share, np.nan, stratum.values), stratum.crossed)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# The interval, against other ways to compute it.


def looped_moments(values: list[list[float]], crossed: bool) -> tuple[float, float]:
    """The mean and its variance, by the sums of textbooks."""
    n_draws, n_queries = len(values), len(values[0])
    rows = [sum(row) / n_queries for row in values]
    mean = sum(rows) / n_draws
    between_rows = sum((row - mean) ** 2 for row in rows) / (n_draws - 1)
    if not crossed:
        return mean, between_rows / n_draws
    columns = [sum(column) / n_draws for column in zip(*values, strict=True)]
    of_draws = n_queries * between_rows
    of_queries = n_draws * sum((column - mean) ** 2 for column in columns) / (n_queries - 1)
    rest = 0.0
    for i, j in itertools.product(range(n_draws), range(n_queries)):
        rest += (values[i][j] - rows[i] - columns[j] + mean) ** 2 / (n_draws - 1) / (n_queries - 1)
    component_of_draws = max(0, of_draws - rest) / n_queries
    component_of_queries = max(0, of_queries - rest) / n_draws
    return mean, component_of_draws / n_draws + component_of_queries / n_queries + rest / n_draws / n_queries


def looped_interval(strata: list[Stratum], level: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """The interval by loops over replicates, draws and queries, on the same random numbers."""
    rng = np.random.default_rng(seed)
    in_sample = [looped_moments(stratum.values.tolist(), stratum.crossed) for stratum in strata]
    resampled: list[list[tuple[float, float]]] = []
    for stratum in strata:
        values = stratum.values.tolist()
        n_draws, n_queries = stratum.values.shape
        tables = []
        if stratum.crossed:
            draw_counts, query_counts = (rng.multinomial(n, [1 / n] * n, n_resamples) for n in stratum.values.shape)
            for counts in zip(draw_counts, query_counts, strict=True):
                draws, queries = ([i for i, count in enumerate(of) for _ in range(count)] for of in counts)
                tables.append([[values[i][j] for j in queries] for i in draws])
        else:
            draws = rng.integers(n_draws, size=(n_resamples, n_draws))
            queries = rng.integers(n_queries, size=(n_resamples, n_draws, n_queries))
            for b in range(n_resamples):
                tables.append([[values[i][j] for j in of_draw] for i, of_draw in zip(draws[b], queries[b], strict=True)])
        resampled.append([looped_moments(table, stratum.crossed) for table in tables])

    mean = sum(of_stratum for of_stratum, _ in in_sample) / len(strata)
    error = math.sqrt(sum(variance for _, variance in in_sample)) / len(strata)
    t = []
    for replicate in zip(*resampled, strict=True):
        off = sum(of_stratum for of_stratum, _ in replicate) / len(strata) - mean
        t.append(off / (math.sqrt(sum(variance for _, variance in replicate)) / len(strata)))
    t.sort()
    cut = int((1 - level) / 2 * (n_resamples + 1))
    return mean - t[n_resamples - cut] * error, mean - t[cut - 1] * error


@pytest.mark.parametrize(
    "designs",
    [[((5, 4), False)], [((6, 5), True)], [((3, 4), False), ((4, 2), False)], [((4, 7), True), ((3, 5), False)]],
    ids=["nested", "crossed", "two tasks", "either design"],
)
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_is_that_of_loops_over_replicates_draws_and_queries(designs, level, rng):
    strata = [drawn(rng, shape, crossed, sds=(1.0, 0.5, 1.0)) for shape, crossed in designs]
    assert bootstrap_interval(strata, level, n_resamples=250, seed=3) == pytest.approx(looped_interval(strata, level, 250, seed=3))


def test_with_one_query_per_draw_the_interval_is_the_bootstrap_t_of_scipy(rng):
    values = rng.exponential(1, 12)

    def t(sample: np.ndarray, axis: int) -> np.ndarray:
        return (sample.mean(axis) - values.mean()) / stats.sem(sample, axis)

    quantiles = stats.bootstrap((values,), t, n_resamples=40_000, method="percentile", random_state=1).confidence_interval
    expected = values.mean() - stats.sem(values) * np.array([quantiles.high, quantiles.low])
    found = bootstrap_interval([Stratum(values[:, None], crossed=False)], n_resamples=40_000)
    assert found == pytest.approx(expected, abs=0.03 * np.ptp(expected))


def test_many_replicates_are_made_in_chunks(rng, monkeypatch):
    strata = [drawn(rng, (6, 8), crossed) for crossed in (False, True)]
    whole = bootstrap_interval(strata, n_resamples=20_000)
    monkeypatch.setattr(resampling, "CHUNK", 1000)
    assert bootstrap_interval(strata, n_resamples=20_000) == pytest.approx(whole, abs=0.05 * (whole[1] - whole[0]))


# What the interval does not depend on.


@pytest.mark.parametrize("crossed", [False, True])
def test_the_interval_is_the_same_for_the_same_seed(crossed, rng):
    stratum = drawn(rng, crossed=crossed)
    assert bootstrap_interval([stratum], seed=1) == bootstrap_interval([stratum], seed=1)
    assert bootstrap_interval([stratum], seed=1) != bootstrap_interval([stratum], seed=2)


@pytest.mark.parametrize("crossed", [False, True])
def test_the_interval_moves_and_stretches_with_the_values(crossed, rng):
    strata = [with_gaps(drawn(rng, crossed=crossed, sds=(1.0, 1.0, 1.0)), rng) for _ in range(2)]
    low, high = bootstrap_interval(strata)
    moved = [Stratum(1e-3 * stratum.values + 5, crossed) for stratum in strata]
    assert bootstrap_interval(moved) == pytest.approx((1e-3 * low + 5, 1e-3 * high + 5), rel=1e-9)
    mirrored = [Stratum(-stratum.values, crossed) for stratum in strata]
    assert bootstrap_interval(mirrored) == pytest.approx((-high, -low))


def test_what_tasks_differ_by_does_not_widen_the_interval(rng):
    near = [drawn(rng) for _ in range(3)]
    far = [Stratum(stratum.values + 100 * i, crossed=False) for i, stratum in enumerate(near)]
    assert np.diff(bootstrap_interval(far)) == pytest.approx(np.diff(bootstrap_interval(near)))


def test_queries_that_all_draws_share_widen_the_interval(rng):
    values = drawn(rng, (10, 64), sds=(0.1, 2.0, 0.5)).values
    (as_nested,), (as_crossed,) = (np.diff(bootstrap_interval([Stratum(values, crossed)])) for crossed in (False, True))
    assert as_crossed > 2 * as_nested


# Values that are undefined, and intervals that are.


@pytest.mark.parametrize("crossed", [False, True])
def test_gaps_change_nothing_about_the_mean_of_draws_means(crossed, rng):
    stratum = with_gaps(drawn(rng, crossed=crossed), rng)
    assert resampling._table(stratum).mean(1) == pytest.approx(np.nanmean(stratum.values, 1))
    assert stratum.draw_means == pytest.approx(np.nanmean(stratum.values, 1))


def test_with_gaps_draws_means_vary_as_means_over_their_defined_queries(rng):
    stratum = with_gaps(drawn(rng, (6, 300), sds=(1.0, 1.0, 1.0)), rng)
    queries = rng.integers(300, size=(2000, 300))
    of_defined = np.nanmean(stratum.values[:, queries], -1)
    of_table = resampling._table(stratum)[:, queries].mean(-1)
    assert np.cov(of_table) == pytest.approx(np.cov(of_defined), rel=0.1)


def test_draws_and_queries_without_a_defined_value_are_left_out(rng):
    stratum = drawn(rng, (6, 9), crossed=True)
    wider = np.full((8, 10), np.nan)
    wider[np.ix_([0, 1, 3, 4, 5, 7], [0, 1, 2, 3, 4, 6, 7, 8, 9])] = stratum.values
    assert bootstrap_interval([Stratum(wider, crossed=True)]) == pytest.approx(bootstrap_interval([stratum]))
    assert np.isnan(Stratum(wider, crossed=True).draw_means).tolist() == [i in (2, 6) for i in range(8)]


@pytest.mark.parametrize(
    "strata",
    [
        [],
        [Stratum(np.ones((1, 50)), crossed=False)],
        [Stratum(np.full((9, 9), np.nan), crossed=False)],
        [Stratum(np.arange(40.0).reshape(4, 10) ** 2, crossed=False)],
        [Stratum(np.arange(40.0).reshape(10, 4) ** 2, crossed=True)],
        [Stratum(np.arange(40.0).reshape(10, 4) ** 2, crossed=False), Stratum(np.arange(4.0)[None], crossed=False)],
        [Stratum(np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]] * 4), crossed=False)],
    ],
    ids=["no task", "one draw", "nothing defined", "four draws", "four queries", "a task of one draw", "equal draws"],
)
def test_there_is_no_interval_where_it_cannot_be_honest(strata):
    assert np.isnan(bootstrap_interval(strata)).all()


def test_there_is_no_interval_where_replicates_that_vary_nowhere_set_its_ends():
    # One replicate in 2⁴ repeats one of the two draws in every task.
    strata = [Stratum(np.array([[0.0], [2.0**i]]), crossed=False) for i in range(4)]
    assert np.isnan(bootstrap_interval(strata, n_resamples=20_000)).all()


@pytest.mark.parametrize("crossed", [False, True])
def test_equal_values_are_known_exactly(crossed):
    strata = [Stratum(np.full((5, 7), value), crossed) for value in (0.1, 0.4)]
    assert bootstrap_interval(strata) == pytest.approx((0.25, 0.25), abs=1e-15)
    assert len(set(bootstrap_interval(strata))) == 1


@pytest.mark.parametrize("crossed", [False, True])
def test_a_task_of_equal_values_beside_one_that_varies_is_known_exactly(crossed, rng):
    varying = drawn(rng, crossed=crossed)
    equal = Stratum(np.full((5, 7), 0.1), crossed)
    low, high = bootstrap_interval([varying])
    assert bootstrap_interval([varying, equal]) == pytest.approx(((low + 0.1) / 2, (high + 0.1) / 2))


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("values", "message"),
    [(np.ones(3), r"must be \[draw query\]; got shape \[3\]"), (np.array([[1.0, np.inf]]), "some are infinite")],
)
def test_values_that_are_no_table_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Stratum(values, crossed=False)


@pytest.mark.parametrize(("about", "message"), [({"level": 95}, "level must be .* 95"), ({"n_resamples": 0}, "n_resamples .* 0")])
def test_options_out_of_range_are_refused(about, message, rng):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval([drawn(rng)], **about)


# What is promised: coverage and size.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_tasks", "about"),
    [
        (1, {"shape": (10, 32)}),
        (1, {"shape": (10, 64), "crossed": True, "sds": (0.5, 1.0, 1.0)}),
        (3, {"shape": (5, 32)}),
    ],
    ids=["nested", "crossed", "three tasks"],
)
def test_95_percent_intervals_cover_the_effect_in_95_percent_of_simulations(n_tasks, about, rng):
    intervals = [
        bootstrap_interval([drawn(rng, **about) for _ in range(n_tasks)], n_resamples=400, seed=seed) for seed in range(1000)
    ]
    assert 0.93 <= np.mean([low <= EFFECT <= high for low, high in intervals]) <= 0.97


@pytest.mark.slow
def test_where_nothing_differs_one_permutation_test_in_twenty_rejects(rng):
    p = [permutation_p([rng.normal(size=10)]) for _ in range(1000)]
    assert 0.03 <= np.mean(np.array(p) <= 0.05) <= 0.07


# The permutation test.


@pytest.mark.parametrize(
    "tasks",
    [
        [[0.3, -0.1, 0.4, 0.2]],
        [[0.3, 0.5, 0.2, -0.4, -0.8, 0.2]],
        [[0.5, 0.2], [-0.1, 0.4, 0.3, 0.1]],
        [[1.0, 1.0, 1.0], [2.0, -1.0]],
    ],
    ids=["one task", "a mean of zero but for rounding", "two tasks", "ties"],
)
def test_the_permutation_p_is_the_share_of_signs_with_as_large_a_mean(tasks):
    def size(signed: list[list[float]]) -> float:
        return round(abs(np.mean([np.mean(task) for task in signed])), 9)

    as_large = []
    for signs in itertools.product([-1, 1], repeat=sum(map(len, tasks))):
        sign = iter(signs)
        as_large.append(size([[next(sign) * value for value in task] for task in tasks]) >= size(tasks))
    assert permutation_p([np.array(task) for task in tasks]) == pytest.approx(np.mean(as_large))


@pytest.mark.parametrize("n", [2, 5, 10])
def test_no_permutation_p_is_below_two_in_two_to_the_draws(n):
    assert permutation_p([np.arange(1.0, n + 1)]) == 2 / 2**n
    assert permutation_p([-np.arange(1.0, n + 1)]) == 2 / 2**n


def test_the_permutation_p_of_many_draws_is_near_that_of_the_t_test_and_the_same_for_the_same_seed(rng):
    values = rng.normal(0.2, 1, 60)
    p = permutation_p([values], seed=1)
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert p == permutation_p([values], seed=1) != permutation_p([values], seed=2)


def test_in_the_permutation_test_every_task_counts_alike():
    few, many = np.array([2.0, 2.0, 2.0]), np.full(9, -1.0)
    # Means are 2 and −1. Counted by draws their mean would be below zero, and smaller.
    assert permutation_p([few, many]) < permutation_p([np.concatenate([few, many])])


def test_without_two_draws_there_is_no_permutation_p():
    assert np.isnan([permutation_p(tasks) for tasks in ([], [np.array([])], [np.array([1.0, np.nan])])]).all()
    assert math.isnan(permutation_p([np.array([1.0, 2.0, 3.0]), np.array([np.nan])]))
    assert permutation_p([np.array([1.0, np.nan, 2.0])]) == 0.5
    assert permutation_p([np.zeros(6)]) == 1


# Holm's correction and the effect size.


def test_holm_multiplies_the_smallest_p_by_all_the_next_by_one_less_and_never_reverses_their_order():
    # Sorted: 0.01 × 4, 0.02 × 3, 0.025 × 2 = 0.05, which may not be below 0.06; 0.4 × 1.
    assert holm([0.02, 0.4, 0.01, 0.025]) == pytest.approx([0.06, 0.4, 0.04, 0.06])
    assert holm([0.7, 0.8]) == pytest.approx([1, 1])


def test_to_holm_undefined_p_values_are_no_tests():
    found = holm([np.nan, 0.02, np.nan, 0.03])
    assert found[[1, 3]] == pytest.approx([0.04, 0.04])
    assert np.isnan(found[[0, 2]]).all()
    assert np.isnan(holm([np.nan])).all()
    assert len(holm([])) == 0


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(ValueError, match=f"between 0 and 1; {p}"):
        holm([0.5, p])


def test_the_effect_size_is_the_mean_by_the_standard_deviation_and_hedges_correction():
    # Mean 2, standard deviation 1, J(2) = Γ(1) / Γ(1/2) = 1/√π.
    assert effect_size([np.array([1.0, 2.0, 3.0])]) == pytest.approx(2 / math.sqrt(math.pi))
    # Means 2 and 4 to 3; squares 2 and 2 over 3 degrees of freedom; J(3) = Γ(3/2) / √(3/2) = √π/2 / √(3/2).
    expected = 3 / math.sqrt(4 / 3) * math.sqrt(math.pi) / 2 / math.sqrt(3 / 2)
    assert effect_size([np.array([1.0, 2.0, 3.0]), np.array([3.0, np.nan, 5.0])]) == pytest.approx(expected)


def test_hedges_correction_leaves_no_bias_with_few_draws(rng):
    sizes = [effect_size([rng.normal(0.8, 1, 4), rng.normal(0.8, 1, 4)]) for _ in range(4000)]
    assert np.mean(sizes) == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("tasks", [[], [[1.0, 2.0]], [[1.0, 2.0, 3.0], []], [[1.0, 1.0, 1.0]], [[0.1, 0.1], [0.3, 0.3]]])
def test_without_spread_or_freedom_there_is_no_effect_size(tasks):
    assert math.isnan(effect_size([np.array(task) for task in tasks]))
