"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
