"""Data sets that tasks are made of, from the hub or from a folder of files with the same columns.

A folder holds one folder per task, and in it one file per split, as in `sst2/train.csv` and `sst2/validation.csv`; `.csv`, `.jsonl`
and `.parquet` are read. It is given as `data=`, or in the environment variable `ICLGD_DATA`; without either the hub is asked, whose
files `datasets` keeps in its cache and finds there again without a connection.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from iclgd_lens import hub
from iclgd_lens.data.formats import PromptFormat
from iclgd_lens.data.rows import Labels, read_csv, read_jsonl
from iclgd_lens.data.tasks import Task

DATA_VARIABLE = "ICLGD_DATA"

CONVERTED = "refs/convert/parquet"
"""Where the hub keeps the tables of data sets whose own files are a loading script, which `datasets` no longer runs."""


@dataclass(frozen=True)
class Source:
    """A data set and how a task is made of it.

    Attributes:
        path: Its canonical name on the hub.
        template: The prompt, with column names in braces.
        labels: The label word of every value of the label column.
        config: Which of its configurations.
        label_column: Which column holds the label.
        train: The split that demonstrations come from.
        queries: The split that queries come from.
    """

    path: str
    template: str
    labels: Labels
    config: str | None = None
    label_column: str = "label"
    train: str = "train"
    queries: str = "validation"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return (*PromptFormat(self.template).fields, self.label_column)

    def task(self, name: str, data: str | Path | None = None) -> Task:
        """Load the data set and make a task of it.

        Args:
            name: The task's name, and that of its folder under `data`.
            data: A folder of local files; by default that in `ICLGD_DATA`, or else the hub.

        Raises:
            OSError: If the folder or a file in it is missing, or the hub can neither be reached nor has been before.
            ValueError: If a file cannot be read, lacks a column or has an unknown label (the message names file, row and column).
        """
        folder = data or os.environ.get(DATA_VARIABLE)
        read = self._read_hub if not folder else lambda split: _read_file(name, Path(folder), split)
        (rows, source), (query_rows, query_source) = read(self.train), read(self.queries)
        return Task.from_rows(
            rows,
            name=name,
            template=self.template,
            labels=self.labels,
            label_column=self.label_column,
            query_rows=query_rows,
            sources=(source, query_source),
        )

    def _read_hub(self, split: str) -> tuple[list[dict[str, Any]], str]:
        what = f"{self.path} ({self.config})" if self.config else self.path
        instead = (
            f"put the splits {self.train!r} and {self.queries!r}, with the columns {', '.join(self.columns)}, into files such as "
            f"DIR/TASK/{self.train}.csv and pass DIR as --data, as data= or in {DATA_VARIABLE}."
        )
        with hub.asked(f"the data set {what}", instead):
            table = self._load(split)
        missing = [column for column in self.columns if column not in table.column_names]
        if missing:
            raise ValueError(f"{what}, {split}: no column {missing[0]!r}; it has {', '.join(table.column_names)}")
        return table.select_columns(list(self.columns)).with_format("arrow")[:].to_pylist(), f"{what}, {split}"

    def _load(self, split: str) -> datasets.Dataset:
        try:
            return datasets.load_dataset(self.path, self.config, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            return datasets.load_dataset(self.path, self.config, split=split, revision=CONVERTED)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path).to_pylist()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error


_READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": _read_parquet}


def _read_file(name: str, folder: Path, split: str) -> tuple[list[dict[str, Any]], str]:
    if not folder.is_dir():
        raise NotADirectoryError(f"the data folder {folder} is not there")
    base = folder / name
    found = [base / f"{split}{suffix}" for suffix in _READERS if (base / f"{split}{suffix}").is_file()]
    if not found:
        wanted = " or ".join(f"{split}{suffix}" for suffix in _READERS)
        raise FileNotFoundError(f"task {name!r} needs {wanted} in {base}, which {_contents(base)}")
    if len(found) > 1:
        raise ValueError(f"{base} holds {' and '.join(path.name for path in found)}; keep one of them")
    return _READERS[found[0].suffix](found[0]), str(found[0])


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "is not there"
    return f"holds {', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}"
