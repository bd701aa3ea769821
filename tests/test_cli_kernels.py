"""`iclgd kernels` as a person runs it."""

import numpy as np
import pandas as pd
import pytest

from iclgd_lens import load_task
from iclgd_lens.data import registry
from iclgd_lens.models.hooked import HookedTransformer
from tests.models_zoo import require_hooked_transformer
from tests.test_cli import assert_reported, run


def small(folder, *more: str):
    return run("kernels", "--episodes", "1", "--k", "3", "--queries", "4", "--device", "cpu", "--out", str(folder), *more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The command with its defaults, and its folder."""
    folder = tmp_path_factory.mktemp("kernels") / "out"
    result = small(folder)
    assert result.exit_code == 0, result.output
    return result, folder


def test_kernels_prints_its_tables_and_writes_them(ran):
    result, folder = ran
    for expected in (
        "λ, twin",
        "τ random",
        "best head",
        "Dai's proxy",
        "all layers, lr/100",
        "Known answer: not checked; a model of known behaviour" if HookedTransformer is None else "similarity reads 1.000",
        "majority",
    ):
        assert expected in result.output
    frame = pd.read_parquet(folder / "frame.parquet")
    assert {"trained", "untrained"} == set(frame["model"])
    assert set(frame["lr"].dropna()) == {0.3}
    tables = folder / "tables"
    assert {path.suffix for path in tables.iterdir()} == {".md", ".tex", ".csv"}
    assert (tables / "kernels_tangent.md").is_file()


@pytest.mark.slow
def test_episodes_have_seeds_of_their_own_and_the_rate_is_the_one_given(bundled, tmp_path):
    result = small(tmp_path / "out", "--episodes", "2", "--seed", "3", "--lr", "0.05", "--no-twins")
    assert result.exit_code == 0, result.output
    assert "2 episodes of 3 demonstrations and 4 queries, lr 0.05" in result.output
    frame = pd.read_parquet(tmp_path / "out" / "frame.parquet")
    assert set(frame["seed"]) == {3, 4}
    assert set(frame["lr"].dropna()) == {0.05}
    values = frame[frame["metric"] == "demonstration_mass"].pivot(index="layer", columns="seed", values="value")
    assert (values[3] != values[4]).all()
    assert_reported(tmp_path / "out", bundled, "iclgd kernels: 2 draws of 3 demonstrations and 4 queries, on bundled (", seed=3)


def test_updates_that_diverge_are_named_and_everything_else_is_shown(tmp_path):
    result = small(tmp_path / "out", "--no-twins", "--lr", "1e30")
    assert result.exit_code == 0, result.output
    assert "Updates that diverged" in result.output
    assert "Attention as a smoother" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "1"], "at least two demonstrations"),
        (["--task", "bundled/remaped"], "did you mean 'bundled/remapped'"),
        (["--task", "mine"], "no default learning rate for the task 'mine'"),
        (["--queries", "3"], "Invalid value for '--queries'"),
        (["--model", "no/such-folder/"], "no/such-folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(registry._MAKERS, "mine", lambda data: load_task("bundled/natural"))
    result = run("kernels", "--episodes", "1", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bridge_gives_the_numbers_of_a_hooked_transformer(ran, tmp_path):
    require_hooked_transformer()  # which the default is then
    assert small(tmp_path, "--backend", "bridge").exit_code == 0
    first, second = (pd.read_parquet(folder / "frame.parquet") for folder in (ran[1], tmp_path))
    described = [name for name in first if first[name].dtype == object and not name.endswith("digest")]
    assert first[described].equals(second[described])
    kendall = first["metric"].str.contains("kendall|top_k|agreement")
    close = np.isclose(first["value"], second["value"], rtol=1e-2, atol=1e-3, equal_nan=True)
    assert close[~kendall].all(), first[~close & ~kendall][["metric", "method", "layer", "value"]]
