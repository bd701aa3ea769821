"""The command `iclgd demo`: the main comparison on the bundled model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from iclgd_lens.cli.common import (
    MOST_SEED,
    Device,
    LossOn,
    Readout,
    console,
    counted,
    errors_for_people,
    listed,
    parse_k,
    progress_bar,
    require_writable,
)


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
        count = parse_k(k)
        results = out / "results.parquet"
        require_writable(results)
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
        with progress_bar() as progress:
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
        f"[bold]{task}[/bold], {counted(episodes, 'episode')} of {listed(frame['k'])} demonstrations and "
        f"{listed(frame['n_queries'])} queries, lr {lr:g}, loss on the {loss_on}, readout over {readout}; the bundled model has "
        f"{model.cfg.n_layers} layers, {model.cfg.n_heads} heads, d_model {model.cfg.d_model}."
    )
    for table in (accuracy_table(frame), similarity_table(frame), layer_table(frame)):
        console.print(table)
    console.print(f"Tidy results, {len(frame)} rows: {path}", soft_wrap=True, markup=False)
    console.print(verdict(frame), markup=False)
