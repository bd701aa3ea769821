"""The command `iclgd reproduce`: the paper's protocol, its tables and its figures, on any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    progress_bar,
    require_writable,
    say,
)
from iclgd_lens.draws import MOST_SEED

if TYPE_CHECKING:
    from iclgd_lens.experiments.reproduce import Results


def reproduce(
    model: Model = "bundled",
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A task, repeated for several; 'all' is the paper's six. By default those, or what the bundled model knows."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results; a run that was stopped goes on there.")] = Path("iclgd-reproduce"),
    data: Data = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="'paper', 'auto' (for each method, by what finetuning does to the task on held-out draws) or a number. By default "
            "the paper's where it has one for every task, else auto."
        ),
    ] = None,
    lr_curve: Annotated[bool, typer.Option("--lr-curve", help="Similarity against learning rate, on held-out draws.")] = False,
    grid: Annotated[str | None, typer.Option(help="Learning rates to try, as in 0.001,0.01,0.1.")] = None,
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=MOST_SEED, help="A seed; repeat for several. By default the paper's.")
    ] = None,
    orders: Annotated[int, typer.Option(min=1, help="Orders of the same demonstrations.")] = 3,
    k: Annotated[
        str | None, typer.Option(help="Demonstrations, or 'fit': as many of 32 as fit, the default for real tasks.")
    ] = None,
    queries: Annotated[int | None, typer.Option(min=1, help="Queries at most. By default 2000, and 32 for bundled tasks.")] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="What else to put in the place of every update: random, random_weights, shuffled_labels, permuted, other_task; "
            "repeat for several, or all, or none. By default all."
        ),
    ] = None,
    other_task: Annotated[
        str | None, typer.Option(help="Whose demonstrations other_task takes. By default the next task's.")
    ] = None,
    twins: Annotated[bool, typer.Option(help="Run untrained twins, too.")] = True,
    separator: Separator = None,
    space_before_labels: SpaceBeforeLabels = None,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    tuning_seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Held-out draws to choose learning rates on. By default 3, and 10 for bundled tasks."),
    ] = None,
    tuning_queries: Annotated[int, typer.Option(min=1, help="Queries of each held-out draw, at most.")] = 64,
    backend: Backend = "auto",
    device: Device = None,
    dtype: DType = "float32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Queries that run at once. By default as many as fit.")] = None,
    process_weights: Annotated[
        bool, typer.Option("--process-weights", help="Fold and centre the weights, which changes what gradient steps do.")
    ] = False,
    pictures: Annotated[bool, typer.Option(help="Write figures as PNG and SVG, too, where a browser can draw them.")] = True,
) -> None:
    """Reproduce the paper's tables and figures on a model, or go on where such a run was stopped."""
    with errors_for_people():
        count = None if k is None else parse_k(k)
        require_writable(out / "frame.parquet")
        with console.status("loading torch and TransformerLens"):
            import torch

            from iclgd_lens.cli.running import close_run, use_threads_for
            from iclgd_lens.data.registry import BUNDLED_TASKS, PAPER_TASKS
            from iclgd_lens.experiments import reproduce as running
            from iclgd_lens.experiments.drawing import draw_to_report, load_tasks
            from iclgd_lens.experiments.folder import begin_run
            from iclgd_lens.experiments.learning_rate import GRID, UPDATE_OPTIONS
            from iclgd_lens.experiments.paper import PAPER
            from iclgd_lens.experiments.protocol import TWINS, Protocol
            from iclgd_lens.models.identity import shown_name
            from iclgd_lens.models.loading import load_model
        tasks = _tasks(task, model, BUNDLED_TASKS, PAPER_TASKS)
        default_lr = "paper" if set(tasks) <= set(PAPER) else "auto"
        protocol = Protocol(
            tasks=tasks,
            seeds=tuple(seed) if seed else None,
            k=count,
            n_queries=queries,
            orders=orders,
            lr=_rate(lr or default_lr),
            controls=_controls(control, several=len(tasks) > 1 or other_task is not None),
            other_task=other_task,
            twins=tuple(TWINS) if twins else (),
            grid=_numbers(grid) if grid else GRID,
            n_tuning_seeds=tuning_seeds,
            n_tuning_queries=tuning_queries,
            lr_curve=lr_curve,
            options={**UPDATE_OPTIONS, "loss_on": loss_on, "readout": readout},
            separator=parse_separator(separator),
            space_before_labels=space_before_labels,
        )
        protocol.require_tasks()
        use_threads_for(model)
        with console.status(Text(f"loading the model {model}")):
            loaded = load_model(model, backend=backend, device=device, dtype=getattr(torch, dtype), process_weights=process_weights)
        name = shown_name(model)
        begin_run(out)
        with progress_bar() as progress:
            bar = progress.add_task("loading data", total=None)
            results = running.reproduce(
                loaded,
                protocol,
                out,
                data=data,
                batch_size=batch_size,
                on_total=lambda total: progress.update(bar, total=total),
                on_runs=lambda runs, about: progress.update(bar, advance=runs, description=about),
            )
        _show(results, name, out, pictures)
        more = {"data": None if data is None else str(data), "batch_size": batch_size, "process_weights": process_weights}
        plans = {each: asdict(protocol.plan(each)) for each in protocol.tasks}
        run = {"command": "reproduce", **more, "protocol": asdict(protocol), "plans": plans}
        first = results.rates["task"].iloc[0]
        rates = results.rates[results.rates["task"] == first].set_index("method")["lr"].to_dict()
        # The example is about the first task's first draw, so no other is made again.
        shown = replace(protocol, tasks=(first,), seeds=protocol.plan(first).seeds[:1], orders=1, controls=(), other_task=None)
        drawn = draw_to_report(shown, load_tasks(shown, data), first, loaded)[0]
        close_run(out, loaded, name, run, drawn.episodes[0], rates, protocol.options)


def _show(results: Results, name: str, out: Path, pictures: bool) -> None:
    """Print the tables, and write them and the figures."""
    from iclgd_lens.views.figures import write_figures
    from iclgd_lens.views.paper_tables import TABLES, brief, paper_tables
    from iclgd_lens.views.sheets import write_sheets

    sheets = paper_tables(results, name)
    write_sheets(sheets, out / "tables", TABLES)
    for sheet in sheets:
        console.print(brief(sheet).rich())
    with console.status("drawing figures"):
        problem = write_figures(results.frames, out / "figures", pictures)
    say(f"Under {out}: tables/ (Markdown, LaTeX, CSV), figures/, setting.json, frame.parquet with {len(results.frame)} tidy rows.")
    if problem:
        say(problem)
    if diverged := len(results.problems):
        first = results.problems["problem"].iloc[0]
        say(f"Updates that diverged and have no rows: {diverged}, listed in problems.parquet. The first: {first}")


def _tasks(given: Sequence[str] | None, model: str, bundled: tuple[str, ...], paper: tuple[str, ...]) -> tuple[str, ...]:
    if not given:
        return bundled if model == "bundled" else paper
    return tuple(dict.fromkeys(name for one in given for name in (paper if one == "all" else (one,))))


def _controls(given: Sequence[str] | None, several: bool) -> tuple[Any, ...]:
    from iclgd_lens.experiments.methods import CONTROLS

    alone = {"all": tuple(control for control in CONTROLS if several or control != "other_task"), "none": ()}
    if not given:
        return alone["all"]
    if len(given) == 1 and given[0] in alone:
        return alone[given[0]]
    for word in alone:
        if word in given:
            raise ValueError(f"--control {word} stands alone; name controls, or give all or none")
    return tuple(given)


def _rate(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text  # which the protocol checks


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--grid must be numbers with commas between them, got {text!r}") from None
