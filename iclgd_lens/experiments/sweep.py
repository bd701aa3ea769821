"""Running a study: its cells are shared out to workers by submitit, on this machine or a SLURM cluster, and kept as they are done.

>>> from tempfile import TemporaryDirectory
>>> study = Study(models="bundled", tasks="bundled/remapped", seeds=0, k=4, queries=4, lr=0.01, executor={"kind": "debug"})
>>> with TemporaryDirectory() as folder:
...     first = run_sweep(study, folder)
...     again = run_sweep(study, folder)
>>> first.done, first.failed, again.was_done
(10, 0, 10)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import submitit

from iclgd_lens.experiments.cell_runs import CellRuns
from iclgd_lens.experiments.cells import DamagedCellError
from iclgd_lens.experiments.grid import Grid
from iclgd_lens.experiments.packs import stamps_of
from iclgd_lens.experiments.study import Study
from iclgd_lens.experiments.sweep_folder import SweepFolder
from iclgd_lens.experiments.sweep_jobs import end_jobs, launch, what_jobs_said
from iclgd_lens.experiments.sweep_worker import Maker, OnCell, is_open

log = logging.getLogger(__name__)

PATIENCE = 2
"""After how many launches in a row that brought nothing a sweep gives up."""

SOON = 1.0
"""Seconds between two looks at what is done."""


@dataclass(frozen=True)
class Plan:
    """What is there of a study in a folder, and what is not.

    Attributes:
        grid: The study's grid.
        done: The digests of cells that are there.
        failed: Of those that failed when they were run last.
        damaged: Why files cannot be read that are there in the place of cells, by digest; these cells are open.
        open: Of cells that are to be made.
    """

    grid: Grid
    done: tuple[str, ...]
    failed: tuple[str, ...]
    damaged: dict[str, str]
    open: tuple[str, ...]

    @classmethod
    def of(cls, grid: Grid, folder: SweepFolder) -> Plan:
        """Look at every cell's file; at those that are packed, whether they are as they were then."""
        done, failed, missing = [], [], []
        damaged: dict[str, str] = {}
        pack = folder.pack
        packed = pack.holds(stamps_of(folder.cells, pack.stamps))
        for group in grid.groups:
            for cell in group.cells:
                try:
                    there = cell.digest in packed or folder.cells.check(cell.digest)
                except DamagedCellError as error:
                    there, damaged[cell.digest] = False, str(error)
                if there:
                    done.append(cell.digest)
                elif folder.has_failed(cell.digest):
                    failed.append(cell.digest)
                else:
                    missing.append(cell.digest)
        return cls(grid, tuple(done), tuple(failed), damaged, tuple(missing))


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        done: Cells made since it began.
        failed: Cells that failed since.
        open: Cells that are still to be made.
        running: What is being run, in words.
    """

    done: int
    failed: int
    open: int
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended.

    Attributes:
        was_done: Cells that were there already.
        done: Cells made.
        failed: Cells that failed, before or now.
        open: Cells that are open still: those of a sweep that was not waited for.
        damaged: Why files could not be read that were there in the place of cells, by digest; these cells were made anew.
    """

    was_done: int
    done: int
    failed: int
    open: int
    damaged: dict[str, str]


def run_sweep(
    study: Study,
    out: str | Path,
    *,
    name: str = "study",
    plan: Plan | None = None,
    retry_failed: bool = False,
    wait: bool = True,
    maker: Maker = CellRuns,
    on_progress: Callable[[Progress], None] | None = None,
) -> Outcome:
    """Run the cells of a study that are not there, where its executor says.

    A cell that fails is recorded with its reason, and the others go on. An interrupt ends the workers and loses the cells that
    they were at. A worker that is killed loses one cell, which another takes up; after two such deaths it counts as failed.

    Args:
        study: What to run.
        out: The folder; several studies may share one, also at the same time.
        name: What the study is called in the folder.
        plan: What is there of it in the folder, if that has been looked at already.
        retry_failed: Run cells again that failed.
        wait: Wait until all is done; otherwise return when the jobs have been handed in.
        maker: What makes cells.
        on_progress: Called now and then.

    Raises:
        ValueError: As `Grid.of`, or if the executor is not there.
        OSError: As `Grid.of`, or if the folder cannot be written.
        RuntimeError: If workers end without having run anything, with what the first of them said.
    """
    folder = SweepFolder(Path(out).absolute())
    plan = plan or Plan.of(Grid.of(study), folder)
    grid = plan.grid
    tell = on_progress or (lambda progress: None)
    folder.write_study(name, study.model_dump(mode="json"), [cell.digest for group in grid.groups for cell in group.cells])
    for reason in plan.damaged.values():
        log.warning("%s; it is made anew", reason)
    retried = plan.failed if retry_failed else ()
    for digest in (*plan.damaged, *retried):
        folder.forget_failure(digest)
    to_do = left = (*plan.open, *retried)
    in_vain = 0
    while left:
        jobs = launch(grid, folder, left, maker, _counting(folder, left, tell))
        if not wait:
            break
        _wait(jobs, folder, left, len(to_do), tell)
        before, wanted = len(left), frozenset(left)
        left = tuple(digest for digest in left if is_open(digest, wanted, folder))
        if len(left) < before:
            in_vain = 0
        elif any(folder.is_claimed(group.digest) for group in grid.with_cells(left)):
            time.sleep(SOON)  # another sweep is at them
        elif (in_vain := in_vain + 1) >= PATIENCE:
            raise RuntimeError(what_jobs_said(jobs, folder))
    failed = 0 if left else sum(map(folder.has_failed, to_do))
    done = len(to_do) - len(left) - failed
    return Outcome(len(plan.done), done, failed + len(plan.failed) - len(retried), len(left), plan.damaged)


def _counting(folder: SweepFolder, open_cells: Sequence[str], tell: Callable[[Progress], None]) -> OnCell:
    """What tells of progress where cells are run in this process."""
    count = {True: 0, False: 0}

    def on_cell(failed: bool) -> None:
        count[failed] += 1
        tell(Progress(count[False], count[True], len(open_cells) - sum(count.values()), tuple(folder.running())))

    return on_cell


def _wait(
    jobs: Sequence[submitit.Job[int]],
    folder: SweepFolder,
    open_cells: Sequence[str],
    to_do: int,
    tell: Callable[[Progress], None],
) -> None:
    """Wait for jobs to end, however they do, and tell how far they are. An interrupt ends them first."""
    if isinstance(jobs[0], submitit.DebugJob):
        if (error := jobs[0].exception()) is not None:
            raise error
        return
    left, failed, took = list(open_cells), 0, 0.0
    try:
        while not all(job.done() for job in jobs):
            time.sleep(max(SOON, 10 * took))
            began = time.perf_counter()
            left = [digest for digest in left if not folder.cells.path(digest).exists()]
            failed = sum(map(folder.has_failed, left))
            tell(Progress(to_do - len(left), failed, len(left) - failed, tuple(folder.running())))
            took = time.perf_counter() - began
    except KeyboardInterrupt:
        end_jobs(jobs)
        raise
