"""The paper's figures of a run, written to a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd
from plotly import graph_objects as go

from iclgd_lens.experiments.reproduce import Results
from iclgd_lens.files import remove_named
from iclgd_lens.views.export import write_figure, write_pictures
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

FIGURES = ("figure2", "figure3", "figure4", "learning_rate")


def paper_figures(frames: Mapping[str, pd.DataFrame]) -> dict[str, tuple[go.Figure, pd.DataFrame]]:
    """Figures 2, 3 and 4, and the learning-rate curve, where a run has the numbers; each with the rows it is drawn from.

    Args:
        frames: The run's frames by name; those of `reproduce` have a `curve` and `rates`.
    """
    frame, gradients = frames["frame"], frames["gradients"]
    curve, rates = frames.get("curve", frame[:0]), frames.get("rates")
    drawn: dict[str, tuple[pd.DataFrame, Callable[[], go.Figure]]] = {
        "figure2": (alpha_rows(frame), lambda: alpha_figure(frame)),
        "figure3": (layer_rows(frame), lambda: layer_figure(frame)),
        "figure4": (gradient_rows(gradients), lambda: gradient_figure(gradients)),
        "learning_rate": (rate_rows(curve), lambda: rate_figure(curve, rates)),
    }
    return {name: (draw(), rows) for name, (rows, draw) in drawn.items() if len(rows)}


def write_paper_figures(results: Results, folder: Path, pictures: bool = True) -> str:
    """Write every figure as a page and its data as CSV, and as PNG and SVG where a browser can draw them.

    Files of these figures that an earlier run left in the folder are removed.

    Returns:
        Why there are no pictures, and what to do; empty if there are, or none were wanted.
    """
    remove_named(folder, FIGURES)
    figures = paper_figures(results.frames)
    for name, (figure, data) in figures.items():
        write_figure(figure, data, folder, name)
    if not pictures:
        return ""
    return write_pictures({name: figure for name, (figure, _) in figures.items()}, folder)[1]
