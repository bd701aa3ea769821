"""The command `iclgd train-bundled`: the bundled learner from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iclgd_lens.cli.common import Device, console, errors_for_people, progress_bar, require_writable, say
from iclgd_lens.draws import MOST_SEED


def train_bundled(
    out: Annotated[Path, typer.Option(help="Where to write the weights (safetensors).")] = Path("bundled.safetensors"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; by default the recipe's.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seeds weights and training episodes; 0 made the shipped weights.")
    ] = 0,
    episodes: Annotated[int, typer.Option(min=1, help="Fresh episodes per row of the table printed at the end.")] = 200,
    device: Device = None,
) -> None:
    """Train the bundled in-context learner from scratch, under 15 minutes on two cores, and measure what it can do."""
    with errors_for_people():
        require_writable(out)
        with console.status("loading torch and TransformerLens"):
            from iclgd_lens.experiments.bundled import measure_bundled
            from iclgd_lens.models.bundled.learner import load_bundled, save_bundled
            from iclgd_lens.models.bundled.training import STEPS, train_bundled
            from iclgd_lens.models.loading import parse_device
            from iclgd_lens.views.tables import bundled_table

            place = parse_device(device)
        steps = STEPS if steps is None else steps
        with progress_bar() as progress:
            bar = progress.add_task("training", total=steps)
            model = train_bundled(
                steps=steps,
                seed=seed,
                device=place,
                on_step=lambda step, loss: progress.update(bar, completed=step, description=f"training, loss {loss:.3f}"),
            )
        save_bundled(model, out)
        with progress_bar() as progress:
            bar = progress.add_task("measuring on fresh episodes", total=None)
            measured = measure_bundled(
                load_bundled(out, place),
                episodes=episodes,
                on_episode=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    console.print(bundled_table(measured).rich())
    say(f"Weights: {out}")
