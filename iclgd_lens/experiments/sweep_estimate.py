"""What a study will take, from probe cells that are run and thrown away."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from iclgd_lens.data.tasks import MOST_DEMONSTRATIONS
from iclgd_lens.experiments.cell_runs import CellRuns
from iclgd_lens.experiments.cells import Cells
from iclgd_lens.experiments.grid import Cell, Grid, Group
from iclgd_lens.experiments.study import ModelChoice

PATIENCE = 20.0
"""After how many seconds for one model's probes they are not run a second time."""


@dataclass(frozen=True)
class SweepEstimate:
    """What the open cells of a study will take.

    Attributes:
        seconds: Of one worker, were it alone; a model's first loading is in it once.
        file_bytes: Of all files of the study's cells, those that are there included.
        memory_bytes: What a worker holds at most: of the process, or where cells run on a GPU, of that.
        on_gpu: Which of both.
        probes: How many cells were run for it.
        problems: What probes failed with, in words.
    """

    seconds: float
    file_bytes: float
    memory_bytes: int
    on_gpu: bool
    probes: int
    problems: tuple[str, ...]


def estimate_sweep(grid: Grid, open_cells: Sequence[str], on_probe: Callable[[str], None] | None = None) -> SweepEstimate:
    """Run one cell of each kind on every model, and reckon from these.

    A model's probes are the first cells, one for every method, control and way of making updates, of its group with the most
    demonstrations. Time is taken to grow as k, so shorter prompts' is a little underestimated and longer ones' overestimated; tasks
    are taken to be alike.

    Args:
        grid: The study's grid.
        open_cells: The digests of the cells that are open.
        on_probe: Called before every probe with what it is about.
    """
    wanted = frozenset(open_cells)
    cost: dict[tuple[ModelChoice, tuple[object, ...]], tuple[float, float]] = {}
    largest: dict[ModelChoice, float] = {}
    problems: list[str] = []
    loading, make = 0.0, CellRuns(grid)
    with TemporaryDirectory() as folder:
        cells = Cells(Path(folder))
        for model in grid.study.models:
            group = max((g for g in grid.groups if g.model == model and g.called == "trained"), key=_size)
            largest[model] = _size(group)
            probed = _probe(make, cells, group, on_probe)
            # What is run first in a process is slow; where it costs little, only a second time counts.
            if probed.seconds < PATIENCE:
                loading += probed.loading
                make.forget()
                probed = _probe(make, cells, group, on_probe)
            loading += probed.loading
            problems += probed.problems
            cost |= {(model, kind): found for kind, found in probed.cost.items()}
    seconds, size = loading, 0.0
    for group in grid.groups:
        for cell in group.cells:
            took, held = cost.get((group.model, _kind(cell)), (0.0, 0.0))
            size += held
            if cell.digest in wanted:
                seconds += took * _size(group) / largest[group.model]
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    memory = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident()
    return SweepEstimate(seconds, size, memory, on_gpu, len(cost), tuple(problems))


class _Probed(NamedTuple):
    cost: dict[tuple[object, ...], tuple[float, float]]
    problems: list[str]
    loading: float
    seconds: float


def _probe(make: CellRuns, cells: Cells, group: Group, on_probe: Callable[[str], None] | None) -> _Probed:
    """Run a group's first cell of each kind: seconds and bytes of each, what failed, and how long the model took to load."""
    began, loading = time.perf_counter(), 0.0
    cost: dict[tuple[object, ...], tuple[float, float]] = {}
    problems = []
    for cell in _kinds(group):
        if on_probe is not None:
            on_probe(f"{group.about}: {cell.about}")
        try:
            start = time.perf_counter()
            make.load(group)
            loaded = time.perf_counter()
            loading += loaded - start
            cells.write(cell.digest, cell.about, make(group, cell))
            cost[_kind(cell)] = (time.perf_counter() - loaded, cells.path(cell.digest).stat().st_size)
        except Exception as error:  # which the sweep will record, and go on
            problems.append(f"{group.about}: {cell.about}: {type(error).__name__}: {error}")
    return _Probed(cost, problems, loading, time.perf_counter() - began)


def _size(group: Group) -> float:
    return float(MOST_DEMONSTRATIONS if group.k == "fit" else group.k)


def _kind(cell: Cell) -> tuple[object, ...]:
    return cell.method, cell.control, cell.updates


def _kinds(group: Group) -> list[Cell]:
    """A group's first cell of each kind."""
    return list({_kind(cell): cell for cell in reversed(group.cells)}.values())[::-1]


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
