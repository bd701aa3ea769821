"""Commands in a folder that may not be written, by somebody without a home: they say so at once, or write where they are told."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.unprivileged import ROOT, require_permissions_hold, run_unprivileged

COMMAND = "from iclgd_lens.cli import app; app()"
STUDY = str(ROOT / "docs" / "studies" / "laptop.yaml")
TINY = """
models: bundled
tasks: bundled/remapped
seeds: [0, 1]
k: 3
queries: 4
lr: 0.1
executor: {kind: debug}
"""

DEFAULT_PLACES = {
    "demo": ([], "iclgd-demo/frame.parquet"),
    "kernels": ([], "iclgd-kernels/frame.parquet"),
    "reproduce": ([], "iclgd-reproduce/frame.parquet"),
    "sweep": ([STUDY], "laptop-sweep/studies/laptop.json"),
    "bench": ([], "iclgd-bench.parquet"),
    "train-bundled": ([], "bundled.safetensors"),
}
"""Every command that writes where it stands if it is not told, its arguments, and what it writes there."""


@pytest.fixture
def read_only(tmp_path) -> Path:
    folder = tmp_path / "read only"
    folder.mkdir()
    folder.chmod(0o555)
    require_permissions_hold(folder)
    return folder


@pytest.mark.parametrize("command", list(DEFAULT_PLACES))
def test_what_cannot_be_written_is_said_in_one_line_before_anything_is_loaded(read_only, command):
    arguments, written = DEFAULT_PLACES[command]
    script = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {COMMAND}"
    found = run_unprivileged("-c", script, command, *arguments, folder=read_only, home=None)
    advice = "give a place that can be written with --out"
    assert found.stderr == f"error: cannot write {written}: no permission to write in {read_only}; {advice}\n"
    assert found.stdout == "False\n"
    assert found.returncode == 2


def test_a_place_in_a_folder_that_may_not_be_looked_into_is_refused_in_the_same_way(read_only, tmp_path):
    hidden = tmp_path / "hidden"
    (hidden / "there").mkdir(parents=True)
    hidden.chmod(0)
    found = run_unprivileged("-c", COMMAND, "demo", "--out", str(hidden / "there"), folder=tmp_path, home=None)
    hidden.chmod(0o755)
    assert f"cannot write {hidden / 'there' / 'frame.parquet'}: no permission to write in {hidden}; give" in found.stderr
    assert found.returncode == 2


def test_a_report_that_cannot_be_written_is_said_before_it_is_made(read_only):
    found = run_unprivileged("-c", COMMAND, "report", str(read_only), folder=read_only, home=None)
    advice = "copy the folder to a place that can be written, and write its report there"
    assert found.stderr == f"error: cannot write {read_only}/report.html: no permission to write in {read_only}; {advice}\n"
    assert found.returncode == 2


def succeed(read_only: Path, *arguments: str) -> None:
    home = str(read_only / "home")  # which is not there, and cannot be made
    found = run_unprivileged("-c", COMMAND, *arguments, folder=read_only, home=home)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "Traceback" not in found.stderr
    assert not list(read_only.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--episodes", "1", "--k", "3", "--queries", "4"),
        ("kernels", "--episodes", "1", "--k", "3", "--queries", "4", "--no-twins"),
        (
            "reproduce",
            *("--task", "bundled/remapped", "--seed", "0", "--k", "3", "--queries", "4", "--lr", "0.1", "--orders", "1"),
            *("--control", "none", "--no-twins", "--no-pictures"),
        ),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_run_that_is_told_where_needs_neither_a_home_nor_the_folder_that_it_stands_in(read_only, tmp_path, arguments):
    out = tmp_path / "out"
    succeed(read_only, *arguments, "--out", str(out))
    assert len(pd.read_parquet(out / "frame.parquet"))
    (out / "report.html").unlink()
    succeed(read_only, "report", str(out))
    assert (out / "report.html").stat().st_size > 1e6


@pytest.mark.slow
def test_a_sweep_that_is_told_where_needs_neither_a_home_nor_the_folder_that_it_stands_in(read_only, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    succeed(read_only, "sweep", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_benchmark_that_is_told_where_needs_neither_a_home_nor_the_folder_that_it_stands_in(read_only, tmp_path):
    sizes = ("--k", "2", "--demonstration", "4", "--queries", "2", "--query", "3", "--repeats", "1")
    succeed(read_only, "bench", "--model", "bundled", *sizes, "--out", str(tmp_path / "out.parquet"))
    assert len(pd.read_parquet(tmp_path / "out.parquet"))
