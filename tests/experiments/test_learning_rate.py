"""Learning rates are chosen by what finetuning does to the task, on held-out draws, and by nothing else."""

import pandas as pd
import pytest
import torch

from iclgd_lens import accuracy, capture, compare, gd, lcgd, load_task
from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments import learning_rate
from iclgd_lens.experiments.learning_rate import GRID, choose, held_out_seeds, search, similarity_by_rate
from iclgd_lens.experiments.paper import PAPER
from iclgd_lens.models.hooked import HookedTransformer


def searched(*rows: tuple[str, float, int, float, float]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["method", "lr", "seed", "accuracy", "label_loss"])


def test_held_out_seeds_are_never_reported_ones():
    assert held_out_seeds((0, 1, 2)) == (1000, 1001, 1002)
    assert held_out_seeds((1000, 1002), 3) == (1001, 1003, 1004)


def test_the_grid_spans_the_paper_s_rates_with_room_on_both_sides():
    rates = [task.lr for task in PAPER.values()]
    assert min(GRID) < min(rates) / 10
    assert max(GRID) > max(rates) * 10
    assert list(GRID) == sorted(set(GRID))


def test_accuracy_decides_then_loss_then_the_smaller_rate():
    assert choose(searched(("gd", 0.1, 0, 0.9, 2.0), ("gd", 1.0, 0, 0.8, 0.1))) == {"gd": 0.1}
    assert choose(searched(("gd", 0.1, 0, 0.9, 2.0), ("gd", 1.0, 0, 0.9, 0.1))) == {"gd": 1.0}
    assert choose(searched(("gd", 1.0, 0, 0.9, 0.1), ("gd", 0.1, 0, 0.9, 0.1))) == {"gd": 0.1}


def test_means_over_draws_decide_and_methods_choose_apart():
    frame = searched(
        ("gd", 0.1, 0, 1.0, 0.5),
        ("gd", 0.1, 1, 0.0, 0.5),
        ("gd", 1.0, 0, 0.6, 0.5),
        ("gd", 1.0, 1, 0.6, 0.5),
        ("lcgd", 0.1, 0, 1.0, 1.0),
    )
    assert choose(frame) == {"gd": 1.0, "lcgd": 0.1}


def test_a_rate_that_diverged_on_any_draw_is_out_and_all_diverging_is_refused():
    nan = float("nan")
    frame = searched(("gd", 0.1, 0, 0.5, 0.5), ("gd", 0.1, 1, 0.5, 0.5), ("gd", 1.0, 0, 1.0, 0.1), ("gd", 1.0, 1, nan, nan))
    assert choose(frame) == {"gd": 0.1}
    with pytest.raises(ValueError, match=r"gd diverged at every learning rate tried \(1\)"):
        choose(frame[frame["lr"] == 1.0])


def test_search_measures_accuracy_and_loss_of_the_finetuned_model(bundled: HookedTransformer, episode: Episode):
    frame = search(bundled, [episode], grid=[0.01, 0.1]).set_index(["method", "lr"])
    for method in (gd, lcgd):
        run = capture(bundled, episode.queries, update=method(bundled, episode.demonstrations, lr=0.1))
        row = frame.loc[(method.__name__, 0.1)]
        assert row["accuracy"] == pytest.approx(float(accuracy(run)))
        expected = torch.nn.functional.cross_entropy(run.label_log_probs, run.labels)
        assert row["label_loss"] == pytest.approx(float(expected), abs=1e-5)


def test_no_in_context_run_is_made_in_a_search(bundled: HookedTransformer, episode: Episode, monkeypatch: pytest.MonkeyPatch):
    def without_context(*arguments, **options):
        assert options.get("context") is None
        assert options["keep"] == ["label_log_probs"]
        return capture(*arguments, **options)

    monkeypatch.setattr(learning_rate, "capture", without_context)
    assert len(search(bundled, [episode], grid=[0.1])) == 2


def test_divergence_is_recorded_with_its_reason_and_the_search_goes_on(bundled: HookedTransformer, episode: Episode):
    ticks = []
    frame = search(bundled, [episode], ["gd"], grid=[1e30, 0.1], on_run=lambda: ticks.append(1))
    assert "lr=1e+30 made the gd update non-finite" in frame["problem"].iloc[0]
    assert frame["accuracy"].isna().tolist() == [True, False]
    assert choose(frame) == {"gd": 0.1}
    assert len(ticks) == 2


def test_the_curve_holds_what_compare_says_at_every_rate(bundled: HookedTransformer, episode: Episode):
    curve = similarity_by_rate(bundled, [episode], grid=[0.01, 0.1, 1e30])
    assert set(curve["lr"]) == {0.01, 0.1}
    alone = compare(bundled, episode, lr=0.1, controls=()).frame
    where = "method == 'lcgd' and metric == 'sim_aou' and subset == 'all'"
    got = curve[curve["lr"] == 0.1].query(where)["value"].tolist()
    assert got == pytest.approx(alone.query(where)["value"].tolist(), abs=1e-6)


def test_tuning_queries_of_a_task_with_a_query_split_come_from_its_training_rows(bundled: HookedTransformer):
    rows = [{"text": word, "label": index % 2} for index, word in enumerate(["lion", "rain", "bread", "snow", "tiger", "cheese"])]
    task = load_task("bundled/natural").from_rows(
        rows[:4], name="t", template="Words: {text} Label:", labels=["alpha", "beta"], query_rows=rows[4:]
    )
    for seed in range(5):
        drawn = task.for_tuning().episode(bundled, k=2, n_queries=9, seed=seed)
        seen = {bundled.tokenizer.decode(each.tokens) for each in drawn.queries}
        reported = {bundled.tokenizer.decode(each.tokens) for each in task.episode(bundled, k=2, seed=seed).queries}
        assert len(drawn.queries) == 2
        assert not seen & reported
