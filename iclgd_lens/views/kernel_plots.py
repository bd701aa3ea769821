"""Kernel views as plotly figures of tidy frames: smoothing, single heads, logit-lens trajectories; and accuracy by k.

Every function takes a frame as `compare` or `reproduce` returns it and gives a `Figure`; nothing is shown or written. Means and
standard deviations are over draws of demonstrations. A run has one colour and one marker everywhere; untrained twins are dotted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from plotly import graph_objects as go

from iclgd_lens.experiments.results import summarise
from iclgd_lens.views.figure_style import (
    COLOURS,
    DOTS,
    draws,
    error_bars,
    grid,
    on_one_scale,
    rows_of,
    shown_text,
    some,
    styled,
    tick_step,
    titled,
)
from iclgd_lens.views.names import METHOD_NAMES, METRIC_NAMES, RUN_NAMES

SMOOTHING = {
    "demonstration_mass": ("λ on demonstrations", "share of attention"),
    "smoothing_share": ("smoothing", "share of the change"),
}
"""What panels of smoothing are called, and the units of their axes."""

LENS, FUNCTIONAL = "lens_gold_probability", "trajectory_tangent_gold_probability"

PANEL_NAMES = {**RUN_NAMES, **METHOD_NAMES}
SERIES_NAMES = {**RUN_NAMES, "functional": "functional GD, tangent kernel"}
SYMBOLS = {"zsl": "square", "icl": "circle", "gd": "triangle-up", "lcgd": "diamond", "functional": "x"}

BESIDE = {"scattermode": "group", "scattergap": 0.8}
"""Points of several lines at one place stand beside each other, so that their error bars can be told apart."""


class HeadMetric(NamedTuple):
    """How a metric of heads is shown: its name, its unit, and whether it may be negative."""

    name: str
    unit: str
    signed: bool = True


HEAD_METRICS = {
    "sim_am": HeadMetric(METRIC_NAMES["sim_am"], "cosine"),
    "sim_am_delta": HeadMetric(METRIC_NAMES["sim_am_delta"], "cosine"),
    "demonstration_mass": HeadMetric("λ: attention to demonstrations", "share of attention", signed=False),
    "smoothing_share": HeadMetric("Smoothing", "share of the head's change"),
    "contribution_inner_kendall": HeadMetric("Implied against in-context attention, labels' ends left out", "Kendall's τ"),
    "attention_agreement": HeadMetric("Label regression by attention", "share of queries as ICL", signed=False),
    "label_attention_agreement": HeadMetric("Label regression by attention to labels", "share of queries as ICL", signed=False),
}


def smoothing_figure(frame: pd.DataFrame) -> go.Figure:
    """λ and the smoothing share of attention's change, layer by layer with error bars, untrained twins dotted (`decompose`).

    Raises:
        ValueError: If the frame has neither, which needs `compare(..., kernels=True)`, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(smoothing_rows(frame), "λ (demonstration_mass) or the smoothing share, which compare(..., kernels=True) adds")
    by = ["task", "metric", "model", "layer"]
    summary = summarise(chosen, by=by)
    tasks, metrics = list(chosen["task"].unique()), list(SMOOTHING)
    figure = grid(tasks, [title for title, _ in SMOOTHING.values()], x_title="layer", gap=0.12)
    lines = _Lines(figure, chosen, "layer")
    for keys, group in summary.groupby(by[:-1], sort=False):
        task, metric, model = map(str, keys)
        lines.add(group, "icl", model, row=tasks.index(task) + 1, column=metrics.index(metric) + 1)
    for column, (_, unit) in enumerate(SMOOTHING.values()):
        figure.update_yaxes(title_text=unit, col=column + 1)
    figure.update_xaxes(tick0=0, dtick=tick_step(int(chosen["layer"].max())))
    figure.update_layout(title=titled("λ and smoothing by layer", f"n = {draws(chosen)}, mean ± sd"), **BESIDE)
    return styled(figure, rows=len(tasks))


def head_figure(heads: pd.DataFrame, metric: str, method: str | None = None, model: str | None = None) -> go.Figure:
    """Any metric of heads, layer by head: a panel for every method and model that has it, all on one colour scale.

    The scale is centred on 0 for metrics that may be negative. Heads whose metric is undefined are grey.

    Args:
        heads: The frame `heads` of a comparison.
        metric: Which metric.
        method: Draw this method alone.
        model: Draw this model alone, such as `"untrained"`.

    Raises:
        ValueError: If the frame is not one of heads or has no such rows, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(head_rows(heads, metric, method, model), _sought(metric, method, model))
    shown = HEAD_METRICS.get(metric, HeadMetric(metric, "value"))
    summary = summarise(chosen, by=["task", "model", "method", "layer", "head"])
    tasks, models = list(chosen["task"].unique()), list(chosen["model"].unique())
    methods = [name for name in RUN_NAMES if name in set(chosen["method"])]
    rows = [(task, model) for task in tasks for model in models]
    several = [len(tasks) > 1, len(models) > 1]
    named = [", ".join(name for name, told in zip(row, several, strict=True) if told) for row in rows]
    figure = grid(named, [PANEL_NAMES[name] for name in methods], x_title="head", y_title="layer")
    for keys, group in summary.groupby(["task", "model", "method"], sort=False):
        task, of_model, name = map(str, keys)
        means, deviations = (group.pivot(index="layer", columns="head", values=value) for value in ("mean", "sd"))
        figure.add_heatmap(
            x=means.columns,
            y=means.index,
            z=means.to_numpy(),
            xgap=1,
            ygap=1,
            customdata=deviations.to_numpy(),
            hovertemplate="layer %{y}, head %{x}: %{z:.3f} ± %{customdata:.3f}<extra></extra>",
            coloraxis="coloraxis",
            row=rows.index((task, of_model)) + 1,
            col=methods.index(name) + 1,
        )
    figure.update_xaxes(tick0=0, dtick=tick_step(int(chosen["head"].max())), showgrid=False, zeroline=False)
    figure.update_yaxes(tick0=0, dtick=tick_step(int(chosen["layer"].max())), showgrid=False, zeroline=False)
    alone = "" if several[1] or models == ["trained"] else f", {models[0]}"
    figure.update_layout(title=titled(shown_text(shown.name), f"by layer and head{alone}, mean over {draws(chosen)}"))
    styled(figure, rows=len(rows))
    largest = summary["mean"].abs().max()
    figure.update_layout(
        plot_bgcolor="#BBBBBB",
        margin_b=110,
        coloraxis={
            "colorscale": "RdBu_r" if shown.signed else "Cividis",
            "cmin": -largest if shown.signed else 0.0,
            "cmax": largest,
            "colorbar": {
                "title": {"text": shown.unit, "side": "right"},
                "orientation": "h",
                "thickness": 12,
                "len": 0.8,
                "yref": "container",
                "y": 0.01,
                "yanchor": "bottom",
            },
        },
    )
    return figure


def trajectory_figure(frame: pd.DataFrame) -> go.Figure:
    """The probability of the gold label after every layer, by the logit lens: ZSL, ICL, finetuned by GD and LCGD, and functional
    GD at the iterate that each layer of ICL is matched with; a panel for every model.

    Functional GD is left out where the frame has none, which needs `compare(..., kernels=True)`.

    Raises:
        ValueError: If the frame has no such probability, as label words share their first token, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(trajectory_rows(frame), f"{LENS}, which needs label words that differ in their first token")
    series = chosen["method"].where(chosen["metric"] == LENS, "functional")
    by = ["task", "model", "series", "layer"]
    summary = summarise(chosen.assign(series=series), by=by)
    tasks, models = list(chosen["task"].unique()), list(chosen["model"].unique())
    figure = grid(tasks, models, x_title="layer", y_title="probability of the gold label")
    lines = _Lines(figure, chosen, "layer")
    for (task, model, name), group in _in_order(summary, ["task", "model", "series"]):
        lines.add(group, name, "trained", row=tasks.index(task) + 1, column=models.index(model) + 1)
    figure.update_xaxes(tick0=0, dtick=tick_step(int(chosen["layer"].max())))
    on_one_scale(figure)
    figure.update_layout(title=titled("Gold label by the logit lens", f"n = {draws(chosen)}, mean ± sd"), **BESIDE)
    return styled(figure, rows=len(tasks))


def k_figure(frame: pd.DataFrame) -> go.Figure:
    """Accuracy against the number of demonstrations: ZSL, ICL, finetuned by GD and by LCGD, untrained twins dotted.

    Raises:
        ValueError: If the frame has no accuracy, or values would be averaged over
            different options of the updates, such as learning rates within a task.
    """
    chosen = some(k_rows(frame), "accuracy")
    by = ["task", "model", "method", "k"]
    summary = summarise(chosen, by=by)
    tasks = list(chosen["task"].unique())
    figure = grid(tasks, ["accuracy"], x_title="demonstrations k", y_title="share of queries")
    lines = _Lines(figure, chosen, "k")
    for (task, model, name), group in _in_order(summary, by[:-1]):
        lines.add(group, name, model, row=tasks.index(task) + 1, column=1)
    figure.update_xaxes(tickvals=sorted(chosen["k"].unique()))
    on_one_scale(figure)
    figure.update_layout(title=titled("Accuracy by k", f"n = {draws(chosen, per=('task', 'k'))}, mean ± sd"), **BESIDE)
    return styled(figure, rows=len(tasks))


def smoothing_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `smoothing_figure` draws."""
    return rows_of(frame, SMOOTHING, ["icl"])


def head_rows(heads: pd.DataFrame, metric: str, method: str | None = None, model: str | None = None) -> pd.DataFrame:
    """The rows that `head_figure` draws; arguments as there.

    Raises:
        ValueError: If the frame is not one of heads.
    """
    if "head" not in heads:
        raise ValueError("the frame has no column 'head'; give the frame `heads` of a comparison")
    chosen = (heads["metric"] == metric) & (heads["control"] == "none")
    chosen &= heads["method"].isin(RUN_NAMES if method is None else [method])
    return heads[chosen if model is None else chosen & (heads["model"] == model)]


def trajectory_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `trajectory_figure` draws; none without those of the logit lens."""
    lens = rows_of(frame, [LENS], RUN_NAMES)
    return rows_of(frame, [LENS, FUNCTIONAL], RUN_NAMES) if len(lens) else lens


def k_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that `k_figure` draws."""
    return rows_of(frame, ["accuracy"], RUN_NAMES)


class _Lines:
    """Lines of runs with error bars, each named in the legend once."""

    def __init__(self, figure: go.Figure, chosen: pd.DataFrame, x: str) -> None:
        self.figure, self.x = figure, x
        self.twins = [model for model in chosen["model"].unique() if model != "trained"]
        self.named: set[str] = set()

    def add(self, group: pd.DataFrame, series: str, model: str, *, row: int, column: int) -> None:
        trained = model == "trained"
        group = group.sort_values(self.x)
        name = SERIES_NAMES[series] + ("" if trained else f", {model}")
        self.figure.add_scatter(
            x=group[self.x],
            y=group["mean"],
            error_y=error_bars(group),
            mode="lines+markers",
            line={"color": COLOURS[series], "dash": "solid" if trained else DOTS[self.twins.index(model) % len(DOTS)]},
            marker={"symbol": SYMBOLS[series] + ("" if trained else "-open"), "size": 7},
            offsetgroup=name,
            name=name,
            legendgroup=name,
            showlegend=name not in self.named,
            row=row,
            col=column,
        )
        self.named.add(name)


def _in_order(summary: pd.DataFrame, by: list[str]) -> Iterator[tuple[tuple[str, ...], pd.DataFrame]]:
    """Groups in the frame's order, the last column, which names the series, in that of `SERIES_NAMES`."""
    groups = {tuple(map(str, keys)): group for keys, group in summary.groupby(by, sort=False)}
    outer = dict.fromkeys(keys[:-1] for keys in groups)
    for keys in ((*place, name) for place in outer for name in SERIES_NAMES):
        if keys in groups:
            yield keys, groups[keys]


def _sought(metric: str, method: str | None, model: str | None) -> str:
    return f"{metric!r}{f' of {method!r}' if method else ''}{f' of the model {model!r}' if model else ''}"
