"""Rows of a task: read from files, checked one by one, turned into examples. What is wrong with a row is said with its number."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_lens.data.prompts import PromptFormat, require_text


@dataclass(frozen=True)
class Example:
    """A row of a task: its text fields by name, and its class index."""

    fields: dict[str, str]
    label: int


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
        ValueError: If a row lacks a column or a value, has an unknown label, an empty text or one with half of a character, there
            are no rows, or a label word is no text.
    """
    for value, word in table.items():
        require_text(word, f"the label word of {value!r}")
    # By text, since a CSV file has no numbers: its "1" is the label 1.
    class_of = {str(value): index for index, value in enumerate(table)}
    class_of |= {str(value).lower(): index for index, value in enumerate(table) if isinstance(value, bool)}
    examples = []
    for number, row in enumerate(rows, start=1):
        if None in row:  # where a reader of CSV puts what has no header
            raise ValueError(f"{source}, row {number}: more values than the header has columns; quote texts that hold commas")
        for column in (*prompt_format.fields, label_column):
            if column not in row:
                raise ValueError(f"{source}, row {number}: no column {column!r}; it has {', '.join(map(str, row))}")
            if row[column] is None or row[column] != row[column]:  # NaN, as tables write what is missing
                raise ValueError(f"{source}, row {number}: the value in column {column!r} is missing")
        fields = {column: str(row[column]).strip() for column in prompt_format.fields}
        empty = [column for column, text in fields.items() if not text]
        if empty:
            raise ValueError(f"{source}, row {number}: the text in column {empty[0]!r} is empty")
        for column, text in fields.items():
            require_text(text, f"{source}, row {number}: the text in column {column!r}")
        label = class_of.get(str(row[label_column]).strip())
        if label is None:
            raise ValueError(
                f"{source}, row {number}: unknown label {row[label_column]!r} in column {label_column!r}; "
                f"known: {', '.join(map(repr, table))}"
            )
        examples.append(Example(fields, label))
    if not examples:
        raise ValueError(f"{source} has no rows")
    return examples


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
