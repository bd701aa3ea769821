"""The command `iclgd demo`: the main comparison on the bundled model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iclgd_lens.cli.common import (
    Device,
    LossOn,
    Readout,
    Separator,
    SpaceBeforeLabels,
    console,
    errors_for_people,
    parse_k,
    parse_separator,
    require_writable,
    say,
)
from iclgd_lens.draws import MOST_SEED
from iclgd_lens.views.names import counted, listed

CONTROLS = ("random",)


def demo(
    task: Annotated[str, typer.Option(help="The bundled task: bundled/remapped or bundled/natural.")] = "bundled/remapped",
    k: Annotated[str, typer.Option(help="Demonstrations per episode, or 'fit': up to 32, as many as fit the context.")] = "12",
    episodes: Annotated[
        int, typer.Option(min=1, help="Episodes, each with demonstrations, queries, label words and an untrained twin of its own.")
    ] = 20,
    queries: Annotated[int, typer.Option(min=1, help="Queries per episode.")] = 32,
    lr: Annotated[
        float,
        typer.Option(help="Learning rate of GD and LCGD. The default is what iclgd reproduce --lr auto chooses on held-out draws."),
    ] = 0.3,
    separator: Separator = None,
    space_before_labels: SpaceBeforeLabels = None,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="The first episode's seed, and its twin's; the next ones follow.")
    ] = 0,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("iclgd-demo"),
) -> None:
    """Compare in-context learning with GD and LCGD on the bundled model and on its untrained twin, offline, in under a minute."""
    with errors_for_people():
        count, between = parse_k(k), parse_separator(separator)
        require_writable(out / "frame.parquet")
        with console.status("loading torch, TransformerLens and the bundled model"):
            from iclgd_lens.cli.running import close_run, compare_episodes, use_threads_for
            from iclgd_lens.data.registry import load_task
            from iclgd_lens.experiments.learning_rate import UPDATE_OPTIONS
            from iclgd_lens.models.loading import load_model
            from iclgd_lens.views.tables import comparison_tables, verdict

            use_threads_for("bundled")
            model = load_model("bundled", device=device)
            drawn = load_task(task, separator=between, space_before_labels=space_before_labels)
        seeds = range(seed, seed + episodes)
        frame = compare_episodes(
            model,
            drawn,
            out,
            k=count,
            queries=queries,
            seeds=seeds,
            twins=True,
            about="running ZSL, ICL, GD and LCGD",
            controls=CONTROLS,
            lr=lr,
            loss_on=loss_on,
            readout=readout,
        ).frame
    console.print(
        f"[bold]{task}[/bold], {counted(episodes, 'episode')} of {listed(frame['k'])} demonstrations and "
        f"{listed(frame['n_queries'])} queries, lr {lr:g}, loss on the {loss_on}, readout over {readout}; the bundled model has "
        f"{model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}."
    )
    console.print()
    for sheet in comparison_tables(frame):
        console.print(sheet.rich())
    say(f"Tidy results, {len(frame)} rows: {out / 'frame.parquet'}")
    with errors_for_people():
        options = {**UPDATE_OPTIONS, "loss_on": loss_on, "readout": readout}
        run = {"command": "demo", "task": task, "k": k, "episodes": episodes, "queries": queries, "lr": lr, "seed": seed}
        run |= {"separator": drawn.format.separator, "space_before_labels": drawn.format.space_before_labels}
        run |= {"twins": True, "controls": CONTROLS, "options": options}
        first = drawn.episode(model, k=count, n_queries=queries, seed=seed)
        close_run(out, model, "bundled", run, first, {"gd": lr, "lcgd": lr}, options)
    console.print(verdict(frame), markup=False)
