"""A run has every figure that it has the numbers for, and what is written is what was drawn."""

from __future__ import annotations

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from iclgd_lens import Comparison, Protocol, compare, figures, load_task, reproduce, write_figures
from iclgd_lens.views.figures import Drawn
from iclgd_lens.views.kernel_plots import HEAD_METRICS, head_figure

PAPER = {"figure2", "figure3", "figure4"}
HEADS = {f"heads_{metric}" for metric in HEAD_METRICS}
KERNEL_HEADS = HEADS - {"heads_sim_am", "heads_sim_am_delta"}


@pytest.fixture(scope="module")
def plain(bundled) -> dict[int, Comparison]:
    task = load_task("bundled/remapped")
    episodes = {k: task.episode(bundled, k=k, n_queries=4, seed=seed) for seed, k in enumerate((2, 3))}
    return {k: compare(bundled, episode, lr=0.1) for k, episode in episodes.items()}


@pytest.fixture(scope="module")
def drawn(with_kernels) -> dict[str, Drawn]:
    return figures(with_kernels.frames)


def test_kernel_views_add_figures_of_their_own(with_kernels, plain, drawn):
    assert set(figures(plain[2].frames)) == {*PAPER, "trajectories", *HEADS} - KERNEL_HEADS
    assert set(drawn) == {*PAPER, "trajectories", "smoothing", *HEADS}
    assert all(drawn[f"heads_{metric}"].figure == head_figure(with_kernels.heads, metric) for metric in HEAD_METRICS)


def test_a_curve_of_learning_rates_is_drawn_where_there_is_one(bundled, tmp_path):
    protocol = Protocol(
        tasks=("bundled/natural",), seeds=(0,), k=2, n_queries=4, orders=1, lr=0.1, twins=(), lr_curve=True, grid=(0.1, 0.3)
    )
    results = reproduce(bundled, protocol, tmp_path)
    drawn = figures(results.frames)
    assert set(drawn) == {*PAPER, "learning_rate", "trajectories", *HEADS} - KERNEL_HEADS
    marked = drawn["learning_rate"].figure.layout.shapes
    assert {(shape.xref, shape.x0) for shape in marked} == {("x", 0.1), ("x2", 0.1), ("x3", 0.1)}


def test_accuracy_by_k_is_drawn_where_a_draw_has_several(plain):
    as_fits = pd.concat([found.frame for found in plain.values()])
    varied = as_fits.assign(seed=0)
    frames = dict(plain[2].frames)
    assert "accuracy_by_k" not in figures(frames | {"frame": as_fits})
    assert "accuracy_by_k" in figures(frames | {"frame": varied})


def test_rows_are_of_true_updates(with_kernels, drawn):
    assert "random" in set(with_kernels.frame["control"])
    for name, (_, rows) in drawn.items():
        assert set(rows["control"]) == {"none"}
        assert set(rows["model"]) == ({"trained"} if name in ("figure2", "figure4") else {"trained", "untrained"})


def test_what_is_written_are_pages_and_the_rows_that_are_drawn(with_kernels, drawn, tmp_path):
    assert write_figures(with_kernels.frames, tmp_path, pictures=False) == ""
    assert {path.name for path in tmp_path.glob("*.html")} == {f"{name}.html" for name in drawn}
    written = pd.read_csv(tmp_path / "heads_sim_am.csv")
    assert_frame_equal(written, drawn["heads_sim_am"].rows.reset_index(drop=True), check_dtype=False)


def test_what_an_earlier_run_left_is_removed_and_nothing_else(plain, tmp_path):
    left = {"smoothing.png", "learning_rate.html", "heads_demonstration_mass.csv"}
    for name in (*left, "mine.html"):
        (tmp_path / name).write_text("left")
    write_figures(plain[2].frames, tmp_path, pictures=False)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & left
    assert {"mine.html", "figure3.html"} <= names


def test_a_frame_that_cannot_be_drawn_leaves_the_folder_as_it_was(plain, tmp_path):
    (tmp_path / "figure3.html").write_text("left")
    frame = plain[2].frame
    mixed = pd.concat([frame, frame.assign(loss_on="label")])
    with pytest.raises(ValueError, match="several values of loss_on"):
        write_figures(plain[2].frames | {"frame": mixed}, tmp_path, pictures=False)
    assert [path.name for path in tmp_path.iterdir()] == ["figure3.html"]
