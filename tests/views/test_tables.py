"""Tables and the verdict say what the frame says."""

import pandas as pd
import pytest
from rich.console import Console

from iclgd_lens import compare, load_task
from iclgd_lens.views.sheets import Sheet
from iclgd_lens.views.tables import accuracy_table, layer_table, similarity_table, verdict


def shown(sheet: Sheet) -> str:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(sheet.rich())
    return captured.get()


@pytest.fixture(scope="module")
def frame(bundled, twin) -> pd.DataFrame:
    task = load_task("bundled/remapped")
    episodes = (task.episode(bundled, k=4, n_queries=6, seed=seed) for seed in range(3))
    return pd.concat([compare(bundled, episode, untrained=twin).frame for episode in episodes], ignore_index=True)


def test_accuracy_table_shows_every_run_of_both_models(frame: pd.DataFrame):
    text = shown(accuracy_table(frame))
    for name in ("ZSL", "ICL", "FT by GD", "FT by LCGD", "trained", "untrained"):
        assert name in text
    icl = frame.query("metric == 'accuracy' and method == 'icl' and model == 'trained'")["value"].mean()
    (line,) = [line for line in text.splitlines() if line.startswith("ICL ")]
    assert f"{icl:.3f}" in line


def test_similarity_table_puts_trained_beside_untrained_beside_random(frame: pd.DataFrame):
    text = shown(similarity_table(frame))
    (line,) = [line for line in text.splitlines() if "SimAOU " in line and " LCGD " in line]
    of_metric = frame.query("metric == 'sim_aou' and method == 'lcgd' and subset == 'all'")
    for condition in (("trained", "none"), ("untrained", "none"), ("trained", "random")):
        mean = of_metric.set_index(["model", "control"]).loc[condition, "value"].mean()
        assert f"{mean:+.3f} ±".replace("-", "−") in line
    assert text.count("SimAM ") == text.count("SimAM, ZSL ref.") == 2


def test_layer_table_has_a_row_for_every_metric_method_and_model(frame: pd.DataFrame):
    text = shown(layer_table(frame))
    assert sum("Sim" in line for line in text.splitlines()) == 2 * 2 * 2
    assert "layer 3" in text


def test_tables_do_without_a_twin(frame: pd.DataFrame):
    alone = frame[frame["model"] == "trained"]
    assert "untrained" not in shown(accuracy_table(alone))
    assert "untrained" not in shown(layer_table(alone))
    assert "–" in shown(similarity_table(alone))
    assert "no evidence" in verdict(alone)


def shifted(frame: pd.DataFrame, by: float, method: str) -> pd.DataFrame:
    changed = frame.copy()
    changed.loc[(changed["model"] == "trained") & (changed["method"] == method), "value"] += by
    return changed


def test_the_verdict_names_a_method_only_where_its_interval_is_above_the_twin(frame: pd.DataFrame):
    assert ". GD measurably exceeds" in verdict(shifted(shifted(frame, 5, "gd"), -5, "lcgd"))
    assert ". GD and LCGD measurably exceed an" in verdict(shifted(shifted(frame, 5, "gd"), 5, "lcgd"))
    assert "No method measurably exceeds" in verdict(shifted(shifted(frame, -5, "gd"), -5, "lcgd"))


def test_a_method_above_its_twin_on_average_only_is_not_named(frame: pd.DataFrame):
    spread = shifted(shifted(frame, -5, "gd"), 1, "lcgd")
    one_episode = (spread["seed"] == 0) & (spread["model"] == "trained") & (spread["method"] == "lcgd")
    spread.loc[one_episode, "value"] += 100
    assert "No method measurably exceeds" in verdict(spread)


def test_every_twin_must_be_exceeded(frame: pd.DataFrame):
    above = shifted(shifted(frame, 5, "gd"), 5, "lcgd")
    as_good = above[above["model"] == "trained"].assign(model="untrained, ln kept")
    text = verdict(pd.concat([above, as_good]))
    assert "No method measurably exceeds all 2 untrained twins" in text
    assert "GD trained − untrained, ln kept +0.000 [+0.000, +0.000]" in text
    lower = as_good.assign(value=as_good["value"] - 3)
    assert "GD and LCGD measurably exceed all 2 untrained twins" in verdict(pd.concat([above, lower]))


def test_what_a_method_that_diverged_lacks_is_said(frame: pd.DataFrame):
    lcgd = frame["method"] == "lcgd"
    gone = verdict(frame[~(lcgd & (frame["model"] == "trained"))])
    assert "LCGD − GD is not defined; " in gone
    assert "LCGD trained − untrained is not defined." in gone
    once = verdict(frame[~(lcgd & (frame["seed"] == 0))])
    assert f" in {frame['seed'].nunique() - 1} of them; " in once


def test_without_any_interval_nothing_is_claimed(frame: pd.DataFrame):
    one = frame[frame["seed"] == 0]
    text = verdict(pd.concat([one, one.assign(task="another")]))
    assert "over 2 episodes" in text
    assert "So few episodes say nothing about how sure these differences are." in text


def test_the_verdict_of_one_episode_claims_nothing(frame: pd.DataFrame):
    text = verdict(frame[frame["seed"] == 0])
    assert "over 1 episode:" in text
    assert "no interval" in text
    assert "One episode says nothing" in text
