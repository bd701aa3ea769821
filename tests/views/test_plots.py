"""Figures show the numbers of their frames, and only what the frame has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from iclgd_lens import Comparison, load_task
from iclgd_lens.experiments.learning_rate import similarity_by_rate
from iclgd_lens.views.figure_style import COLOURS, shown_text, shown_texts, tick_step
from iclgd_lens.views.plots import SIMILARITIES, alpha_figure, gradient_figure, layer_figure, rate_figure
from tests.views.frames import TASKS, drawn_again, moments, of, place, titles, units

SEEDS = (0, 1, 2)
RATES = (0.01, 0.1)


@pytest.mark.parametrize(
    ("largest", "step"), [(0, 1), (3, 1), (6, 1), (7, 2), (12, 2), (23, 5), (30, 5), (31, 10), (47, 10), (61, 20)]
)
def test_ticks_are_few_and_on_round_numbers(largest, step):
    assert tick_step(largest) == step


def test_long_names_that_differ_are_told_apart():
    assert shown_texts(["one", "other", "one"], 24) == ["one", "other", "one"]
    names = [f"organisation/{letter}-a-data-set-with-a-long-name" for letter in "ab"]
    assert shown_texts(names, 24) == ["…a-a-data-s…-a-long-name", "…b-a-data-s…-a-long-name"]


def test_names_are_shown_letter_by_letter_and_no_longer_than_there_is_room():
    assert shown_text("a <b>task</b> & $x$") == "a &lt;b&gt;task&lt;/b&gt; &amp; &#36;x&#36;"
    assert shown_text("bundled/remapped", 16) == "bundled/remapped"
    assert shown_text("bundled/remapped", 9) == "bund…pped"


@pytest.fixture(scope="module")
def found(with_kernels) -> Comparison:
    """Two tasks, three draws and a twin, with what no figure shows: a control and, in one draw, a second order."""
    draws = [{"task": task, "seed": seed} for task in TASKS for seed in SEEDS] + [{"task": TASKS[0], "seed": SEEDS[0], "order": 1}]
    return Comparison.concatenated([drawn_again(with_kernels, number, **about) for number, about in enumerate(draws)])


@pytest.fixture(scope="module")
def curve(bundled) -> pd.DataFrame:
    episodes = [load_task(task).episode(bundled, k=3, n_queries=4, seed=seed) for task in TASKS for seed in SEEDS[:2]]
    return similarity_by_rate(bundled, episodes, grid=RATES)


@pytest.fixture(scope="module", params=[TASKS, TASKS[1:]], ids=["two_tasks", "one_task"])
def tasks(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def test_alpha_bars_are_means_over_draws_and_their_errors_sds(found: Comparison, tasks: tuple[str, ...]):
    frame = of(found.frame, tasks)
    figure = alpha_figure(frame)
    assert [trace.name for trace in figure.data] == ["α of h", "α of m"]
    for trace, metric in zip(figure.data, ("alpha_aou", "alpha_am"), strict=True):
        assert (trace.type, trace.marker.color) == ("bar", COLOURS[metric])
        assert [figure.layout.xaxis.ticktext[x] for x in trace.x] == list(tasks)
        for task, height, error in zip(tasks, trace.y, trace.error_y.array, strict=True):
            assert (height, error) == pytest.approx(moments(frame, task=task, metric=metric, model="trained"), abs=1e-9)
    assert figure.layout.yaxis.title.text == "cosine, mean over layers"
    assert f"n = 3 draws{' per task' if len(tasks) > 1 else ''}," in figure.layout.title.text


def test_layer_bars_are_trained_and_dotted_lines_untrained(found: Comparison, tasks: tuple[str, ...]):
    frame = of(found.frame, tasks)
    figure = layer_figure(frame)
    assert len(figure.data) == len(tasks) * 2 * 2 * 2
    seen = set()
    for trace in figure.data:
        model = "trained" if trace.type == "bar" else "untrained"
        method = trace.name.split(",")[0].lower()
        task, metric = tasks[place(trace) // 2], SIMILARITIES[place(trace) % 2]
        seen.add((model, method, task, metric))
        assert list(trace.x) == [0, 1, 2, 3]
        for layer in trace.x:
            mean, sd = moments(frame, task=task, metric=metric, model=model, method=method, layer=layer)
            assert trace.y[layer] == pytest.approx(mean, abs=1e-9)
            if model == "trained":
                assert trace.error_y.array[layer] == pytest.approx(sd, abs=1e-9)
        if model == "trained":
            assert trace.marker.color == COLOURS[method]
        else:
            assert (trace.line.color, trace.line.dash) == (COLOURS[method], "dot")
    assert len(seen) == len(figure.data)


def test_layer_figure_names_its_axes_and_panels_and_every_series_once(found: Comparison, tasks: tuple[str, ...]):
    figure = layer_figure(of(found.frame, tasks))
    panels = ["SimAOU", "SimAM_Δ"]
    assert titles(figure) == [
        *([f"{task}<br>{panel}" for task in tasks for panel in panels] if len(tasks) > 1 else panels),
        "layer",
    ]
    assert units(figure) == ["cosine"] * len(tasks)
    legend = [trace.name for trace in figure.data if trace.showlegend]
    assert sorted(legend) == ["GD", "GD, untrained", "LCGD", "LCGD, untrained"]
    assert "mean ± sd" in figure.layout.title.text


def test_several_twins_have_dashes_of_their_own(found: Comparison, curve: pd.DataFrame):
    other = found.frame[found.frame["model"] == "untrained"].assign(model="untrained 1")
    of_layers = layer_figure(pd.concat([found.frame, other]))
    of_rates = rate_figure(pd.concat([curve, *(curve.assign(model=model) for model in ("untrained", "untrained 1"))]))
    for figure in (of_layers, of_rates):
        dashes = {trace.name: trace.line.dash for trace in figure.data if "untrained" in trace.name}
        assert dashes == {
            f"{method}, {model}": dash
            for method in ("GD", "LCGD")
            for model, dash in (("untrained", "dot"), ("untrained 1", "dash"))
        }


def test_layer_figure_does_without_a_twin_a_method_or_a_second_draw(found: Comparison):
    frame = found.frame[(found.frame["model"] == "trained") & (found.frame["method"] != "lcgd") & (found.frame["seed"] == 1)]
    figure = layer_figure(frame)
    assert [trace.name for trace in figure.data] == ["GD"] * 4
    assert all(np.isnan(trace.error_y.array).all() for trace in figure.data)
    assert "n = 1 draw per task" in figure.layout.title.text


def test_one_metric_alone_has_a_legend_too(found: Comparison):
    figure = layer_figure(found.frame[found.frame["metric"] == "sim_am_delta"])
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == ["GD", "GD, untrained", "LCGD", "LCGD, untrained"]


def test_heat_maps_are_mean_gradient_norms_and_lcgd_s_their_decimal_logarithms(found: Comparison, tasks: tuple[str, ...]):
    gradients = of(found.gradients, tasks)
    figure = gradient_figure(gradients)
    assert len(figure.data) == 2 * len(tasks)
    for trace in figure.data:
        task, method = tasks[place(trace) // 2], ("gd", "lcgd")[place(trace) % 2]
        chosen = gradients[(gradients["task"] == task) & (gradients["method"] == method) & (gradients["model"] == "trained")]
        assert (list(trace.y), list(trace.x)) == ([0, 1, 2, 3], [0, 1, 2])
        for layer in trace.y:
            for step in trace.x:
                mean = chosen[(chosen["layer"] == layer) & (chosen["step"] == step)]["gradient_norm"].mean()
                assert trace.z[layer][step] == pytest.approx(mean if method == "gd" else np.log10(mean), abs=1e-9)
                assert trace.customdata[layer][step] == pytest.approx(mean)
    assert titles(figure)[-1] == "demonstration"
    assert units(figure) == ["layer"] * len(tasks)
    assert [title.split("<br>")[-1] for title in titles(figure)[:-1]] == ["GD", "LCGD, log scale"] * len(tasks)


def test_ticks_of_a_log_scale_stand_at_the_logarithms_of_what_they_say(found: Comparison):
    for trace in gradient_figure(found.gradients).data:
        if place(trace) % 2:
            ticks, texts = trace.colorbar.tickvals, trace.colorbar.ticktext
            assert len(ticks) > 0
            assert list(ticks) == pytest.approx([np.log10(float(text)) for text in texts])
            assert np.min(trace.z) <= min(ticks) <= max(ticks) <= np.max(trace.z)
        else:
            assert trace.colorbar.tickvals is None


def norms(values: dict[str, list[list[float]]], **about: Any) -> pd.DataFrame:
    """Gradient norms `[layer step]` by method."""
    base = {"task": "t", "k": 2, "seed": 0, "order": 0, "model": "trained", "control": "none"} | about
    return pd.DataFrame(
        [
            base | {"method": method, "layer": layer, "step": step, "gradient_norm": norm}
            for method, rows in values.items()
            for (layer, step), norm in np.ndenumerate(np.array(rows))
        ]
    )


def test_a_gradient_of_zero_is_blank_on_a_log_scale_and_zero_on_the_other():
    grid = [[0.0, 10.0], [100.0, 0.01]]
    gd, lcgd = gradient_figure(norms({"gd": grid, "lcgd": grid})).data
    np.testing.assert_allclose(gd.z, grid)
    np.testing.assert_allclose(lcgd.z, [[np.nan, 1], [2, -2]], atol=1e-12)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_gradients_that_are_all_zero_are_drawn_blank():
    (trace,) = gradient_figure(norms({"lcgd": [[0.0, 0.0]]})).data
    assert np.isnan(trace.z).all()


def test_heat_maps_leave_twins_out_and_average_before_the_logarithm():
    frame = pd.concat([norms({"lcgd": [[1.0]]}), norms({"lcgd": [[3.0]]}, seed=1), norms({"lcgd": [[500.0]]}, model="untrained")])
    (trace,) = gradient_figure(frame).data
    assert trace.z[0][0] == pytest.approx(np.log10(2))


def test_rate_curves_are_means_over_draws_by_rate(curve: pd.DataFrame, tasks: tuple[str, ...]):
    frame = of(curve, tasks)
    figure = rate_figure(frame)
    metrics = (*SIMILARITIES, "accuracy")
    assert len(figure.data) == len(tasks) * 3 * 2
    for trace in figure.data:
        task, metric, method = tasks[place(trace) // 3], metrics[place(trace) % 3], trace.name.lower()
        assert list(trace.x) == list(RATES)
        assert trace.line.color == COLOURS[method]
        for lr, mean, sd in zip(trace.x, trace.y, trace.error_y.array, strict=True):
            assert (mean, sd) == pytest.approx(moments(frame, task=task, metric=metric, method=method, lr=lr), abs=1e-9)
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == ["GD", "LCGD"]
    assert {figure.layout[name].type for name in figure.layout if name.startswith("xaxis")} == {"log"}
    assert "learning rate" in titles(figure)
    panels = [title.split("<br>")[-1] for title in titles(figure)[:3]]
    assert panels[:2] == ["SimAOU", "SimAM_Δ"]
    assert "accuracy" in panels[2]


def test_rate_curves_run_from_small_rates_to_large(curve: pd.DataFrame):
    assert all(list(trace.x) == list(RATES) for trace in rate_figure(curve[::-1]).data)


def test_rates_in_use_are_marked_in_every_panel_of_their_task_and_method(curve: pd.DataFrame):
    used = {(TASKS[0], "gd"): 0.01, (TASKS[0], "lcgd"): 0.1, (TASKS[1], "gd"): 0.03}
    rates = pd.DataFrame([{"task": task, "method": method, "lr": lr} for (task, method), lr in used.items()])
    found = [(int(shape.xref[1:] or 1) - 1, shape.x0, shape.line.color) for shape in rate_figure(curve, rates).layout.shapes]
    expected = [(3 * TASKS.index(task) + panel, lr, COLOURS[m]) for (task, m), lr in used.items() for panel in range(3)]
    assert sorted(found) == sorted(expected)
    assert not rate_figure(curve).layout.shapes


def test_one_rate_of_both_methods_is_marked_in_the_colour_of_neither(curve: pd.DataFrame):
    rates = pd.DataFrame([{"task": TASKS[0], "method": method, "lr": 0.1} for method in ("gd", "lcgd")])
    shapes = rate_figure(curve, rates).layout.shapes
    assert len(shapes) == 3
    assert not {shape.line.color for shape in shapes} & set(COLOURS.values())


def test_rates_close_together_are_ticks_themselves(curve: pd.DataFrame):
    narrow = rate_figure(curve.assign(lr=curve["lr"].map({lr: 0.02 + 0.01 * place for place, lr in enumerate(RATES)})))
    assert list(narrow.layout.xaxis.ticktext) == [f"{0.02 + 0.01 * place:g}" for place in range(len(RATES))]
    wide = rate_figure(pd.concat([curve, curve.assign(lr=curve["lr"] * 1000)]))
    assert (wide.layout.xaxis.dtick, wide.layout.xaxis.ticktext) == (1, None)


def test_axes_of_rate_curves_have_their_units(curve: pd.DataFrame):
    figure = rate_figure(curve)
    panels = [figure.get_subplot(1, column + 1).yaxis.title.text for column in range(3)]
    assert panels == ["cosine", "cosine", "share of queries"]


def test_several_k_in_one_mean_are_told(found: Comparison):
    both = pd.concat([found.frame, found.frame.assign(k=6)])
    assert "n = 6 draws per task of k = 3, 6, mean" in layer_figure(both).layout.title.text
    assert "k =" not in layer_figure(found.frame).layout.title.text


def test_steps_of_several_epochs_are_not_called_demonstrations(found: Comparison):
    assert titles(gradient_figure(found.gradients.assign(epochs=2)))[-1].startswith("step")


def test_a_rate_at_which_a_method_diverged_is_a_point_less(curve: pd.DataFrame):
    figure = rate_figure(curve[(curve["method"] == "gd") | (curve["lr"] < 0.1)])
    assert {trace.name: list(trace.x) for trace in figure.data} == {"GD": list(RATES), "LCGD": [0.01]}


def test_a_method_has_one_colour_in_all_figures(found: Comparison, curve: pd.DataFrame):
    colours: dict[str, set[str]] = {"GD": set(), "LCGD": set()}
    for figure in (layer_figure(found.frame), rate_figure(curve)):
        for trace in figure.data:
            colours[trace.name.split(",")[0]].add(trace.marker.color if trace.type == "bar" else trace.line.color)
    assert colours == {"GD": {COLOURS["gd"]}, "LCGD": {COLOURS["lcgd"]}}
    assert len(set(COLOURS.values())) == len(COLOURS)


def test_frames_without_the_rows_of_a_figure_are_refused(found: Comparison, curve: pd.DataFrame):
    frame = found.frame
    with pytest.raises(ValueError, match="no rows of α"):
        alpha_figure(frame[~frame["metric"].str.startswith("alpha")])
    with pytest.raises(ValueError, match="no rows of α"):
        alpha_figure(frame[frame["model"] == "untrained"])
    with pytest.raises(ValueError, match="no rows of SimAOU or SimAM_Δ"):
        layer_figure(frame[frame["metric"] == "sim_am"])
    with pytest.raises(ValueError, match="no rows of SimAOU or SimAM_Δ"):
        layer_figure(frame[frame["control"] == "random"])
    with pytest.raises(ValueError, match="no rows of gradients of a trained model"):
        gradient_figure(found.gradients[found.gradients["model"] == "untrained"])
    with pytest.raises(ValueError, match="no rows of SimAOU, SimAM_Δ or accuracy"):
        rate_figure(curve[curve["metric"] == "label_loss"])


def test_a_frame_of_runs_without_updates_alone_is_refused(found: Comparison):
    with pytest.raises(ValueError, match="no rows of SimAOU, SimAM_Δ or accuracy"):
        rate_figure(found.frame[found.frame["method"].isin(["zsl", "icl"])])


def test_similarities_of_updates_made_in_different_ways_are_not_averaged(curve: pd.DataFrame):
    with pytest.raises(ValueError, match="several values of lr"):
        layer_figure(curve)


def test_gradients_of_updates_made_in_different_ways_are_not_averaged(found: Comparison):
    with pytest.raises(ValueError, match="several values of lr"):
        gradient_figure(pd.concat([found.gradients, found.gradients.assign(lr=1.0)]))


def test_drawing_leaves_the_frame_as_it_was(found: Comparison, curve: pd.DataFrame):
    before = [frame.copy() for frame in (found.frame, found.gradients, curve)]
    alpha_figure(found.frame)
    layer_figure(found.frame)
    gradient_figure(found.gradients)
    rate_figure(curve)
    for frame, copy in zip((found.frame, found.gradients, curve), before, strict=True):
        pd.testing.assert_frame_equal(frame, copy)
