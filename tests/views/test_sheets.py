"""Cells as people see them, and tables in their four forms."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from iclgd_lens.views.sheets import P_VALUE, SMALLEST_P, Column, Sheet

NAN = float("nan")
NUMBERS = pd.DataFrame(
    {
        "task": ["a_b|c", "50% & #1 {x}"],
        "value": [-1 / 3, 2 / 3],
        "sd": [0.1234, NAN],
        "low": [-0.5, NAN],
        "high": [0.25, NAN],
        "draws": [3, 12],
    }
)
COLUMNS = (
    Column("task_name Δ", "task"),
    Column("mean ± sd", "value", spread="sd"),
    Column("LCGD − GD", "value", low="low", high="high"),
    Column("draws", "draws"),
)


def sheet(numbers: pd.DataFrame = NUMBERS, columns: Sequence[Column] = COLUMNS) -> Sheet:
    return Sheet("numbers", "All_of 100% α", numbers, tuple(columns), "Read me – √d_k ± Δ & so on")


@pytest.mark.parametrize(
    ("column", "row", "shown"),
    [
        (Column("h", "v"), {"v": None}, "–"),
        (Column("h", "v"), {"v": NAN}, "–"),
        (Column("h", "v", spread="s", low="l", high="h"), {"v": NAN, "s": 1.0, "l": 0.0, "h": 2.0}, "–"),
        (Column("h", "v"), {"v": "sst-2"}, "sst-2"),
        (Column("h", "v"), {"v": 1234}, "1234"),
        (Column("h", "v"), {"v": 0.12345}, "+0.123"),
        (Column("h", "v"), {"v": np.float64(0.12345)}, "+0.123"),
        (Column("h", "v"), {"v": -0.12345}, "−0.123"),
        (Column("h", "v", style=".1f"), {"v": 0.25}, "0.2"),
        (Column("h", "v", style="g"), {"v": 0.0005}, "0.0005"),
        (Column("h", "v", style="g"), {"v": 1e-05}, "1e−05"),
        (Column("h", "v", spread="s"), {"v": 0.5, "s": 0.0625}, "+0.500 ± 0.062"),
        (Column("h", "v", spread="s"), {"v": 0.5, "s": NAN}, "+0.500"),
        (Column("h", "v", low="l", high="h"), {"v": -0.5, "l": -0.75, "h": 0.25}, "−0.500 [−0.750, +0.250]"),
        (Column("h", "v", low="l", high="h"), {"v": 0.5, "l": NAN, "h": NAN}, "+0.500"),
        (Column("h", "v", "s", "l", "h"), {"v": 0.5, "s": 0.25, "l": 0.0, "h": 1.0}, "+0.500 ± 0.250 [+0.000, +1.000]"),
        (Column("h", "v", style=P_VALUE), {"v": 0.03125}, "0.0312"),
        (Column("h", "v", style=P_VALUE), {"v": SMALLEST_P}, "0.0001"),
        (Column("h", "v", style=P_VALUE), {"v": SMALLEST_P / 2}, "< 0.0001"),
    ],
)
def test_cells(column: Column, row: dict, shown: str):
    assert column.shown(row) == shown


def test_a_missing_whole_number_is_shown_as_missing():
    numbers = pd.DataFrame({"layer": pd.array([3, None], dtype="Int64")})
    assert sheet(numbers, [Column("layer", "layer")]).cells == [["3"], ["–"]]


def test_a_spread_or_interval_that_is_none_is_left_out():
    row = {"v": 0.5, "none": None}
    assert Column("h", "v", spread="none").shown(row) == "+0.500"
    assert Column("h", "v", low="none", high="none").shown(row) == "+0.500"


def test_every_form_shows_every_cell_and_header():
    made = sheet()
    console = Console(width=200, file=io.StringIO())
    console.print(made.rich())
    terminal = console.file.getvalue()
    cells = [cell for row in made.cells for cell in row]
    assert cells[:4] == ["a_b|c", "−0.333 ± 0.123", "−0.333 [−0.500, +0.250]", "3"]
    for text in [*cells, *made.headers, made.title, made.note]:
        assert text in terminal
        assert text.replace("|", r"\|") in made.markdown()


def test_text_is_left_justified_and_numbers_right_for_a_terminal():
    table = sheet().rich().renderables[0]
    assert [column.justify for column in table.columns] == ["left", "right", "right", "right"]
    assert table.row_count == 2


def test_a_table_without_rows_has_its_headers_in_every_form():
    empty = sheet(NUMBERS[:0])
    assert empty.cells == []
    assert empty.rich().renderables[0].row_count == 0
    assert all(header in empty.markdown() for header in empty.headers)
    assert "draws" in empty.latex()
    assert empty.numbers.to_csv(index=False).strip() == ",".join(NUMBERS.columns)


def test_brackets_in_a_cell_are_text_for_a_terminal():
    console = Console(width=80, file=io.StringIO())
    console.print(sheet(pd.DataFrame({"task": ["mine[red]", "[/b]"]}), [Column("task", "task")]).rich())
    assert "mine[red]" in console.file.getvalue()
    assert "[/b]" in console.file.getvalue()


def test_markdown_rows_have_as_many_cells_as_there_are_columns():
    table = [line for line in sheet().markdown().splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {len(COLUMNS) + 1}
    assert r"a_b\|c" in table[2]


def test_html_escapes_cells_headers_title_and_note():
    hostile = "<b>&"
    numbers = pd.DataFrame({"task": [hostile]})
    text = Sheet("numbers", hostile, numbers, (Column(hostile, "task"),), hostile).html()
    assert hostile not in text
    assert text.count("&lt;b&gt;&amp;") == 4


def test_a_sheet_without_a_note_has_none():
    bare = Sheet("numbers", "Title", NUMBERS, COLUMNS)
    assert bare.markdown().rstrip().endswith("|")
    assert r"\caption{Title.}" in bare.latex()
    console = Console(width=200, file=io.StringIO())
    console.print(bare.rich())
    assert console.file.getvalue().rstrip().endswith(" 12")


def test_latex_is_a_table_that_balances():
    text = sheet().latex()
    assert re.findall(r"\\(?:begin|end)\{\w+\}", text) == [
        r"\begin{table}",
        r"\begin{tabular}",
        r"\end{tabular}",
        r"\end{table}",
    ]
    assert len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1]) == len(COLUMNS)
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(lines) == 1 + len(NUMBERS)
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(COLUMNS) - 1}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0


def test_latex_escapes_what_has_a_meaning_there_and_writes_signs_as_commands():
    text = sheet().latex()
    assert text.isascii()
    for escaped in (r"a\_b|c", r"50\% \& \#1 \{x\}", r"task\_name $\Delta$", r"All\_of 100\% $\alpha$", r"$-$0.333 $\pm$ 0.123"):
        assert escaped in text
    assert r"Read me -- $\surd$d\_k $\pm$ $\Delta$ \& so on}" in text
    body = text.split(r"\midrule")[1]
    assert not re.search(r"(?<!\\)[_%#]", body)


def test_latex_of_no_rows_declares_its_columns():
    text = sheet(NUMBERS[:0]).latex()
    assert len(re.search(r"\\begin\{tabular\}\{(\w*)\}", text)[1]) == len(COLUMNS)


def test_written_files_are_the_three_forms_and_the_csv_holds_unrounded_numbers(tmp_path):
    made = sheet()
    paths = made.write(tmp_path / "new")
    assert [path.name for path in paths] == ["numbers.md", "numbers.tex", "numbers.csv"]
    assert sorted(entry.name for entry in (tmp_path / "new").iterdir()) == ["numbers.csv", "numbers.md", "numbers.tex"]
    assert paths[0].read_text(encoding="utf-8") == made.markdown()
    assert paths[1].read_text(encoding="utf-8") == made.latex()
    read = list(csv.DictReader(paths[2].read_text(encoding="utf-8").splitlines()))
    assert list(read[0]) == list(NUMBERS.columns)
    assert [row["task"] for row in read] == NUMBERS["task"].tolist()
    assert [float(row["value"]) for row in read] == NUMBERS["value"].tolist()
    assert [row["draws"] for row in read] == ["3", "12"]


def test_a_write_that_fails_leaves_the_old_files_whole(tmp_path, monkeypatch):
    old = sheet().write(tmp_path)
    before = [path.read_bytes() for path in old]
    monkeypatch.setattr("pathlib.Path.write_text", lambda self, text, encoding: self.write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sheet(NUMBERS[:1]).write(tmp_path)
    assert [path.read_bytes() for path in old] == before
    assert len(list(tmp_path.iterdir())) == 3
