"""Figures of kernel views, of heads, of layers and of accuracy by k show the numbers of their frames, and refuse frames without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from iclgd_lens import Comparison, compare, load_task, summarise
from iclgd_lens.views.figure_style import COLOURS
from iclgd_lens.views.kernel_plots import (
    HEAD_METRICS,
    SERIES_NAMES,
    head_figure,
    head_rows,
    k_figure,
    k_rows,
    smoothing_figure,
    smoothing_rows,
    trajectory_figure,
    trajectory_rows,
)
from iclgd_lens.views.plots import layer_figure
from tests.views.frames import TASKS, drawn_again, moments, of, place, titles, units

SEEDS = (0, 1)
SERIES = {name: series for series, name in SERIES_NAMES.items()}


@pytest.fixture(scope="module")
def found(with_kernels) -> Comparison:
    """Two tasks, two draws and a twin, with what no figure shows: a control and, in one draw, a second order."""
    draws = [{"task": task, "seed": seed} for task in TASKS for seed in SEEDS] + [{"task": TASKS[0], "seed": SEEDS[0], "order": 1}]
    return Comparison.concatenated([drawn_again(with_kernels, number, **about) for number, about in enumerate(draws)])


@pytest.fixture(scope="module")
def by_k(bundled, twin) -> pd.DataFrame:
    """Two tasks, the second with one k alone; in the first, the larger k comes first; without kernel views."""
    drawn = [(TASKS[0], 4), (TASKS[0], 2), (TASKS[1], 3)]
    one = compare(bundled, load_task(TASKS[0]).episode(bundled, k=4, n_queries=6, seed=0), lr=0.1, untrained=twin)
    draws = [{"task": task, "k": k, "seed": seed} for task, k in drawn for seed in SEEDS]
    return pd.concat([drawn_again(one, number, **about).frame for number, about in enumerate(draws)], ignore_index=True)


@pytest.fixture(params=[TASKS, TASKS[1:]], ids=["two_tasks", "one_task"])
def tasks(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def series_and_model(trace: Any) -> tuple[str, str]:
    """The series of a line, and its model."""
    for name, series in SERIES.items():
        if trace.name == name or trace.name.startswith(f"{name}, "):
            return series, trace.name.removeprefix(name).removeprefix(", ") or "trained"
    raise AssertionError(trace.name)


def assert_line(trace: Any, x: list[int], expected: list[tuple[float, float]]) -> None:
    assert list(trace.x) == x
    assert list(zip(trace.y, trace.error_y.array, strict=True)) == [pytest.approx(pair, abs=1e-9, nan_ok=True) for pair in expected]


def test_smoothing_lines_are_means_over_draws_by_layer_and_twins_dotted(found: Comparison, tasks: tuple[str, ...]):
    frame = of(found.frame, tasks)
    figure = smoothing_figure(frame)
    seen = set()
    for trace in figure.data:
        task = tasks[place(trace) // 2]
        metric = ("demonstration_mass", "smoothing_share")[place(trace) % 2]
        series, model = series_and_model(trace)
        expected = [moments(frame, task=task, metric=metric, model=model, method="icl", layer=layer) for layer in range(4)]
        assert_line(trace, [0, 1, 2, 3], expected)
        assert (trace.line.color, trace.line.dash) == (COLOURS["icl"], "solid" if model == "trained" else "dot")
        assert series == "icl"
        seen.add((task, metric, model))
    assert len(seen) == len(figure.data) == len(tasks) * 2 * 2
    assert [trace.name for trace in figure.data if trace.showlegend] == ["ICL", "ICL, untrained"]


def test_smoothing_figure_names_its_units_and_draws(found: Comparison, tasks: tuple[str, ...]):
    figure = smoothing_figure(of(found.frame, tasks))
    named = [figure.get_subplot(row + 1, column + 1).yaxis.title.text for row in range(len(tasks)) for column in range(2)]
    assert named == ["share of attention", "share of the change"] * len(tasks)
    assert titles(figure)[-1] == "layer"
    assert {axis.dtick for axis in figure.select_xaxes()} == {1}
    assert f">n = 2 draws{' per task' if len(tasks) > 1 else ''}, mean ± sd<" in figure.layout.title.text


@pytest.mark.parametrize("model", ["trained", "untrained"])
@pytest.mark.parametrize("metric", HEAD_METRICS)
def test_heat_maps_are_means_over_draws_head_by_head(found: Comparison, tasks: tuple[str, ...], metric: str, model: str):
    heads = of(found.heads, tasks)
    figure = head_figure(heads, metric, model=model)
    methods = [method for method in ("icl", "gd", "lcgd") if method in set(heads[heads["metric"] == metric]["method"])]
    assert len(figure.data) == len(tasks) * len(methods)
    for trace in figure.data:
        task, method = tasks[place(trace) // len(methods)], methods[place(trace) % len(methods)]
        assert (list(trace.y), list(trace.x)) == ([0, 1, 2, 3], [0, 1, 2, 3])
        shown = heads[(heads["task"] == task) & (heads["metric"] == metric) & (heads["model"] == model)]
        for layer in range(4):
            for head in range(4):
                mean, sd = moments(shown, method=method, layer=layer, head=head)
                assert trace.z[layer][head] == pytest.approx(mean, abs=1e-9)
                assert trace.customdata[layer][head] == pytest.approx(sd, abs=1e-9)
    names = [{"icl": "ICL", "gd": "GD", "lcgd": "LCGD"}[method] for method in methods]
    assert titles(figure) == [
        *([f"{task}<br>{name}" for task in tasks for name in names] if len(tasks) > 1 else names),
        "head",
    ]
    assert units(figure) == ["layer"] * len(tasks)
    assert "mean over 2 draws" in figure.layout.title.text
    assert ("untrained" in figure.layout.title.text) == (model == "untrained")


def test_heads_of_all_panels_share_a_scale_which_is_centred_where_values_may_be_negative(found: Comparison):
    for metric, shown in HEAD_METRICS.items():
        figure = head_figure(found.heads, metric)
        scale = figure.layout.coloraxis
        assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
        largest = max(np.abs(trace.z).max() for trace in figure.data)
        assert scale.cmax == pytest.approx(largest)
        assert scale.cmin == pytest.approx(-largest if metric not in NOT_NEGATIVE else 0)
        colours = [colour for _, colour in scale.colorscale]
        assert (colours[len(colours) // 2] == "rgb(247,247,247)") == (metric not in NOT_NEGATIVE)
        assert scale.colorbar.title.text == shown.unit
        assert shown.name in figure.layout.title.text
        if metric in NOT_NEGATIVE:
            assert min(np.min(trace.z) for trace in figure.data) >= 0


NOT_NEGATIVE = ("demonstration_mass", "attention_agreement", "label_attention_agreement")


def test_one_method_alone_can_be_drawn(found: Comparison):
    figure = head_figure(found.heads, "sim_am_delta", "lcgd", "trained")
    assert titles(figure)[:-1] == [f"{task}<br>LCGD" for task in TASKS]
    both = head_figure(found.heads, "sim_am_delta", model="trained")
    np.testing.assert_array_equal(figure.data[0].z, both.data[1].z)


def test_models_stand_below_each_other_on_one_scale(found: Comparison, tasks: tuple[str, ...]):
    heads = of(found.heads, tasks)
    figure = head_figure(heads, "sim_am_delta")
    rows = [(task, model) for task in tasks for model in ("trained", "untrained")]
    named = [f"{task}, {model}" if len(tasks) > 1 else model for task, model in rows]
    assert titles(figure)[:-1] == [f"{row}<br>{method}" for row in named for method in ("GD", "LCGD")]
    for trace in figure.data:
        (task, model), method = rows[place(trace) // 2], ("gd", "lcgd")[place(trace) % 2]
        about = {"task": task, "model": model, "method": method, "metric": "sim_am_delta"}
        assert trace.z[2][1] == pytest.approx(moments(heads, **about, layer=2, head=1)[0], abs=1e-9)
    assert "trained" not in figure.layout.title.text


def test_controls_and_other_metrics_are_not_in_a_heat_map(found: Comparison):
    other = found.heads.assign(control="random", value=7.0)
    for drawn, alone in zip(*(head_figure(h, "sim_am").data for h in (pd.concat([found.heads, other]), found.heads)), strict=True):
        np.testing.assert_array_equal(drawn.z, alone.z)


def test_a_metric_of_one_s_own_is_drawn_under_its_name_and_undefined_heads_are_blank(found: Comparison):
    own = found.heads[found.heads["metric"] == "sim_am"].assign(metric="mine")
    own.loc[(own["layer"] == 0) & (own["head"] == 1), "value"] = np.nan
    figure = head_figure(own, "mine")
    assert figure.layout.title.text.startswith("mine<br>")
    assert figure.layout.plot_bgcolor == "#BBBBBB"
    assert all(np.isnan(trace.z).tolist() == [[False, True, False, False], *[[False] * 4] * 3] for trace in figure.data)


def test_trajectories_are_those_of_every_run_and_of_the_matched_iterates(found: Comparison, tasks: tuple[str, ...]):
    frame = of(found.frame, tasks)
    figure = trajectory_figure(frame)
    seen = set()
    for trace in figure.data:
        task, model = tasks[place(trace) // 2], ("trained", "untrained")[place(trace) % 2]
        series, _ = series_and_model(trace)
        about = {"metric": "lens_gold_probability", "method": series}
        if series == "functional":
            about = {"metric": "trajectory_tangent_gold_probability", "method": "icl"}
        expected = [moments(frame, task=task, model=model, layer=layer, **about) for layer in range(4)]
        assert_line(trace, [0, 1, 2, 3], expected)
        assert trace.line.color == COLOURS[series]
        seen.add((task, model, series))
    assert len(seen) == len(figure.data) == len(tasks) * 2 * 5
    assert [axis.matches for axis in figure.select_yaxes()] == [None, *["y"] * (2 * len(tasks) - 1)]
    assert units(figure) == ["probability of the gold label"] * len(tasks)
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert legend == ["ZSL", "ICL", "FT by GD", "FT by LCGD", "functional GD, tangent kernel"]
    panels = ["trained", "untrained"]
    assert titles(figure) == [
        *([f"{task}<br>{panel}" for task in tasks for panel in panels] if len(tasks) > 1 else panels),
        "layer",
    ]
    assert "n = 2 draws" in figure.layout.title.text


def test_trajectories_do_without_functional_descent_and_a_twin(by_k: pd.DataFrame):
    figure = trajectory_figure(by_k[(by_k["model"] == "trained") & (by_k["k"] == 3)])
    assert [trace.name for trace in figure.data] == ["ZSL", "ICL", "FT by GD", "FT by LCGD"]
    assert titles(figure)[0] == "trained"


def test_accuracy_by_k_is_the_mean_over_draws_at_each_k(by_k: pd.DataFrame):
    figure = k_figure(by_k)
    seen = set()
    for trace in figure.data:
        task = TASKS[place(trace)]
        series, model = series_and_model(trace)
        ks = [2, 4] if task == TASKS[0] else [3]
        expected = [moments(by_k, task=task, model=model, method=series, metric="accuracy", k=k) for k in ks]
        assert_line(trace, ks, expected)
        assert (trace.line.color, trace.line.dash) == (COLOURS[series], "solid" if model == "trained" else "dot")
        seen.add((task, model, series))
    assert len(seen) == len(figure.data) == 2 * 2 * 4
    legend = [trace.name for trace in figure.data if trace.showlegend]
    runs = ["ZSL", "ICL", "FT by GD", "FT by LCGD"]
    assert legend == [*runs, *(f"{run}, untrained" for run in runs)]
    symbols = {trace.name: trace.marker.symbol for trace in figure.data}
    assert len({symbols[run] for run in runs}) == 4
    assert {name: symbols[f"{name}, untrained"] for name in runs} == {name: f"{symbols[name]}-open" for name in runs}
    assert [trace.offsetgroup for trace in figure.data] == [trace.name for trace in figure.data]
    assert figure.layout.scattermode == "group"
    assert titles(figure) == [*(f"{task}<br>accuracy" for task in TASKS), "demonstrations k"]
    assert units(figure) == ["share of queries"] * 2
    assert [axis.matches for axis in figure.select_yaxes()] == [None, "y"]
    assert list(figure.layout.xaxis.tickvals) == [2, 3, 4]
    assert "n = 2 draws per task and k," in figure.layout.title.text


def test_one_k_gives_single_points(found: Comparison):
    figure = k_figure(of(found.frame, TASKS[:1]))
    assert all(list(trace.x) == [3] for trace in figure.data)
    assert titles(figure)[0] == "accuracy"
    assert "n = 2 draws, mean" in figure.layout.title.text


def test_figures_agree_with_summaries_of_their_rows(found: Comparison):
    summary = summarise(k_rows(found.frame), by=["task", "model", "method", "k"])
    assert len(summary) == len(k_figure(found.frame).data)
    assert sorted(summary["mean"]) == pytest.approx(sorted(trace.y[0] for trace in k_figure(found.frame).data))
    for rows in (smoothing_rows(found.frame), trajectory_rows(found.frame), head_rows(found.heads, "sim_am")):
        assert set(rows["control"]) == {"none"}
        assert len(rows) < len(found.frame)


def test_a_single_draw_has_points_and_no_spread(found: Comparison):
    frame = found.frame[found.frame["seed"] == 1]
    for figure in (smoothing_figure(frame), trajectory_figure(frame), k_figure(frame)):
        assert all(np.isnan(trace.error_y.array).all() for trace in figure.data)
        assert "n = 1 draw per task" in figure.layout.title.text


def test_several_twins_have_dashes_of_their_own(found: Comparison):
    other = found.frame[found.frame["model"] == "untrained"].assign(model="untrained, ln kept")
    frame = pd.concat([found.frame, other])
    for figure in (smoothing_figure(frame), k_figure(frame)):
        dashes = {series_and_model(trace)[1]: trace.line.dash for trace in figure.data}
        assert dashes == {"trained": "solid", "untrained": "dot", "untrained, ln kept": "dash"}


def test_a_run_has_one_colour_in_all_figures(found: Comparison):
    colours: dict[str, set[str]] = {}
    for figure in (smoothing_figure(found.frame), trajectory_figure(found.frame), k_figure(found.frame)):
        for trace in figure.data:
            colours.setdefault(series_and_model(trace)[0], set()).add(trace.line.color)
    assert colours == {series: {COLOURS[series]} for series in ("zsl", "icl", "gd", "lcgd", "functional")}
    bars = {trace.name: trace.marker.color for trace in layer_figure(found.frame).data if trace.type == "bar"}
    assert bars == {"GD": COLOURS["gd"], "LCGD": COLOURS["lcgd"]}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_frames_without_the_rows_of_a_figure_are_refused_by_what_they_lack(found: Comparison, by_k: pd.DataFrame):
    frame, heads = found.frame, found.heads
    with pytest.raises(ValueError, match=r"no rows of λ .* or the smoothing share, which compare\(\.\.\., kernels=True\) adds"):
        smoothing_figure(by_k)
    with pytest.raises(ValueError, match="no rows of lens_gold_probability, which needs label words"):
        trajectory_figure(frame[frame["metric"] != "lens_gold_probability"])
    with pytest.raises(ValueError, match="no rows of accuracy"):
        k_figure(frame[frame["metric"] != "accuracy"])
    with pytest.raises(ValueError, match="no rows of 'sim_aou'"):
        head_figure(heads, "sim_aou")
    with pytest.raises(ValueError, match="no rows of 'demonstration_mass' of 'gd'"):
        head_figure(heads, "demonstration_mass", "gd")
    with pytest.raises(ValueError, match="no rows of 'sim_am' of the model 'other'"):
        head_figure(heads, "sim_am", model="other")
    with pytest.raises(ValueError, match="no column 'head'; give the frame `heads`"):
        head_figure(frame, "sim_am")


def test_values_of_updates_made_in_different_ways_are_not_averaged(found: Comparison):
    frame, heads = (pd.concat([part, part.assign(loss_on="label", seed=part["seed"] + 7)]) for part in (found.frame, found.heads))
    for draw in (smoothing_figure, trajectory_figure, k_figure, lambda _: head_figure(heads, "sim_am")):
        with pytest.raises(ValueError, match="several values of loss_on"):
            draw(frame)
    with pytest.raises(ValueError, match="several values of lr"):
        head_figure(pd.concat([found.heads, found.heads.assign(lr=1.0)]), "sim_am")


def test_drawing_leaves_the_frame_as_it_was(found: Comparison):
    before = [part.copy() for part in (found.frame, found.heads)]
    smoothing_figure(found.frame)
    trajectory_figure(found.frame)
    k_figure(found.frame)
    head_figure(found.heads, "sim_am")
    for part, copy in zip((found.frame, found.heads), before, strict=True):
        pd.testing.assert_frame_equal(part, copy)
