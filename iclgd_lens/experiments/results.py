"""Tidy results: how frames of `compare` are kept, averaged and tested.

The unit that varies is the episode. A value is first averaged over what is inside an episode (queries, heads, and layers where
asked), then over episodes, and its interval says how well the mean over episodes is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from iclgd_lens.files import written_whole

EPISODE = ["task", "k", "seed"]
"""The columns that tell episodes apart."""

OPTIONS = ["lr", "loss_on", "readout", "schedule", "epochs", "parameters"]
"""The columns that say how updates were made; values made in different ways are never averaged."""

LEVEL = 0.95


def summarise(frame: pd.DataFrame, by: Sequence[str] = ("model", "method", "control", "metric")) -> pd.DataFrame:
    """Average a tidy frame over episodes.

    Args:
        frame: Rows of one or more comparisons.
        by: The columns to tell apart; add `"layer"` for values per layer, else layers are averaged within each episode.

    Returns:
        One row per group: the columns of `by`, then `mean`, `low` and `high` (a 95 % t-interval over episodes, NaN for a single
        one), `episodes` (how many had a defined value) and `undefined` (values left out within them).

    Raises:
        ValueError: If values would be averaged over different options of the updates, such as learning rates.
    """
    by = list(by)
    _refuse_pooling(frame, by)
    groups = frame.groupby(EPISODE + by, dropna=False, observed=True)
    per_episode = groups.agg(value=("value", "mean"), undefined=("undefined", "sum")).reset_index()

    def row(group: pd.DataFrame) -> pd.Series:
        mean, low, high, count = interval(group["value"].to_numpy())
        return pd.Series({"mean": mean, "low": low, "high": high, "episodes": count, "undefined": group["undefined"].sum()})

    summary = per_episode.groupby(by, dropna=False, observed=True)[["value", "undefined"]].apply(row).reset_index()
    return summary.astype({"episodes": int, "undefined": int})


def paired_difference(frame: pd.DataFrame, metric: str, a: dict[str, str], b: dict[str, str]) -> tuple[float, float, float, int]:
    """The mean difference of a metric between two conditions on the same episodes, with its 95 % t-interval.

    Args:
        frame: Rows of several comparisons.
        metric: Which metric; layers are averaged within each episode.
        a: The first condition, as column values, such as `{"model": "trained", "method": "lcgd"}`.
        b: The condition that is subtracted.

    Returns:
        Mean, low, high, and the number of episodes in which both are defined.

    Raises:
        ValueError: If a condition would average over different options of the updates, such as learning rates.
    """

    def per_episode(condition: dict[str, str]) -> pd.Series:
        chosen = frame[frame["metric"] == metric]
        for column, value in ({"control": "none"} | condition).items():
            chosen = chosen[chosen[column] == value]
        _refuse_pooling(chosen, [])
        return chosen.groupby(EPISODE)["value"].mean()

    return interval((per_episode(a) - per_episode(b)).to_numpy())


def interval(values: np.ndarray) -> tuple[float, float, float, int]:
    """Mean, and 95 % t-interval of the mean, over the defined values; the interval is NaN for fewer than two.

    Returns:
        Mean, low, high, and the number of defined values.
    """
    defined = values[~np.isnan(values)]
    count = len(defined)
    mean = float(defined.mean()) if count else float("nan")
    if count < 2:
        return mean, float("nan"), float("nan"), count
    half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * stats.sem(defined))
    return mean, mean - half, mean + half, count


def _refuse_pooling(frame: pd.DataFrame, by: list[str]) -> None:
    groups = frame.groupby(by, dropna=False, observed=True) if by else frame.groupby(lambda _: 0)
    for option in OPTIONS:
        if option in frame and option not in by and (groups[option].nunique() > 1).any():
            values = ", ".join(map(str, sorted(frame[option].dropna().unique())))
            raise ValueError(f"the frame holds several values of {option} ({values}); choose one, or add {option!r} to `by`")


def write_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a frame to a parquet file, whole or not at all, and return its path."""
    with written_whole(Path(path)) as partial:
        frame.to_parquet(partial, index=False)
    return Path(path)
