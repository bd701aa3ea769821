"""The command `iclgd check`: what the package promises, proved on one model."""

from __future__ import annotations

from typing import Annotated

import typer

from iclgd_lens.cli.common import Backend, Device, DType, console, errors_for_people, say


def check(
    model: Annotated[
        str, typer.Argument(help="'bundled', the folder of a Hugging Face model, a .gguf file, or a name on the hub.")
    ],
    device: Device = None,
    dtype: DType = "float32",
    backend: Backend = "auto",
    longest: Annotated[
        int, typer.Option(min=1, help="How many tokens a prompt may have: more than the model's longest window.")
    ] = 4_500,
) -> None:
    """Prove on a model that outputs, captures, attention and updates are exact; the exit status is 1 where one is not."""
    with errors_for_people():
        with console.status("loading torch, TransformerLens and the model"):
            import torch
            from rich import box
            from rich.table import Table
            from rich.text import Text

            from iclgd_lens.checking.check import check as check_model
            from iclgd_lens.cli.running import use_threads_for
            from iclgd_lens.models.loading import load_model

            use_threads_for(model)
            loaded = load_model(model, device=device, dtype=getattr(torch, dtype), backend=backend)
        with console.status("comparing with the plain model, whole prompts and autograd"):
            found = check_model(loaded, longest=longest)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("what", "error", "tolerance", "verdict"):
        table.add_column(column, no_wrap=True)
    for cells in found.shown:
        table.add_row(*map(Text, cells))
    say(found.title)
    console.print(table)
    for line in (*found.notes, found.summary):
        console.print(line, markup=False, highlight=False)
    raise typer.Exit(0 if found.ok else 1)
