"""A pack: the rows of many cells in one file, so that a hundred thousand cells are read like one.

A pack is a copy. It is made by whoever opens results when there are many cells that are in none, and says of every cell which file
its rows came from, by length and time of change; rows of a file that has changed since are left aside. What cells hold is in their
own files alone: a pack that is lost or damaged is made anew of them.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from iclgd_lens.experiments.cells import ABOUT, Cells, DamagedCellError, in_schema, verified
from iclgd_lens.files import written_whole

CELL = "cell"
"""The column that says which cell a row is of."""

WORTH_PACKING = 1000
"""So many cells that are in no pack are worth a new one."""

_AT_ONCE = 1000
"""How many cells' rows are held at once while packing; also the size of a row group, in cells."""

log = logging.getLogger(__name__)

Stamp = tuple[int, int]
"""Which file it was: its length in bytes, and when it was changed, in ns."""


@dataclass(frozen=True)
class Pack:
    """Rows of many cells.

    Attributes:
        path: Its file, which need not be there.
        stamps: The file that each cell's rows came from, by the cell's digest.
    """

    path: Path
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Pack:
        """Open a pack; without a file, or with a damaged one, there is nothing in it."""
        try:
            with pa.memory_map(str(path)) as mapped:
                says = verified(memoryview(mapped.read_buffer()), "the pack of cells")
            return cls(path, {digest: (size, changed) for digest, (size, changed) in says["cells"].items()})
        except FileNotFoundError:
            return cls(path)
        except (DamagedCellError, KeyError, TypeError, ValueError) as error:
            log.warning("%s; it is made anew", error)
            return cls(path)

    def holds(self, stamps: Mapping[str, Stamp]) -> set[str]:
        """The cells whose rows it has from these very files."""
        return {digest for digest, stamp in stamps.items() if self.stamps.get(digest) == stamp}

    def rows(self, schema: pa.Schema) -> ds.Dataset:
        """All its rows, with the column `cell` in front."""
        return ds.dataset(str(self.path), schema=with_cell(schema), format="parquet")

    def extended(self, cells: Cells, stamps: Mapping[str, Stamp], schema: pa.Schema) -> tuple[Pack, dict[str, str]]:
        """Make a pack of files: of those that it holds, its own rows, and of others what is read.

        Args:
            cells: Where the files are.
            stamps: The files.
            schema: The columns that are wanted.

        Returns:
            The new pack, and why files could not be read, by the digests of their cells.

        Raises:
            OSError: If it cannot be written.
        """
        kept = self.holds(stamps)
        fresh = sorted(stamps.keys() - kept)
        held = {digest: stamps[digest] for digest in kept}
        damaged: dict[str, str] = {}

        def read(digest: str) -> pa.Table | None:
            try:
                return cells.table(digest)
            except FileNotFoundError:  # a retry has just taken it away
                return None
            except DamagedCellError as error:
                damaged[digest] = str(error)
                return None

        with written_whole(self.path) as partial, partial.open("wb") as file:
            sink = _Summed(file)
            with pq.ParquetWriter(pa.PythonFile(sink, mode="w"), with_cell(schema), compression="zstd") as writer:
                if kept:
                    for batch in self.rows(schema).to_batches(filter=pc.field(CELL).isin([*kept])):
                        writer.write_batch(batch)
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    for start in range(0, len(fresh), _AT_ONCE):
                        some = fresh[start : start + _AT_ONCE]
                        tables = zip(some, pool.map(read, some), strict=True)
                        if whole := {digest: table for digest, table in tables if table is not None}:
                            writer.write_table(_together(whole, schema))
                            held |= {digest: stamps[digest] for digest in whole}
                says = {"cells": held, "bytes": sink.length, "crc32": sink.crc32}
                writer.add_key_value_metadata({ABOUT: json.dumps(says)})
        return Pack(self.path, held), damaged


def with_cell(schema: pa.Schema) -> pa.Schema:
    """The columns, and `cell` in front."""
    return schema.insert(0, pa.field(CELL, pa.string()))


def stamps_of(cells: Cells, digests: Collection[str]) -> dict[str, Stamp]:
    """The files of those cells that are there."""
    found = {}
    for digest in digests:
        try:
            status = os.stat(cells.path(digest))
        except FileNotFoundError:
            continue
        found[digest] = (status.st_size, status.st_mtime_ns)
    return found


class _Summed:
    """A file that is written once, with the checksum of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.length = self.crc32 = 0
        self.closed = False

    def write(self, data: Any) -> int:
        written = memoryview(data).cast("B")
        self.length += len(written)
        self.crc32 = zlib.crc32(written, self.crc32)
        return self._file.write(written)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self.length

    def close(self) -> None:
        """The file is closed by whoever opened it."""
        self.closed = True


def _together(tables: Mapping[str, pa.Table], schema: pa.Schema) -> pa.Table:
    """Several cells' rows in one table, with the column `cell` in front."""
    alike: dict[pa.Schema, dict[str, pa.Table]] = defaultdict(dict)
    for digest, table in tables.items():
        alike[table.schema.remove_metadata()][digest] = table.replace_schema_metadata()
    # What cells leave empty has a type that says nothing, so types are made equal before kinds of cells are put together.
    return pa.concat_tables([in_schema(_named(of_a_kind), with_cell(schema)) for of_a_kind in alike.values()])


def _named(tables: Mapping[str, pa.Table]) -> pa.Table:
    names = np.repeat([*tables], [len(table) for table in tables.values()])
    return pa.concat_tables(tables.values()).add_column(0, CELL, pa.array(names, pa.string()))
