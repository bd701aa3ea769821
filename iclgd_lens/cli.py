"""The command `iclgd`.

Torch and TransformerLens take seconds to import, so they are imported inside the commands, behind a spinner: `--help` is instant.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="In-context learning against gradient descent, layer by layer, on TransformerLens models.",
)
console = Console()
errors = Console(stderr=True)

MOST_SEED = 2**31 - 1

Device = Annotated[str | None, typer.Option(help="A torch device, such as cpu or cuda. By default CUDA where there is one.")]


@app.callback()
def main() -> None:
    """Keep `iclgd demo` a subcommand, whatever the number of commands."""


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="The bundled task: bundled/remapped or bundled/natural.")] = "bundled/remapped",
    k: Annotated[str, typer.Option(help="Demonstrations per episode, or 'fit': up to 32, as many as fit the context.")] = "12",
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes, each with demonstrations, queries, label words and an untrained twin of its own.")
    ] = 20,
    queries: Annotated[int, typer.Option(min=1, help="Queries per episode.")] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of GD and LCGD; the similarities depend on it.")] = 0.01,
    loss_on: Annotated[
        Literal["demonstration", "label"], typer.Option(help="Take the loss on the whole demonstration or on its label alone.")
    ] = "demonstration",
    readout: Annotated[
        Literal["vocab", "labels"],
        typer.Option(help="Read losses out over the vocabulary, or over the label words' tokens (needs --loss-on label)."),
    ] = "vocab",
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="The first episode's seed, and its twin's; the next ones follow.")
    ] = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("iclgd-demo"),
) -> None:
    """Compare in-context learning with GD and LCGD on the bundled model and on its untrained twin, offline, in under a minute."""
    with _errors_for_people():
        count = _parse_k(k)
        results = out / "results.parquet"
        _require_writable(results)
        with console.status("loading torch, TransformerLens and the bundled model"):
            import pandas as pd
            import torch

            from iclgd_lens.data.registry import load_task
            from iclgd_lens.experiments.compare import compare, n_runs
            from iclgd_lens.experiments.results import write_frame
            from iclgd_lens.models.loading import load_model
            from iclgd_lens.models.untrained import untrained_twin
            from iclgd_lens.views.tables import accuracy_table, layer_table, similarity_table, verdict

            # The bundled model is so small that threads cost more than they bring.
            torch.set_num_threads(1)
            model = load_model("bundled", device=device)
            drawn = load_task(task)
        frames = []
        with _progress() as progress:
            bar = progress.add_task("running ZSL, ICL, GD and LCGD", total=episodes * n_runs(("gd", "lcgd"), untrained=True))
            for number in range(episodes):
                episode = drawn.episode(model, k=count, n_queries=queries, seed=seed + number)
                frames.append(
                    compare(
                        model,
                        episode,
                        lr=lr,
                        untrained=untrained_twin(model, seed=seed + number),
                        loss_on=loss_on,
                        readout=readout,
                        on_run=lambda: progress.advance(bar),
                    ).frame
                )
        frame = pd.concat(frames, ignore_index=True)
        path = write_frame(frame, results)
    console.print(
        f"[bold]{task}[/bold], {episodes} episodes of {_listed(frame['k'])} demonstrations and {_listed(frame['n_queries'])} "
        f"queries, lr {lr:g}, loss on the {loss_on}, readout over {readout}; the bundled model has {model.cfg.n_layers} layers, "
        f"{model.cfg.n_heads} heads, d_model {model.cfg.d_model}."
    )
    for table in (accuracy_table(frame), similarity_table(frame), layer_table(frame)):
        console.print(table)
    console.print(f"Tidy results, {len(frame)} rows: {path}", soft_wrap=True, markup=False)
    console.print(verdict(frame), markup=False)


@app.command()
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
    with _errors_for_people():
        _require_writable(out)
        with console.status("loading torch and TransformerLens"):
            from iclgd_lens.experiments.bundled import measure_bundled
            from iclgd_lens.models.bundled.learner import load_bundled, save_bundled
            from iclgd_lens.models.bundled.training import STEPS, train_bundled
            from iclgd_lens.models.loading import parse_device
            from iclgd_lens.views.tables import bundled_table

            place = parse_device(device)
        steps = STEPS if steps is None else steps
        with _progress() as progress:
            bar = progress.add_task("training", total=steps)
            model = train_bundled(
                steps=steps,
                seed=seed,
                device=place,
                on_step=lambda step, loss: progress.update(bar, completed=step, description=f"training, loss {loss:.3f}"),
            )
        save_bundled(model, out)
        with _progress() as progress:
            bar = progress.add_task("measuring on fresh episodes", total=None)
            measured = measure_bundled(
                load_bundled(out, place),
                episodes=episodes,
                on_episode=lambda done, total: progress.update(bar, completed=done, total=total),
            )
    console.print(bundled_table(measured))
    console.print(f"Weights: {out}", soft_wrap=True, markup=False)


def _listed(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(set(values))))


def _parse_k(k: str) -> int | Literal["fit"]:
    if k == "fit":
        return "fit"
    try:
        return int(k)
    except ValueError:
        raise ValueError(f"k must be a number of demonstrations or 'fit', got {k!r}") from None


def _require_writable(file: Path) -> None:
    """Find out before any work is done whether a file can be written."""
    if file.is_dir():
        raise IsADirectoryError(f"cannot write {file}: it is a folder")
    nearest = next(folder for folder in file.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write {file}: {nearest} is a file, not a folder")
    if not os.access(nearest, os.W_OK):
        raise PermissionError(f"cannot write {file}: no permission to write in {nearest}")


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Turn errors about values and files into one line and exit status 2; others are defects and keep their trace."""
    try:
        yield
    except (ValueError, OSError) as error:
        errors.print("[bold red]error:[/bold red]", Text(str(error)))
        raise typer.Exit(2) from error
