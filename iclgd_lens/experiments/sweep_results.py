"""What sweeps found, read lazily: millions of rows stay on the disk until they are asked for.

found = load_results("sst2-sweep")
found.frame()                                                   # as `Comparison.frame`, of all cells
found.frame("per_query", pc.field("metric") == "sim_aou")       # only these rows are read
found.dataset.to_batches(columns=["task", "value"])             # or anything that pyarrow can do
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from iclgd_lens.experiments.cells import PART, Cells, DamagedCellError
from iclgd_lens.experiments.comparison import COLUMNS, TYPES
from iclgd_lens.experiments.packs import CELL, WORTH_PACKING, Pack, stamps_of, with_cell
from iclgd_lens.experiments.sweep_folder import SweepFolder

SOURCE = {
    "model_name": pa.string(),
    "dtype": pa.string(),
    "separator": pa.string(),
    "space_before_labels": pa.string(),
    "task": pa.string(),
    "k": pa.int64(),
    "seed": pa.int64(),
    "order": pa.int64(),
    "n_queries": pa.int64(),
    "loss_on": pa.string(),
    "readout": pa.string(),
    "schedule": pa.string(),
    "epochs": pa.int64(),
    "parameters": pa.string(),
    "model": pa.string(),
}
"""The columns that say where a row comes from, and their types."""

OWN = "the task's own"
"""What `separator` and `space_before_labels` say where a study leaves them as the task has them. The files of cells say nothing
then, since cells that were made before there were such options have neither column."""

_ARROW = {"float64": pa.float64(), "int64": pa.int64(), "Int64": pa.int64(), "bool": pa.bool_()}

_PARTS = ("frame", "queries", "gradients", "heads", "per_query")
"""The frames of a comparison that cells have; an update that diverged has no cell."""

log = logging.getLogger(__name__)


def _schema() -> pa.Schema:
    types: dict[str, pa.DataType] = {PART: pa.string(), **SOURCE}
    for part in _PARTS:
        types |= {name: _ARROW[TYPES[part][name]] if name in TYPES[part] else pa.string() for name in COLUMNS[part]}
    return pa.schema(types)


@dataclass(frozen=True, eq=False)
class SweepResults:
    """The cells of a folder.

    Attributes:
        dataset: Every row of every cell; the column `part` says which frame it is of, and columns that this does not have are null.
            The column `cell` is null where a cell is read from its own file.
        cells: How many cells there are.
        damaged: Why files could not be read, by the digests of their cells; they are left out.
    """

    dataset: ds.Dataset
    cells: int
    damaged: Mapping[str, str]

    def frame(self, part: str = "frame", where: pc.Expression | None = None) -> pd.DataFrame:
        """Read a frame of all cells, or those rows of it that are wanted.

        Args:
            part: Which of the frames of `Comparison`; `problems` are in the folder's failures.
            where: A condition on its columns.

        Returns:
            Its rows, with the columns `model_name`, `dtype`, `separator` and `space_before_labels` in front, sorted by where they
            come from. The last two say `OWN`, or what a study wrote otherwise: a text in double quotes, and yes or no.

        Raises:
            ValueError: If there is no such frame.
        """
        if part not in _PARTS:
            raise ValueError(f"part must be one of {', '.join(_PARTS)}; got {part!r}")
        wanted = pc.field(PART) == part
        table = self.dataset.to_table([*SOURCE, *COLUMNS[part]], filter=wanted if where is None else wanted & where)
        frame = table.to_pandas().astype(TYPES[part]).fillna({"separator": OWN, "space_before_labels": OWN})
        # In the order of the grid and not of the file names, which are digests.
        return frame.sort_values(list(SOURCE), kind="stable", ignore_index=True)


def load_results(folder: str | Path, study: str | None = None) -> SweepResults:
    """Open the cells of a sweep's folder.

    Args:
        folder: The folder.
        study: Of which study; by default of all that the folder holds. Cells that an option was changed for since belong to none.

    Raises:
        FileNotFoundError: If it is not the folder of a sweep.
        ValueError: If there is no such study, or its file is damaged.
    """
    place = SweepFolder(Path(folder))
    studies = place.studies()
    if study is not None and study not in studies:
        raise ValueError(f"{folder} holds no study {study!r}; it holds {', '.join(studies)}")
    everything = {digest for each in studies.values() for digest in each["cells"]}
    wanted = everything if study is None else set(studies[study]["cells"])

    pack, stamps = place.pack, stamps_of(place.cells, everything)
    damaged: dict[str, str] = {}
    loose = stamps.keys() - pack.holds(stamps)
    if len(loose) >= WORTH_PACKING:
        try:
            pack, damaged = pack.extended(place.cells, stamps, _schema())
            loose = set()
        except OSError as error:  # a folder that is only to be read
            log.info("%s cannot be written (%s): its cells are read one by one", pack.path, error)
    whole, refused = _checked(place.cells, sorted(loose & wanted))
    damaged = {digest: reason for digest, reason in (damaged | refused).items() if digest in wanted}
    for reason in damaged.values():
        log.warning("%s; it is left out", reason)
    packed = sorted(pack.holds(stamps) & wanted)
    return SweepResults(_dataset(place.cells, whole, pack, packed), len(whole) + len(packed), damaged)


def _checked(cells: Cells, digests: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those cells whose files are whole, and why others are not."""

    def check(digest: str) -> tuple[bool, str]:
        try:
            return cells.check(digest), ""
        except DamagedCellError as error:
            return False, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = dict(zip(digests, pool.map(check, digests, chunksize=64), strict=True))
    whole = [digest for digest, (there, _) in checked.items() if there]
    return whole, {digest: reason for digest, (_, reason) in checked.items() if reason}


def _dataset(cells: Cells, loose: Sequence[str], pack: Pack, packed: Sequence[str]) -> ds.Dataset:
    """The rows of files of their own and of a pack; of this, whoever may have written it anew since, those cells alone."""
    schema = _schema()
    parts = []
    if loose:
        parts.append(ds.dataset([str(cells.path(digest)) for digest in loose], schema=with_cell(schema), format="parquet"))
    if packed:
        parts.append(pack.rows(schema))
    if not parts:
        return ds.dataset(with_cell(schema).empty_table())
    return ds.dataset(parts).filter(pc.field(CELL).is_null() | pc.field(CELL).isin(pa.array(packed, pa.string())))
