"""Cells: the parts of a long run, each kept in a file of its own, so that a run that was stopped goes on where it was.

A cell's file is named by a digest of everything that determines its content, and says so inside. Files appear whole or not at all.
What is damaged, or is there under another cell's name, is found by a checksum and is never read.
"""

from __future__ import annotations

import io
import json
import logging
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from iclgd_lens.digests import digest_of
from iclgd_lens.files import written_whole

RESULTS_FORMAT = 3
"""Raised when the meaning of results changes, so that older cells are made anew."""

ABOUT = "iclgd_lens"
"""The key, in a file's metadata, under which it says what it is."""

PART = "part"
"""The column that tells a cell's frames apart."""

_END = 8
"""The bytes that end a parquet file: the length of its footer, and four letters."""

log = logging.getLogger(__name__)

Frames = Mapping[str, pd.DataFrame]


class DamagedCellError(ValueError):
    """A file that is not the cell that its name says, or not all of it."""


@dataclass(frozen=True)
class Cells:
    """A folder of cells.

    Attributes:
        folder: The folder. Files lie in folders of their digest's first two digits, so that none holds too many.
    """

    folder: Path

    def path(self, digest: str) -> Path:
        """Where a cell is kept."""
        return self.folder / digest[:2] / f"{digest}.parquet"

    def write(self, digest: str, about: str, frames: Frames) -> None:
        """Keep a cell's frames.

        Args:
            digest: Its `cell_digest`.
            about: What it is, in words.
            frames: Its frames, by name.
        """
        tables = {name: pa.Table.from_pandas(frame, preserve_index=False) for name, frame in frames.items()}
        schema = pa.unify_schemas([table.schema.remove_metadata() for table in tables.values()], promote_options="permissive")
        schema = schema.insert(0, pa.field(PART, pa.string()))
        says = {
            "format": RESULTS_FORMAT,
            "cell": digest,
            "about": about,
            "parts": {name: [table.column_names, table.schema.metadata[b"pandas"].decode()] for name, table in tables.items()},
        }
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            # In one row group: each costs a file's reader as much as its rows do.
            named = [table.add_column(0, PART, pa.array([name] * len(table), pa.string())) for name, table in tables.items()]
            writer.write_table(pa.concat_tables([in_schema(table, schema) for table in named]))
            says |= {"bytes": sink.tell(), "crc32": zlib.crc32(sink.getbuffer())}
            writer.add_key_value_metadata({ABOUT: json.dumps(says)})
        with written_whole(self.path(digest)) as partial:
            partial.write_bytes(sink.getbuffer())

    def read(self, digest: str) -> dict[str, pd.DataFrame]:
        """Read a cell's frames.

        Raises:
            FileNotFoundError: If it is not there.
            DamagedCellError: If its file is damaged, or another's.
        """
        content = self.path(digest).read_bytes()
        says, table = _checked(content, digest), _rows(content)
        frames = {}
        for name, (columns, pandas) in says["parts"].items():
            part = table.filter(pc.field(PART) == name).select(columns)
            frames[name] = part.replace_schema_metadata({"pandas": pandas}).to_pandas()
        return frames

    def table(self, digest: str) -> pa.Table:
        """Read the rows of all a cell's frames together, told apart by the column `part`.

        Raises:
            FileNotFoundError: If it is not there.
            DamagedCellError: If its file is damaged, or another's.
        """
        content = self.path(digest).read_bytes()
        _checked(content, digest)
        return _rows(content)

    def check(self, digest: str) -> bool:
        """Whether a cell is there, without reading its frames.

        Raises:
            DamagedCellError: If a file is there in its place that is damaged, or another's.
        """
        try:
            content = self.path(digest).read_bytes()
        except FileNotFoundError:
            return False
        _checked(content, digest)
        return True


def cell(cells: Cells, key: Mapping[str, Any], about: str, make: Callable[[], Frames]) -> Frames:
    """Read a cell's frames, or make them and keep them.

    Args:
        cells: Where cells are kept.
        key: Everything that determines the frames, as JSON can write it.
        about: What the cell is, in words.
        make: Makes the frames, by name.
    """
    digest = cell_digest(key)
    try:
        return cells.read(digest)
    except FileNotFoundError:
        pass
    except DamagedCellError as error:
        log.warning("%s; it is made anew", error)
    made = make()
    cells.write(digest, about, made)
    return made


def cell_digest(key: Mapping[str, Any]) -> str:
    """Tell cells apart, in 20 hex digits."""
    return digest_of({"format": RESULTS_FORMAT, **key}, digits=20)


def in_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """A table with the columns of a schema, in its order and of its types; those that it lacks are empty."""
    have = set(table.column_names)
    columns = [table[field.name].cast(field.type) if field.name in have else pa.nulls(len(table), field.type) for field in schema]
    return pa.table(columns, schema=schema)


def _rows(content: bytes) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)


def _checked(content: bytes, digest: str) -> Any:
    """What a cell's file says of itself, if that is true."""
    where = f"the file of cell {digest}"
    says = verified(memoryview(content), where)
    try:
        holds, of_format = says["cell"], says["format"]
    except KeyError as error:
        raise DamagedCellError(f"{where} is none of ours (no {error})") from error
    if holds != digest or of_format != RESULTS_FORMAT:
        raise DamagedCellError(f"{where} holds another cell, {holds} in format {of_format}")
    return says


def verified(content: memoryview, where: str) -> Any:
    """What a parquet file of ours says of itself, whose checksum is right.

    Args:
        content: The file.
        where: What it is, for messages.

    Raises:
        DamagedCellError: If it is cut off, damaged, or not written here.
    """
    try:
        footer = int.from_bytes(content[-_END:-4], "little") + _END
        says = json.loads(pq.read_metadata(pa.BufferReader(content[-footer:])).metadata[ABOUT.encode()])
        whole = zlib.crc32(content[: says["bytes"]]) == says["crc32"]
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCellError(f"{where} is cut off or none of ours ({type(error).__name__})") from error
    if not whole or len(content) - footer != says["bytes"]:
        raise DamagedCellError(f"{where} is damaged: its checksum is another")
    return says
