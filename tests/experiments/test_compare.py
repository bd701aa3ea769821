"""A whole comparison: its rows, their values, their controls, and that it repeats."""

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from transformer_lens import HookedTransformer

from iclgd_lens import accuracy, capture, compare, lcgd, sim_am, sim_am_delta, sim_aou
from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.compare import n_runs

KEYS = ["model", "method", "control", "layer", "metric"]


@pytest.fixture(scope="module")
def frame(bundled: HookedTransformer, twin: HookedTransformer, episode: Episode) -> pd.DataFrame:
    return compare(bundled, episode, lr={"gd": 0.02, "lcgd": 0.01}, untrained=twin).frame


def value(frame: pd.DataFrame, **where: object) -> float:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (only,) = frame["value"]
    return only


def test_every_row_has_its_key_once_and_every_expected_row_is_there(frame: pd.DataFrame):
    assert not frame.duplicated(KEYS).any()
    layered, per_method = 4, ["sim_aou", "sim_aou_norm", "sim_am", "sim_am_delta"]
    expected = 4 + 2 + layered * (1 + 2 * 2 * len(per_method) + 2 * 2)
    assert frame.groupby("model").size().to_dict() == {"trained": expected, "untrained": expected}


def test_values_are_the_means_of_the_metrics(bundled: HookedTransformer, episode: Episode, frame: pd.DataFrame):
    zsl = capture(bundled, episode.queries)
    icl = capture(bundled, episode.queries, context=episode.demonstrations)
    ft = capture(bundled, episode.queries, update=lcgd(bundled, episode.demonstrations, lr=0.01))
    where = {"model": "trained", "method": "lcgd", "control": "none"}
    for layer in range(4):
        got = value(frame, **where, metric="sim_aou", layer=layer)
        assert got == pytest.approx(float(sim_aou(icl, ft, zsl)[:, layer].mean()), abs=1e-6)
        got = value(frame, **where, metric="sim_am_delta", layer=layer)
        assert got == pytest.approx(float(sim_am_delta(icl, ft, zsl)[:, layer].mean()), abs=1e-6)
        reference = value(frame, model="trained", method="zsl", metric="sim_am", layer=layer)
        assert reference == pytest.approx(float(sim_am(icl, zsl)[:, layer].mean()), abs=1e-6)
    assert value(frame, **where, metric="accuracy") == float(accuracy(ft))
    assert value(frame, model="trained", method="icl", metric="accuracy") == float(accuracy(icl))


def test_rows_say_where_they_come_from(frame: pd.DataFrame, episode: Episode):
    assert frame["task"].unique() == [episode.task]
    assert frame["k"].unique() == [6]
    assert frame["n_queries"].unique() == [12]
    assert frame[frame["method"] == "gd"]["lr"].unique() == [0.02]
    assert frame[frame["method"] == "icl"]["lr"].isna().all()
    heads = frame[(frame["metric"] == "sim_am") & (frame["layer"] == 0)]
    assert ((heads["n"] + heads["undefined"]) == 12 * 4).all()


def test_the_same_seed_gives_the_same_frame(
    bundled: HookedTransformer, twin: HookedTransformer, episode: Episode, frame: pd.DataFrame
):
    torch.manual_seed(123)
    assert_frame_equal(compare(bundled, episode, lr={"gd": 0.02, "lcgd": 0.01}, untrained=twin).frame, frame)


def test_a_zero_learning_rate_leaves_similarities_undefined_and_counts_them(bundled: HookedTransformer, episode: Episode):
    frame = compare(bundled, episode, ["lcgd"], lr=0.0).frame
    similarity = frame[frame["metric"] == "sim_aou"]
    assert similarity["value"].isna().all()
    assert (similarity["undefined"] == 12).all()
    assert value(frame, method="lcgd", metric="accuracy") == value(frame, method="zsl", metric="accuracy")


def test_alpha_needs_both_methods_and_one_method_is_enough_for_the_rest(bundled: HookedTransformer, episode: Episode):
    metrics = set(compare(bundled, episode, ["lcgd"], lr=0.01).frame["metric"])
    assert not metrics & {"alpha_aou", "alpha_am"}
    assert "sim_aou" in metrics


def test_progress_is_told_of_every_run(bundled: HookedTransformer, twin: HookedTransformer, episode: Episode):
    ticks = []
    compare(bundled, episode, lr=0.01, untrained=twin, on_run=lambda: ticks.append(1))
    assert len(ticks) == n_runs(["gd", "lcgd"], untrained=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["adam"]}, "methods must be some of gd, lcgd"),
        ({"methods": []}, "methods must be some of"),
        ({"lr": {"gd": 0.1}}, "no learning rate for 'lcgd'"),
        ({"readout": "labels"}, "loss_on='label'"),
    ],
)
def test_bad_options_are_refused_by_name(bundled: HookedTransformer, episode: Episode, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        compare(bundled, episode, **options)
