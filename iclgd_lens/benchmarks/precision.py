"""What half precision does to results: the same episodes with weights of several dtypes, against float64.

The weights are the same numbers but for being rounded to the dtype, and so is everything that is computed from them; similarities
are computed in at least float32 whatever the dtype (`models/precision.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from iclgd_lens.data.registry import load_task
from iclgd_lens.experiments.compare import compare
from iclgd_lens.models.loading import load_model
from iclgd_lens.views.names import METRIC_NAMES, RUN_NAMES
from iclgd_lens.views.sheets import Column, Sheet

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that are compared with float64."""

METRICS = ("sim_aou", "sim_am_delta", "accuracy")

_KEYS = ["seed", "method", "layer", "metric"]


def dtype_agreement(
    dtypes: Sequence[torch.dtype] = DTYPES,
    *,
    task: str = "bundled/remapped",
    lr: float = 0.3,
    n_episodes: int = 5,
    n_queries: int = 64,
    device: str | None = None,
    on_dtype: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Compare GD and LCGD with in-context learning by the bundled model with weights of several dtypes.

    Args:
        dtypes: What to compare with float64.
        task: A bundled task.
        lr: The step size of both methods.
        n_episodes: How many draws of demonstrations.
        n_queries: Queries of each.
        device: Where to run.
        on_dtype: Called with the name of each dtype before it is measured.

    Returns:
        One row per dtype, method and metric (similarities, one value per layer and draw, and accuracy, one per draw): `dtype`,
        `method`, `metric`, `value`, the mean in float64, and `mean` and `largest`, the absolute differences from float64.
    """

    def measured(dtype: torch.dtype) -> pd.Series[Any]:
        if on_dtype is not None:
            on_dtype(_name(dtype))
        model, draw_from = load_model("bundled", device=device, dtype=dtype), load_task(task)
        frames = []
        for seed in range(n_episodes):
            episode = draw_from.episode(model, k="fit", n_queries=n_queries, seed=seed)
            frames.append(compare(model, episode, lr=lr, controls=()).frame)
        frame = pd.concat(frames)
        return frame[frame["metric"].isin(METRICS) & (frame["subset"] == "all")].set_index(_KEYS)["value"]

    exact = measured(torch.float64)
    rows = []
    for dtype in dtypes:
        difference = (measured(dtype) - exact).abs()
        of_both = pd.DataFrame({"value": exact, "difference": difference}).reset_index().groupby(["method", "metric"], sort=False)
        summary = of_both.agg(value=("value", "mean"), mean=("difference", "mean"), largest=("difference", "max")).reset_index()
        rows.append(summary.assign(dtype=_name(dtype)))
    return pd.concat(rows, ignore_index=True)


def precision_table(frame: pd.DataFrame) -> Sheet:
    """What `dtype_agreement` found, for people."""
    numbers = frame.assign(run=frame["method"].replace(RUN_NAMES), metric=frame["metric"].replace(METRIC_NAMES))
    columns = (
        *(Column(name, name) for name in ("dtype", "run", "metric")),
        Column("in float64", "value", style=".3f"),
        Column("differs by", "mean", style=".1e"),
        Column("at most", "largest", style=".1e"),
    )
    note = "Absolute differences from float64, over layers and draws of demonstrations."
    return Sheet("precision", "What dtypes do to results", numbers, columns, note)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
