"""Cells that cost nothing, for sweeps whose numbers do not matter; workers import them."""

import os
import signal
import time
from pathlib import Path

import pandas as pd

from iclgd_lens.experiments.grid import RUNS, Cell, Grid, Group


class Trivial:
    """Makes frames of a few rows.

    Args:
        grid: The grid.
        started: A file that gets a line for every cell that is begun.
        pause: Seconds that a cell takes.
        deadly: What a cell is about whose process is killed; empty for none.
    """

    def __init__(self, grid: Grid, started: Path | None = None, pause: float = 0.0, deadly: str = "") -> None:
        self.started, self.pause, self.deadly = started, pause, deadly

    def __call__(self, group: Group, cell: Cell) -> dict[str, pd.DataFrame]:
        if self.started is not None:
            with self.started.open("a") as file:
                file.write(f"{cell.digest}\n")
        if cell.about == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.pause)
        about = {"model_name": group.model.shown, "dtype": group.model.dtype, "task": group.task, "k": group.k, "seed": group.seed}
        about |= {"order": group.order, "n_queries": 2, "epochs": 1, "model": group.called}
        about |= {"method": "icl" if cell.method == RUNS else cell.method, "lr": cell.lr, "control": cell.control or "none"}
        value = float(int(cell.digest[:8], 16))
        row = {**about, "subset": "all", "layer": 0, "metric": "sim_aou", "value": value, "n": 2, "undefined": 0}
        return {"frame": pd.DataFrame({name: [value] for name, value in row.items()})}
