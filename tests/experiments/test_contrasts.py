"""Differences paired by query, on frames whose answers are known."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from iclgd_lens import contrasts


def per_query(rng: np.random.Generator, *, tasks=("t",), seeds=5, queries=8, shared=True, orders=2, lrs=(0.1,)) -> pd.DataFrame:
    """Values of trained and untrained models by both methods; LCGD is 0.5 above GD, and both are 0.2 above the twin's."""
    made = []
    for task in tasks:
        for seed in range(seeds):
            of_draw = rng.normal(scale=0.1)
            for order, model, method, lr, query in product(
                range(orders), ("trained", "untrained"), ("gd", "lcgd"), lrs, range(queries)
            ):
                value = 0.5 * (method == "lcgd") * (1 + of_draw) + 0.2 * (model == "trained") + rng.normal(scale=0.01)
                about = {"task": task, "k": 4, "seed": seed, "order": order, "model": model, "method": method, "lr": lr}
                digest = f"{query}" if shared else f"{seed}/{query}"
                made.append(
                    {**about, "control": "none", "query": query, "query_digest": digest, "metric": "sim_aou", "value": value}
                )
    return pd.DataFrame(made)


@pytest.mark.parametrize("shared", [True, False])
def test_contrasts_are_paired_differences_with_what_they_rest_on(shared):
    frame = per_query(np.random.default_rng(0), tasks=("a", "b"), shared=shared)
    found = contrasts(frame, metrics=["sim_aou"]).set_index(["contrast", "method", "task"])
    assert len(found) == 3 * 3
    row = found.loc[("LCGD − GD", "lcgd", "all tasks")]
    trained = frame[frame["model"] == "trained"].groupby(["task", "method"])["value"].mean()
    by_hand = np.mean([trained[task, "lcgd"] - trained[task, "gd"] for task in ("a", "b")])
    assert row["mean"] == pytest.approx(by_hand)
    assert row["low"] < by_hand < row["high"]
    assert (row["draws"], row["episodes"]) == (10, 20)
    assert row["p"] == pytest.approx(2 / 2**10)
    assert row["p_holm"] >= row["p"]
    assert found.loc[("trained − twin", "gd", "a"), "mean"] == pytest.approx(0.2, abs=0.02)
    assert found.loc[("trained − twin", "gd", "a"), "draws"] == 5


def test_contrasts_tell_apart_what_a_task_was_run_with_and_not_what_tasks_differ_by():
    rng = np.random.default_rng(0)
    both = contrasts(per_query(rng, lrs=(0.1, 1.0)), metrics=["sim_aou"])
    assert sorted(both["lr"].unique()) == [0.1, 1.0]
    own = pd.concat([per_query(rng, tasks=("a",), lrs=(0.1,)), per_query(rng, tasks=("b",), lrs=(1.0,))])
    found = contrasts(own, metrics=["sim_aou"])
    assert "lr" not in found
    assert "all tasks" in set(found["task"])


def test_queries_that_draws_share_widen_the_interval_of_a_contrast():
    frame = per_query(np.random.default_rng(0), seeds=12, queries=6)
    effect = frame["query"].map(dict(enumerate([-3.0, 3.0, 1.0, -1.0, 2.0, -2.0]))) * (frame["method"] == "lcgd")
    frame["value"] += effect
    own = frame.assign(query_digest=frame["seed"].astype(str) + frame["query_digest"])
    shared, nested = (contrasts(each, metrics=["sim_aou"]).iloc[0] for each in (frame, own))
    assert shared["high"] - shared["low"] > 3 * (nested["high"] - nested["low"])


def test_a_task_without_one_side_has_no_contrast_and_none_is_over_all_tasks():
    frame = per_query(np.random.default_rng(0), tasks=("a", "b"))
    found = contrasts(frame[(frame["task"] == "a") | (frame["method"] == "gd")], metrics=["sim_aou"])
    assert set(found[found["contrast"] == "LCGD − GD"]["task"]) == {"a"}
    assert "all tasks" in set(found[(found["contrast"] == "trained − twin") & (found["method"] == "gd")]["task"])
    assert contrasts(frame[:0]).empty
