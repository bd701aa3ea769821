"""Cells: the parts of a long run, each kept in files of its own, so that a run that was stopped goes on where it was.

A cell's files are named by a digest of everything that determines its content. What is there under that name is the cell; what is
not there, or cannot be read, is made. Files appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from iclgd_lens.experiments.results import write_frame

RESULTS_FORMAT = 2
"""Raised when the meaning of results changes, so that older cells are made anew."""

log = logging.getLogger(__name__)


def cell(
    folder: Path, name: str, key: Mapping[str, Any], parts: Sequence[str], make: Callable[[], Mapping[str, pd.DataFrame]]
) -> dict[str, pd.DataFrame]:
    """Read a cell's frames, or make them and keep them.

    Args:
        folder: Where cells are kept.
        name: How the files' names begin, for people.
        key: Everything that determines the frames, as JSON can write it.
        parts: The names of the frames. The first is written last: where it is, the cell is whole.
        make: Makes the frames, by name.
    """
    stem = cell_stem(name, key)
    files = {part: folder / f"{stem}.{part}.parquet" for part in parts}
    if files[parts[0]].exists():
        try:
            return {part: pd.read_parquet(file) for part, file in files.items()}
        except (OSError, pa.ArrowException) as error:
            log.warning("%s cannot be read (%s); it is made anew", stem, str(error).split("\n", maxsplit=1)[0])
    made = make()
    for part in reversed(parts):
        write_frame(made[part], files[part])
    return {part: made[part] for part in parts}


def cell_stem(name: str, key: Mapping[str, Any]) -> str:
    """The beginning of a cell's file names: its name, and 16 hex digits for its key."""
    text = json.dumps({"format": RESULTS_FORMAT, **key}, sort_keys=True)
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', name)[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
