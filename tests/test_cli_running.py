"""Commands that compare episode by episode keep what is done, and close a run's folder with what was asked for."""

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from rich.progress import Progress

from iclgd_lens import attention_example, compare, gd, lcgd, load_task, untrained_twin
from iclgd_lens.cli import running
from iclgd_lens.cli.running import close_run, compare_episodes
from iclgd_lens.experiments import compare as comparing
from iclgd_lens.experiments.comparison import Comparison

TASK = load_task("bundled/remapped")
SMALL = {"k": 3, "queries": 4, "about": "running", "controls": (), "lr": 0.1}


@pytest.fixture(scope="module")
def done(bundled, tmp_path_factory):
    """The folder of two episodes, and what was found."""
    out = tmp_path_factory.mktemp("done")
    return out, compare_episodes(bundled, TASK, out, seeds=(0, 1), twins=True, **SMALL)


def test_every_episode_stands_beside_a_twin_of_its_own_seed(bundled, done):
    out, found = done
    each = [
        compare(
            bundled,
            TASK.episode(bundled, k=3, n_queries=4, seed=seed),
            untrained=untrained_twin(bundled, seed=seed),
            controls=(),
            lr=0.1,
        )
        for seed in (0, 1)
    ]
    expected = Comparison.concatenated(each)
    assert_frame_equal(found.frame, expected.frame)
    assert_frame_equal(pd.read_parquet(out / "heads.parquet"), expected.heads)


def test_episodes_that_were_done_are_kept_when_a_later_one_fails_and_no_report_of_an_earlier_run(bundled, monkeypatch, tmp_path):
    finished = []

    def second_fails(*arguments, **options):
        if finished:
            raise RuntimeError("out of memory")
        finished.append(compare(*arguments, **options))
        return finished[0]

    monkeypatch.setattr(comparing, "compare", second_fails)
    for left in ("setting.json", "attention.json", "report.html"):
        (tmp_path / left).write_text("of the run before")
    with pytest.raises(RuntimeError, match="out of memory"):
        compare_episodes(bundled, TASK, tmp_path, seeds=(5, 6), twins=False, **SMALL)
    assert_frame_equal(pd.read_parquet(tmp_path / "frame.parquet"), finished[0].frame)
    assert not {"setting.json", "attention.json", "report.html"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("twins", "kernels"), [(False, True), (True, False)])
def test_progress_ends_at_the_total_that_was_announced(bundled, monkeypatch, tmp_path, twins, kernels):
    progress = Progress(disable=True)
    monkeypatch.setattr(running, "progress_bar", lambda: progress)
    compare_episodes(bundled, TASK, tmp_path, seeds=(0,), twins=twins, kernels=kernels, **SMALL)
    (bar,) = progress.tasks
    assert bar.completed == bar.total > 0


def test_the_example_has_the_rates_and_options_of_the_run(bundled, done):
    out, _ = done
    episode = TASK.episode(bundled, k=3, n_queries=4, seed=0)
    rates, options = {"gd": 0.1, "lcgd": 3.0}, {"loss_on": "label", "readout": "labels"}
    close_run(out, bundled, "bundled", {"command": "demo"}, episode, rates, options)
    made = {
        name: method(bundled, episode.demonstrations, lr=rates[name], label_tokens=episode.label_tokens, **options)
        for name, method in (("gd", gd), ("lcgd", lcgd))
    }
    attention_example(bundled, episode, made, range(4)).save(out / "expected.json")
    assert (out / "attention.json").read_text() == (out / "expected.json").read_text()
