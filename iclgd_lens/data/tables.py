"""Rows in whatever they come: mappings, data frames, Arrow tables, data sets in any of their formats. They are read once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import datasets
import pandas as pd
import pyarrow as pa

Row = Mapping[str, Any]

Rows: TypeAlias = Iterable[Row] | pd.DataFrame | pa.Table | datasets.Dataset | datasets.IterableDataset


def rows_of(given: Rows, source: str, columns: Sequence[str], label_column: str, values: Collection[Any]) -> Iterable[Row]:
    """Read rows as mappings from column names to values.

    Args:
        given: The rows. Of other kinds of tables, those are known that offer themselves as an Arrow stream.
        source: What messages call them.
        columns: The columns that are wanted; rows may have more.
        label_column: Which of them holds the label.
        values: The values of the label column that a task knows. Where the column is a `ClassLabel` and all of these are its names,
            its numbers are given as names.

    Raises:
        ValueError: If a table lacks a wanted column, or has one twice.
        TypeError: If rows cannot be read from what is given.
    """
    if isinstance(given, datasets.Dataset):
        return _named(_of_dataset(given, source, columns), given, label_column, values)
    if isinstance(given, datasets.IterableDataset):
        return _named(given.with_format(None), given, label_column, values)
    if isinstance(given, pd.DataFrame):
        _require_columns(list(given.columns), source, columns)
        return given[list(dict.fromkeys(columns))].to_dict("records")
    if hasattr(given, "__arrow_c_stream__"):
        table = pa.table(given)
        _require_columns(table.column_names, source, columns)
        return table.select(list(dict.fromkeys(columns))).to_pylist()
    if isinstance(given, Mapping):
        splits = isinstance(given, datasets.DatasetDict | datasets.IterableDatasetDict)
        advice = f"choose one of its splits: {', '.join(given)}" if splits else "for one of columns give pandas.DataFrame(rows)"
        raise TypeError(f"rows must be one mapping for each row, got {type(given).__name__}; {advice}")
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise TypeError(f"rows must be one mapping for each row, got {given!r}; a file is read by Task.from_csv or Task.from_jsonl")
    return map(_as_mapping, given)


def _as_mapping(row: Any) -> Any:
    """A row of a data frame as a mapping; other rows as they are."""
    return row.to_dict() if isinstance(row, pd.Series) else row


def _of_dataset(dataset: datasets.Dataset, source: str, columns: Sequence[str]) -> Iterable[Row]:
    if dataset.format["type"] == "custom":  # a transform, which makes the columns when it is read
        return dataset
    _require_columns(dataset.column_names, source, columns)
    return dataset.select_columns(list(dict.fromkeys(columns))).with_format("arrow")[:].to_pylist()


def _named(
    rows: Iterable[Row], dataset: datasets.Dataset | datasets.IterableDataset, label_column: str, values: Collection[Any]
) -> Iterable[Row]:
    """The rows, with the label's name in the place of its number where a task knows labels by their names."""
    feature = (dataset.features or {}).get(label_column)
    if not isinstance(feature, datasets.ClassLabel) or not set(values) <= set(feature.names):
        return rows

    def named(row: Row) -> Iterator[tuple[str, Any]]:
        for column, value in row.items():
            known = column == label_column and isinstance(value, int) and 0 <= value < len(feature.names)
            yield column, feature.names[value] if known else value

    return (dict(named(row)) for row in rows)


def _require_columns(have: Sequence[Any], source: str, wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in have:
            raise ValueError(f"{source}: no column {column!r}; it has {', '.join(map(str, have))}")
        if have.count(column) > 1:
            raise ValueError(f"{source} has {have.count(column)} columns {column!r}; rename all but one")
