"""Packs change nothing but the time that reading takes: every row once, of the file that is there, whatever happens to either."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from iclgd_lens import Study, load_results, run_sweep
from iclgd_lens.experiments import packs, sweep_results
from iclgd_lens.experiments.cells import Cells
from iclgd_lens.experiments.grid import Grid
from iclgd_lens.experiments.sweep import Plan
from iclgd_lens.experiments.sweep_folder import SweepFolder
from tests.experiments.trivial_cells import Trivial


def study(**changes: Any) -> Study:
    small = {"models": "bundled", "tasks": "bundled/remapped", "seeds": [0], "k": 2, "lr": 0.1, "executor": {"kind": "debug"}}
    return Study(**{**small, **changes})


@pytest.fixture
def worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single cell that is in no pack is worth a new one."""
    monkeypatch.setattr(sweep_results, "WORTH_PACKING", 1)


def run(out: Path, name: str = "study", **changes: Any) -> list[Path]:
    run_sweep(study(**changes), out, name=name, maker=Trivial)
    return sorted(out.glob("cells/*/*.parquet"))


def packed(out: Path) -> set[str]:
    return set(SweepFolder(out).pack.stamps)


def test_few_cells_are_read_from_their_own_files(tmp_path):
    files = run(tmp_path)
    assert load_results(tmp_path).cells == len(files)
    assert not packed(tmp_path)


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_a_pack_holds_the_rows_of_the_files(tmp_path, monkeypatch, at_once):
    files = run(tmp_path, seeds=[0, 1, 2])
    plain = load_results(tmp_path).frame()
    monkeypatch.setattr(sweep_results, "WORTH_PACKING", 1)
    monkeypatch.setattr(packs, "_AT_ONCE", at_once)
    first, again = load_results(tmp_path), load_results(tmp_path)
    assert packed(tmp_path) == {file.stem for file in files}
    for results in (first, again):
        assert results.cells == len(files)
        by = ["value", "seed"]
        pd.testing.assert_frame_equal(results.frame().sort_values(by, ignore_index=True), plain.sort_values(by, ignore_index=True))
        assert results.dataset.count_rows() == len(plain)


@pytest.mark.usefixtures("worth_it")
def test_what_is_packed_is_read_from_the_pack_alone(tmp_path, monkeypatch):
    run(tmp_path)
    expected = load_results(tmp_path).frame()

    def refuse(self: Cells, digest: str) -> None:
        raise AssertionError(f"{digest} was read")

    monkeypatch.setattr(Cells, "check", refuse)
    monkeypatch.setattr(Cells, "table", refuse)
    pd.testing.assert_frame_equal(load_results(tmp_path).frame(), expected)
    assert not Plan.of(Grid.of(study()), SweepFolder(tmp_path)).open


@pytest.mark.usefixtures("worth_it")
def test_new_cells_come_in_and_each_row_is_there_once(tmp_path):
    run(tmp_path, seeds=[0])
    load_results(tmp_path)
    files = run(tmp_path, seeds=[0, 1])
    frame = load_results(tmp_path).frame()
    assert len(frame) == len(files)
    assert not frame.duplicated(["seed", "model", "method", "lr", "control"]).any()
    assert packed(tmp_path) == {file.stem for file in files}


def test_loose_and_packed_cells_are_read_together(tmp_path, monkeypatch):
    run(tmp_path, seeds=[0])
    with monkeypatch.context() as patched:
        patched.setattr(sweep_results, "WORTH_PACKING", 1)
        load_results(tmp_path)
    files = run(tmp_path, seeds=[0, 1])
    results = load_results(tmp_path)
    assert len(results.frame()) == results.cells == results.dataset.count_rows() == len(files)
    assert set(results.frame()["seed"]) == {0, 1}


@pytest.mark.usefixtures("worth_it")
def test_a_file_that_is_damaged_after_packing_is_reported_and_not_read(tmp_path):
    files = run(tmp_path)
    load_results(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:-50])
    results = load_results(tmp_path)
    assert set(results.damaged) == {files[0].stem}
    assert len(results.frame()) == results.cells == len(files) - 1
    assert Plan.of(Grid.of(study()), SweepFolder(tmp_path)).open == (files[0].stem,)


@pytest.mark.usefixtures("worth_it")
def test_a_cell_that_is_made_anew_after_packing_is_read_as_it_is_now(tmp_path):
    files = run(tmp_path)
    load_results(tmp_path)
    cells = SweepFolder(tmp_path).cells
    frame = cells.read(files[0].stem)["frame"]
    cells.write(files[0].stem, "the same", {"frame": frame.assign(value=-1.0)})
    found = load_results(tmp_path).frame()
    assert (found["value"] == -1.0).sum() == 1
    assert len(found) == len(files)  # and not as it was, too


@pytest.mark.usefixtures("worth_it")
def test_one_study_of_a_packed_folder_is_its_own_cells(tmp_path):
    run(tmp_path, "one", seeds=[0, 1])
    files = run(tmp_path, "other", seeds=[1, 2])
    assert len(load_results(tmp_path).frame()) == len(files)
    for name, seeds in {"one": {0, 1}, "other": {1, 2}}.items():
        results = load_results(tmp_path, name)
        assert set(results.frame()["seed"]) == seeds
        assert len(results.frame()) == results.cells == 2 * len(files) // 3


@pytest.mark.usefixtures("worth_it")
@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:60] + b"\0\0" + data[62:], lambda data: b""])
def test_a_damaged_pack_is_made_anew(tmp_path, caplog, damage):
    run(tmp_path)
    expected = load_results(tmp_path).frame()
    file = SweepFolder(tmp_path).pack.path
    file.write_bytes(damage(file.read_bytes()))
    pd.testing.assert_frame_equal(load_results(tmp_path).frame(), expected)
    assert "the pack of cells is" in caplog.text
    assert packed(tmp_path)


@pytest.mark.usefixtures("worth_it")
def test_where_nothing_can_be_written_cells_are_read_one_by_one(tmp_path, monkeypatch):
    files = run(tmp_path)

    @contextmanager
    def refuse(path: Path) -> Any:
        raise PermissionError(f"{path} is on a file system that is only to be read")
        yield

    monkeypatch.setattr(packs, "written_whole", refuse)
    results = load_results(tmp_path)
    assert len(results.frame()) == results.cells == len(files)
    assert not results.damaged


def test_a_pack_that_others_made_anew_since_doubles_no_rows(tmp_path, monkeypatch):
    run(tmp_path, seeds=[0])
    monkeypatch.setattr(sweep_results, "WORTH_PACKING", 1)
    load_results(tmp_path)
    files = run(tmp_path, seeds=[0, 1])
    monkeypatch.setattr(sweep_results, "WORTH_PACKING", 1000)
    results = load_results(tmp_path)  # half from the pack, half from files of their own
    monkeypatch.setattr(sweep_results, "WORTH_PACKING", 1)
    load_results(tmp_path)  # now the pack has all
    assert len(results.frame()) == len(files)


@pytest.mark.usefixtures("worth_it")
def test_a_cell_that_is_taken_away_while_others_are_packed_is_missing_and_not_damaged(tmp_path, monkeypatch):
    files = run(tmp_path)
    read = Cells.table

    def table(self: Cells, digest: str) -> Any:
        if digest == files[0].stem:
            files[0].unlink()
        return read(self, digest)

    monkeypatch.setattr(Cells, "table", table)
    results = load_results(tmp_path)
    assert not results.damaged
    assert len(results.frame()) == results.cells == len(files) - 1
    assert packed(tmp_path) == {file.stem for file in files[1:]}
