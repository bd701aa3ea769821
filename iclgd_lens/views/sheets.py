"""Tables of numbers, and their forms: rich text for a terminal, Markdown, HTML, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tabulate import LATEX_ESCAPE_RULES, tabulate

from iclgd_lens.files import remove_named, write_text

LATEX_SIGNS = {
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "Δ": r"$\Delta$",
    "α": r"$\alpha$",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "√": r"$\surd$",
    "‖": r"$\|$",
}

P_VALUE, SMALLEST_P = ".4f", 0.0001
"""How p-values are written, and below which they only say so."""


@dataclass(frozen=True)
class Column:
    """A column as people see it.

    Attributes:
        header: What stands above it.
        value: The column of the numbers that is shown.
        spread: A column whose number follows after ±, where it is defined.
        low: With `high`, columns of an interval, shown in brackets where it is defined.
        high: See `low`.
        style: A format of Python's for numbers.
    """

    header: str
    value: str
    spread: str | None = None
    low: str | None = None
    high: str | None = None
    style: str = "+.3f"

    def shown(self, row: Any) -> str:
        """Write this column's cell of a row."""
        value = row[self.value]
        if _missing(value):
            return "–"
        if isinstance(value, str):
            return value
        if self.style == P_VALUE and value < SMALLEST_P:
            return f"< {SMALLEST_P}"
        text = f"{value:{self.style}}" if isinstance(value, float) else str(value)
        if self.spread and not _missing(row[self.spread]):
            text += f" ± {row[self.spread]:{self.style.lstrip('+')}}"
        if self.low and self.high and not _missing(row[self.low]) and not _missing(row[self.high]):
            text += f" [{row[self.low]:{self.style}}, {row[self.high]:{self.style}}]"
        return text.replace("-", "−")


def _missing(value: Any) -> bool:
    return value is None or value != value


@dataclass(frozen=True, eq=False)
class Sheet:
    """A table: numbers, and how they are shown.

    Attributes:
        name: What its files are called.
        title: What it is.
        numbers: One row per row, unrounded; the CSV form.
        columns: What people see of it.
        note: What must be known to read it.
    """

    name: str
    title: str
    numbers: pd.DataFrame
    columns: tuple[Column, ...]
    note: str = ""

    @property
    def headers(self) -> list[str]:
        """What stands above the columns."""
        return [column.header for column in self.columns]

    @property
    def cells(self) -> list[list[str]]:
        """What people see, row by row."""
        return [[column.shown(row) for column in self.columns] for row in self.numbers.to_dict("records")]

    def rich(self) -> Group:
        """The table for a terminal, with its note below and an empty line after."""
        # As text: a task's name may hold what the console reads as markup.
        table = Table(title=Text(self.title), title_justify="left", title_style="bold")
        table.box, table.show_edge, table.pad_edge, table.collapse_padding = box.SIMPLE_HEAD, False, False, True
        for index, column in enumerate(self.columns):
            text = index == 0 or (bool(len(self.numbers)) and isinstance(self.numbers[column.value].iloc[0], str))
            table.add_column(Text(column.header), justify="left" if text else "right", overflow="fold")
        for row in self.cells:
            table.add_row(*map(Text, row))
        # Not as the table's caption, which is folded to the width of the table.
        return Group(table, *([Text(self.note, "italic dim")] if self.note else []), "")

    def markdown(self) -> str:
        """The table as GitHub's Markdown, with its title and note."""
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in self.cells]
        body = tabulate(escaped, headers=self.headers, tablefmt="github", disable_numparse=True)
        return "\n\n".join(filter(None, [f"**{self.title}**", body, self.note])) + "\n"

    def html(self) -> str:
        """The table as HTML, with its title and note."""
        head = "".join(f"<th>{escape(header)}</th>" for header in self.headers)
        rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in self.cells]
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        note = f"<p class=note>{escape(self.note)}</p>" if self.note else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f"<section><h3>{escape(self.title)}</h3><div class=scroll>{table}</div>{note}</section>"

    def latex(self) -> str:
        """The table as a LaTeX `table` with `booktabs` rules, its title as the caption."""
        cells = self.cells or [[""] * len(self.columns)]  # which tells how many columns there are
        body = tabulate(cells, headers=self.headers, tablefmt="latex_booktabs", disable_numparse=True)
        caption = "".join(LATEX_ESCAPE_RULES.get(sign, sign) for sign in f"{self.title}. {self.note}".strip())
        whole = "\n".join([r"\begin{table}", r"\centering", body, rf"\caption{{{caption}}}", r"\end{table}"]) + "\n"
        for sign, command in LATEX_SIGNS.items():
            whole = whole.replace(sign, command)
        return whole

    def write(self, folder: Path) -> list[Path]:
        """Write the Markdown, LaTeX and CSV forms into a folder, and return their paths."""
        forms: dict[Literal["md", "tex", "csv"], str] = {
            "md": self.markdown(),
            "tex": self.latex(),
            "csv": self.numbers.to_csv(index=False),
        }
        paths = []
        for suffix, text in forms.items():
            path = folder / f"{self.name}.{suffix}"
            write_text(path, text)
            paths.append(path)
        return paths


def write_sheets(sheets: Iterable[Sheet], folder: Path, names: Iterable[str]) -> None:
    """Write tables in all forms, and remove those of such names (`*` stands for anything) that an earlier run left."""
    remove_named(folder, names)
    for sheet in sheets:
        sheet.write(folder)
