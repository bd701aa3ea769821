"""Frames of several draws, and what their figures should show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from plotly import graph_objects as go

from iclgd_lens import Comparison

TASKS = ("bundled/remapped", "bundled/natural")

NUMBERS = {"frame": "value", "queries": "probability", "gradients": "gradient_norm", "heads": "value", "per_query": "value"}


def drawn_again(found: Comparison, number: int, **about: object) -> Comparison:
    """A comparison with its columns `about` changed and all its numbers a little other, as if it were of another draw."""
    rng = np.random.default_rng(number)
    frames = {}
    for part, frame in found.frames.items():
        changed = frame.assign(**about)
        if part in NUMBERS:
            changed[NUMBERS[part]] *= rng.uniform(0.5, 1.0, len(changed))
        frames[part] = changed
    return Comparison(**frames)


def of(frame: pd.DataFrame, tasks: tuple[str, ...]) -> pd.DataFrame:
    return frame[frame["task"].isin(tasks)]


def moments(frame: pd.DataFrame, **where: Any) -> tuple[float, float]:
    """Mean and sd over draws of what is left of a frame, each draw averaged first."""
    if "subset" in frame:
        where["subset"] = "all"
    for column, wanted in {"control": "none", **where}.items():
        frame = frame[frame[column] == wanted]
    per_draw = [frame[frame["seed"] == seed]["value"].mean() for seed in frame["seed"].unique()]
    return float(np.mean(per_draw)), float(np.std(per_draw, ddof=1))


def place(trace: Any) -> int:
    """The number of a trace's subplot, from 0, row by row."""
    return int((trace.xaxis or "x")[1:] or 1) - 1


def titles(figure: go.Figure) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def units(figure: go.Figure) -> list[str]:
    """What stands beside the first panel of every row."""
    return [axis.title.text for axis in figure.select_yaxes(col=1)]
