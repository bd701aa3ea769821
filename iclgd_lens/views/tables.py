"""Results as tables for the terminal, and in one line. Every number comes from the frame that is given."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.table import Table

from iclgd_lens.experiments.results import EPISODE, Estimate, paired_difference, summarise
from iclgd_lens.views.names import METHOD_NAMES, METRIC_NAMES, RUN_NAMES

CONDITIONS = {"trained": ("trained", "none"), "untrained": ("untrained", "none"), "random": ("trained", "random")}
"""Columns of the similarity table: which model, and whether the update's effect was replaced by a random one."""


def accuracy_table(frame: pd.DataFrame) -> Table:
    """Accuracy of every run, trained beside untrained."""
    summary = summarise(frame[frame["metric"] == "accuracy"], by=["model", "method"]).set_index(["model", "method"])
    models = [str(model) for model in frame["model"].unique()]
    table = _table("Accuracy (mean ± 95 % over episodes)", ["run", *models])
    for method, name in RUN_NAMES.items():
        if (models[0], method) in summary.index:
            table.add_row(name, *(_plus_minus(summary.loc[(model, method)], "") for model in models))
    return table


def similarity_table(frame: pd.DataFrame) -> Table:
    """Every similarity, averaged over layers, heads and queries: trained beside untrained beside random baseline.

    The last column counts the values that were undefined and left out.
    """
    summary = summarise(frame).set_index(["metric", "method", "model", "control"])
    table = _table(
        "Similarity, averaged over layers (mean ± 95 % interval over episodes)", ["metric", "method", *CONDITIONS, "undef."]
    )
    for metric, metric_name in METRIC_NAMES.items():
        for method, method_name in METHOD_NAMES.items():
            keys = [(metric, method, *condition) for condition in CONDITIONS.values()]
            present = [key for key in keys if key in summary.index]
            if present:
                shown = [_plus_minus(summary.loc[key]) if key in present else "–" for key in keys]
                name = "LCGD, GD" if metric.startswith("alpha") else method_name
                table.add_row(metric_name, name, *shown, str(summary.loc[present, "undefined"].sum()))
        table.add_section()
    return table


def layer_table(frame: pd.DataFrame) -> Table:
    """SimAOU and SimAM_Δ of every method, layer by layer, trained over untrained."""
    metrics = ["sim_aou", "sim_am_delta"]
    by = ["metric", "method", "model", "layer"]
    chosen = frame[frame["metric"].isin(metrics) & (frame["control"] == "none")]
    summary = summarise(chosen, by=by).set_index(by)["mean"]
    layers = sorted(chosen["layer"].unique())
    table = _table("By layer (mean over episodes)", ["metric", "method", "model", *(f"layer {layer}" for layer in layers)])
    for metric in metrics:
        for method in METHOD_NAMES:
            for model in frame["model"].unique():
                if (metric, method, model, layers[0]) in summary.index:
                    values = (f"{summary.loc[(metric, method, model, layer)]:+.3f}" for layer in layers)
                    table.add_row(METRIC_NAMES[metric], METHOD_NAMES[method], str(model), *values)
        table.add_section()
    return table


def bundled_table(measured: pd.DataFrame) -> Table:
    """Accuracy of the bundled learner, one row per task and setting, trained beside untrained."""
    table = _table("Accuracy on fresh episodes", ["labels", "classes", "k", "ICL", "ZSL", "untrained ICL", "untrained ZSL"])
    for setting, group in measured.groupby(["mapping", "n_classes", "k"], sort=False):
        models = group.set_index("model")
        shown = [f"{models.loc[model, run]:.3f}" for model in ("trained", "untrained") for run in ("icl", "zsl")]
        table.add_row(*map(str, setting), *shown)
    return table


def verdict(frame: pd.DataFrame, metric: str = "sim_aou") -> str:
    """Say in one line what a metric's numbers show, and no more: LCGD against GD, and each against its untrained twin.

    Differences are paired by episode; their 95 % t-intervals decide the words.
    """
    methods = [method for method in ("gd", "lcgd") if method in set(frame["method"])]
    parts = []
    if len(methods) == 2:
        against_gd = [{"model": "trained", "method": method} for method in ("lcgd", "gd")]
        parts.append(f"LCGD − GD {_difference(paired_difference(frame, metric, *against_gd))}")
    exceeding = []
    if has_twin := "untrained" in set(frame["model"]):
        for method in methods:
            twins = [{"model": model, "method": method} for model in ("trained", "untrained")]
            difference = paired_difference(frame, metric, *twins)
            parts.append(f"{METHOD_NAMES[method]} trained − untrained {_difference(difference)}")
            if difference.low > 0:
                exceeding.append(METHOD_NAMES[method])
    episodes = len(frame[EPISODE].drop_duplicates())
    numbers = f"{METRIC_NAMES[metric]} over {episodes} episode{'s' if episodes != 1 else ''}: {'; '.join(parts)}."
    if not has_twin:
        return f"{numbers} Without an untrained twin beside it, a similarity is no evidence that ICL is gradient descent."
    if episodes == 1:
        return f"{numbers} One episode says nothing about how sure these differences are."
    who = " and ".join(exceeding) + f" measurably exceed{'s' if len(exceeding) == 1 else ''}"
    return (
        f"{numbers} {who if exceeding else 'No method measurably exceeds'} an untrained twin; similarity that the twin reaches "
        "too is no evidence that ICL is gradient descent."
    )


def _difference(difference: Estimate) -> str:
    if difference.low != difference.low:
        return f"{difference.mean:+.3f} (no interval)"
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _plus_minus(row: pd.Series, sign: str = "+") -> str:
    if row["mean"] != row["mean"]:
        return "undefined"
    mean = f"{row['mean']:{sign}.3f}"
    return mean if row["low"] != row["low"] else f"{mean} ±{row['high'] - row['mean']:.3f}"


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    text = ("run", "metric", "method", "model", "labels")
    for column in columns:
        table.add_column(column, justify="left" if column in text else "right", no_wrap=True)
    return table
