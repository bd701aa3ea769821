"""The paper's tables and what goes beyond them, from the frames of a run (Deutch et al. 2024, Tables 1 to 3).

Numbers are means over draws of demonstrations, ± the standard deviation over draws; layers, heads, queries and orders are averaged
within a draw. Where the task is one of the paper's, its figures stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from iclgd_lens.experiments.claims import claims
from iclgd_lens.experiments.orders import order_sensitivity
from iclgd_lens.experiments.paper import AVERAGES, GD_SIM_AOU_RANGE, PAPER, reported
from iclgd_lens.experiments.protocol import Protocol
from iclgd_lens.experiments.reproduce import Results
from iclgd_lens.experiments.results import OVER_TASKS, Estimate, paired_difference, summarise
from iclgd_lens.views.names import CONTROL_NAMES, METHOD_NAMES, METRIC_NAMES, RUN_NAMES, SUBSET_NAMES
from iclgd_lens.views.sheets import P_VALUE, Column, Sheet

TABLES = ("table1", "table2", "table3", "outputs", "dai", "controls", "claims")

SHOWN = ("sim_aou", "sim_aou_norm", "sim_am_delta")
"""The metrics of tables 1 and 2."""

TEXT = (Column("metric", "metric"), Column("method", "method"), Column("task", "task"))


def paper_tables(results: Results, model_name: str) -> list[Sheet]:
    """All tables that a run has the numbers for."""
    frame = results.frame
    finetuned = set(frame[frame["model"] == "trained"]["method"]) & set(METHOD_NAMES)
    sheets = [table3(results, model_name), output_table(frame, results.queries)]
    if not finetuned:  # every update diverged
        return sheets
    if finetuned == set(METHOD_NAMES):
        sheets.insert(0, table2(frame))
    if results.protocol.twins:
        sheets.insert(0, table1(frame))
    sheets.append(dai_table(frame))
    if results.protocol.controls:
        sheets.append(control_table(frame))
    claimed = claim_table(frame)
    return [*sheets, claimed] if len(claimed.numbers) else sheets


def brief(sheet: Sheet) -> Sheet:
    """The rows over all tasks alone, of claims and differences of several tasks; every other table as it is."""
    numbers = sheet.numbers
    if sheet.name == "differences" and OVER_TASKS in set(numbers["task"]):
        return replace(sheet, numbers=numbers[numbers["task"] == OVER_TASKS])
    if sheet.name == "claims" and OVER_TASKS in set(numbers["task"]):
        return replace(sheet, numbers=numbers[numbers["task"] == OVER_TASKS], note=f"{sheet.note} Task by task in the files.")
    return sheet


def table1(frame: pd.DataFrame) -> Sheet:
    """Trained against untrained, with every twin of the run."""
    models = list(frame["model"].unique())
    chosen = frame[(frame["control"] == "none") & frame["metric"].isin(SHOWN)]
    table = _wide(chosen, ["metric", "method", "task"], "model", models)
    table["paper"] = [_paper_text(row, set(chosen["task"])) for row in table.to_dict("records")]
    columns = [*TEXT, *(Column(model, model, spread=f"{model} sd") for model in models), Column("paper, trained", "paper")]
    low, high = GD_SIM_AOU_RANGE["untrained"]
    return Sheet(
        "table1",
        "Table 1: trained against untrained models",
        _named(table),
        tuple(columns),
        f"Mean ± sd over draws, each with twins of its own. The paper's GD on untrained models: SimAOU {low} to {high}.",
    )


def table2(frame: pd.DataFrame) -> Sheet:
    """GD against LCGD on the trained model, paired by draw."""
    chosen = frame[(frame["control"] == "none") & (frame["model"] == "trained") & frame["metric"].isin(SHOWN)]
    table = _wide(chosen, ["metric", "task"], "method", ["gd", "lcgd"])
    rows = []
    for row in table.to_dict("records"):
        task, metric = row["task"], row["metric"]
        of_task = chosen if task == OVER_TASKS else chosen[chosen["task"] == task]
        pair = [{"model": "trained", "method": method} for method in ("lcgd", "gd")]
        found = paired_difference(of_task, metric, *pair)
        paper_gd, paper_lcgd = _paper_figures(task, metric, set(chosen["task"])) or (float("nan"), float("nan"))
        # Over all tasks only where each has a difference, as with the columns beside it.
        complete = task != OVER_TASKS or (row["gd"] == row["gd"] and row["lcgd"] == row["lcgd"])
        tested: dict[str, Any] = found._asdict() if complete else dict.fromkeys(Estimate._fields, float("nan"))
        shown: dict[Any, Any] = {**row, **tested}
        rows.append({**shown, "paper gd": paper_gd, "paper lcgd": paper_lcgd})
    columns = (
        Column("metric", "metric"),
        Column("task", "task"),
        Column("GD", "gd", spread="gd sd"),
        Column("LCGD", "lcgd", spread="lcgd sd"),
        Column("LCGD − GD", "mean", low="low", high="high"),
        Column("p", "p", style=P_VALUE),
        Column("draws", "draws"),
        Column("paper GD", "paper gd", style=".3f"),
        Column("paper LCGD", "paper lcgd", style=".3f"),
    )
    note = (
        "Mean ± sd over draws; difference with 95 % t-interval and paired t-test over draws, orders averaged within a draw. Over "
        "all tasks, every task counts alike."
    )
    return Sheet("table2", "Table 2: GD against LCGD", _named(pd.DataFrame(rows)), columns, note)


def table3(results: Results, model_name: str) -> Sheet:
    """The setting that was used."""
    protocol, frame = results.protocol, results.frame
    rows = []
    for task in protocol.tasks:
        of_task = frame[frame["task"] == task]
        rates = results.rates[results.rates["task"] == task].set_index("method")["lr"]
        row: dict[str, Any] = {
            "task": task,
            "model": model_name,
            "k": _span(of_task["k"]),
            "queries": _span(of_task["n_queries"]),
            "seeds": _seed_range(protocol.plan(task).seeds),
            "orders": of_task["order"].nunique(),
            **{f"lr {method}": float(rates.get(method, float("nan"))) for method in protocol.methods},
            "rates from": _rate_source(protocol, task, rates.tolist()),
            "loss on": protocol.options["loss_on"],
            "readout": protocol.options["readout"],
            "paper lr": PAPER[task].lr if task in PAPER else float("nan"),
        }
        rows.append(row)
    rate_columns = (Column(f"lr {METHOD_NAMES[method]}", f"lr {method}", style="g") for method in protocol.methods)
    columns = (
        *(Column(name, name) for name in ("task", "model", "k", "queries", "seeds", "orders")),
        *rate_columns,
        *(Column(name, name) for name in ("rates from", "loss on", "readout")),
        Column("paper lr", "paper lr", style="g"),
    )
    return Sheet("table3", "Table 3: the setting", pd.DataFrame(rows), columns)


def dai_table(frame: pd.DataFrame) -> Sheet:
    """The metrics of Dai et al. 2023 on the trained model, over all queries and over false-to-true ones."""
    metrics = ["rec2ftp", "sim_aou_norm", "sim_am", "sim_am_zsl"]
    trained = frame[(frame["model"] == "trained") & (frame["control"] == "none") & frame["metric"].isin(metrics)]
    by = ["task", "method", "subset", "metric"]
    summary = summarise(trained, by=by).set_index(by)
    counted = trained[(trained["metric"] == "sim_aou_norm") & (trained["layer"] == trained["layer"].min())]
    counts = counted.groupby(["task", "method", "subset"])[["n", "undefined"]].sum().sum(axis=1)
    rows = []
    for task, method, subset in dict.fromkeys(key[:3] for key in summary.index):
        row: dict[str, Any] = {"task": task, "method": METHOD_NAMES[method], "queries": SUBSET_NAMES[subset]}
        row["n"] = int(counts[task, method, subset])
        for metric in metrics:
            # Rec2FTP is about its own choice of queries.
            key = (task, method, "all" if metric == "rec2ftp" else subset, metric)
            row |= {metric: summary["mean"].get(key, float("nan")), f"{metric} sd": summary["sd"].get(key, float("nan"))}
        rows.append(row)
    columns = (
        *(Column(name, name) for name in ("task", "method", "queries", "n")),
        Column("Rec2FTP", "rec2ftp", spread="rec2ftp sd", style=".3f"),
        *(Column(METRIC_NAMES[metric], metric, spread=f"{metric} sd") for metric in metrics[1:]),
    )
    note = (
        "False to true: queries that ZSL gets wrong and ICL and FT get right; n counts queries over draws and orders. Rec2FTP has "
        "queries of its own."
    )
    return Sheet("dai", "Metrics of Dai et al. 2023", pd.DataFrame(rows), columns, note)


def output_table(frame: pd.DataFrame, queries: pd.DataFrame) -> Sheet:
    """Outputs on the trained model: accuracy, likeness to ICL, and how much they depend on the order of the demonstrations."""
    metrics = ["accuracy", "same_prediction", "js_divergence"]
    trained = frame[(frame["model"] == "trained") & (frame["control"] == "none") & frame["metric"].isin(metrics)]
    by = ["task", "method", "metric"]
    summary = summarise(trained, by=by).set_index(by)
    spread = order_sensitivity(queries[queries["model"] == "trained"])
    rows = []
    for task in trained["task"].unique():
        for method in [method for method in RUN_NAMES if method in set(trained["method"])]:
            row: dict[str, Any] = {"task": task, "run": RUN_NAMES[method]}
            for metric in metrics:
                for number, name in (("mean", metric), ("sd", f"{metric} sd")):
                    row[name] = summary[number].get((task, method, metric), float("nan"))
            for metric in ("probability_sd", "changed", "accuracy_sd"):
                row[metric] = float("nan")
                if len(spread) and method != "zsl":  # no demonstrations, no order
                    row[metric] = spread[(spread["task"] == task) & (spread["method"] == method)][metric].mean()
            rows.append(row)
    columns = (
        Column("task", "task"),
        Column("run", "run"),
        Column("accuracy", "accuracy", spread="accuracy sd", style=".3f"),
        Column("as ICL", "same_prediction", spread="same_prediction sd", style=".3f"),
        Column("JS from ICL", "js_divergence", spread="js_divergence sd", style=".3f"),
        Column("order: sd of p", "probability_sd", style=".3f"),
        Column("changed", "changed", style=".3f"),
        Column("sd of acc.", "accuracy_sd", style=".3f"),
    )
    note = (
        "As ICL: share of queries with ICL's prediction. JS: Jensen–Shannon divergence of the label distributions, nats. Order: "
        "over orders of the same demonstrations, sd of a label's probability, share of queries whose prediction changes, sd of "
        "accuracy."
    )
    return Sheet("outputs", "Outputs: ICL against finetuning", pd.DataFrame(rows), columns, note)


def control_table(frame: pd.DataFrame) -> Sheet:
    """Similarities of the true update beside those of every control, on the trained model."""
    metrics = ["sim_aou", "sim_am_delta"]
    chosen = frame[(frame["model"] == "trained") & frame["metric"].isin(metrics)]
    controls = [control for control in CONTROL_NAMES if control in set(chosen["control"])]
    table = _wide(chosen, ["metric", "method", "task"], "control", controls)
    columns = (*TEXT, *(Column(CONTROL_NAMES[control], control, spread=f"{control} sd") for control in controls))
    note = (
        "The update is replaced, in-context learning keeps the true demonstrations. A similarity that says something about "
        "learning falls off in the other columns."
    )
    return Sheet("controls", "Controls", _named(table), columns, note)


def claim_table(frame: pd.DataFrame) -> Sheet:
    """The paper's claims as they came out."""
    table = claims(frame)
    table["twin"] = table["twin"].fillna("")
    table["method"] = [" ".join(METHOD_NAMES.get(word, word) for word in method.split()) for method in table["method"]]
    columns = (
        *(Column(name, name) for name in ("claim", "metric", "method", "twin", "task")),
        Column("mean [95 %]", "mean", low="low", high="high"),
        Column("p", "p", style=P_VALUE),
        Column("draws", "draws"),
        Column("outcome", "outcome"),
    )
    note = "Differences are paired by draw: LCGD − GD, and trained − twin. Intervals are not corrected for their number."
    return Sheet("claims", "The paper's claims on this run", _named(table), columns, note)


def _wide(frame: pd.DataFrame, by: list[str], across: str, order: list[str]) -> pd.DataFrame:
    """Means and sds, one row per `by`, one pair of columns per value of `across`; over all tasks the mean of the tasks' means."""
    summary = summarise(frame, by=[*by, across])
    table = summary.pivot(index=by, columns=across, values=["mean", "sd"])
    # A column may be missing: every update of a twin may have diverged.
    wanted = {f"{value}{suffix}": (kind, value) for value in order for kind, suffix in (("mean", ""), ("sd", " sd"))}
    flat = pd.DataFrame({name: table.get(column, float("nan")) for name, column in wanted.items()}, index=table.index)
    within = [column for column in by if column != "task"]
    # Tasks in the frame's own order, not the alphabet's.
    flat = flat.loc[list(dict.fromkeys(summary[by].itertuples(index=False, name=None)))]
    if frame["task"].nunique() > 1:
        # A mean over fewer tasks than its neighbours would not be comparable with them; it is left out.
        over = flat.groupby(level=within, sort=False).agg(lambda values: values.mean(skipna=False))
        over.loc[:, [f"{value} sd" for value in order]] = float("nan")
        over = over.assign(task=OVER_TASKS).set_index("task", append=True).reorder_levels(by)
        flat = pd.concat([flat, over])
    ranks = {name: rank for rank, name in enumerate([*METRIC_NAMES, *METHOD_NAMES])}
    return flat.reset_index().sort_values(within, key=lambda column: column.map(ranks), kind="stable")


def _named(table: pd.DataFrame) -> pd.DataFrame:
    return table.replace({"metric": METRIC_NAMES, "method": METHOD_NAMES})


def _paper_figures(task: str, metric: str, tasks: set[str]) -> tuple[float, float] | None:
    """The paper's figures, of GD and LCGD; its averages are over its own six tasks, and comparable to no other average."""
    if task == OVER_TASKS:
        return AVERAGES.get(metric) if tasks == set(PAPER) else None
    return reported(task, metric)


def _paper_text(row: Mapping[Any, Any], tasks: set[str]) -> str:
    figures = _paper_figures(row["task"], row["metric"], tasks)
    if figures is None:
        return "–"
    text = f"{figures[tuple(METHOD_NAMES).index(row['method'])]:.3f}"
    if row["task"] == OVER_TASKS and (row["metric"], row["method"]) == ("sim_aou", "gd"):
        low, high = GD_SIM_AOU_RANGE["trained"]
        text += f" (tasks {low} to {high})"
    return text


def _span(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def _seed_range(seeds: Sequence[int]) -> str:
    if len(seeds) > 3 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))


def _rate_source(protocol: Protocol, task: str, rates: Sequence[float]) -> str:
    if protocol.lr == "auto":
        at_end = set(rates) & {min(protocol.grid), max(protocol.grid)}
        return (
            f"FT accuracy, then loss, on seeds {_seed_range(protocol.plan(task).tuning_seeds)}"
            f"{', at an end of the grid' if at_end else ''}"
        )
    return "the paper" if protocol.lr == "paper" else "given"
