"""The command `iclgd`.

Torch and TransformerLens take seconds to import, so they are imported inside the commands, behind a spinner: `--help` is instant.
"""

from __future__ import annotations

import typer

from iclgd_lens.cli.bench import bench
from iclgd_lens.cli.check import check
from iclgd_lens.cli.demo import demo
from iclgd_lens.cli.kernels import kernels
from iclgd_lens.cli.report import report
from iclgd_lens.cli.reproduce import reproduce
from iclgd_lens.cli.sweep import sweep
from iclgd_lens.cli.train_bundled import train_bundled

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="In-context learning against gradient descent, layer by layer, on TransformerLens models.",
)
for command in (demo, reproduce, kernels, sweep, report, check, train_bundled, bench):
    app.command()(command)
