"""Cells are made once, told apart by everything that determines them, and never half there."""

import logging

import pandas as pd
import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from iclgd_lens.experiments import cells as module
from iclgd_lens.experiments.cells import Cells, DamagedCellError, cell, cell_digest


def frames(value: float = 1.0) -> dict[str, pd.DataFrame]:
    frame = pd.DataFrame({"value": [value, None], "layer": pd.array([1, None], dtype="Int64"), "n": [3, 4], "word": ["a", None]})
    return {"frame": frame, "queries": pd.DataFrame({"query": [0], "is_gold": [True]}), "problems": pd.DataFrame({"problem": []})}


def refuse() -> dict[str, pd.DataFrame]:
    raise AssertionError("this cell was there already")


@pytest.fixture
def cells(tmp_path) -> Cells:
    return Cells(tmp_path)


def test_a_cell_is_made_once_and_read_as_it_was_made(cells):
    made = cell(cells, {"lr": 0.1}, "a b/c", frames)
    again = cell(cells, {"lr": 0.1}, "a b/c", refuse)
    assert list(again) == list(made)
    for name, frame in made.items():
        assert_frame_equal(again[name], frame, check_dtype=len(frame) > 0)


@pytest.mark.parametrize("key", [{"lr": 0.2}, {"lr": 0.1, "k": 1}, {}])
def test_another_key_is_another_cell(cells, key):
    cell(cells, {"lr": 0.1}, "a", frames)
    assert cell(cells, key, "a", lambda: frames(2.0))["frame"]["value"][0] == 2.0


def test_keys_in_any_order_are_one_cell_and_formats_are_not(monkeypatch):
    first = cell_digest({"x": 1, "y": 2})
    assert cell_digest({"y": 2, "x": 1}) == first
    monkeypatch.setattr(module, "RESULTS_FORMAT", module.RESULTS_FORMAT + 1)
    assert cell_digest({"x": 1, "y": 2}) != first


def test_a_cell_is_one_file_that_others_can_read_too(cells):
    cells.write("ab12", "seed 0", frames())
    (file,) = cells.folder.rglob("*.*")
    assert file == cells.path("ab12")
    table = pq.read_table(file)
    assert table["part"].to_pylist() == ["frame", "frame", "queries"]
    assert table["query"].to_pylist() == [None, None, 0]


def test_a_cell_whose_writing_was_stopped_is_not_there(cells, monkeypatch):
    def stopped(self, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.Path, "write_bytes", stopped)
    with pytest.raises(KeyboardInterrupt):
        cells.write("ab12", "a", frames())
    assert not cells.check("ab12")
    assert not [path for path in cells.folder.rglob("*") if path.is_file()]


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[1:],
        lambda data: b"",
        lambda data: b"not a table",
        lambda data: b"PAR1" + data,
        lambda data: flip(data, 100),
        lambda data: flip(data, 0),
        lambda data: data + b"more",
    ],
    ids=["half", "end cut", "start cut", "empty", "text", "put before", "bit flipped", "first bit", "put behind"],
)
def test_a_damaged_file_is_said_and_made_anew(cells, caplog, damage):
    cell(cells, {}, "a", frames)
    file = cells.path(cell_digest({}))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedCellError):
        cells.check(cell_digest({}))
    with caplog.at_level(logging.WARNING):
        assert cell(cells, {}, "a", lambda: frames(4.0))["frame"]["value"][0] == 4.0
    assert "is made anew" in caplog.text
    assert cells.check(cell_digest({}))


def test_a_file_of_another_cell_or_another_program_is_not_read(cells, tmp_path):
    cells.write("ab12", "a", frames())
    other = cells.path("ab34")
    other.write_bytes(cells.path("ab12").read_bytes())
    with pytest.raises(DamagedCellError, match="holds another cell, ab12"):
        cells.check("ab34")
    pd.DataFrame({"value": [1.0]}).to_parquet(other)
    with pytest.raises(DamagedCellError, match="none of ours"):
        cells.read("ab34")


def test_a_file_of_another_format_is_not_read(cells, monkeypatch):
    cells.write("ab12", "a", frames())
    monkeypatch.setattr(module, "RESULTS_FORMAT", module.RESULTS_FORMAT + 1)
    with pytest.raises(DamagedCellError, match="in format"):
        cells.read("ab12")
