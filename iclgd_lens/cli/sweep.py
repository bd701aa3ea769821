"""The command `iclgd sweep`: a study's grid of comparisons, on this machine or a SLURM cluster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import TextColumn
from rich.text import Text

from iclgd_lens.cli.common import console, errors_for_people, progress_bar, require_writable, say
from iclgd_lens.views.names import counted

if TYPE_CHECKING:
    from iclgd_lens.experiments import sweep as sweeping
    from iclgd_lens.experiments.grid import Grid
    from iclgd_lens.experiments.sweep_estimate import SweepEstimate
    from iclgd_lens.experiments.sweep_folder import SweepFolder

MOST_SHOWN = 20
"""How many cells, and how many reasons for failures, are printed."""


def sweep(
    study: Annotated[Path, typer.Argument(help="The file of the study (YAML).")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for results; what is there is not run again. By default the study's name and -sweep."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, what is done, and what it will take; run probes alone.")
    ] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run cells again that failed.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Hand in the jobs and do not wait for them.")] = False,
) -> None:
    """Run a study: every combination of its models, tasks, seeds, methods and learning rates, or what is missing of them."""
    with errors_for_people():
        out = out or Path(f"{study.stem}-sweep")
        require_writable(out / "studies" / f"{study.stem}.json")
        with console.status("loading torch and TransformerLens"):
            from iclgd_lens.experiments.grid import Grid
            from iclgd_lens.experiments.study import Study
            from iclgd_lens.experiments.sweep import Plan, run_sweep
            from iclgd_lens.experiments.sweep_folder import SweepFolder
        read = Study.read(study)
        folder = SweepFolder(out)
        with console.status("planning"):
            grid = Grid.of(read)
            plan = Plan.of(grid, folder)
        say(_shape(grid))
        for reason in plan.damaged.values():
            say(f"Damaged: {reason}; it is to be made anew.")
        say(f"In {out}: {len(plan.done)} done, {len(plan.failed)} failed, {len(plan.open)} to run.")
        if dry_run:
            _show_cells(grid, plan)
            _show_estimate(grid, plan)
            return
        with progress_bar(TextColumn("{task.fields[failed]}")) as progress:
            bar = progress.add_task("starting", total=len(plan.open) + retry_failed * len(plan.failed), failed="")

            def on_progress(now: sweeping.Progress) -> None:
                about = now.running[0] if now.running else ""
                more = f" and {len(now.running) - 1} more" if len(now.running) > 1 else ""
                failed = f", {now.failed} failed" if now.failed else ""
                progress.update(bar, completed=now.done + now.failed, description=f"{about}{more}", failed=failed)

            outcome = run_sweep(
                read, out, name=study.stem, plan=plan, retry_failed=retry_failed, wait=not detach, on_progress=on_progress
            )
        if detach:
            say(f"{outcome.open} cells were handed in. The same command with --dry-run says how far they are; logs: {folder.jobs}.")
            return
        say(f"{outcome.done} cells made, {outcome.was_done} were there, {outcome.failed} failed.")
        _show_failures(folder, grid)
        _show_results(out, study.stem)
    if outcome.failed:
        raise typer.Exit(1)


def _shape(grid: Grid) -> str:
    study = grid.study
    parts = [
        counted(len(study.models), "model"),
        counted(len(study.tasks), "task"),
        counted(len(study.seeds), "seed"),
        counted(study.orders, "order"),
        f"{len(study.k)} k",
        counted(len(study.methods), "method"),
        counted(len(study.lr), "learning rate"),
        counted(len(study.controls), "control"),
        counted(len(study.twins), "twin"),
        f"{counted(len(study.updates), 'way')} of making updates",
    ]
    return f"{len(grid)} cells in {len(grid.groups)} groups: {', '.join(parts)}."


def _show_cells(grid: Grid, plan: sweeping.Plan) -> None:
    """Print the first open cells, and how many there are of each method and control."""
    wanted = frozenset(plan.open)
    found = [(group, cell) for group in grid.groups for cell in group.cells if cell.digest in wanted]
    for (method, control), n in Counter((cell.method, cell.control) for _, cell in found).items():
        say(f"  {n} × {method}{'' if control is None else f', {control}'}")
    for group, cell in found[:MOST_SHOWN]:
        say(f"  {cell.digest}  {group.about}: {cell.about}")
    if len(found) > MOST_SHOWN:
        say(f"  … and {len(found) - MOST_SHOWN} more")


def _show_estimate(grid: Grid, plan: sweeping.Plan) -> None:
    import torch

    from iclgd_lens.experiments.sweep_estimate import estimate_sweep
    from iclgd_lens.experiments.sweep_worker import threads_of

    if threads := threads_of(grid.study):
        torch.set_num_threads(threads)  # as its workers do
    with console.status("running probes") as status:
        found: SweepEstimate = estimate_sweep(grid, plan.open, lambda about: status.update(Text(f"probe: {about}")))
    for problem in found.problems:
        say(f"A probe failed: {problem}")
    if not found.probes:
        return
    workers = min(grid.study.executor.workers, len(grid.groups))
    held = f"{found.memory_bytes / 2**30:.1f} GiB {'of its GPU' if found.on_gpu else 'of memory'}"
    say(
        f"From {found.probes} probes here: about {_duration(found.seconds)} of work, {_duration(found.seconds / workers)} for "
        f"{counted(workers, 'worker')} of such speed; {held} each; {found.file_bytes / 2**20:.1f} MiB of results."
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _show_failures(folder: SweepFolder, grid: Grid) -> None:
    """Print why cells of this study failed, each reason once."""
    own = {cell.digest for group in grid.groups for cell in group.cells}
    failures = [failure for failure in folder.failures() if failure.cell in own]
    reasons = Counter(failure.reason for failure in failures)
    for reason, n in reasons.most_common(MOST_SHOWN):
        first = next(failure for failure in failures if failure.reason == reason)
        say(f"  {n} × {reason}\n    first: {first.about}")
    if failures:
        say(f"Where each failed is in {folder.path / 'failed'}; --retry-failed runs them again.")


def _show_results(out: Path, study: str) -> None:
    from iclgd_lens.experiments.sweep_results import load_results
    from iclgd_lens.views.paper_tables import brief
    from iclgd_lens.views.sweep_report import difference_sheet, write_sweep_report

    with console.status("reading results"):
        results = load_results(out, study)
        sheet = brief(difference_sheet(results.frame("per_query")))
    if len(sheet.numbers):
        console.print(sheet.rich())
    with console.status("writing the report"):
        report = write_sweep_report(out)
    say(f"Report: {report}")
