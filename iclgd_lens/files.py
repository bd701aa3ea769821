"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to, and move what was written to `path` at the end; an exception leaves nothing behind.

    Folders that are missing are made. The file can be read by everybody, whatever the writing library thinks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process, so that two that write the same file do not write into each other's.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a frame to a parquet file, whole or not at all, and return its path."""
    with written_whole(Path(path)) as partial:
        frame.to_parquet(partial, index=False)
    return Path(path)


def remove_named(folder: Path, names: Iterable[str]) -> None:
    """Remove the files of these names (`*` stands for anything), whatever their suffix, that an earlier run left in a folder."""
    for name in names:
        for left in folder.glob(f"{name}.*"):
            left.unlink()
