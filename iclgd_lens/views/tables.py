"""Results as tables, and in one line. Every number comes from the frame that is given."""

from __future__ import annotations

from math import isnan
from typing import Any

import pandas as pd

from iclgd_lens.experiments.results import EPISODE, Estimate, paired_difference, summarise
from iclgd_lens.views.names import METHOD_NAMES, METRIC_NAMES, RUN_NAMES, counted
from iclgd_lens.views.sheets import Column, Sheet

CONDITIONS = {"trained": ("trained", "none"), "untrained": ("untrained", "none"), "random": ("trained", "random")}
"""Columns of the similarity table: which model, and whether the update's effect was replaced by a random one."""


def comparison_tables(frame: pd.DataFrame) -> list[Sheet]:
    """The tables of a comparison: accuracy, similarities, and similarities by layer; the first alone if every update diverged."""
    similar = [similarity_table(frame), layer_table(frame)] if "sim_aou" in set(frame["metric"]) else []
    return [accuracy_table(frame), *similar]


def accuracy_table(frame: pd.DataFrame) -> Sheet:
    """Accuracy of every run, trained beside untrained."""
    by = ["model", "method"]
    summary = summarise(frame[frame["metric"] == "accuracy"], by=by).set_index(by)
    models = [str(model) for model in frame["model"].unique()]
    rows = [
        {"run": name} | {key: cell for model in models for key, cell in _cells(summary, (model, method), model)}
        for method, name in RUN_NAMES.items()
        if (models[0], method) in summary.index
    ]
    columns = (Column("run", "run"), *(_column(model, ".3f") for model in models))
    return Sheet("accuracy", "Accuracy (mean ± 95 % over episodes)", pd.DataFrame(rows), columns)


def similarity_table(frame: pd.DataFrame) -> Sheet:
    """Every similarity, averaged over layers, heads and queries: trained beside untrained beside random baseline.

    The last column counts the values that were undefined and left out.
    """
    summary = summarise(frame).set_index(["metric", "method", "model", "control"])
    rows = []
    for metric, metric_name in METRIC_NAMES.items():
        for method, method_name in METHOD_NAMES.items():
            keys = {name: (metric, method, *condition) for name, condition in CONDITIONS.items()}
            present = [key for key in keys.values() if key in summary.index]
            if present:
                row: dict[str, Any] = {"metric": metric_name, "method": "LCGD, GD" if metric.startswith("alpha") else method_name}
                row |= {key: cell for name, place in keys.items() for key, cell in _cells(summary, place, name)}
                rows.append(row | {"undefined": int(summary.loc[present, "undefined"].sum())})
    columns = (
        Column("metric", "metric"),
        Column("method", "method"),
        *map(_column, CONDITIONS),
        Column("undef.", "undefined"),
    )
    title = "Similarity, averaged over layers (mean ± 95 % interval over episodes)"
    return Sheet("similarity", title, pd.DataFrame(rows), columns)


def layer_table(frame: pd.DataFrame) -> Sheet:
    """SimAOU and SimAM_Δ of every method, layer by layer, trained over untrained."""
    metrics = ["sim_aou", "sim_am_delta"]
    by = ["metric", "method", "model", "layer"]
    chosen = frame[frame["metric"].isin(metrics) & (frame["control"] == "none")]
    summary = summarise(chosen, by=by).set_index(by)["mean"]
    layers = sorted(chosen["layer"].unique())
    rows = [
        {"metric": METRIC_NAMES[metric], "method": METHOD_NAMES[method], "model": str(model)}
        | {f"layer {layer}": summary.loc[(metric, method, model, layer)] for layer in layers}
        for metric in metrics
        for method in METHOD_NAMES
        for model in frame["model"].unique()
        if (metric, method, model, layers[0]) in summary.index
    ]
    texts = (Column(name, name) for name in ("metric", "method", "model"))
    columns = (*texts, *(Column(f"layer {layer}", f"layer {layer}") for layer in layers))
    return Sheet("layers", "By layer (mean over episodes)", pd.DataFrame(rows), columns)


def bundled_table(measured: pd.DataFrame) -> Sheet:
    """Accuracy of the bundled learner, one row per task and setting, trained beside untrained."""
    shown = {
        f"{'' if model == 'trained' else 'untrained '}{run.upper()}": (model, run)
        for model in ("trained", "untrained")
        for run in ("icl", "zsl")
    }
    rows = []
    for setting, group in measured.groupby(["mapping", "n_classes", "k"], sort=False):
        models = group.set_index("model")
        row: dict[str, Any] = dict(zip(("labels", "classes", "k"), setting, strict=True))
        rows.append(row | {name: models.loc[place] for name, place in shown.items()})
    columns = (*(Column(name, name) for name in ("labels", "classes", "k")), *(Column(name, name, style=".3f") for name in shown))
    return Sheet("bundled", "Accuracy on fresh episodes", pd.DataFrame(rows), columns)


def verdict(frame: pd.DataFrame, metric: str = "sim_aou") -> str:
    """Say in a few words what a metric's numbers show, and no more: LCGD against GD, and each against every untrained twin.

    Differences are paired by episode; their 95 % t-intervals decide the words.
    """
    methods = [method for method in METHOD_NAMES if method in set(frame["method"])]
    twins = [model for model in frame["model"].unique() if model != "trained"]
    episodes = len(frame[EPISODE].drop_duplicates())

    def between(a: dict[str, str], b: dict[str, str]) -> Estimate:
        return paired_difference(frame, metric, a, b)

    parts = []
    if len(methods) == 2:
        lcgd_gd = between({"model": "trained", "method": "lcgd"}, {"model": "trained", "method": "gd"})
        parts.append(f"LCGD − GD {_difference(lcgd_gd, episodes)}")
    against: dict[str, list[Estimate]] = {}
    for method in methods:
        against[method] = [between({"model": "trained", "method": method}, {"model": twin, "method": method}) for twin in twins]
        for twin, found in zip(twins, against[method], strict=True):
            parts.append(f"{METHOD_NAMES[method]} trained − {twin} {_difference(found, episodes)}")
    numbers = f"{METRIC_NAMES[metric]} over {counted(episodes, 'episode')}: {'; '.join(parts)}."
    if not twins:
        return f"{numbers} Without an untrained twin beside it, a similarity is no evidence that ICL is gradient descent."
    if all(isnan(each.low) for found in against.values() for each in found):
        few = "One episode says" if episodes == 1 else "So few episodes say"
        return f"{numbers} {few} nothing about how sure these differences are."
    exceeding = [METHOD_NAMES[method] for method, found in against.items() if all(each.low > 0 for each in found)]
    who = f"{' and '.join(exceeding)} measurably exceed{'s' if len(exceeding) == 1 else ''}"
    twin = "an untrained twin" if len(twins) == 1 else f"all {len(twins)} untrained twins"
    return (
        f"{numbers} {who if exceeding else 'No method measurably exceeds'} {twin}; similarity that a twin reaches too is no "
        "evidence that ICL is gradient descent."
    )


def _difference(found: Estimate, episodes: int) -> str:
    if found.draws == 0:
        return "is not defined"
    interval = "(no interval)" if isnan(found.low) else f"[{found.low:+.3f}, {found.high:+.3f}]"
    fewer = "" if found.draws == episodes else f" in {found.draws} of them"
    return f"{found.mean:+.3f} {interval}{fewer}".replace("-", "−")


def _cells(summary: pd.DataFrame, key: Any, name: str) -> list[tuple[str, Any]]:
    """A mean and half of its interval, under the names that `_column` shows."""
    if key not in summary.index:
        return [(name, None), (f"{name} half", None)]
    row = summary.loc[key]
    return [(name, row["mean"]), (f"{name} half", row["high"] - row["mean"])]


def _column(name: str, style: str = "+.3f") -> Column:
    return Column(name, name, spread=f"{name} half", style=style)
