"""The paper's figures of a run, written to a folder."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from plotly import graph_objects as go

from iclgd_lens.experiments.reproduce import Results
from iclgd_lens.views.export import write_figure, write_pictures
from iclgd_lens.views.plots import SIMILARITIES, alpha_figure, gradient_figure, layer_figure, rate_figure


def paper_figures(results: Results) -> dict[str, tuple[go.Figure, pd.DataFrame]]:
    """Figures 2, 3 and 4, and the learning-rate curve, where the run has the numbers; each with the rows it was drawn from."""
    frame, gradients = results.frame, results.gradients
    figures: dict[str, tuple[go.Figure, pd.DataFrame]] = {}
    alphas = frame[frame["metric"].str.startswith("alpha")]
    if len(alphas):
        figures["figure2"] = (alpha_figure(frame), alphas)
    similarities = frame[frame["metric"].isin(SIMILARITIES)]
    if len(similarities):
        figures["figure3"] = (layer_figure(frame), similarities)
    if (gradients["model"] == "trained").any():
        figures["figure4"] = (gradient_figure(gradients), gradients)
    if len(results.curve):
        figures["learning_rate"] = (rate_figure(results.curve, results.rates), results.curve)
    return figures


def write_paper_figures(results: Results, folder: Path, pictures: bool = True) -> str:
    """Write every figure as a page and its data as CSV, and as PNG and SVG where a browser can draw them.

    Returns:
        Why there are no pictures, and what to do; empty if there are, or none were wanted.
    """
    figures = paper_figures(results)
    for name, (figure, data) in figures.items():
        write_figure(figure, data, folder, name)
    if not pictures:
        return ""
    return write_pictures({name: figure for name, (figure, _) in figures.items()}, folder)[1]
