"""What a worker of a sweep does: open cells of a study, one after the other, of groups that nobody else is at."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from iclgd_lens.experiments.cell_runs import CellRuns
from iclgd_lens.experiments.cells import DamagedCellError
from iclgd_lens.experiments.grid import Cell, Grid, Group
from iclgd_lens.experiments.study import Local, Slurm, Study
from iclgd_lens.experiments.sweep_folder import MOST_DEATHS, SweepFolder
from iclgd_lens.updates.gradient import DivergedError

log = logging.getLogger(__name__)

Make = Callable[[Group, Cell], dict[str, pd.DataFrame]]
Maker = Callable[[Grid], Make]
"""What makes cells, begun anew in every worker."""

OnCell = Callable[[bool], None]
"""Called after every cell with whether it failed."""


@dataclass
class Worker:
    """What a job runs: the open cells of a study, from its own share on, as long as nobody else is at them.

    Attributes:
        study: The study.
        weights: What told its models' weights apart when it was planned.
        folder: The folder of the sweep.
        open_cells: A file with the digests of what is to be run.
        index: The number of this worker, from 0.
        of: How many there are.
        maker: What makes cells.
        on_cell: Called after every cell with whether it failed.
    """

    study: Study
    weights: tuple[str, ...]
    folder: Path
    open_cells: Path
    index: int
    of: int
    maker: Maker = CellRuns
    on_cell: OnCell | None = field(default=None, compare=False)

    def __call__(self) -> int:
        """Run, and return how many cells were made or failed.

        Raises:
            RuntimeError: If a model's weights are not those that the study was planned with.
        """
        if threads := threads_of(self.study):
            torch.set_num_threads(threads)
        grid = Grid.of(self.study)
        if grid.weights != self.weights:
            raise RuntimeError("the weights of a model have changed since the sweep began; run it again")
        return work(
            grid,
            SweepFolder(self.folder),
            frozenset(self.open_cells.read_text(encoding="utf-8").split()),
            self.maker(grid),
            share=(self.index, self.of),
            on_cell=self.on_cell,
        )

    def checkpoint(self) -> DelayedSubmission:
        """What to do when it is queued again: the same, for what is done is not open any more."""
        return DelayedSubmission(self)


def work(
    grid: Grid,
    folder: SweepFolder,
    wanted: frozenset[str],
    make: Make,
    share: tuple[int, int] = (0, 1),
    on_cell: OnCell | None = None,
) -> int:
    """Run those of a grid's cells that are wanted, open, and of groups that nobody is at; return how many were made or failed.

    Args:
        grid: The grid.
        folder: Where cells are kept.
        wanted: Digests.
        make: Makes a cell.
        share: The number of this worker and how many there are; each begins at its own place in the grid and goes all around, so
            that who is done early helps the others.
        on_cell: Called after every cell with whether it failed.
    """
    groups = grid.with_cells(wanted)
    start = len(groups) * share[0] // share[1]
    n_ran = 0
    for group in [*groups[start:], *groups[:start]]:
        if not any(is_open(cell.digest, wanted, folder) for cell in group.cells):
            continue
        with folder.claimed(group.digest) as claim:
            if claim is None:
                continue
            try:
                for cell in group.cells:
                    if not is_open(cell.digest, wanted, folder):
                        continue
                    about = f"{group.about}: {cell.about}"
                    deaths = claim.begin(cell.digest, about)
                    if deaths >= MOST_DEATHS:
                        reason = f"its process was killed {deaths} times, as happens where memory does not suffice"
                        folder.record_failure(cell.digest, about, reason)
                    else:
                        _run(group, cell, about, folder, make)
                    n_ran += 1
                    if on_cell is not None:
                        on_cell(folder.has_failed(cell.digest))
            finally:
                claim.end()
    return n_ran


def threads_of(study: Study) -> int | None:
    """The torch threads of each worker; None for torch's own choice."""
    executor = study.executor
    if isinstance(executor, Slurm):
        return executor.cpus
    if executor.threads:
        return executor.threads
    if all(model.name == "bundled" for model in study.models):
        return 1  # so small that threads cost more than they bring
    return max(1, (os.cpu_count() or 1) // executor.workers) if isinstance(executor, Local) else None


def is_open(digest: str, wanted: frozenset[str], folder: SweepFolder) -> bool:
    """Whether a cell is one of those wanted, and neither there nor failed."""
    if digest not in wanted or folder.has_failed(digest):
        return False
    try:
        return not folder.cells.check(digest)
    except DamagedCellError:
        return True


def _run(group: Group, cell: Cell, about: str, folder: SweepFolder, make: Make) -> None:
    """Make a cell and keep it, or say why it failed."""
    try:
        frames = make(group, cell)
    except UncompletedJobError:  # raised in here by a signal: the job's time is up
        raise
    except Exception as error:  # whatever it is, the other cells can be run
        log.log(logging.INFO if isinstance(error, DivergedError) else logging.WARNING, "%s failed: %s", about, error)
        folder.record_failure(cell.digest, about, error)
        return
    folder.cells.write(cell.digest, about, frames)
