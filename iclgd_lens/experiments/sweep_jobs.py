"""The jobs of a sweep: one for each worker, handed in by submitit to run in this process, on this machine or on a SLURM cluster."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import submitit

from iclgd_lens.experiments.grid import Grid
from iclgd_lens.experiments.study import Debug, Local, Slurm
from iclgd_lens.experiments.sweep_folder import SweepFolder
from iclgd_lens.experiments.sweep_worker import Maker, OnCell, Worker
from iclgd_lens.files import write_text


def launch(grid: Grid, folder: SweepFolder, open_cells: Sequence[str], maker: Maker, on_cell: OnCell) -> list[submitit.Job[int]]:
    """Hand in one job for each worker.

    Args:
        grid: The study's grid.
        folder: The folder of the sweep.
        open_cells: The digests of what is to be run.
        maker: What makes cells.
        on_cell: Called after every cell with whether it failed, where cells are run in this process.

    Raises:
        ValueError: If the executor is not there.
    """
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
        worker.on_cell = on_cell
        return [submitit.DebugExecutor(logs).submit(worker)]
    if isinstance(study.executor, Local):
        return list(_submit_here(study.executor, logs, workers))
    executor = _slurm_executor(study.executor, logs)
    with executor.batch():
        return [executor.submit(worker) for worker in workers]


def end_jobs(jobs: Sequence[submitit.Job[int]]) -> None:
    """End jobs, and give those of this machine a moment to put their things away."""
    for job in jobs:
        job.cancel()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not all(job.done() for job in jobs if isinstance(job, submitit.LocalJob)):
        time.sleep(0.1)


def what_jobs_said(jobs: Sequence[submitit.Job[int]], folder: SweepFolder) -> str:
    """Why workers ended without having run anything, as far as they said."""
    said = [str(error).strip() for error in (job.exception() for job in jobs) if error is not None]
    why = f" The first of them said:\n{said[0]}" if said else ""
    return f"the workers ended without having run a cell; what they wrote is in {folder.jobs}.{why}"


def _submit_here(choice: Local, logs: Path, workers: Sequence[Worker]) -> Iterator[submitit.Job[int]]:
    for worker in workers:
        # One for each, since each has a GPU of its own.
        executor = submitit.LocalExecutor(logs, max_num_timeout=1000)
        gpus = {"gpus_per_node": 1, "visible_gpus": [worker.index % choice.gpus]} if choice.gpus else {"gpus_per_node": 0}
        executor.update_parameters(timeout_min=choice.timeout_min, **gpus)
        yield executor.submit(worker)


def _slurm_executor(choice: Slurm, logs: Path) -> submitit.AutoExecutor:
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
