"""The command `iclgd kernels`: attention, gradient steps and kernel regression as one kind of object, on a model and a task."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from iclgd_lens.cli.common import (
    Backend,
    Data,
    Device,
    DType,
    LossOn,
    Model,
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


def kernels(
    model: Model = "bundled",
    task: Annotated[str, typer.Option(help="A task by name.")] = "bundled/remapped",
    k: Annotated[str, typer.Option(help="Demonstrations per episode, or 'fit': up to 32, as many as fit the context.")] = "12",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes, each with demonstrations and an untrained twin of its own.")] = 5,
    queries: Annotated[int, typer.Option(min=4, help="Queries per episode, at most.")] = 32,
    lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of GD and LCGD. By default the paper's for its tasks, and 0.3 for the bundled ones."),
    ] = None,
    twins: Annotated[bool, typer.Option(help="Run untrained twins, too.")] = True,
    separator: Separator = None,
    space_before_labels: SpaceBeforeLabels = None,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="The first episode's seed, and its twin's; the next ones follow.")
    ] = 0,
    data: Data = None,
    backend: Backend = "auto",
    device: Device = None,
    dtype: DType = "float32",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("iclgd-kernels"),
) -> None:
    """View ICL, GD and LCGD as kernel methods: smoothing, implied attention, label regression, tangent kernels, functional GD."""
    with errors_for_people():
        count, between = parse_k(k), parse_separator(separator)
        require_writable(out / "frame.parquet")
        with console.status("loading torch and TransformerLens"):
            import torch

            from iclgd_lens.cli.running import close_run, compare_episodes, use_threads_for
            from iclgd_lens.data.registry import load_task
            from iclgd_lens.experiments.learning_rate import UPDATE_OPTIONS
            from iclgd_lens.kernels.constructed import positive_control
            from iclgd_lens.models.hooked import NoHookedTransformerError
            from iclgd_lens.models.identity import shown_name
            from iclgd_lens.models.loading import load_model
            from iclgd_lens.views.kernel_tables import kernel_tables, kernel_verdict
            from iclgd_lens.views.sheets import write_sheets
        drawn = load_task(task, data, separator=between, space_before_labels=space_before_labels)
        rate = _rate(lr, task)
        use_threads_for(model)
        with console.status(Text(f"loading the model {model}")):
            loaded = load_model(model, backend=backend, device=device, dtype=getattr(torch, dtype))
        found = compare_episodes(
            loaded,
            drawn,
            out,
            k=count,
            queries=queries,
            seeds=range(seed, seed + episodes),
            twins=twins,
            about="running ZSL, ICL, GD, LCGD and their kernel views",
            controls=(),
            kernels=True,
            if_diverged="record",
            lr=rate,
            loss_on=loss_on,
            readout=readout,
        )
        frame, diverged = found.frame, found.problems
    console.print(
        f"{task}, {counted(episodes, 'episode')} of {listed(frame['k'])} demonstrations and {listed(frame['n_queries'])} queries, "
        f"lr {rate:g}, loss on the {loss_on}, readout over {readout}, model {model}.",
        markup=False,
    )
    console.print()
    sheets = kernel_tables(frame)
    write_sheets(sheets, out / "tables", ["kernels_*"])
    for sheet in sheets:
        console.print(sheet.rich())
    try:
        known = positive_control(seed)
        answer = (
            f"where a layer is built to do a step of gradient descent, similarity reads {known.same:.3f}, and against a step on "
            f"another problem {known.unrelated:+.3f}."
        )
    except NoHookedTransformerError as error:
        answer = f"not checked; {error}."
    console.print(f"Known answer: {answer}", markup=False)
    say(f"Tidy results, {len(frame)} rows: {out / 'frame.parquet'}; tables as Markdown, LaTeX and CSV: {out / 'tables'}")
    if len(diverged):
        say(f"Updates that diverged: {len(diverged)}. The first: {diverged['problem'].iloc[0]}")
    with errors_for_people():
        run: dict[str, Any] = {"command": "kernels", "task": task, "data": None if data is None else str(data), "k": k}
        run |= {"episodes": episodes, "queries": queries, "lr": rate, "twins": twins, "seed": seed}
        run |= {"separator": drawn.format.separator, "space_before_labels": drawn.format.space_before_labels}
        options = {**UPDATE_OPTIONS, "loss_on": loss_on, "readout": readout}
        run |= {"controls": (), "options": options}
        first = drawn.episode(loaded, k=count, n_queries=queries, seed=seed)
        close_run(out, loaded, shown_name(model), run, first, {"gd": rate, "lcgd": rate}, options)
    console.print(kernel_verdict(frame), markup=False)


def _rate(given: float | None, task: str) -> float:
    from iclgd_lens.data.registry import BUNDLED_TASKS
    from iclgd_lens.experiments.paper import PAPER

    if given is not None:
        return given
    if task in PAPER:
        return PAPER[task].lr
    if task in BUNDLED_TASKS:
        return 0.3
    raise ValueError(f"there is no default learning rate for the task {task!r}; give one with --lr")
