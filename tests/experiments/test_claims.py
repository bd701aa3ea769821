"""Claims computed from frames whose answers are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from iclgd_lens.experiments.claims import claims

METRICS = {"sim_aou", "sim_am_delta"}


def rows(values: dict[int, float], **about: Any) -> pd.DataFrame:
    """One row per draw."""
    base = {"task": "t", "k": 2, "order": 0, "model": "trained", "method": "gd", "control": "none", "subset": "all", "layer": 0}
    base |= {"metric": "sim_aou"}
    return pd.DataFrame([base | about | {"seed": seed, "value": value} for seed, value in values.items()])


def drawn(seed: int, n: int = 5, mean: float = 0.0) -> dict[int, float]:
    return dict(enumerate(np.random.default_rng(seed).normal(mean, 0.1, n)))


def only(found: pd.DataFrame, **where: Any) -> dict[str, Any]:
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    (row,) = found.to_dict("records")
    return row


def assert_paired(row: dict[str, Any], a: list[float], b: list[float]) -> None:
    tested = stats.ttest_rel(a, b)
    low, high = tested.confidence_interval(0.95)
    expected = (np.mean(np.subtract(a, b)), low, high, tested.pvalue)
    assert tuple(row[name] for name in ("mean", "low", "high", "p")) == pytest.approx(expected, rel=1e-9)
    assert row["draws"] == len(a)


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_lcgd_minus_gd_is_a_paired_t_test_over_draws(metric: str):
    gd, lcgd = drawn(0), drawn(1, mean=0.1)
    found = claims(pd.concat([rows(gd, metric=metric), rows(lcgd, metric=metric, method="lcgd")]))
    row = only(found, claim="LCGD above GD")
    assert_paired(row, list(lcgd.values()), list(gd.values()))
    assert (row["metric"], row["method"], row["twin"], row["task"]) == (metric, "lcgd − gd", None, "t")


def test_trained_minus_twin_is_paired_for_every_method_and_twin():
    values = {
        (model, method): drawn(seed, mean=0.1 * seed)
        for seed, (model, method) in enumerate([(m, f) for m in ("trained", "untrained 0", "untrained 1") for f in ("gd", "lcgd")])
    }
    found = claims(pd.concat([rows(v, model=model, method=method) for (model, method), v in values.items()]))
    twins = found[found["claim"] == "untrained twins comparable"]
    assert len(twins) == 4
    for method in ("gd", "lcgd"):
        for twin in ("untrained 0", "untrained 1"):
            sides = (list(values[model, method].values()) for model in ("trained", twin))
            assert_paired(only(twins, method=method, twin=twin), *sides)


def test_draws_are_paired_by_their_seed_and_not_by_their_place():
    gd, lcgd = {0: 0.0, 1: 1.0, 2: 5.0}, {2: 5.3, 0: 0.1, 1: 1.2}
    row = only(claims(pd.concat([rows(gd), rows(lcgd, method="lcgd")])), claim="LCGD above GD")
    assert_paired(row, [0.1, 1.2, 5.3], [0.0, 1.0, 5.0])


@pytest.mark.parametrize("missing", [{0: 0.0, 1: 0.1, 3: 0.5}, {0: 0.0, 1: 0.1, 2: float("nan"), 3: 0.5}])
def test_a_draw_that_one_side_lacks_is_left_out(missing: dict[int, float]):
    lcgd = {0: 0.3, 1: 0.2, 2: 9.0, 3: 0.9}
    row = only(claims(pd.concat([rows(missing), rows(lcgd, method="lcgd")])), claim="LCGD above GD")
    assert_paired(row, [0.3, 0.2, 0.9], [0.0, 0.1, 0.5])


def test_orders_and_layers_are_averaged_before_draws_are_tested():
    rng = np.random.default_rng(0)
    parts, means = [], {}
    for method in ("gd", "lcgd"):
        values = rng.normal(size=(2, 3, 4))  # order, layer, draw
        means[method] = values.mean(axis=(0, 1))
        for order, layer in np.ndindex(2, 3):
            parts.append(rows(dict(enumerate(values[order, layer])), method=method, order=order, layer=layer))
    assert_paired(only(claims(pd.concat(parts)), claim="LCGD above GD"), list(means["lcgd"]), list(means["gd"]))


def test_controls_subsets_and_other_metrics_are_no_part_of_a_claim():
    frame = pd.concat([rows(drawn(0)), rows(drawn(1), method="lcgd"), rows(drawn(2), method="lcgd", metric="alpha_aou")])
    wild = {seed: 100.0 + seed for seed in range(5)}
    others = [{"control": "random"}, {"subset": "false_to_true"}, {"metric": "sim_am"}]
    noise = [rows(wild, method=method, **other) for method in ("gd", "lcgd") for other in others]
    noise += [rows(wild, method="lcgd", **({"metric": "alpha_aou"} | other)) for other in others[:2]]
    pd.testing.assert_frame_equal(claims(pd.concat([frame, *noise])), claims(frame))


def test_alpha_is_a_mean_over_draws_of_the_trained_model_with_a_t_interval_and_no_p():
    values = drawn(0, mean=0.15)
    frame = pd.concat([rows(values, method="lcgd", metric="alpha_am"), rows(drawn(1), method="lcgd", metric="alpha_am", model="u")])
    row = only(claims(frame), claim="α small")
    mean, sem = np.mean(list(values.values())), stats.sem(list(values.values()))
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((mean, *stats.t.interval(0.95, 4, mean, sem)))
    assert np.isnan(row["p"])
    assert (row["metric"], row["draws"]) == ("alpha_am", 5)


def test_all_tasks_count_alike_and_stand_there_only_for_several_tasks():
    gd, lcgd = {task: drawn(seed) for seed, task in enumerate("tu")}, {task: drawn(seed, n=4) for seed, task in enumerate("ut")}
    parts = [rows(v[task], task=task, method=m) for task in "tu" for m, v in (("gd", gd), ("lcgd", lcgd))]
    parts += [rows(drawn(7), task=task, method="lcgd", metric="alpha_aou") for task in "tu"]
    found = claims(pd.concat(parts))
    assert found.groupby("claim", sort=False)["task"].agg(list).to_dict() == {
        "LCGD above GD": ["t", "u", "all tasks"],
        "α small": ["t", "u", "all tasks"],
    }
    means = [np.mean([lcgd[task][seed] - gd[task][seed] for seed in range(4)]) for task in "tu"]
    assert only(found, claim="LCGD above GD", task="all tasks")["mean"] == pytest.approx(np.mean(means))
    assert only(found, claim="α small", task="all tasks")["draws"] == 10
    assert set(claims(pd.concat(parts[:2]))["task"]) == {"t"}


@pytest.mark.parametrize(
    ("difference", "methods", "twins"),
    [
        ({0: 0.30, 1: 0.31, 2: 0.29}, "LCGD above GD", "trained above twin"),
        ({0: -0.30, 1: -0.31, 2: -0.29}, "LCGD below GD", "twin above trained"),
        ({0: 0.30, 1: 0.31, 2: -0.29}, "no difference found", "no difference found"),
        ({0: -0.30, 1: -0.31, 2: 0.29}, "no difference found", "no difference found"),
    ],
)
def test_a_difference_is_above_or_below_only_where_its_whole_interval_is(difference: dict[int, float], methods: str, twins: str):
    zero = dict.fromkeys(difference, 0.0)
    assert only(claims(pd.concat([rows(difference, method="lcgd"), rows(zero)])), claim="LCGD above GD")["outcome"] == methods
    (row,) = claims(pd.concat([rows(difference), rows(zero, model="untrained")])).to_dict("records")
    assert (row["claim"], row["outcome"]) == ("untrained twins comparable", twins)


@pytest.mark.parametrize(
    ("values", "outcome"),
    [
        ([0.10, 0.11, 0.12], "at most 0.2"),
        ([-0.5, -0.4, -0.6], "at most 0.2"),
        ([0.30, 0.31, 0.32], "above 0.2"),
        ([0.10, 0.20, 0.30], "undecided"),
        ([0.05, 0.10, 0.30], "undecided"),
        ([0.10], "undecided"),
    ],
)
def test_alpha_is_small_or_not_only_where_its_whole_interval_is(values: list[float], outcome: str):
    frame = rows(dict(enumerate(values)), method="lcgd", metric="alpha_aou")
    assert only(claims(frame), claim="α small")["outcome"] == outcome


def test_one_draw_has_a_difference_and_nothing_to_rest_an_outcome_on():
    row = only(claims(pd.concat([rows({0: 0.1}), rows({0: 0.9}, method="lcgd")])), claim="LCGD above GD")
    assert (row["mean"], row["draws"]) == (pytest.approx(0.8), 1)
    assert np.isnan([row["low"], row["high"], row["p"]]).all()
    assert row["outcome"] == "undecided"


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ([("trained", "gd")], {}),
        ([("trained", "gd"), ("trained", "lcgd")], {"LCGD above GD": 2}),
        ([("trained", "lcgd"), ("untrained", "lcgd")], {"untrained twins comparable": 2}),
        (
            [(model, method) for model in ("trained", "untrained") for method in ("gd", "lcgd")],
            {"LCGD above GD": 2, "untrained twins comparable": 4},
        ),
    ],
    ids=["one method", "no twin", "one method and a twin", "all"],
)
def test_a_frame_has_the_claims_that_it_has_rows_for(kept: list[tuple[str, str]], expected: dict[str, int]):
    of_runs = [rows(drawn(0), model=model, method=method, metric=metric) for model, method in kept for metric in sorted(METRICS)]
    outputs = [rows(drawn(0), method=method, metric="accuracy") for method in ("zsl", "icl")]
    found = claims(pd.concat([*of_runs, *outputs]))
    assert (found.groupby("claim").size().to_dict() if len(found) else {}) == expected


def test_a_twin_without_runs_by_a_method_has_no_row_for_it():
    found = claims(pd.concat([rows(drawn(0)), rows(drawn(1), method="lcgd"), rows(drawn(2), model="untrained")]))
    assert found[found["draws"] == 0].empty


def test_differences_at_several_learning_rates_are_refused():
    frame = pd.concat([rows(drawn(0), lr=lr, method=method) for lr in (0.1, 1.0) for method in ("gd", "lcgd")])
    with pytest.raises(ValueError, match="several values of lr"):
        claims(frame)


def test_alphas_at_several_learning_rates_are_refused():
    with pytest.raises(ValueError, match="several values of lr"):
        claims(pd.concat([rows(drawn(0), lr=lr, method="lcgd", metric="alpha_aou") for lr in (0.1, 1.0)]))
