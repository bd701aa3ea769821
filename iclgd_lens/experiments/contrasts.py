"""What methods and training make of similarities: differences that are paired by query, over draws, resampled and tested.

`results.paired_difference` is the simple form, with t-intervals over draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from iclgd_lens.experiments.resampling import Stratum, bootstrap_interval, effect_size, holm, permutation_p
from iclgd_lens.experiments.results import EPISODE, LEVEL, OPTIONS, OVER_TASKS

Condition = tuple[str, str]
"""What the columns `model` and `method` say."""


def contrasts(
    per_query: pd.DataFrame, metrics: Sequence[str] = ("sim_aou", "sim_am_delta"), n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """What methods and training make of similarities: LCGD − GD on trained models, and trained − twin, for every way they were run.

    Differences are paired by draw, order and query. Orders of the same demonstrations are averaged, then queries, then draws, then
    tasks. Ways of running (learning rates, numbers of demonstrations, options, models) are told apart where a task has several.

    Args:
        per_query: Rows of `Comparison.per_query`, of one or many comparisons or of a sweep.
        metrics: Which metrics.
        n_resamples: Replicates of the bootstrap.
        seed: Seeds them.

    Returns:
        One row per way of running, contrast, metric, method, twin and task, and over all tasks where there are several and all have
        it: the columns that tell ways apart, `contrast`, `metric`, `method`, `twin`, `task`, `mean`, `low` and `high` (a 95 %
        interval by hierarchical bootstrap over draws and queries, `bootstrap_interval`), `p` (`permutation_p` over draws),
        `p_holm` (the same, corrected by Holm for all rows here), `effect` (`effect_size`, in standard deviations over draws),
        `draws` and `episodes` (a draw in each of its orders) with a defined difference.
    """
    chosen = per_query[
        per_query["metric"].isin(metrics) & per_query["method"].isin(["gd", "lcgd"]) & (per_query["control"] == "none")
    ]
    ways = [column for column in ("model_name", "dtype") if column in chosen]
    per_task = chosen.groupby([*ways, "task"], observed=True, sort=False)
    ways += [column for column in ("k", "n_queries", *OPTIONS) if column in chosen and (per_task[column].nunique() > 1).any()]
    rows = []
    for way, group in chosen.groupby(ways, observed=True, sort=False) if ways else [((), chosen)]:
        about = dict(zip(ways, way, strict=True))
        for contrast, method, twin, a, b in _contrasts_of(group):
            for metric in metrics:
                of_metric = group[group["metric"] == metric]
                strata = _strata(_where(of_metric, a), _where(of_metric, b))
                where = {**about, "contrast": contrast, "metric": metric, "method": method, "twin": twin}
                for task, (stratum, episodes) in strata.items():
                    rows.append({**where, "task": task, **_contrast([stratum], n_resamples, seed), "episodes": episodes})
                if len(strata) == group["task"].nunique() > 1:
                    over = _contrast([stratum for stratum, _ in strata.values()], n_resamples, seed)
                    rows.append({**where, "task": OVER_TASKS, **over, "episodes": sum(n for _, n in strata.values())})
    columns = [*ways, "contrast", "metric", "method", "twin", "task", "mean", "low", "high", "p", "effect", "draws", "episodes"]
    found = pd.DataFrame(rows, columns=columns)
    found.insert(found.columns.get_loc("p") + 1, "p_holm", holm(found["p"].to_numpy(dtype=float)))
    return found


def _contrasts_of(frame: pd.DataFrame) -> Iterator[tuple[str, str, str | None, Condition, Condition]]:
    """The name, method, twin and the two conditions of every contrast that a frame may have."""
    methods = [method for method in ("gd", "lcgd") if method in set(frame["method"])]
    if len(methods) == 2:
        yield "LCGD − GD", "lcgd", None, ("trained", "lcgd"), ("trained", "gd")
    for method in methods:
        for twin in (model for model in frame["model"].unique() if model != "trained"):
            yield "trained − twin", method, str(twin), ("trained", method), (str(twin), method)


def _where(frame: pd.DataFrame, condition: Condition) -> pd.DataFrame:
    model, method = condition
    return frame[(frame["model"] == model) & (frame["method"] == method)]


def _strata(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, tuple[Stratum, int]]:
    """The differences of every task that has any, and how many episodes they come from."""
    place = [*EPISODE, "order", "query", "query_digest"]
    differences = (a.set_index(place)["value"] - b.set_index(place)["value"]).dropna()
    strata = {}
    for task, values in differences.groupby(level="task", sort=False):
        episodes = values.index.to_frame()[["k", "seed", "order"]].drop_duplicates()
        # Orders are averaged; a row per draw, a column per query.
        table = values.groupby(level=["k", "seed", "query"]).mean().unstack("query")
        # Whether draws have the same queries: then each column is one.
        digests = values.index.to_frame(index=False).groupby("query")["query_digest"].nunique()
        crossed = len(table) > 1 and bool((digests == 1).all())
        strata[str(task)] = Stratum(table.to_numpy(), crossed), len(episodes)
    return strata


def _contrast(strata: Sequence[Stratum], n_resamples: int, seed: int) -> dict[str, float]:
    means = [stratum.draw_means for stratum in strata]
    low, high = bootstrap_interval(strata, LEVEL, n_resamples, seed)
    return {
        "mean": float(np.mean([each.mean() for each in means])),
        "low": low,
        "high": high,
        "p": permutation_p(means, seed=seed),
        "effect": effect_size(means),
        "draws": sum(map(len, means)),
    }
