"""What a sweep costs beside its cells: planning, keeping, skipping and loading, on a simulated grid whose cells cost nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from iclgd_lens.experiments.grid import RUNS, Cell, Grid, Group
from iclgd_lens.experiments.study import Study
from iclgd_lens.experiments.sweep import Plan, run_sweep
from iclgd_lens.experiments.sweep_folder import SweepFolder
from iclgd_lens.experiments.sweep_results import load_results
from iclgd_lens.views.sheets import Column, Sheet

LAYERS, QUERIES = 12, 16
"""The size of a simulated cell's frames."""


class Simulated:
    """Makes frames of a cell's shape out of nothing: rows of 12 layers and 16 queries for two metrics.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._shared = grid.study.updates[0].options() | {"parameters": "W_K b_K W_V b_V"}
        metrics = ["sim_aou", "sim_am_delta"]
        self._frame = pd.DataFrame(
            {"subset": "all", "layer": [*range(LAYERS)] * 2, "metric": np.repeat(metrics, LAYERS), "n": QUERIES, "undefined": 0}
        )
        self._group: tuple[str, dict[str, pd.DataFrame]] = ("", {})
        digests = [str(query) for query in range(QUERIES)] * 2
        self._per_query = pd.DataFrame(
            {"query": [*range(QUERIES)] * 2, "query_digest": digests, "metric": np.repeat(metrics, QUERIES)}
        )

    def __call__(self, group: Group, cell: Cell) -> dict[str, pd.DataFrame]:
        """Make a cell, its values drawn by its digest."""
        if self._group[0] != group.digest:
            about = {"model_name": group.model.shown, "dtype": group.model.dtype, "task": group.task, "k": group.k}
            about |= {"seed": group.seed, "order": group.order, "n_queries": QUERIES, **self._shared, "model": group.called}
            frames = {"frame": self._frame.assign(**about), "per_query": self._per_query.assign(**about)}
            self._group = group.digest, frames
        own = {"method": "icl" if cell.method == RUNS else cell.method, "lr": cell.lr, "control": cell.control or "none"}
        rng = np.random.default_rng(int(cell.digest[:8], 16))
        parts = ("frame",) if cell.control else ("frame", "per_query")
        return {
            part: rows.assign(value=rng.normal(size=len(rows)), **own) for part, rows in self._group[1].items() if part in parts
        }


@dataclass(frozen=True)
class SweepCost:
    """What a simulated sweep cost.

    Attributes:
        cells: The number of cells.
        rows: The number of rows in their files.
        file_bytes: The size of their files.
        seconds: By step: `plan` a new folder, `run` (with making and keeping the cells), `skip` (planning where all is there),
            `open` (finding and checking all files, and packing them), `skip again` and `open again` (the same where all is packed),
            `load` (reading the frame of all cells), `query` (reading one task's SimAOU).
    """

    cells: int
    rows: int
    file_bytes: int
    seconds: dict[str, float]


def measure_sweep(cells: int, on_step: Callable[[str], None] | None = None) -> SweepCost:
    """Run a simulated study of about so many cells with the executor `"debug"`.

    Args:
        cells: How many cells, about.
        on_step: Called before every step with its name.
    """
    tell, seconds = on_step or (lambda name: None), {}
    per_seed = 2 * 2 * (1 + 4 * 2 * 3) + 2 * 2 * (1 + 4 * 2 * 2)
    study = Study.model_validate(
        {
            "models": "bundled",
            "tasks": ["bundled/remapped", "bundled/natural"],
            "seeds": range(max(1, round(cells / per_seed))),
            "k": [4, 12],
            "lr": [0.001, 0.01, 0.1, 1.0],
            "controls": ["random", "shuffled_labels"],
            "executor": {"kind": "debug"},
        }
    )

    def timed(name: str) -> Callable[[], None]:
        tell(name)
        began = time.perf_counter()
        return lambda: seconds.update({name: time.perf_counter() - began})

    with TemporaryDirectory() as out:
        done = timed("plan")
        plan = Plan.of(Grid.of(study), SweepFolder(Path(out)))
        done()
        done = timed("run")
        run_sweep(study, out, plan=plan, maker=Simulated)
        done()
        for again in ("", " again"):
            done = timed(f"skip{again}")
            skipped = run_sweep(study, out, maker=Simulated)
            done()
            assert skipped.was_done == len(plan.open)
            done = timed(f"open{again}")
            results = load_results(out)
            done()
        done = timed("load")
        results.frame()
        done()
        done = timed("query")
        results.frame("per_query", (pc.field("task") == "bundled/natural") & (pc.field("metric") == "sim_aou"))
        done()
        file_bytes = sum(file.stat().st_size for file in Path(out).glob("cells/*/*.parquet"))
        return SweepCost(len(plan.open), results.dataset.count_rows(), file_bytes, seconds)


def sweep_table(costs: list[SweepCost]) -> Sheet:
    """Costs of simulated sweeps, one row each."""
    steps = ("plan", "run", "skip", "open", "skip again", "open again", "load", "query")
    numbers = pd.DataFrame(
        [{"cells": cost.cells, "rows": cost.rows, "MiB": cost.file_bytes / 2**20, **cost.seconds} for cost in costs]
    )
    columns = (
        Column("cells", "cells"),
        Column("rows", "rows"),
        Column("MiB", "MiB", style=".0f"),
        *(Column(f"{step}, s", step, style=".2f") for step in steps),
    )
    note = (
        "Cells cost nothing but making two small frames. Plan: in a new folder. Run: with keeping the cells. Skip: where all is "
        "there. Open: finding and checking all files, and packing many. Again: where they are packed. Load: the frame of all "
        "cells. Query: one metric of one task, by query."
    )
    return Sheet("sweeps", "Simulated sweeps", numbers, columns, note)
