"""The paper's figures and the learning-rate curve, as plotly figures of tidy frames (Deutch et al. 2024, Figures 2 to 4).

Every function takes frames as `compare` or `reproduce` return them and gives a `Figure`; nothing is shown or written. Means and
standard deviations are over draws of demonstrations. GD is blue and LCGD vermilion everywhere; untrained twins are dotted.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from plotly import graph_objects as go

from iclgd_lens.experiments.results import refuse_pooling, summarise
from iclgd_lens.views.figure_style import (
    COLOURS,
    DOTS,
    draws,
    error_bars,
    grid,
    rows_of,
    shown_texts,
    some,
    styled,
    tick_step,
    titled,
)
from iclgd_lens.views.names import METHOD_NAMES, METRIC_NAMES

SIMILARITIES = ("sim_aou", "sim_am_delta")


def alpha_figure(frame: pd.DataFrame) -> go.Figure:
    """α per task, averaged over layers, of attention outputs and of attention scores (Figure 2).

    Raises:
        ValueError: If the frame has no α, which needs both methods, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(alpha_rows(frame), "α")
    summary = summarise(chosen, by=["task", "metric"])
    tasks = list(chosen["task"].unique())
    figure = go.Figure()
    for metric, group in summary.groupby("metric", sort=False):
        figure.add_bar(
            x=[tasks.index(task) for task in group["task"]],
            y=group["mean"],
            error_y=error_bars(group),
            name=METRIC_NAMES[str(metric)],
            marker_color=COLOURS[str(metric)],
        )
    figure.update_xaxes(tickvals=[*range(len(tasks))], ticktext=shown_texts(tasks, 72 // len(tasks)))
    title = titled("α: how alike the updates of LCGD and GD are", f"n = {draws(chosen)}, mean ± sd")
    figure.update_layout(title=title, yaxis_title="cosine, mean over layers", barmode="group")
    return styled(figure)


def layer_figure(frame: pd.DataFrame) -> go.Figure:
    """SimAOU and SimAM_Δ layer by layer with error bars, GD beside LCGD, untrained twins as dotted lines (Figure 3).

    Raises:
        ValueError: If the frame has neither metric, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(layer_rows(frame), "SimAOU or SimAM_Δ")
    by = ["task", "metric", "model", "method", "layer"]
    summary = summarise(chosen, by=by)
    tasks = list(chosen["task"].unique())
    figure = grid(tasks, [METRIC_NAMES[metric] for metric in SIMILARITIES], x_title="layer", y_title="cosine")
    twins = [model for model in chosen["model"].unique() if model != "trained"]
    in_legend: set[tuple[str, str]] = set()
    for keys, group in summary.groupby(by[:-1], sort=False):
        task, metric, model, method = map(str, keys)
        place = {"row": tasks.index(task) + 1, "col": SIMILARITIES.index(metric) + 1}
        first = (method, model) not in in_legend
        in_legend.add((method, model))
        if model == "trained":
            figure.add_bar(
                x=group["layer"],
                y=group["mean"],
                error_y=error_bars(group),
                name=METHOD_NAMES[method],
                legendgroup=method,
                showlegend=first,
                marker_color=COLOURS[method],
                opacity=0.6,  # so that the twins' lines are seen in front
                **place,
            )
        else:
            figure.add_scatter(
                x=group["layer"],
                y=group["mean"],
                error_y=error_bars(group),
                mode="lines+markers",
                line={"color": COLOURS[method], "dash": DOTS[twins.index(model) % len(DOTS)], "width": 1.5},
                marker={"line": {"color": "white", "width": 1}},
                name=f"{METHOD_NAMES[method]}, {model}",
                legendgroup=f"{method} {model}",
                showlegend=first,
                **place,
            )
    figure.update_xaxes(tick0=0, dtick=tick_step(int(chosen["layer"].max())))
    figure.update_layout(title=titled("Similarity of updates to ICL by layer", f"n = {draws(chosen)}, mean ± sd"), barmode="group")
    return styled(figure, rows=len(tasks))


def gradient_figure(gradients: pd.DataFrame) -> go.Figure:
    """ℓ2 norms of the gradients, layer by demonstration, GD beside LCGD, the latter on a log scale (Figure 4).

    Raises:
        ValueError: If the frame has no gradients of the trained model, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(gradient_rows(gradients), "gradients of a trained model")
    refuse_pooling(chosen, ["task", "method"])
    tasks, methods = list(chosen["task"].unique()), [method for method in METHOD_NAMES if method in set(chosen["method"])]
    titles = [METHOD_NAMES[method] + (", log scale" if method == "lcgd" else "") for method in methods]
    several_epochs = "epochs" in chosen and (chosen["epochs"] > 1).any()
    steps = "step: demonstrations, epoch by epoch" if several_epochs else "demonstration"
    figure = grid(tasks, titles, x_title=steps, y_title="layer", gap=0.2)
    for keys, group in chosen.groupby(["task", "method"], sort=False):
        task, method = map(str, keys)
        row, column = tasks.index(task) + 1, methods.index(method) + 1
        norms = group.pivot_table(index="layer", columns="step", values="gradient_norm", aggfunc="mean")
        values = norms.to_numpy()
        log = method == "lcgd"
        # Logarithms of zero stay blank.
        shown = np.log10(np.where(values > 0, values, np.nan)) if log else values
        x_domain = figure.get_subplot(row, column).xaxis.domain
        y_domain = figure.get_subplot(row, column).yaxis.domain
        bar = {
            "x": x_domain[1] + 0.005,
            "xanchor": "left",
            "y": sum(y_domain) / 2,
            "len": y_domain[1] - y_domain[0],
            "thickness": 12,
            "title": {"text": "ℓ2 norm", "side": "right"},
        }
        if log and np.isfinite(shown).any():
            low, high = np.nanmin(shown), np.nanmax(shown)
            ticks = [digit * 10.0**power for power in range(int(low) - 2, int(high) + 2) for digit in (1, 2, 5)]
            ticks = [tick for tick in ticks if low <= np.log10(tick) <= high]
            if len(ticks) < 2:  # norms that differ by less than such steps
                ticks = [10**power for power in (low, (low + high) / 2, high)]
            bar |= {"tickvals": np.log10(ticks), "ticktext": [f"{tick:.3g}" for tick in ticks]}
        figure.add_heatmap(
            x=norms.columns,
            y=norms.index,
            z=shown,
            customdata=values,
            hovertemplate="layer %{y}, demonstration %{x}: %{customdata:.3g}<extra></extra>",
            colorscale="Cividis",
            colorbar=bar,
            row=row,
            col=column,
        )
    figure.update_xaxes(tick0=0, dtick=tick_step(int(chosen["step"].max()), most=12))
    figure.update_yaxes(tick0=0, dtick=tick_step(int(chosen["layer"].max())))
    figure.update_layout(title=titled("ℓ2 norms of the gradients", f"mean over {draws(chosen)}"))
    return styled(figure, rows=len(tasks))


def rate_figure(curve: pd.DataFrame, rates: pd.DataFrame | None = None) -> go.Figure:
    """SimAOU, SimAM_Δ and accuracy after finetuning against the learning rate, GD beside LCGD, untrained twins as dotted lines.

    Args:
        curve: What `similarity_by_rate` found.
        rates: The learning rates in use, with columns `task`, `method` and `lr`, to be marked.

    Raises:
        ValueError: If the frame has none of the metrics, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    metrics = (*SIMILARITIES, "accuracy")
    chosen = some(rate_rows(curve), "SimAOU, SimAM_Δ or accuracy")
    by = ["task", "metric", "model", "method", "lr"]
    summary = summarise(chosen, by=by).sort_values(by)
    tasks = list(chosen["task"].unique())
    titles = [METRIC_NAMES.get(metric, f"FT {metric}") for metric in metrics]
    twins = [model for model in chosen["model"].unique() if model != "trained"]
    in_legend: set[tuple[str, str]] = set()
    figure = grid(tasks, titles, x_title="learning rate", gap=0.12)
    for keys, group in summary.groupby(by[:-1], sort=False):
        task, metric, model, method = map(str, keys)
        trained = model == "trained"
        place = {"row": tasks.index(task) + 1, "col": metrics.index(metric) + 1}
        figure.add_scatter(
            x=group["lr"],
            y=group["mean"],
            error_y=error_bars(group) if trained else None,
            mode="lines+markers" if trained else "lines",
            line={"color": COLOURS[method], "dash": "solid" if trained else DOTS[twins.index(model) % len(DOTS)]},
            name=METHOD_NAMES[method] if trained else f"{METHOD_NAMES[method]}, {model}",
            legendgroup=f"{method} {model}",
            showlegend=(method, model) not in in_legend,
            **place,
        )
        in_legend.add((method, model))
    marked = [] if rates is None else rates[rates["task"].isin(tasks)].groupby(["task", "lr"])["method"].unique().items()
    for (task, rate), used in marked:
        # One line where both methods use the same rate, in the colour of neither.
        colour = COLOURS[used[0]] if len(used) == 1 else "#666666"
        for column in range(len(metrics)):
            line = {"color": colour, "dash": "dash", "width": 1}
            figure.add_vline(rate, line=line, row=tasks.index(task) + 1, col=column + 1)
    figure.update_xaxes(type="log", tickangle=0, **_rate_ticks(sorted(chosen["lr"].unique())))
    for column, metric in enumerate(metrics):
        figure.update_yaxes(title_text="share of queries" if metric == "accuracy" else "cosine", title_standoff=4, col=column + 1)
    note = f"n = {draws(chosen)}, mean ± sd, untrained: mean" + ("; dashed: rate in use" if marked else "")
    figure.update_layout(title=titled("Similarity against learning rate", note))
    return styled(figure, rows=len(tasks))


def _rate_ticks(rates: list[float]) -> dict[str, object]:
    """Ticks at powers of ten, or at the rates themselves where these do not span two."""
    decades = math.log10(rates[-1] / rates[0])
    if decades < 2:
        return {"tickvals": rates, "ticktext": [f"{rate:g}" for rate in rates]}
    return {"dtick": 1 if decades < 5 else 2, "exponentformat": "power"}


def alpha_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `alpha_figure` draws."""
    return rows_of(frame[frame["model"] == "trained"], ["alpha_aou", "alpha_am"], METHOD_NAMES)


def layer_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `layer_figure` draws."""
    return rows_of(frame, SIMILARITIES, METHOD_NAMES)


def gradient_rows(gradients: pd.DataFrame) -> pd.DataFrame:
    """The rows that `gradient_figure` draws."""
    return gradients[gradients["model"] == "trained"]


def rate_rows(curve: pd.DataFrame) -> pd.DataFrame:
    """The rows that `rate_figure` draws."""
    return rows_of(curve, (*SIMILARITIES, "accuracy"), METHOD_NAMES) if len(curve) else curve
