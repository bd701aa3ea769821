"""Benchmarks as a frame, a table and a command."""

import dataclasses

import pandas as pd
import pytest

from iclgd_lens.benchmarks import run as bench_run
from iclgd_lens.benchmarks.jobs import JOBS, Setting
from iclgd_lens.benchmarks.models import Sizes
from iclgd_lens.benchmarks.run import DisagreementError, benchmark_table, run_benchmarks
from tests.models_zoo import make_model, require_hooked_transformer
from tests.test_cli import run


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.of("three layers", make_model(), Sizes(k=3, demonstration=8, queries=3, query=6))


@pytest.mark.slow
def test_every_job_has_a_row_and_is_shown(setting):
    begun: list[str] = []
    frame = run_benchmarks(setting, repeats=1, on_job=begun.append)
    assert list(frame["job"]) == begun == list(JOBS)
    assert (frame["error"] < 1e-4).all()
    shown = benchmark_table(frame).markdown()
    assert all(name in shown for name in JOBS)
    assert "three layers" in shown


def test_what_disagrees_is_not_timed(setting, monkeypatch):
    def prepare(of):
        work = JOBS["gd"].prepare(of)
        return dataclasses.replace(work, error=lambda: 0.01, ours=lambda: pytest.fail("timed"))

    monkeypatch.setattr(bench_run, "JOBS", {"wrong": dataclasses.replace(JOBS["gd"], prepare=prepare)})
    with pytest.raises(DisagreementError, match=r"wrong: results differ from the naive path's by 1\.0e-02"):
        run_benchmarks(setting, ["wrong"], repeats=1)


def test_an_unknown_job_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=r"icl-capture.*got 'speed'"):
        run_benchmarks(setting, ["speed"])


def test_the_command_prints_a_table_and_writes_the_frame(tmp_path):
    require_hooked_transformer()
    out = tmp_path / "results.parquet"
    sizes = ["--k", "3", "--demonstration", "8", "--queries", "3", "--query", "6"]
    command = ["bench", "--model", "bundled", "--job", "gd", "--job", "ft-capture", "--repeats", "1", "--device", "cpu", *sizes]
    result = run(*command, "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "ft-capture" in result.output
    assert list(pd.read_parquet(out)["job"]) == ["gd", "ft-capture"]


def test_shapes_for_a_gpu_say_so_where_there_is_none(tmp_path):
    result = run("bench", "--model", "gpt2-xl", "--device", "cpu", "--out", str(tmp_path / "none.parquet"))
    assert result.exit_code == 0
    assert "gpt2-xl: no GPU" in result.output
    assert not list(tmp_path.iterdir())
