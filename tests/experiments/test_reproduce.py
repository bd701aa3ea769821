"""A whole run: offline, resumed, and with numbers that only change on purpose."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from iclgd_lens import claims, load_model, untrained_twin
from iclgd_lens.data import registry
from iclgd_lens.data.registry import load_task
from iclgd_lens.data.tasks import Task
from iclgd_lens.experiments import learning_rate
from iclgd_lens.experiments import reproduce as running
from iclgd_lens.experiments.compare import compare
from iclgd_lens.experiments.methods import CONTROLS
from iclgd_lens.experiments.protocol import TWINS, Protocol
from iclgd_lens.experiments.reproduce import FRAMES, reproduce
from iclgd_lens.models.hooked import HookedTransformer

GOLDEN = Path(__file__).parent / "golden.csv"

SMALL = Protocol(
    ("bundled/remapped", "bundled/natural"),
    seeds=(0, 1),
    k=4,
    n_queries=6,
    orders=2,
    controls=CONTROLS,
    grid=(0.01, 0.1, 1.0),
    n_tuning_seeds=2,
    n_tuning_queries=6,
    lr_curve=True,
)


@pytest.fixture(scope="module")
def double() -> HookedTransformer:
    return load_model("bundled", device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def results(double: HookedTransformer, tmp_path_factory: pytest.TempPathFactory) -> running.Results:
    return reproduce(double, SMALL, tmp_path_factory.mktemp("run"))


def test_golden_run(results: running.Results, request: pytest.FixtureRequest):
    """Numbers of a fixed run. A change of them must be on purpose; `pytest --write-golden` writes them anew."""
    columns = ["model", "method", "lr", "control", "subset", "metric", "layer", "n", "value"]
    one = results.frame.query("task == 'bundled/remapped' and seed == 0 and order == 1")
    if request.config.getoption("--write-golden"):
        one[columns].to_csv(GOLDEN, index=False, float_format="%.6f")
    found = one[columns].reset_index(drop=True).astype({"layer": "float64"})
    assert_frame_equal(found, pd.read_csv(GOLDEN), check_dtype=False, atol=1e-4, rtol=0)


def test_every_task_seed_order_and_model_is_there_with_its_controls(results: running.Results):
    frame = results.frame
    cells = frame[["task", "seed", "order", "model"]].drop_duplicates()
    assert len(cells) == 2 * 2 * 2 * 3
    assert set(frame["model"]) == {"trained", *TWINS}
    controls = frame.groupby("model")["control"].unique().map(set).to_dict()
    assert controls == {"trained": {"none", *CONTROLS}, **{twin: {"none", "random"} for twin in TWINS}}


def test_a_cell_is_what_compare_finds_on_that_episode(double: HookedTransformer, results: running.Results):
    episode = load_task("bundled/natural").episode(double, k=4, n_queries=6, seed=1, order=1)
    rates = results.rates[results.rates["task"] == "bundled/natural"].set_index("method")["lr"].to_dict()
    twin = untrained_twin(double, seed=1, keep=("ln",))
    called = "untrained, ln kept"
    alone = compare(twin, episode, lr=rates, called=called).frame
    cell = results.frame[(results.frame["model"] == called) & (results.frame["task"] == "bundled/natural")]
    cell = cell[(cell["seed"] == 1) & (cell["order"] == 1)].reset_index(drop=True)
    assert_frame_equal(cell, alone, atol=1e-9)


def test_rates_are_those_that_the_search_chooses(results: running.Results):
    assert len(results.searched) == 2 * 2 * 3 * 2
    assert not set(results.searched["seed"]) & {0, 1}
    used = results.frame.dropna(subset="lr").groupby(["task", "method"])["lr"].unique()
    for row in results.rates.to_dict("records"):
        assert used[row["task"], row["method"]].tolist() == [row["lr"]]
        assert row["lr"] in SMALL.grid


def test_the_curve_is_on_held_out_draws(results: running.Results):
    assert set(results.curve["lr"]) == set(SMALL.grid)
    assert not set(results.curve["seed"]) & {0, 1}


def test_every_claim_is_computed_with_an_interval_at_rates_chosen_on_held_out_draws(results: running.Results):
    found = claims(results.frame)
    assert set(found["claim"]) == {"LCGD above GD", "untrained twins comparable", "α small"}
    over_all = found[found["task"] == "all tasks"]
    assert len(over_all) == 2 + 2 * 2 * 2 + 2
    assert found[["mean", "low", "high"]].notna().all(axis=None)
    assert (found["low"] <= found["high"]).all()
    assert found["outcome"].str.len().min() > 0


ONE = Protocol(("bundled/remapped",), seeds=(0, 1), k=4, n_queries=3, orders=1, lr=0.01)


def test_a_run_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    bundled: HookedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = reproduce(bundled, ONE, tmp_path / "whole")
    made: list[str] = []

    def counting(*arguments, **options):
        made.append(options["called"])
        return compare(*arguments, **options)

    def stopping(*arguments, **options):
        if len(made) == 4:
            raise KeyboardInterrupt
        return counting(*arguments, **options)

    monkeypatch.setattr(running, "compare", stopping)
    with pytest.raises(KeyboardInterrupt):
        reproduce(bundled, ONE, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "frame.parquet").exists()
    monkeypatch.setattr(running, "compare", counting)
    again = reproduce(bundled, ONE, tmp_path / "stopped")
    assert len(made) == 6
    for part in FRAMES:
        assert_frame_equal(getattr(again, part), getattr(whole, part))
        if part not in ("searched", "curve"):
            assert_frame_equal(pd.read_parquet(tmp_path / "stopped" / f"{part}.parquet"), getattr(whole, part))
    reproduce(bundled, ONE, tmp_path / "stopped")
    assert len(made) == 6


def test_cells_that_are_not_there_are_made_anew(bundled, tmp_path, monkeypatch):
    first = reproduce(bundled, ONE, tmp_path)
    lost = sorted((tmp_path / "cells").rglob("*.parquet"))
    assert len(lost) == 6
    for file in lost[:2]:
        file.unlink()
    made = []

    def counting(*arguments, **options):
        made.append(options["called"])
        return compare(*arguments, **options)

    monkeypatch.setattr(running, "compare", counting)
    assert_frame_equal(reproduce(bundled, ONE, tmp_path).heads, first.heads)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("change", "n_made"),
    [
        ({"lr": 0.02}, 6),
        ({"k": 3}, 6),
        ({"n_queries": 2}, 6),
        ({"controls": ()}, 6),
        ({"seeds": (0, 2)}, 3),
        ({"orders": 2}, 6),
        ({"twins": ()}, 0),
        ({"methods": ("gd",)}, 6),
    ],
    ids=str,
)
def test_only_what_an_option_touches_is_made_anew(bundled, tmp_path, monkeypatch, change, n_made):
    reproduce(bundled, ONE, tmp_path)
    made = []

    def counting(*arguments, **options):
        made.append(options["called"])
        return compare(*arguments, **options)

    monkeypatch.setattr(running, "compare", counting)
    reproduce(bundled, Protocol(**{**ONE.__dict__, **change}), tmp_path)
    assert len(made) == n_made


def test_another_model_s_cells_are_never_taken(bundled, twin, tmp_path):
    first = reproduce(bundled, ONE, tmp_path).frame
    other = reproduce(twin, ONE, tmp_path).frame
    assert not first["value"].equals(other["value"])


def test_rates_are_tuned_on_no_row_that_is_reported_where_a_task_has_no_split_for_queries(bundled, tmp_path, monkeypatch):
    words = ["lion", "rain", "bread", "snow", "tiger", "cheese", "hammer", "violin", "jacket", "tennis", "shirt", "airport"]
    rows = [{"text": f"{a} {b}", "label": index % 2} for index, (a, b) in enumerate(pairwise(words))]
    task = Task.from_rows(rows, name="rows", template="Words: {text} Label:", labels=["alpha", "beta"], separator=" ;")
    monkeypatch.setitem(registry._MAKERS, "rows", lambda data: task)
    seen: dict[str, set[tuple[int, ...]]] = {"tuned": set(), "reported": set()}

    def texts(episode):
        labelled = {tuple(each.tokens[:-1].tolist()) for each in episode.demonstrations}
        return labelled | {tuple(each.tokens.tolist()) for each in episode.queries}

    def searching(model, episodes, *arguments, **options):
        seen["tuned"] |= {text for episode in episodes for text in texts(episode)}
        return learning_rate.search(model, episodes, *arguments, **options)

    def comparing(model, episode, *arguments, **options):
        seen["reported"] |= texts(episode)
        return compare(model, episode, *arguments, **options)

    searching.__name__ = "search"
    monkeypatch.setattr(running, "search", searching)
    monkeypatch.setattr(running, "compare", comparing)
    reproduce(bundled, Protocol(("rows",), k=2, seeds=(0, 1, 2), orders=1, lr="auto", grid=(0.1, 1.0), twins=()), tmp_path)
    assert len(seen["tuned"]) == 3
    assert len(seen["reported"]) == 8
    assert not seen["tuned"] & seen["reported"]


def test_cells_of_another_dtype_or_configuration_are_never_taken(bundled, double, tmp_path, monkeypatch):
    reproduce(bundled, ONE, tmp_path)
    n_cells = len(list((tmp_path / "cells").rglob("*.parquet")))
    reproduce(double, ONE, tmp_path)
    assert len(list((tmp_path / "cells").rglob("*.parquet"))) == 2 * n_cells
    monkeypatch.setattr(bundled.cfg, "eps", 1e-3)
    reproduce(bundled, ONE, tmp_path)
    assert len(list((tmp_path / "cells").rglob("*.parquet"))) == 3 * n_cells


def test_another_task_s_update_is_made_on_as_many_demonstrations(bundled, tmp_path, monkeypatch):
    seen = []

    def watching(*arguments, **options):
        seen.append((arguments[1].k, options["other"].k, options["other"].task))
        return compare(*arguments, **options)

    monkeypatch.setattr(running, "compare", watching)
    options = {**ONE.__dict__, "controls": ("other_task",), "other_task": "bundled/natural", "twins": ()}
    reproduce(bundled, Protocol(**options), tmp_path)
    assert set(seen) == {(4, 4, "bundled/natural")}


def test_a_method_that_diverges_at_every_rate_is_a_problem_and_the_rest_goes_on(bundled, tmp_path):
    options = {"seeds": (0,), "k": 2, "n_queries": 2, "orders": 1, "twins": (), "n_tuning_seeds": 1, "n_tuning_queries": 2}
    searched = learning_rate.search

    def failing(model, episodes, methods, grid, **how):
        return searched(model, episodes, methods, [1e30] if methods == ["gd"] else grid, **how)

    failing.__name__ = "search"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "search", failing)
        found = reproduce(bundled, Protocol(("bundled/remapped",), grid=(0.1,), **options), tmp_path)
    assert found.rates["method"].tolist() == ["lcgd"]
    assert set(found.frame["method"]) == {"zsl", "icl", "lcgd"}
    assert "gd diverged at every learning rate tried (1e+30)" in found.problems["problem"].iloc[0]
    with pytest.raises(ValueError, match="bundled/remapped: gd diverged at every learning rate"):
        reproduce(bundled, Protocol(("bundled/remapped",), grid=(1e30,), **options), tmp_path / "none")


def test_updates_that_diverge_leave_numbers_that_can_be_drawn(bundled, tmp_path):
    rates = {"trained": 0.1}

    def diverging(*arguments, **options):
        return compare(*arguments, **{**options, "lr": dict.fromkeys(("gd", "lcgd"), rates.get(options["called"], 1e30))})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "compare", diverging)
        found = reproduce(bundled, ONE, tmp_path)
    assert len(found.problems) == 2 * 2 * 2
    assert found.gradients["gradient_norm"].dtype == "float64"
    assert found.frame["seed"].dtype == "int64"


def test_progress_adds_up_to_the_total_whether_cells_are_made_or_there(bundled, tmp_path):
    totals: list[int] = []
    runs: list[int] = []
    for times in (1, 2):
        reproduce(bundled, ONE, tmp_path, on_total=totals.append, on_runs=lambda n, about: runs.append(n))
        assert totals == [6 * (2 + 2 * 2)] * times
        assert sum(runs) == sum(totals)


def test_bad_tasks_show_before_anything_runs_or_is_written(bundled, tmp_path):
    with pytest.raises(ValueError, match="longer than the model's context window"):
        reproduce(bundled, Protocol(("bundled/natural", "bundled/remapped"), k=4000, lr=0.1), tmp_path / "out")
    with pytest.raises(OSError, match="data folder"):
        reproduce(bundled, Protocol(("bundled/natural", "sst2"), lr=0.1), tmp_path / "out", data=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_the_model_is_left_as_it_was(bundled, tmp_path):
    before = {name: parameter.clone() for name, parameter in bundled.named_parameters()}
    reproduce(bundled, ONE, tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in bundled.named_parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bundled.hook_dict.values())


def test_a_protocol_is_made_of_the_json_of_one():
    protocol = Protocol(tasks=("bundled/natural",), seeds=(3, 4), lr=0.1, options={"loss_on": "label"})
    assert Protocol.from_json(json.loads(json.dumps(asdict(protocol)))) == protocol
