"""The command `iclgd report`: the page of a run, made anew from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iclgd_lens.cli.common import console, errors_for_people, require_writable, say


def report(
    run: Annotated[Path, typer.Argument(help="The folder that iclgd demo, kernels, reproduce or sweep wrote.")],
) -> None:
    """Write a run's report: one page with its summary, tables, figures, an example of attention and its setting."""
    with errors_for_people(), console.status("writing the report"):
        if run.is_dir():
            require_writable(run / "report.html", "copy the folder to a place that can be written, and write its report there")
        from iclgd_lens.experiments.folder import RunFolder
        from iclgd_lens.experiments.sweep_folder import SweepFolder
        from iclgd_lens.views.report import write_report
        from iclgd_lens.views.sweep_report import write_sweep_report

        path = write_sweep_report(run) if SweepFolder(run).is_one() else write_report(RunFolder.read(run))
    say(f"Report: {path}")
