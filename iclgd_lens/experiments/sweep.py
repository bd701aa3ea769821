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
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import pandas as pd
import submitit
import torch
from submitit.core.utils import DelayedSubmission, UncompletedJobError

from iclgd_lens.experiments.cell_runs import CellRuns
from iclgd_lens.experiments.cells import DamagedCellError
from iclgd_lens.experiments.grid import Cell, Grid, Group
from iclgd_lens.experiments.study import Debug, Local, Slurm, Study
from iclgd_lens.experiments.sweep_folder import MOST_DEATHS, SweepFolder
from iclgd_lens.files import write_text
from iclgd_lens.updates.gradient import DivergedError

log = logging.getLogger(__name__)

Make = Callable[[Group, Cell], dict[str, pd.DataFrame]]
Maker = Callable[[Grid], Make]
"""What makes cells, begun anew in every worker."""

OnCell = Callable[[bool], None]

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
        """Look at every cell's file."""
        done, failed, missing = [], [], []
        damaged: dict[str, str] = {}
        for group in grid.groups:
            for cell in group.cells:
                try:
                    there = folder.cells.check(cell.digest)
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
        jobs = _launch(grid, folder, left, maker, tell)
        if not wait:
            break
        _wait(jobs, folder, left, len(to_do), tell)
        before, wanted = len(left), frozenset(left)
        left = tuple(digest for digest in left if _is_open(digest, wanted, folder))
        if len(left) < before:
            in_vain = 0
        elif any(folder.is_claimed(group.digest) for group in grid.with_cells(left)):
            time.sleep(SOON)  # another sweep is at them
        elif (in_vain := in_vain + 1) >= PATIENCE:
            raise RuntimeError(_what_they_said(jobs, folder))
    failed = 0 if left else sum(map(folder.has_failed, to_do))
    done = len(to_do) - len(left) - failed
    return Outcome(len(plan.done), done, failed + len(plan.failed) - len(retried), len(left), plan.damaged)


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
        if not any(_is_open(cell.digest, wanted, folder) for cell in group.cells):
            continue
        with folder.claimed(group.digest) as claim:
            if claim is None:
                continue
            try:
                for cell in group.cells:
                    if not _is_open(cell.digest, wanted, folder):
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


def _is_open(digest: str, wanted: frozenset[str], folder: SweepFolder) -> bool:
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


def _launch(
    grid: Grid, folder: SweepFolder, open_cells: Sequence[str], maker: Maker, tell: Callable[[Progress], None]
) -> list[submitit.Job[int]]:
    """Hand in one job for each worker."""
    study = grid.study
    now = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S-%f")
    logs = folder.jobs / f"{now}-{os.getpid()}"
    wanted = logs / "open.txt"
    write_text(wanted, "\n".join(open_cells))
    n_groups = len(grid.with_cells(open_cells))
    n = min(study.executor.workers, n_groups)
    workers = [Worker(study, grid.weights, folder.path, wanted, index, n, maker) for index in range(n)]
    if isinstance(study.executor, Debug):
        (worker,) = workers
        worker.on_cell = _counting(folder, open_cells, tell)
        return [submitit.DebugExecutor(logs).submit(worker)]
    if isinstance(study.executor, Local):
        return list(_submit_here(study.executor, logs, workers))
    executor = slurm_executor(study.executor, logs)
    with executor.batch():
        return [executor.submit(worker) for worker in workers]


def _submit_here(choice: Local, logs: Path, workers: Sequence[Worker]) -> Iterator[submitit.Job[int]]:
    for worker in workers:
        # One for each, since each has a GPU of its own.
        executor = submitit.LocalExecutor(logs, max_num_timeout=1000)
        gpus = {"gpus_per_node": 1, "visible_gpus": [worker.index % choice.gpus]} if choice.gpus else {"gpus_per_node": 0}
        executor.update_parameters(timeout_min=choice.timeout_min, **gpus)
        yield executor.submit(worker)


def slurm_executor(choice: Slurm, logs: Path) -> submitit.AutoExecutor:
    """What hands in jobs to a cluster.

    Raises:
        ValueError: If there is none here.
    """
    try:
        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=choice.requeues)
    except RuntimeError as error:
        raise ValueError(f"the executor 'slurm' needs a machine of a SLURM cluster: {error}") from error
    named = {name: getattr(choice, name) for name in ("partition", "account", "qos", "constraint")}
    executor.update_parameters(
        name="iclgd",
        timeout_min=choice.timeout_min,
        cpus_per_task=choice.cpus,
        gpus_per_node=choice.gpus,
        mem_gb=choice.mem_gb,
        slurm_array_parallelism=choice.parallel,
        slurm_setup=list(choice.setup),
        slurm_additional_parameters=dict(choice.more),
        **{f"slurm_{name}": value for name, value in named.items() if value is not None},
    )
    return executor


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
        _end(jobs)
        raise


def _end(jobs: Sequence[submitit.Job[int]]) -> None:
    """End jobs, and give those of this machine a moment to put their things away."""
    for job in jobs:
        job.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(job.done() for job in jobs if isinstance(job, submitit.LocalJob)):
        time.sleep(0.1)


def _what_they_said(jobs: Sequence[submitit.Job[int]], folder: SweepFolder) -> str:
    """Why workers ended without having run anything, as far as they said."""
    said = [str(error).strip() for error in (job.exception() for job in jobs) if error is not None]
    why = f" The first of them said:\n{said[0]}" if said else ""
    return f"the workers ended without having run a cell; what they wrote is in {folder.jobs}.{why}"
