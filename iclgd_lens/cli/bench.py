"""The command `iclgd bench`: what the main jobs cost, against a naive path or the work that they cannot avoid."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from iclgd_lens.cli.common import Device, DType, console, errors_for_people, require_writable, say


def bench(
    model: Annotated[
        str, typer.Option(help="A shape: bundled, gpt2-small, gpt2-medium, gpt2-xl or llama-7b; weights are random.")
    ] = "gpt2-small",
    job: Annotated[list[str] | None, typer.Option(help="A job by name; may be given more than once. By default all.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often each job is timed.")] = 5,
    k: Annotated[int, typer.Option(min=2, help="Demonstrations.")] = 32,
    demonstration: Annotated[int, typer.Option(min=4, help="Tokens of a demonstration.")] = 28,
    queries: Annotated[int, typer.Option(min=1, help="Queries.")] = 64,
    query: Annotated[int, typer.Option(min=3, help="Tokens of a query.")] = 24,
    growth: Annotated[
        bool, typer.Option("--growth", help="Measure how cost and memory grow with the work, on a model of its own, and no job.")
    ] = False,
    dtypes: Annotated[
        bool, typer.Option("--dtypes", help="Measure what half precision does to results of the bundled model, and no job.")
    ] = False,
    grid: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Measure what a sweep of about so many cells costs beside the cells, and no job; may be repeated."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; by default its own choice.")] = None,
    device: Device = None,
    dtype: DType = "float32",
    out: Annotated[Path, typer.Option(help="File for the results (parquet).")] = Path("iclgd-bench.parquet"),
) -> None:
    """Time the main jobs against a naive path, or against passes that they must make anyway; results are checked first."""
    with errors_for_people():
        require_writable(out)
        with console.status("loading torch and TransformerLens"):
            import torch

            from iclgd_lens.benchmarks.jobs import JOBS, Setting
            from iclgd_lens.benchmarks.models import NEEDS_GPU, Sizes
            from iclgd_lens.benchmarks.run import benchmark_table, run_benchmarks
            from iclgd_lens.files import write_frame
            from iclgd_lens.models.loading import parse_device
        if threads is not None:
            torch.set_num_threads(threads)
        if model in NEEDS_GPU and parse_device(device) == "cpu":
            say(f"{model}: no GPU")
            return
        if growth + dtypes + bool(grid) > 1:
            raise ValueError("--growth, --dtypes and --grid are measured apart; give one of them")
        if growth:
            _growth(repeats, device, out)
            return
        if dtypes:
            _dtypes(device, out)
            return
        if grid:
            _sweeps(grid, out)
            return
        sizes = Sizes(k=k, demonstration=demonstration, queries=queries, query=query)
        with console.status(Text(f"building {model}")) as status:
            setting = Setting.named(model, sizes, device=device, dtype=getattr(torch, dtype))
            frame = run_benchmarks(
                setting, job or tuple(JOBS), repeats=repeats, on_job=lambda name: status.update(Text(f"measuring {name}"))
            )
        write_frame(frame, out)
    console.print(benchmark_table(frame).rich())
    say(f"Results: {out}")


def _growth(repeats: int, device: str | None, out: Path) -> None:
    from iclgd_lens.benchmarks.growth import capture_growth, capture_table, graph_growth, graph_table, growth_table, measure_growth
    from iclgd_lens.files import write_frame

    with console.status("measuring") as status:
        frame = measure_growth(repeats=repeats, device=device, on_axis=lambda name: status.update(Text(f"varying {name}")))
        write_frame(frame, out)
        status.update("counting bytes")
        graphs, captures = graph_growth(device=device), capture_growth(device=device)
    console.print(growth_table(frame).rich())
    console.print(graph_table(graphs).rich())
    console.print(capture_table(captures).rich())
    say(f"Results: {out}")


def _dtypes(device: str | None, out: Path) -> None:
    from iclgd_lens.benchmarks.precision import dtype_agreement, precision_table
    from iclgd_lens.files import write_frame

    with console.status("measuring") as status:
        frame = dtype_agreement(device=device, on_dtype=lambda name: status.update(Text(f"measuring {name}")))
        write_frame(frame, out)
    console.print(precision_table(frame).rich())
    say(f"Results: {out}")


def _sweeps(sizes: list[int], out: Path) -> None:
    from iclgd_lens.benchmarks.sweeps import measure_sweep, sweep_table
    from iclgd_lens.files import write_frame

    with console.status("measuring") as status:

        def tell(size: int, step: str) -> None:
            status.update(Text(f"{size} cells: {step}"))

        costs = [measure_sweep(size, partial(tell, size)) for size in sizes]
    table = sweep_table(costs)
    write_frame(table.numbers, out)
    console.print(table.rich())
    say(f"Results: {out}")
