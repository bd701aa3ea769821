"""Tidy results: how frames of `compare` are averaged and tested.

The unit that varies is the draw of demonstrations. A value is first averaged over what is inside a draw (queries, heads, orders of
the demonstrations, and layers where asked), then over draws, and its interval says how well the mean over draws is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

EPISODE = ["task", "k", "seed"]
"""The columns that tell draws of demonstrations apart; orders of the same demonstrations are averaged."""

OPTIONS = ["separator", "space_before_labels", "lr", "loss_on", "readout", "schedule", "epochs", "parameters"]
"""The columns that say how prompts were written and updates made; values made in different ways are never averaged."""

OVER_TASKS = "all tasks"
"""What the column `task` says of draws of all tasks taken together."""

LEVEL = 0.95
"""The coverage of intervals."""

SUMMARY = ["mean", "sd", "low", "high", "episodes", "undefined"]
"""The columns that `summarise` adds to those that it tells apart."""


def summarise(frame: pd.DataFrame, by: Sequence[str] = ("model", "method", "control", "metric")) -> pd.DataFrame:
    """Average a tidy frame over draws of demonstrations.

    Args:
        frame: Rows of one or more comparisons, of `frame` or of `heads`, whose values are over all queries.
        by: The columns to tell apart; add `"layer"` for values per layer, else layers are averaged within each draw; add
            `"subset"` for false-to-true queries beside all queries, else values are over all queries.

    Returns:
        One row per group, in the frame's order: the columns of `by`, then `mean`, `sd` (over draws; NaN for a single one), `low`
        and `high` (a 95 % t-interval of the mean, likewise), `episodes` (how many draws had a defined value) and `undefined`
        (values left out within them).

    Raises:
        ValueError: If values would be averaged over different options of the updates, such as learning rates within a task.
    """
    by = list(by)
    frame = frame if "subset" in by or "subset" not in frame else frame[frame["subset"] == "all"]
    if frame.empty:
        return pd.DataFrame(columns=[*by, *SUMMARY])
    refuse_pooling(frame, by)
    tell_apart = [*(column for column in EPISODE if column not in by), *by]
    groups = frame.groupby(tell_apart, dropna=False, observed=True, sort=False)
    per_draw = groups.agg(value=("value", "mean"), undefined=("undefined", "sum")).reset_index()

    among = per_draw.groupby(by, dropna=False, observed=True, sort=False)
    summary = among.agg(mean=("value", "mean"), sd=("value", "std"), episodes=("value", "count"), undefined=("undefined", "sum"))
    half = stats.t.ppf((1 + LEVEL) / 2, summary["episodes"] - 1) * summary["sd"] / np.sqrt(summary["episodes"])
    summary = summary.assign(low=summary["mean"] - half, high=summary["mean"] + half).reset_index()
    return summary[[*by, *SUMMARY]].astype({"episodes": int, "undefined": int})


class Estimate(NamedTuple):
    """A mean over draws, and how well it is known.

    Attributes:
        mean: The mean; over several tasks the mean of their means, each task counting alike.
        low: The lower end of its 95 % t-interval; NaN if a task has fewer than two draws.
        high: The upper end.
        p: The two-sided p-value of the t-test that the mean is zero; NaN likewise.
        draws: The number of draws with a defined value.
    """

    mean: float
    low: float
    high: float
    p: float
    draws: int


def paired_difference(frame: pd.DataFrame, metric: str, a: dict[str, str], b: dict[str, str]) -> Estimate:
    """The mean difference of a metric between two conditions on the same draws, with its interval and paired t-test.

    Args:
        frame: Rows of several comparisons.
        metric: Which metric.
        a: The first condition, as column values, such as `{"model": "trained", "method": "lcgd"}`; if it does not name them,
            `control` is `"none"` and `subset` is `"all"`.
        b: The condition that is subtracted.

    Raises:
        ValueError: If a condition would average over different options of the updates, such as learning rates within a task.
    """
    return estimate(paired_differences(frame, metric, a, b))


def paired_differences(frame: pd.DataFrame, metric: str, a: dict[str, str], b: dict[str, str]) -> pd.Series:
    """The difference of `paired_difference` in every draw, indexed by `EPISODE`; arguments are the same.

    It is taken order by order and layer by layer, where both sides are defined, and averaged within the draw. Draws in which it is
    defined nowhere are left out.

    Raises:
        ValueError: As `paired_difference`.
    """

    def in_its_place(condition: dict[str, str]) -> pd.Series:
        chosen = frame[frame["metric"] == metric]
        for column, value in ({"control": "none", "subset": "all"} | condition).items():
            chosen = chosen[chosen[column] == value]
        refuse_pooling(chosen, [])
        place = [chosen[column] for column in (*EPISODE, "order")] + [chosen["layer"].astype("Int64").fillna(-1)]
        return chosen.groupby(place, sort=False)["value"].mean()

    differences = (in_its_place(a) - in_its_place(b)).dropna()
    per_draw = differences.groupby(level=EPISODE, sort=False).mean()
    # In the frame's own order, which a difference of unequal sides loses.
    return per_draw.reindex(pd.MultiIndex.from_frame(frame[EPISODE].drop_duplicates())).dropna()


def estimate(per_draw: pd.Series) -> Estimate:
    """Estimate a mean from one value per draw.

    Several tasks are strata: the mean is over their means, and its error comes from the spread of draws within tasks, with the
    degrees of freedom of Welch and Satterthwaite. So it is about these tasks, and not about tasks in general.

    Args:
        per_draw: Values, with the task as a level of the index. Those that are NaN are left out.
    """
    strata = [values.to_numpy() for _, values in per_draw.dropna().groupby(level="task", sort=False)]
    draws = sum(map(len, strata))
    mean = float(np.mean([values.mean() for values in strata])) if strata else math.nan
    if not strata or min(map(len, strata)) < 2:
        return Estimate(mean, math.nan, math.nan, math.nan, draws)
    squares = np.array([values.var(ddof=1) / len(values) for values in strata]) / len(strata) ** 2
    error = math.sqrt(squares.sum())
    if error == 0:
        return Estimate(mean, mean, mean, float(mean == 0), draws)
    freedom = squares.sum() ** 2 / sum(square**2 / (len(values) - 1) for square, values in zip(squares, strata, strict=True))
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, freedom)), draws)


def refuse_pooling(frame: pd.DataFrame, by: Sequence[str]) -> None:
    """Check that values within a group of `by` were made in one way.

    Raises:
        ValueError: If they were made with different options of the updates, such as learning rates within a task.
    """
    for option in OPTIONS:
        # Every task may have a learning rate of its own.
        within = [*by, "task"] if option == "lr" and "task" not in by else list(by)
        groups = frame.groupby(within, dropna=False, observed=True) if within else frame.groupby(lambda _: 0)
        if option in frame and option not in by and (groups[option].nunique() > 1).any():
            values = ", ".join(map(str, sorted(frame[option].dropna().unique())))
            raise ValueError(f"the frame holds several values of {option} ({values}); choose one, or add {option!r} to `by`")
