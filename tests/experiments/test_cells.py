"""Cells are made once, told apart by everything that determines them, and never half there."""

import logging

import pandas as pd
import pytest

from iclgd_lens.experiments import cells
from iclgd_lens.experiments.cells import cell, cell_stem

PARTS = ("frame", "queries")


def frames(value: float = 1.0) -> dict[str, pd.DataFrame]:
    return {"frame": pd.DataFrame({"value": [value]}), "queries": pd.DataFrame({"query": [0]})}


def refuse() -> dict[str, pd.DataFrame]:
    raise AssertionError("this cell was there already")


def test_a_cell_is_made_once(tmp_path):
    made = cell(tmp_path, "a b/c", {"lr": 0.1}, PARTS, frames)
    again = cell(tmp_path, "a b/c", {"lr": 0.1}, PARTS, refuse)
    assert made["frame"].equals(again["frame"])
    assert made["queries"].equals(again["queries"])


@pytest.mark.parametrize("key", [{"lr": 0.2}, {"lr": 0.1, "k": 1}, {}])
def test_another_key_is_another_cell(tmp_path, key):
    cell(tmp_path, "a", {"lr": 0.1}, PARTS, frames)
    assert cell(tmp_path, "a", key, PARTS, lambda: frames(2.0))["frame"]["value"].tolist() == [2.0]


def test_keys_in_any_order_are_one_cell_and_formats_are_not(monkeypatch):
    first = cell_stem("a", {"x": 1, "y": 2})
    assert cell_stem("a", {"y": 2, "x": 1}) == first
    monkeypatch.setattr(cells, "RESULTS_FORMAT", cells.RESULTS_FORMAT + 1)
    assert cell_stem("a", {"x": 1, "y": 2}) != first


def test_names_become_file_names(tmp_path):
    cell(tmp_path, "bundled/remapped, seed 0", {}, PARTS, frames)
    assert all(path.name.startswith("bundled-remapped-seed-0-") for path in tmp_path.iterdir())


def test_a_cell_that_was_stopped_between_its_files_is_made_anew(tmp_path, monkeypatch):
    written = cells.write_frame

    def stopped_before_the_last(frame, path):
        if ".frame." in path.name:
            raise KeyboardInterrupt
        return written(frame, path)

    monkeypatch.setattr(cells, "write_frame", stopped_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        cell(tmp_path, "a", {}, PARTS, frames)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(cells, "write_frame", written)
    assert cell(tmp_path, "a", {}, PARTS, lambda: frames(3.0))["frame"]["value"].tolist() == [3.0]


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not a table"])
@pytest.mark.parametrize("part", PARTS)
def test_a_file_that_cannot_be_read_is_said_and_made_anew(tmp_path, caplog, damage, part):
    cell(tmp_path, "a", {}, PARTS, frames)
    (file,) = tmp_path.glob(f"*.{part}.parquet")
    file.write_bytes(damage(file.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cell(tmp_path, "a", {}, PARTS, lambda: frames(4.0))["frame"]["value"].tolist() == [4.0]
    assert "cannot be read" in caplog.text


def test_a_part_that_is_missing_is_made_anew(tmp_path):
    cell(tmp_path, "a", {}, PARTS, frames)
    (file,) = tmp_path.glob("*.queries.parquet")
    file.unlink()
    assert cell(tmp_path, "a", {}, PARTS, lambda: frames(5.0))["frame"]["value"].tolist() == [5.0]
