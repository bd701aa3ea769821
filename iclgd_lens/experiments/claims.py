"""The paper's claims, each as a number with an interval, computed from a run (Deutch et al. 2024, section 5).

==========================================  ==============================================================================
`"LCGD above GD"`                           LCGD − GD on the trained model, in SimAOU and SimAM_Δ, paired by draw
`"untrained twins comparable"`              trained − twin, for each method and twin, in SimAOU and SimAM_Δ, paired by draw
`"α small"`                                 α, of h and of m, on the trained model; the paper's is about 0.1 to 0.2
==========================================  ==============================================================================

A draw is one set of demonstrations; its orders, queries, layers and heads are averaged first. What an outcome says rests on the
95 % t-interval over draws, and on nothing else; over all tasks every task counts alike (`results.estimate`). Intervals are not
corrected for the number of claims.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from iclgd_lens.experiments.paper import ALPHA_RANGE
from iclgd_lens.experiments.results import EPISODE, OVER_TASKS, estimate, paired_differences, refuse_pooling

METRICS = ("sim_aou", "sim_am_delta")

COLUMNS = ["claim", "metric", "method", "twin", "task", "mean", "low", "high", "p", "draws", "outcome"]


def claims(frame: pd.DataFrame) -> pd.DataFrame:
    """Compute every claim that a frame has the rows for, for each task and over all tasks.

    Args:
        frame: Rows of a run, as in `Comparison.frame`.

    Returns:
        One row per claim, metric, method, twin and task: `claim`, `metric`, `method`, `twin`, `task`, `mean` (of the difference,
        or of α), `low` and `high` (95 % t-interval over draws), `p` (paired t-test that a difference is zero; missing for α),
        `draws`, and `outcome` in words.

    Raises:
        ValueError: If values would be averaged over different options of the updates, such as learning rates within a task.
    """
    return pd.DataFrame([*_lcgd_above_gd(frame), *_twins_comparable(frame), *_alpha_small(frame)], columns=COLUMNS)


def _lcgd_above_gd(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    if not {"gd", "lcgd"} <= set(frame["method"]):
        return
    for metric in METRICS:
        a, b = ({"model": "trained", "method": method} for method in ("lcgd", "gd"))
        for task, values in _by_task(paired_differences(frame, metric, a, b), frame):
            about = {"claim": "LCGD above GD", "metric": metric, "method": "lcgd − gd", "twin": None, "task": task}
            yield about | _difference(values, "LCGD above GD", "LCGD below GD")


def _twins_comparable(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for metric in METRICS:
        for method in [method for method in ("gd", "lcgd") if method in set(frame["method"])]:
            for twin in [model for model in frame["model"].unique() if model != "trained"]:
                a, b = ({"model": model, "method": method} for model in ("trained", twin))
                for task, values in _by_task(paired_differences(frame, metric, a, b), frame):
                    about = {"claim": "untrained twins comparable", "metric": metric, "method": method, "twin": twin, "task": task}
                    yield about | _difference(values, "trained above twin", "twin above trained")


def _alpha_small(frame: pd.DataFrame) -> Iterator[dict[str, Any]]:
    trained = frame[(frame["model"] == "trained") & (frame["control"] == "none") & (frame["subset"] == "all")]
    limit = ALPHA_RANGE[1]
    for metric in ("alpha_aou", "alpha_am"):
        alphas = trained[trained["metric"] == metric]
        refuse_pooling(alphas, [])
        for task, values in _by_task(alphas.groupby(EPISODE, sort=False)["value"].mean(), frame):
            found = estimate(values)
            outcome = f"at most {limit}" if found.high <= limit else f"above {limit}" if found.low > limit else "undecided"
            about = {"claim": "α small", "metric": metric, "method": "lcgd and gd", "twin": None, "task": task}
            yield about | found._asdict() | {"p": float("nan"), "outcome": outcome}


def _by_task(per_draw: pd.Series, frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series]]:
    """The values of every task that has any, and of all tasks together if there are several and each has some."""
    per_draw = per_draw.dropna()
    tasks = per_draw.index.get_level_values("task")
    for task in tasks.unique():
        yield str(task), per_draw[tasks == task]
    if tasks.nunique() == frame["task"].nunique() > 1:
        yield OVER_TASKS, per_draw


def _difference(values: pd.Series, if_above: str, if_below: str) -> dict[str, Any]:
    found = estimate(values)
    undecided = found.low != found.low
    outcome = "undecided" if undecided else if_above if found.low > 0 else if_below if found.high < 0 else "no difference found"
    return {**found._asdict(), "outcome": outcome}
