"""Rows of a task: read from files, checked one by one, turned into examples. What is wrong with a row is said with its number."""

from __future__ import annotations

import csv
import datetime
import io
import json
import reprlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Number
from pathlib import Path
from typing import Any

import pandas as pd

from iclgd_lens.checks import in_order
from iclgd_lens.data.formats import PromptFormat, require_text

Labels = Mapping[Any, str] | Iterable[str]
"""The label word of every value of the label column: by value, or in the order of the values 0, 1, …."""


@dataclass(frozen=True)
class Example:
    """A row of a task: its text fields by name, and its class index."""

    fields: dict[str, str]
    label: int


def label_table(labels: Labels) -> dict[Any, str]:
    """Take label words once, by the values that they stand for; their order gives the class indices.

    Raises:
        ValueError: If they have no order, as those of a set, there are none, or two values are written alike, as 1 and "1" are.
    """
    by_value = labels.items() if isinstance(labels, Mapping | pd.Series) else enumerate(in_order("labels", labels))
    pairs = [(_plain(value), word) for value, word in by_value]
    if not pairs:
        raise ValueError("labels must be at least one word; got none")
    written: dict[str, Any] = {}
    for value, _ in pairs:
        for spelling in _spellings(value):
            if spelling in written:
                raise ValueError(f"labels names {written[spelling]!r} and {value!r}, which a row may write alike; name one of them")
        written |= dict.fromkeys(_spellings(value), value)
    return dict(pairs)


def checked_examples(
    rows: Iterable[Mapping[str, Any]], source: str, prompt_format: PromptFormat, table: dict[Any, str], label_column: str
) -> list[Example]:
    """Check rows one by one and turn them into examples.

    Args:
        rows: Each maps column names to values.
        source: What messages call the rows.
        prompt_format: Names the text columns.
        table: The label word of every value of the label column; its order gives the class indices.
        label_column: Which column holds the label.

    Raises:
        ValueError: If a row is no mapping, lacks a column or a value, has an unknown label, a text that is empty, has half of a
            character or is no text, as a list of words, there are no rows, or a label word is no text.
    """
    for value, word in table.items():
        require_text(word, f"the label word of {value!r}")
    # By text, since a CSV file has no numbers: its "1" is the label 1.
    class_of = {spelling: index for index, value in enumerate(table) for spelling in _spellings(value)}
    examples = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{source}, row {number} must map column names to values; got {type(row).__name__} {_shown(row)}")
        if None in row:  # where a reader of CSV puts what has no header
            raise ValueError(f"{source}, row {number}: more values than the header has columns; quote texts that hold commas")
        for column in (*prompt_format.fields, label_column):
            if column not in row:
                raise ValueError(f"{source}, row {number}: no column {column!r}; it has {', '.join(map(str, row))}")
            value = _plain(row[column])
            if pd.api.types.is_scalar(value) and pd.isna(value):  # NaN among them, as tables write what is missing
                raise ValueError(f"{source}, row {number}: the value in column {column!r} is missing")
        fields = {
            column: _as_text(_plain(row[column]), f"{source}, row {number}: the text in column {column!r}")
            for column in prompt_format.fields
        }
        value = _plain(row[label_column])
        label = next((class_of[spelling] for spelling in _spellings(value) if spelling in class_of), None)
        if label is None:
            unlabelled = "; -1 marks rows without a label, as in many test splits: take a split with labels" if value == -1 else ""
            raise ValueError(
                f"{source}, row {number}: unknown label {_shown(value)} in column {label_column!r}; "
                f"known: {', '.join(map(repr, table))}{unlabelled}"
            )
        examples.append(Example(fields, label))
    if not examples:
        raise ValueError(f"{source} has no rows")
    return examples


def _plain(value: Any) -> Any:
    """What is in a NumPy scalar or a tensor without dimensions; other values as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _shown(value: object) -> str:
    return reprlib.repr(value)


def _as_text(value: Any, what: str) -> str:
    """A text, or a number or date as text.

    Raises:
        ValueError: If it is of another kind, whose Python code would stand in the prompt, or empty, or holds half of a character.
    """
    if not isinstance(value, str | Number | datetime.date | datetime.time):
        advice = "; join its parts to one text, as with ' '.join" if isinstance(value, list | tuple) else ""
        advice = "; decode it, as with .decode()" if isinstance(value, bytes) else advice
        raise ValueError(f"{what} must be text, got {type(value).__name__} {_shown(value)}{advice}")
    text = str(value).strip()
    if not text:
        raise ValueError(f"{what} is empty")
    require_text(text, what)
    return text


def _spellings(value: Any) -> list[str]:
    """How files and tables write a label's value: 1 is also written 1.0 where a column was read as floats, or as true."""
    if isinstance(value, bool):
        return [str(value), str(value).lower(), str(value).upper(), str(int(value))]
    if isinstance(value, Integral):
        return [str(int(value)), f"{int(value)}.0"]
    if isinstance(value, float) and value.is_integer():
        return [str(value), str(int(value))]
    if isinstance(value, str):
        return [value.strip()]
    return [] if isinstance(value, bytes | Collection) else [str(value)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read; save it as UTF-8") from error


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read a CSV file with a header line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8 or not CSV.
    """
    try:
        return list(csv.DictReader(io.StringIO(_read_text(path), newline="")))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as CSV: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line; empty lines are passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8, or a line is not a JSON object.
    """
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows
