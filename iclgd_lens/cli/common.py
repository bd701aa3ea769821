"""What the commands share: the console, options, checks at the entrance, progress and errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from iclgd_lens.data.escapes import unescaped

# Where nobody watches, as in a pipe, tables need not fold to 80 columns.
console = Console(width=None if Console().is_terminal or "COLUMNS" in os.environ else 160)
errors = Console(stderr=True)

Model = Annotated[
    str, typer.Option(help="'bundled', the folder of a Hugging Face model, a .gguf file, or any name that TransformerLens knows.")
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of local data, as TASK/SPLIT.csv, .jsonl or .parquet; else the hub.", envvar="ICLGD_DATA"),
]
Separator = Annotated[
    str | None,
    typer.Option(
        help="What stands between demonstrations: \\n is a line break, {eos} the end-of-text token. By default the task's own.",
        show_default=False,
    ),
]
SpaceBeforeLabels = Annotated[
    bool | None,
    typer.Option(
        help="Write label words after a space, or right after the template. By default as the task has it.", show_default=False
    ),
]
DType = Annotated[Literal["float32", "float64", "bfloat16", "float16"], typer.Option(help="The dtype of the weights.")]
Backend = Annotated[
    Literal["auto", "hooked", "bridge"],
    typer.Option(help="Load it as a HookedTransformer or a TransformerBridge; auto: the first, where TransformerLens has it."),
]
Device = Annotated[str | None, typer.Option(help="A torch device, such as cpu or cuda. By default CUDA where there is one.")]
LossOn = Annotated[
    Literal["demonstration", "label"], typer.Option(help="Take the loss on the whole demonstration or on its label alone.")
]
Readout = Annotated[
    Literal["vocab", "labels"],
    typer.Option(help="Read losses out over the vocabulary, or over the label words' tokens (needs --loss-on label)."),
]


def parse_k(k: str) -> int | Literal["fit"]:
    """Read a number of demonstrations, or 'fit'.

    Raises:
        ValueError: If it is neither.
    """
    if k == "fit":
        return "fit"
    try:
        return int(k)
    except ValueError:
        raise ValueError(f"k must be a number of demonstrations or 'fit', got {k!r}") from None


def parse_separator(separator: str | None) -> str | None:
    r"""Read a separator, whose line breaks a shell leaves as `\n`; None stays None.

    Raises:
        ValueError: If a backslash stands before a letter that means nothing.
    """
    return None if separator is None else unescaped("--separator", separator)


def require_writable(file: Path, instead: str = "give a place that can be written with --out") -> None:
    """Find out before any work is done whether a file can be written.

    Args:
        file: The file.
        instead: What to do if it cannot.

    Raises:
        OSError: If it cannot, saying why and what to do.
    """
    if os.path.isdir(file):
        raise IsADirectoryError(f"cannot write {file}: it is a folder; {instead}")
    # Of what is in a folder that may not be looked into, this says that it is not there, where Path.exists raises.
    nearest = next(folder for folder in file.absolute().parents if os.path.exists(folder))
    if not nearest.is_dir():
        raise NotADirectoryError(f"cannot write {file}: {nearest} is a file, not a folder; {instead}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write {file}: no permission to write in {nearest}; {instead}")


def say(text: str) -> None:
    """Print a line as it is: whole, since a path that is folded cannot be copied, and with nothing in it read as markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def progress_bar(*more: ProgressColumn) -> Progress:
    """A bar that is gone when the work is done, with more columns before the time that is left."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *more,
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Turn errors about values, files and what is not installed into one line and exit status 2; others are defects and keep their
    trace.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        errors.print("[bold red]error:[/bold red]", Text(str(error)), soft_wrap=True)
        raise typer.Exit(2) from error
