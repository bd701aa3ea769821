"""The paper's tables hold the numbers of the run, and the paper's where they belong."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from iclgd_lens import Protocol, load_model, reproduce
from iclgd_lens.experiments.methods import CONTROLS
from iclgd_lens.experiments.paper import AVERAGES, PAPER
from iclgd_lens.experiments.reproduce import Results
from iclgd_lens.views.figures import figures, write_figures
from iclgd_lens.views.paper_tables import TABLES, brief, paper_tables, table1, table2
from iclgd_lens.views.sheets import write_sheets

TASKS = ("bundled/remapped", "bundled/natural")


def run(tmp_path_factory, **options) -> Results:
    given = {"tasks": TASKS, "seeds": (0, 1, 2), "k": 3, "n_queries": 4, "orders": 2, "lr": 0.3, "controls": CONTROLS}
    protocol = Protocol(**{**given, **options})
    return reproduce(load_model("bundled", device="cpu"), protocol, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return run(tmp_path_factory)


@pytest.fixture(scope="module")
def sheets(results) -> dict:
    return {sheet.name: sheet for sheet in paper_tables(results, "bundled")}


def per_seed(frame: pd.DataFrame, **where: str) -> np.ndarray:
    """Layers within an order, orders within a seed, and one number per seed."""
    for column, wanted in {"control": "none", "model": "trained", "subset": "all", **where}.items():
        frame = frame[frame[column] == wanted]
    return frame.groupby(["seed", "order"])["value"].mean().groupby("seed").mean().to_numpy()


def row(sheet, **where: str) -> dict:
    chosen = sheet.numbers
    for column, wanted in where.items():
        chosen = chosen[chosen[column] == wanted]
    (only,) = chosen.to_dict("records")
    return only


def test_table_1_is_mean_and_sd_over_seeds_of_every_model(results, sheets):
    for model in ("trained", "untrained", "untrained, ln kept"):
        where = {"metric": "sim_am_delta", "method": "lcgd", "task": TASKS[1]}
        values = per_seed(results.frame, **where, model=model)
        got = row(sheets["table1"], metric="SimAM_Δ", method="LCGD", task=TASKS[1])
        assert (got[model], got[f"{model} sd"]) == pytest.approx((values.mean(), values.std(ddof=1)))


def test_rows_over_all_tasks_are_means_of_the_tasks_means_beside_the_paper_s(results, sheets):
    means = [per_seed(results.frame, metric="sim_aou", method="gd", task=task).mean() for task in TASKS]
    got = row(sheets["table1"], metric="SimAOU", method="GD", task="all tasks")
    assert got["trained"] == pytest.approx(np.mean(means))
    assert np.isnan(got["trained sd"])


def test_table_2_tests_lcgd_against_gd_paired_by_draw(results, sheets):
    lcgd, gd = (per_seed(results.frame, metric="sim_aou", method=method, task=TASKS[0]) for method in ("lcgd", "gd"))
    test = stats.ttest_rel(lcgd, gd)
    interval = test.confidence_interval()
    got = row(sheets["table2"], metric="SimAOU", task=TASKS[0])
    assert (got["lcgd"], got["gd"]) == pytest.approx((lcgd.mean(), gd.mean()))
    assert (got["low"], got["high"], got["p"]) == pytest.approx((interval.low, interval.high, test.pvalue))
    assert got["draws"] == 3
    assert row(sheets["table2"], metric="SimAOU", task="all tasks")["draws"] == 6


def test_table_3_is_the_setting_that_was_used(sheets):
    got = row(sheets["table3"], task=TASKS[0])
    assert (got["model"], got["k"], got["queries"], got["seeds"], got["orders"]) == ("bundled", "3", "4", "0, 1, 2", 2)
    assert (got["lr gd"], got["lr lcgd"], got["rates from"]) == (0.3, 0.3, "given")


def test_the_paper_s_figures_stand_beside_its_tasks_alone(tmp_path_factory, results):
    frame = results.frame.replace({"task": {TASKS[0]: "cb", TASKS[1]: "mine"}})
    rates = results.rates.replace({"task": {TASKS[0]: "cb", TASKS[1]: "mine"}})
    protocol = Protocol(("cb",), lr="paper", controls=())
    renamed = replace(results, protocol=protocol, frame=frame, rates=rates)
    table2 = {sheet.name: sheet for sheet in paper_tables(renamed, "m")}["table2"]
    cb = row(table2, metric="SimAOU_norm", task="cb")
    assert (cb["paper gd"], cb["paper lcgd"]) == PAPER["cb"].sim_aou_norm
    assert np.isnan(row(table2, metric="SimAOU", task="cb")["paper gd"])
    assert np.isnan(row(table2, metric="SimAM_Δ", task="mine")["paper gd"])


def test_the_paper_s_averages_stand_beside_averages_over_its_six_tasks_alone(results, sheets):
    one = results.frame[results.frame["task"] == TASKS[0]]
    of_six = pd.concat([one.replace({"task": {TASKS[0]: task}}) for task in PAPER])
    got = row(table2(of_six), metric="SimAM_Δ", task="all tasks")
    assert (got["paper gd"], got["paper lcgd"]) == AVERAGES["sim_am_delta"] == (0.267, 0.336)
    assert row(table1(of_six), metric="SimAOU", method="GD", task="all tasks")["paper"] == "0.102 (tasks 0.04 to 0.17)"
    assert np.isnan(row(sheets["table2"], metric="SimAM_Δ", task="all tasks")["paper gd"])
    assert row(sheets["table1"], metric="SimAM_Δ", method="GD", task="all tasks")["paper"] == "–"


def test_dai_s_table_tells_all_queries_from_false_to_true_ones(results, sheets):
    of = {"metric": "sim_am", "method": "gd", "task": TASKS[0]}
    for subset, name in (("all", "all"), ("false_to_true", "false to true")):
        values = per_seed(results.frame, **of, subset=subset)
        got = row(sheets["dai"], task=TASKS[0], method="GD", queries=name)
        assert got["sim_am"] == pytest.approx(np.nanmean(values), nan_ok=True)


def test_outputs_hold_agreement_with_icl_and_spread_over_orders(results, sheets):
    got = row(sheets["outputs"], task=TASKS[0], run="FT by GD")
    values = per_seed(results.frame, metric="js_divergence", method="gd", task=TASKS[0])
    assert got["js_divergence"] == pytest.approx(values.mean())
    assert 0 <= got["probability_sd"] < 0.8
    assert np.isnan(row(sheets["outputs"], task=TASKS[0], run="ZSL")["probability_sd"])


def test_every_control_is_a_column(results, sheets):
    for control in ("none", *CONTROLS):
        values = per_seed(results.frame, metric="sim_aou", method="gd", task=TASKS[0], control=control)
        assert row(sheets["controls"], metric="SimAOU", method="GD", task=TASKS[0])[control] == pytest.approx(values.mean())


def test_a_mean_over_all_tasks_is_left_out_where_a_task_has_none(results):
    some = results.frame[(results.frame["task"] == TASKS[0]) | (results.frame["method"] != "lcgd")]
    got = row(table2(some), metric="SimAOU", task="all tasks")
    assert np.isnan([got["lcgd"], got["mean"], got["p"]]).all()
    assert not np.isnan(got["gd"])


def test_what_an_earlier_run_left_is_removed_and_nothing_else(results, tmp_path):
    (tmp_path / "mine.md").write_text("kept")
    for name in ("table1.md", "controls.csv"):
        (tmp_path / name).write_text("left")
    write_sheets([table2(results.frame)], tmp_path, TABLES)
    names = {path.name for path in tmp_path.iterdir()}
    assert not names & {"table1.md", "controls.csv"}
    assert {"mine.md", "table2.md"} <= names


def test_a_brief_table_of_claims_is_over_all_tasks(sheets):
    assert set(brief(sheets["claims"]).numbers["task"]) == {"all tasks"}
    assert brief(sheets["table1"]) is sheets["table1"]


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ({"methods": ("gd",)}, {"table2"}),
        ({"methods": ("lcgd",)}, {"table2"}),
        ({"twins": ()}, {"table1"}),
        ({"controls": ()}, {"controls"}),
        ({"lr": 1e30}, {"table1", "table2", "dai", "controls", "claims"}),
    ],
    ids=["GD alone", "LCGD alone", "no twins", "no controls", "diverged"],
)
@pytest.mark.parametrize("tasks", [TASKS[:1], TASKS], ids=["one task", "two tasks"])
def test_a_run_with_less_has_the_tables_and_figures_that_it_has_numbers_for(tmp_path_factory, tmp_path, tasks, options, missing):
    small = {"tasks": tasks, "seeds": (0,), "k": 2, "orders": 1, "controls": ("permuted",), **options}
    results = run(tmp_path_factory, **small)
    sheets = paper_tables(results, "bundled")
    assert {sheet.name for sheet in sheets} == {"table1", "table2", "table3", "dai", "outputs", "controls", "claims"} - missing
    for sheet in sheets:
        assert len(sheet.cells) == len(sheet.numbers) > 0
        assert sheet.latex()
        assert sheet.markdown()
    assert write_figures(results.frames, tmp_path, pictures=False) == ""
    assert ("figure3" in figures(results.frames)) == (options.get("lr") is None)
