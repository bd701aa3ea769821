"""A whole comparison: its rows, their values, their controls, and that it repeats."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from iclgd_lens import Comparison, accuracy, capture, compare, gd, lcgd, load_task, sim_am, sim_am_delta, sim_aou
from iclgd_lens.data.controls import permuted, shuffled_labels
from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.compare import n_runs
from iclgd_lens.experiments.methods import CONTROLS
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.updates.gradient import DivergedError
from iclgd_lens.updates.random_weights import random_weights

KEYS = ["model", "method", "control", "subset", "layer", "metric"]


@pytest.fixture(scope="module")
def found(bundled: HookedTransformer, twin: HookedTransformer, episode: Episode) -> Comparison:
    return compare(bundled, episode, lr={"gd": 0.02, "lcgd": 0.01}, untrained=twin)


@pytest.fixture(scope="module")
def frame(found: Comparison) -> pd.DataFrame:
    return found.frame


def value(frame: pd.DataFrame, **where: object) -> float:
    where = {"subset": "all"} | where
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    (only,) = frame["value"]
    return only


def test_every_row_has_its_key_once_and_every_expected_row_is_there(frame: pd.DataFrame):
    assert not frame.duplicated(KEYS).any()
    # Zero-shot and in-context have accuracy and loss; zero-shot and each method two kinds of agreement with ICL; each method
    # accuracy, loss and recall, too; five similarities per layer and subset, for each method and its random control; two α; the
    # logit lens of each run per layer.
    expected = 2 * 2 + 3 * 2 + 2 * 3 + 4 * (2 * 2 * 5 * 2 + 2 * 2 + 4)
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
        reference = value(frame, **where, metric="sim_am_zsl", layer=layer)
        assert reference == pytest.approx(float(sim_am(icl, zsl)[:, layer].mean()), abs=1e-6)
    assert value(frame, **where, metric="accuracy") == float(accuracy(ft))
    assert value(frame, model="trained", method="icl", metric="accuracy") == float(accuracy(icl))


def test_heads_are_the_means_over_queries_of_true_updates_head_by_head(
    bundled: HookedTransformer, twin: HookedTransformer, episode: Episode, found: Comparison
):
    heads = found.heads
    assert not heads.duplicated(["model", "method", "layer", "head", "metric"]).any()
    assert heads.groupby(["model", "method", "metric"]).size().to_dict() == {
        (model, method, metric): 4 * 4
        for model in ("trained", "untrained")
        for method in ("gd", "lcgd")
        for metric in ("sim_am", "sim_am_delta")
    }
    assert set(heads["control"]) == {"none"}
    assert set(heads[heads["method"] == "gd"]["lr"]) == {0.02}
    for name, model in (("trained", bundled), ("untrained", twin)):
        zsl = capture(model, episode.queries)
        icl = capture(model, episode.queries, context=episode.demonstrations)
        ft = capture(model, episode.queries, update=lcgd(model, episode.demonstrations, lr=0.01))
        rows = heads[(heads["model"] == name) & (heads["method"] == "lcgd")].set_index(["metric", "layer", "head"])
        for metric, values in (("sim_am", sim_am(icl, ft)), ("sim_am_delta", sim_am_delta(icl, ft, zsl))):
            for layer in range(4):
                for head in range(4):
                    row = rows.loc[(metric, layer, head)]
                    assert row["value"] == pytest.approx(float(values[:, layer, head].mean()), abs=1e-6)
                    assert (row["n"], row["undefined"]) == (12, 0)


def test_heads_whose_similarity_is_undefined_are_counted(bundled: HookedTransformer, episode: Episode):
    heads = compare(bundled, episode, ["lcgd"], lr=0.0, controls=()).heads.set_index("metric")
    undefined = heads.loc["sim_am_delta"]
    assert undefined["value"].isna().all()
    assert set(undefined["n"]) == {0}
    assert set(undefined["undefined"]) == {12}
    assert heads.loc["sim_am", "value"].notna().all()


def test_the_logit_lens_reads_the_gold_label_in_every_run(bundled: HookedTransformer, episode: Episode, frame: pd.DataFrame):
    runs = {
        "zsl": capture(bundled, episode.queries),
        "icl": capture(bundled, episode.queries, context=episode.demonstrations),
        "gd": capture(bundled, episode.queries, update=gd(bundled, episode.demonstrations, lr=0.02)),
    }
    for method, run in runs.items():
        for layer in range(4):
            by_hand = [float(run.lens_logits[q, layer].softmax(dim=-1)[run.labels[q]]) for q in range(12)]
            got = value(frame, model="trained", method=method, control="none", metric="lens_gold_probability", layer=layer)
            assert got == pytest.approx(sum(by_hand) / 12, abs=1e-6)


def test_label_words_that_share_their_first_token_are_not_read_by_the_lens(bundled: HookedTransformer, episode: Episode):
    first = episode.label_tokens[0]
    shared = tuple(torch.cat([first, tail]) for tail in episode.label_tokens)
    queries = tuple(replace(query, label_tokens=shared) for query in episode.queries)
    frame = compare(bundled, replace(episode, queries=queries, label_tokens=shared), ["lcgd"], controls=()).frame
    assert "accuracy" in set(frame["metric"])
    assert "lens_gold_probability" not in set(frame["metric"])


def test_rows_say_where_they_come_from(frame: pd.DataFrame, episode: Episode):
    assert frame["task"].unique() == [episode.task]
    assert frame["k"].unique() == [6]
    assert frame["n_queries"].unique() == [12]
    assert frame[frame["method"] == "gd"]["lr"].unique() == [0.02]
    assert frame[frame["method"] == "icl"]["lr"].isna().all()
    heads = frame[(frame["metric"] == "sim_am") & (frame["layer"] == 0)]
    heads = heads[heads["subset"] == "all"]
    assert ((heads["n"] + heads["undefined"]) == 12 * 4).all()


def test_the_same_seed_gives_the_same_frame(
    bundled: HookedTransformer, twin: HookedTransformer, episode: Episode, frame: pd.DataFrame
):
    torch.manual_seed(123)
    assert_frame_equal(compare(bundled, episode, lr={"gd": 0.02, "lcgd": 0.01}, untrained=twin).frame, frame)


def test_a_zero_learning_rate_leaves_similarities_undefined_and_counts_them(bundled: HookedTransformer, episode: Episode):
    frame = compare(bundled, episode, ["lcgd"], lr=0.0).frame
    similarity = frame[(frame["metric"] == "sim_aou") & (frame["subset"] == "all")]
    assert similarity["value"].isna().all()
    assert (similarity["undefined"] == 12).all()
    assert value(frame, method="lcgd", metric="accuracy") == value(frame, method="zsl", metric="accuracy")


def test_alpha_needs_both_methods_and_one_method_is_enough_for_the_rest(bundled: HookedTransformer, episode: Episode):
    metrics = set(compare(bundled, episode, ["lcgd"], lr=0.01).frame["metric"])
    assert not metrics & {"alpha_aou", "alpha_am"}
    assert "sim_aou" in metrics


@pytest.mark.parametrize("controls", [("random",), CONTROLS], ids=["random", "all"])
def test_progress_is_told_of_every_run(
    bundled: HookedTransformer, twin: HookedTransformer, episode: Episode, other: Episode, controls: tuple[str, ...]
):
    ticks = []
    compare(bundled, episode, untrained=twin, controls=controls, other=other, on_run=lambda: ticks.append(1))
    assert len(ticks) == n_runs(["gd", "lcgd"], controls, untrained=True)


@pytest.fixture(scope="module")
def other(bundled: HookedTransformer) -> Episode:
    return load_task("bundled/natural").episode(bundled, k=4, n_queries=1, seed=5)


@pytest.fixture(scope="module")
def controlled(bundled: HookedTransformer, episode: Episode, other: Episode) -> Comparison:
    return compare(bundled, episode, lr=0.1, controls=CONTROLS, other=other)


def test_a_control_s_update_is_made_on_what_it_says_and_compared_with_true_icl(
    bundled: HookedTransformer, episode: Episode, other: Episode, controlled: Comparison
):
    zsl, icl = capture(bundled, episode.queries), capture(bundled, episode.queries, context=episode.demonstrations)
    true = lcgd(bundled, episode.demonstrations, lr=0.1)
    seed = episode.seed  # wrong demonstrations are the same for both methods, random directions are not
    updates = {
        "none": true,
        "random_weights": random_weights(true, 2 * seed + 1),
        "shuffled_labels": lcgd(bundled, shuffled_labels(episode, seed), lr=0.1),
        "permuted": lcgd(bundled, permuted(episode, seed), lr=0.1),
        "other_task": lcgd(bundled, other.demonstrations, lr=0.1),
    }
    seen = set()
    for control, update in updates.items():
        ft = capture(bundled, episode.queries, update=update)
        where = {"method": "lcgd", "control": control}
        for layer in range(4):
            got = value(controlled.frame, **where, metric="sim_aou", layer=layer)
            assert got == pytest.approx(float(sim_aou(icl, ft, zsl)[:, layer].mean()), abs=1e-5)
        assert value(controlled.frame, **where, metric="accuracy") == pytest.approx(float(accuracy(ft)))
        seen.add(round(got, 6))
    assert len(seen) == len(updates)


def test_the_random_control_has_similarities_and_no_outputs_of_its_own(controlled: Comparison):
    metrics = set(controlled.frame[controlled.frame["control"] == "random"]["metric"])
    assert "sim_aou" in metrics
    assert not metrics & {"accuracy", "label_loss", "same_prediction", "js_divergence", "rec2ftp"}


def test_a_control_with_nothing_to_change_has_no_rows(bundled: HookedTransformer):
    single = load_task("bundled/remapped").episode(bundled, k=1, n_queries=3, seed=0)
    ticks = []
    frame = compare(bundled, single, controls=("shuffled_labels", "permuted"), on_run=lambda: ticks.append(1)).frame
    assert set(frame["control"]) == {"none"}
    assert len(ticks) == 6


def test_false_to_true_rows_are_over_queries_that_zsl_gets_wrong_and_icl_and_ft_right(
    bundled: HookedTransformer, episode: Episode, controlled: Comparison
):
    zsl, icl = capture(bundled, episode.queries), capture(bundled, episode.queries, context=episode.demonstrations)
    ft = capture(bundled, episode.queries, update=gd(bundled, episode.demonstrations, lr=0.1))
    gold = zsl.labels
    chosen = (zsl.predictions != gold) & (icl.predictions == gold) & (ft.predictions == gold)
    assert 0 < int(chosen.sum()) < len(gold)
    where = {"method": "gd", "control": "none", "subset": "false_to_true", "layer": 2}
    assert value(controlled.frame, **where, metric="sim_aou") == pytest.approx(
        float(sim_aou(icl, ft, zsl)[chosen, 2].mean()), abs=1e-5
    )
    row = controlled.frame.query("metric == 'sim_aou' and method == 'gd' and control == 'none' and subset == 'false_to_true'")
    assert set(row["n"]) == {int(chosen.sum())}


def test_queries_hold_a_distribution_over_label_words_for_every_true_run(episode: Episode, controlled: Comparison):
    queries = controlled.queries
    assert set(queries["method"]) == {"zsl", "icl", "gd", "lcgd"}
    assert set(queries["control"]) == {"none"}
    assert set(queries["label"]) == set(episode.label_words)
    totals = queries.groupby(["method", "query"])[["probability", "is_gold"]].sum()
    assert len(totals) == 4 * 12
    assert totals["probability"].tolist() == pytest.approx([1.0] * len(totals))
    assert (totals["is_gold"] == 1).all()


def test_gradients_are_those_of_the_true_updates(bundled: HookedTransformer, episode: Episode, controlled: Comparison):
    norms = gd(bundled, episode.demonstrations, lr=0.1).gradient_norms
    got = controlled.gradients.query("method == 'gd'").pivot(index="layer", columns="step", values="gradient_norm")
    assert torch.allclose(torch.tensor(got.to_numpy()), norms.double(), rtol=1e-5)
    assert set(controlled.gradients["control"]) == {"none"}


def test_alpha_is_lcgd_against_the_true_gd_whatever_the_order_of_methods(bundled: HookedTransformer, episode: Episode):
    frames = [compare(bundled, episode, methods, controls=(), lr=0.1).frame for methods in (("gd", "lcgd"), ("lcgd", "gd"))]
    alphas = [value(frame, metric="alpha_aou", method="lcgd", layer=1) for frame in frames]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-6)


def test_methods_and_controls_from_generators_are_all_compared(bundled: HookedTransformer, episode: Episode):
    names = ["gd", "lcgd"], ["random", "permuted"]
    listed, read = (compare(bundled, episode, *each).frame for each in ([names[0]], [iter(names[0])]))
    assert_frame_equal(read, listed)
    listed, read = (compare(bundled, episode, ["gd"], controls=each).frame for each in (names[1], iter(names[1])))
    assert_frame_equal(read, listed)
    assert n_runs(iter(names[0]), iter(names[1])) == n_runs(*names)


def test_orders_of_an_episode_are_told_apart(bundled: HookedTransformer, episode: Episode):
    frames = [compare(bundled, episode.reordered(order), controls=()).frame for order in (0, 1)]
    assert [frame["order"].unique().tolist() for frame in frames] == [[0], [1]]
    assert value(frames[0], method="zsl", metric="label_loss") == value(frames[1], method="zsl", metric="label_loss")
    assert value(frames[0], method="gd", metric="label_loss") != value(frames[1], method="gd", metric="label_loss")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["adam"]}, "methods must be some of gd, lcgd"),
        ({"methods": []}, "methods must be some of"),
        ({"lr": {"gd": 0.1}}, "no learning rate for 'lcgd'"),
        ({"readout": "labels"}, "loss_on='label'"),
        ({"controls": ["noise"]}, "controls must be some of random, random_weights, .*; got 'noise'"),
        ({"controls": ["other_task"]}, "needs other="),
        ({"if_diverged": "typo"}, "if_diverged must be one of 'raise', 'record'; got 'typo'"),
        ({"methods": "gd"}, "methods must be several items in an order, such as a list; got str 'gd'"),
        ({"methods": {"gd", "lcgd"}}, "methods must be given in an order, and a set"),
        ({"controls": {"random", "permuted"}}, "controls must be given in an order, and a set"),
    ],
)
def test_bad_options_are_refused_by_name(bundled: HookedTransformer, episode: Episode, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        compare(bundled, episode, **options)


def test_an_update_that_diverges_is_raised_or_recorded_and_the_rest_goes_on(bundled: HookedTransformer, episode: Episode):
    rates = {"gd": 1e30, "lcgd": 0.01}
    with pytest.raises(DivergedError, match=r"lr=1e\+30 made the gd update non-finite"):
        compare(bundled, episode, lr=rates)
    found = compare(bundled, episode, lr=rates, if_diverged="record")
    assert set(found.frame["method"]) == {"zsl", "icl", "lcgd"}
    assert not set(found.frame["metric"]) & {"alpha_aou", "alpha_am"}
    (problem,) = found.problems.to_dict("records")
    assert (problem["method"], problem["lr"], problem["control"]) == ("gd", 1e30, "none")
    assert "non-finite" in problem["problem"]
    alone = compare(bundled, episode, ["lcgd"], lr=0.01, controls=()).frame
    where = {"method": "lcgd", "metric": "sim_aou", "layer": 3, "control": "none"}
    assert value(found.frame, **where) == value(alone, **where)
