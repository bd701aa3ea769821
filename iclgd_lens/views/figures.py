"""Every figure that the frames of a run have the numbers for, and writing them to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from plotly import graph_objects as go

from iclgd_lens.files import remove_named
from iclgd_lens.views.export import write_figure, write_pictures
from iclgd_lens.views.figure_style import varies_k
from iclgd_lens.views.kernel_plots import (
    HEAD_METRICS,
    head_figure,
    head_rows,
    k_figure,
    k_rows,
    smoothing_figure,
    smoothing_rows,
    trajectory_figure,
    trajectory_rows,
)
from iclgd_lens.views.plots import (
    alpha_figure,
    alpha_rows,
    gradient_figure,
    gradient_rows,
    layer_figure,
    layer_rows,
    rate_figure,
    rate_rows,
)

MakeFigure = Callable[[], go.Figure]


class Drawn(NamedTuple):
    """A figure, and the rows that it is drawn from."""

    figure: go.Figure
    rows: pd.DataFrame


def figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, Drawn]:
    """Draw every figure that a run has the numbers for.

    Args:
        frames: The run's frames by name, those of a `Comparison` (`Comparison.frames`); those of `reproduce` have a `curve` and
            `rates`, too.

    Returns:
        By name: `figure2`, `figure3`, `figure4` (the paper's), `learning_rate` (with a curve), `accuracy_by_k` (where a draw has
        several k), `trajectories`, `smoothing` (with kernel views), and `heads_` with every metric of heads.

    Raises:
        ValueError: If values would be averaged over different options of the updates, such as learning rates within a task.
    """
    return {name: Drawn(draw(), rows) for name, (rows, draw) in _drawable(frames).items() if len(rows)}


def write_figures(frames: Mapping[str, pd.DataFrame], folder: Path, pictures: bool = True) -> str:
    """Write every figure as a page and its data as CSV, and as PNG and SVG where a browser can draw them.

    Files of such figures that an earlier run left in the folder are removed.

    Returns:
        Why there are no pictures, and what to do; empty if there are, or none were wanted.

    Raises:
        OSError: If they cannot be written.
        ValueError: As `figures`.
    """
    drawn = figures(frames)
    remove_named(folder, _drawable(frames))
    for name, (figure, data) in drawn.items():
        write_figure(figure, data, folder, name)
    if not pictures:
        return ""
    return write_pictures({name: figure for name, (figure, _) in drawn.items()}, folder)[1]


def _drawable(frames: Mapping[str, pd.DataFrame]) -> dict[str, tuple[pd.DataFrame, MakeFigure]]:
    """The rows of every figure that there is, and what draws it."""
    frame, gradients, heads = frames["frame"], frames["gradients"], frames["heads"]
    curve, rates = frames.get("curve", frame[:0]), frames.get("rates")
    return {
        "figure2": (alpha_rows(frame), lambda: alpha_figure(frame)),
        "figure3": (layer_rows(frame), lambda: layer_figure(frame)),
        "figure4": (gradient_rows(gradients), lambda: gradient_figure(gradients)),
        "learning_rate": (rate_rows(curve), lambda: rate_figure(curve, rates)),
        "accuracy_by_k": (k_rows(frame) if varies_k(frame) else frame[:0], lambda: k_figure(frame)),
        "trajectories": (trajectory_rows(frame), lambda: trajectory_figure(frame)),
        "smoothing": (smoothing_rows(frame), lambda: smoothing_figure(frame)),
        **{f"heads_{metric}": _of_heads(heads, metric) for metric in HEAD_METRICS},
    }


def _of_heads(heads: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, MakeFigure]:
    return head_rows(heads, metric), lambda: head_figure(heads, metric)
