"""The report of a sweep: one page that opens from disk without a network, of all studies in its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
from plotly import graph_objects as go

from iclgd_lens.experiments.contrasts import contrasts
from iclgd_lens.experiments.folder import REPORT
from iclgd_lens.experiments.results import OPTIONS, summarise
from iclgd_lens.experiments.sweep_folder import Failure, SweepFolder
from iclgd_lens.experiments.sweep_results import SweepResults, load_results
from iclgd_lens.files import write_text
from iclgd_lens.views.circuits import asset, page
from iclgd_lens.views.figure_style import shown_text
from iclgd_lens.views.names import CONTROL_NAMES, METHOD_NAMES, METRIC_NAMES, RUN_NAMES, counted
from iclgd_lens.views.plots import SIMILARITIES, layer_figure, rate_figure
from iclgd_lens.views.report import figure_section
from iclgd_lens.views.sheets import P_VALUE, Column, Sheet

WAY = ("model_name", "dtype", "k", "n_queries", *OPTIONS)
"""The columns that tell apart how comparisons were run."""

WAY_NAMES = {
    "model_name": "model",
    "n_queries": "queries",
    "loss_on": "loss on",
}

MOST_FIGURES = 12


def write_sweep_report(folder: str | Path) -> Path:
    """Write a sweep's report into its folder, and return its path.

    Raises:
        FileNotFoundError: If it is not the folder of a sweep.
        ValueError: If a file of a study is damaged.
        OSError: If it cannot be written.
    """
    path = Path(folder) / REPORT
    write_text(path, sweep_report(folder))
    return path


def sweep_report(folder: str | Path) -> str:
    """Make the page of a sweep."""
    place, results = SweepFolder(Path(folder)), load_results(folder)
    studies = place.studies()
    wanted = {digest for study in studies.values() for digest in study["cells"]}
    failures = [failure for failure in place.failures() if failure.cell in wanted]
    # Over queries and layers; rows of single layers are read where a figure needs them.
    frame = results.frame("frame", pc.field("metric").isin([*SIMILARITIES, "accuracy"]) & (pc.field("subset") == "all"))
    sheets = [difference_sheet(results.frame("per_query")), mean_sheet(frame)] if len(frame) else []
    if failures:
        sheets.append(failure_sheet(failures))
    drawn = sweep_figures(frame)
    shown = dict(list(drawn.items())[:MOST_FIGURES])
    n_more = len(drawn) - len(shown)
    left_out = [f"<p>{n_more} more figures of other ways of running are left out.</p>"] if n_more else []
    names = ", ".join(studies)
    parts = [
        f"<style>{asset('report.css')}</style>",
        f"<h1>Sweep: {escape(names)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in _summary(frame, results, len(wanted), len(failures))),
        '<nav><a href="#tables">tables</a> <a href="#figures">figures</a> <a href="#setting">setting</a></nav>',
        '<h2 id="tables">Tables</h2>',
        *(sheet.html() for sheet in sheets),
        *(figure_section(shown) if shown else []),
        *left_out,
        '<h2 id="setting">Setting</h2>',
        "<p>The studies as they were checked, defaults filled in.</p>",
        f"<pre>{escape(json.dumps({name: study['study'] for name, study in studies.items()}, indent=2))}</pre>",
    ]
    return page(f"iclgd_lens sweep: {names}", "\n".join(parts))


def _summary(frame: pd.DataFrame, results: SweepResults, planned: int, failed: int) -> list[str]:
    missing = planned - results.cells - failed
    text = f"{results.cells} of {counted(planned, 'cell')} are done"
    text += f", {failed} failed" if failed else ""
    text += f", {missing} are still to be made" if missing > 0 else ""
    if frame.empty:
        return [f"{text}."]
    draws = len(frame[["model_name", "task", "k", "seed"]].drop_duplicates())
    episodes = len(frame[["model_name", "task", "k", "seed", "order"]].drop_duplicates())
    return [
        f"{text}. They hold {counted(episodes, 'episode')} of {counted(draws, 'draw')} of demonstrations. Similarity that an "
        "untrained twin reaches too is no evidence that ICL is gradient descent: read trained − twin first."
    ]


def difference_sheet(per_query: pd.DataFrame) -> Sheet:
    """LCGD − GD and trained − twin, with intervals, p-values, effect sizes and how many episodes each rests on.

    Args:
        per_query: Rows of `Comparison.per_query`, as of `SweepResults.frame("per_query")`.
    """
    found = contrasts(per_query)
    tests = int(found["p"].notna().sum())
    ways = [column for column in WAY if column in found and (column == "model_name" or found[column].nunique() > 1)]
    of_twins = found["twin"].notna()
    shown = found.assign(
        metric=found["metric"].map(METRIC_NAMES),
        contrast=found["contrast"].where(~of_twins, "trained − " + found["twin"].astype(str)),
        method=found["method"].map(METHOD_NAMES).where(of_twins, "–"),
    )
    columns = (
        *_way_columns(ways),
        *(Column(name, name) for name in ("contrast", "method", "metric", "task")),
        Column("difference", "mean", low="low", high="high"),
        Column("p", "p", style=P_VALUE),
        Column("p, Holm", "p_holm", style=P_VALUE),
        Column("effect", "effect", style="+.2f"),
        Column("draws", "draws"),
        Column("episodes", "episodes"),
    )
    note = (
        "Differences paired by query, averaged over orders, queries and draws; 95 % intervals by hierarchical bootstrap over draws "
        "and queries, none with fewer than 5 draws in a single task; p by sign flips of draws, of which n draws cannot show less "
        f"than 2/2ⁿ; Holm's correction is for all {tests} tests, of tasks and over tasks; effect in standard deviations over draws."
    )
    return Sheet("differences", "LCGD against GD, and trained against untrained", shown, columns, note)


def mean_sheet(frame: pd.DataFrame) -> Sheet:
    """Similarities and accuracy of every way of running, model and control, over draws."""
    by = [*(way for way in WAY if way == "model_name" or frame[way].nunique() > 1), "task", "model", "method", "control", "metric"]
    summary = summarise(frame, by=by)
    summary = summary.assign(
        metric=summary["metric"].map(lambda metric: METRIC_NAMES.get(metric, metric)),
        method=summary["method"].map(RUN_NAMES),
        control=summary["control"].map(CONTROL_NAMES),
    )
    ways = [way for way in by if way in WAY]
    columns = (
        *_way_columns(ways),
        *(Column(name, name) for name in ("task", "metric", "method")),
        Column("weights", "model"),
        Column("control", "control"),
        Column("mean", "mean", spread="sd"),
        Column("draws", "episodes"),
    )
    return Sheet("means", "Means of every cell of the grid", summary, columns, "Mean ± sd over draws; layers averaged within each.")


def _way_columns(ways: Iterable[str]) -> Iterator[Column]:
    return (Column(WAY_NAMES.get(way, way), way, style="g" if way == "lr" else "") for way in ways)


def failure_sheet(failures: list[Failure]) -> Sheet:
    """Which cells failed, and why."""
    numbers = pd.DataFrame([vars(failure) for failure in failures])
    columns = (Column("cell", "about"), Column("reason", "reason"), Column("when", "at"), Column("where", "host"))
    note = "They are in no number above; iclgd sweep --retry-failed runs them again."
    return Sheet("failures", f"{counted(len(failures), 'cell')} that failed", numbers, columns, note)


def sweep_figures(frame: pd.DataFrame) -> Mapping[str, go.Figure]:
    """For every way of running, similarity against learning rate where there are several, else layer by layer."""
    drawn: dict[str, go.Figure] = {}
    if frame.empty:
        return drawn
    ways = [way for way in WAY if way not in ("lr", "n_queries")]
    updated = frame[frame["method"].isin(list(METHOD_NAMES))]
    for number, (_, group) in enumerate(updated.groupby(ways, sort=False)):
        model, k = group[["model_name", "k"]].iloc[0]
        several = (group.groupby("task")["lr"].nunique() > 1).any()
        figure = rate_figure(group) if several else layer_figure(group)
        figure.update_layout(title_text=f"{shown_text(str(model))}, k = {k}: {figure.layout.title.text}")
        drawn[str(number)] = figure
    return drawn
