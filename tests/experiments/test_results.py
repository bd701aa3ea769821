"""Averages and intervals over episodes, on frames whose answers are known."""

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from scipy import stats

from iclgd_lens import paired_difference, summarise
from iclgd_lens.experiments.results import estimate


def rows(values: dict[int, list[float]], **about: object) -> pd.DataFrame:
    """A frame with one value per episode and layer."""
    base = {"task": "t", "k": 2, "model": "trained", "method": "gd", "control": "none", "metric": "sim_aou", "undefined": 1}
    base |= {"subset": "all", "order": 0}
    return pd.DataFrame(
        [
            base | about | {"seed": seed, "layer": layer, "value": value}
            for seed, per_layer in values.items()
            for layer, value in enumerate(per_layer)
        ]
    )


def test_summary_averages_layers_first_and_then_episodes():
    frame = rows({0: [0.0, 0.2], 1: [0.2, 0.4], 2: [0.4, 0.9]})
    (row,) = summarise(frame).to_dict("records")
    per_episode = [0.1, 0.3, 0.65]
    low, high = stats.t.interval(0.95, 2, np.mean(per_episode), stats.sem(per_episode))
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((np.mean(per_episode), low, high))
    assert (row["episodes"], row["undefined"]) == (3, 6)


def test_summary_by_layer_keeps_layers_apart():
    summary = summarise(rows({0: [0.0, 0.2], 1: [0.2, 0.4]}), by=["layer"])
    assert summary["mean"].tolist() == pytest.approx([0.1, 0.3])


def test_undefined_episodes_are_left_out():
    (row,) = summarise(rows({0: [0.1], 1: [float("nan")], 2: [0.3]})).to_dict("records")
    assert row["mean"] == pytest.approx(0.2)
    assert row["episodes"] == 2


def test_frames_without_subsets_are_over_all_queries():
    frame = rows({0: [0.0, 0.2], 1: [0.2, 0.4]})
    assert_frame_equal(summarise(frame.drop(columns="subset")), summarise(frame))


@pytest.mark.parametrize(
    ("option", "values", "written"),
    [
        ("lr", (0.1, 1.0), r"0\.1, 1\.0"),
        ("loss_on", ("label", "demonstration"), "demonstration, label"),
        ("readout", ("vocab", "labels"), "labels, vocab"),
        ("schedule", ("online", "batch"), "batch, online"),
        ("epochs", (1, 2), "1, 2"),
        ("parameters", ("W_K W_V", "W_V"), "W_K W_V, W_V"),
    ],
)
def test_values_of_updates_made_in_different_ways_are_never_averaged(option, values, written):
    frame = pd.concat([rows({0: [0.1]}, **{option: value}) for value in values])
    with pytest.raises(ValueError, match=rf"several values of {option} \({written}\); choose one, or add '{option}' to `by`"):
        summarise(frame)
    assert summarise(frame, by=[option])["mean"].tolist() == [0.1, 0.1]
    condition = {"model": "trained", "method": "gd"}
    with pytest.raises(ValueError, match=f"several values of {option}"):
        paired_difference(frame, "sim_aou", condition, condition)


def test_one_episode_has_a_mean_and_no_interval():
    (row,) = summarise(rows({0: [0.5]})).to_dict("records")
    assert (row["mean"], row["episodes"]) == (0.5, 1)
    assert np.isnan([row["sd"], row["low"], row["high"]]).all()


def test_without_a_defined_value_there_is_no_mean():
    (row,) = summarise(rows({0: [np.nan], 1: [np.nan]})).to_dict("records")
    assert np.isnan([row["mean"], row["sd"], row["low"], row["high"]]).all()
    assert row["episodes"] == 0


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    drawn = np.random.default_rng(0).normal(0.3, 1, (6, 1000))
    summary = summarise(rows(dict(enumerate(drawn.tolist()))), by=["layer"])
    assert 0.93 <= ((summary["low"] <= 0.3) & (summary["high"] >= 0.3)).mean() <= 0.97


def test_paired_difference_pairs_by_episode():
    gd = rows({0: [0.0], 1: [1.0], 2: [2.0]})
    lcgd = rows({2: [2.5], 0: [0.5], 1: [1.5]}, method="lcgd")
    condition = {"model": "trained"}
    frame = pd.concat([gd, lcgd])
    found = paired_difference(frame, "sim_aou", condition | {"method": "lcgd"}, condition | {"method": "gd"})
    assert found == pytest.approx((0.5, 0.5, 0.5, 0.0, 3))


def test_metrics_of_the_whole_model_are_paired_too():
    sides = [rows({0: [a], 1: [b]}, method=method) for method, a, b in (("gd", 0.1, 0.3), ("lcgd", 0.2, 0.6))]
    frame = pd.concat(sides).assign(layer=pd.array([pd.NA] * 4, dtype="Int64"))
    lcgd, gd = ({"model": "trained", "method": method} for method in ("lcgd", "gd"))
    found = paired_difference(frame, "sim_aou", lcgd, gd)
    assert (found.mean, found.draws) == (pytest.approx(0.2), 2)


@pytest.mark.parametrize("other", [{"control": "random"}, {"subset": "false_to_true"}])
def test_differences_are_of_true_updates_over_all_queries_unless_told(other):
    true = [rows({0: [0.1], 1: [0.2]}), rows({0: [0.4], 1: [0.6]}, method="lcgd")]
    frame = pd.concat([*true, *(rows({0: [9.0], 1: [9.0]}, method=method, **other) for method in ("gd", "lcgd"))])
    lcgd, gd = ({"model": "trained", "method": method} for method in ("lcgd", "gd"))
    assert paired_difference(frame, "sim_aou", lcgd, gd).mean == pytest.approx(0.35)
    assert paired_difference(frame, "sim_aou", lcgd | other, gd | other).mean == 0
    assert paired_difference(frame, "sim_aou", lcgd | other, gd).mean == pytest.approx(8.85)


def test_orders_are_averaged_within_a_draw_and_give_the_sd_no_more_values():
    frame = pd.concat([rows({0: [0.1], 1: [0.5]}), rows({0: [0.3], 1: [0.9]}, order=1)])
    (row,) = summarise(frame).to_dict("records")
    assert row["mean"] == pytest.approx(0.45)
    assert row["sd"] == pytest.approx(np.std([0.2, 0.7], ddof=1))
    assert row["episodes"] == 2


def test_values_are_over_all_queries_unless_subsets_are_told_apart():
    frame = pd.concat([rows({0: [0.1]}), rows({0: [0.9]}, subset="false_to_true")])
    assert summarise(frame)["mean"].tolist() == [0.1]
    assert summarise(frame, by=["subset"])["mean"].tolist() == [0.1, 0.9]


def test_every_task_may_have_a_learning_rate_of_its_own():
    frame = pd.concat([rows({0: [0.1]}, lr=0.1), rows({0: [0.3]}, lr=1.0, task="u")])
    assert summarise(frame)["mean"].tolist() == pytest.approx([0.2])


def draws(**by_task: list[float]) -> pd.Series:
    values = {(task, 2, seed): value for task, of_task in by_task.items() for seed, value in enumerate(of_task)}
    index = pd.MultiIndex.from_tuples(values, names=["task", "k", "seed"])
    return pd.Series(list(values.values()), index=index)


@pytest.mark.parametrize("differences", [[0.1, 0.3, -0.2, 0.4], [0.1, float("nan"), 0.3]])
def test_an_estimate_of_one_task_is_the_paired_t_test_of_its_defined_draws(differences: list[float]):
    defined = [value for value in differences if value == value]
    test = stats.ttest_1samp(defined, 0.0)
    interval = test.confidence_interval()
    expected = (np.mean(defined), interval.low, interval.high, test.pvalue, len(defined))
    assert estimate(draws(t=differences)) == pytest.approx(expected)


def test_over_tasks_every_task_counts_alike_and_spread_between_tasks_is_no_error():
    found = estimate(draws(t=[0.1, 0.2, 0.3], u=[5.0, 5.1]))
    assert found.mean == pytest.approx((0.2 + 5.05) / 2)
    assert found.draws == 5
    # The mean of two means is half the difference of one and the other's negative, whose interval Welch's test gives.
    welch = stats.ttest_ind([0.1, 0.2, 0.3], [-5.0, -5.1], equal_var=False)
    interval = welch.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((interval.low / 2, interval.high / 2, welch.pvalue))


def test_a_task_with_a_single_draw_leaves_no_interval():
    found = estimate(draws(t=[0.1, 0.2], u=[0.5]))
    assert found.mean == pytest.approx(0.325)
    assert np.isnan([found.low, found.high, found.p]).all()
    assert np.isnan(estimate(draws(t=[float("nan")])).mean)


def test_equal_draws_are_known_exactly():
    assert estimate(draws(t=[0.5, 0.5])) == (0.5, 0.5, 0.5, 0.0, 2)
    assert estimate(draws(t=[0.0, 0.0])).p == 1.0


def test_differences_are_paired_by_order_and_layer_where_both_sides_are_defined():
    gd = pd.concat([rows({0: [0.1, 0.2]}), rows({0: [0.5, 0.9]}, order=1)])
    lcgd = rows({0: [0.4, float("nan")]}, method="lcgd")  # which has no second order
    sides = [{"model": "trained", "method": method} for method in ("lcgd", "gd")]
    assert paired_difference(pd.concat([gd, lcgd]), "sim_aou", *sides).mean == pytest.approx(0.3)
