"""Cells whose prompts a study writes otherwise say so in every row, and are never averaged with others."""

from pathlib import Path

import pytest

from iclgd_lens import Study, contrasts, load_results, run_sweep, summarise
from tests.experiments.trivial_cells import Trivial

SMALL = {"models": "bundled", "tasks": "bundled/remapped", "k": 2, "queries": 2, "lr": 0.1, "controls": [], "twins": []}
OWN = ("the task's own", "the task's own")


def study(**changes: object) -> Study:
    return Study(**{"executor": {"kind": "debug"}, "seeds": 0, "methods": "gd", **SMALL, **changes})


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three studies in one folder."""
    folder = tmp_path_factory.mktemp("sweeps")
    run_sweep(study(), folder, name="own")
    run_sweep(study(separator=" table"), folder, name="comma")
    run_sweep(study(space_before_labels=False), folder, name="no_space")
    return folder


def written(frame) -> set[tuple[str, str]]:
    return set(frame[["separator", "space_before_labels"]].itertuples(index=False, name=None))


def test_rows_say_how_their_prompts_were_written(out):
    assert written(load_results(out, "own").frame()) == {OWN}
    assert written(load_results(out, "comma").frame("per_query")) == {('" table"', "the task's own")}
    assert written(load_results(out, "no_space").frame()) == {("the task's own", "no")}


def test_rows_of_other_prompts_are_refused_together_and_told_apart_by_name(out):
    frame = load_results(out).frame()
    with pytest.raises(ValueError, match="several values of separator"):
        summarise(frame)
    apart = summarise(frame, by=["separator", "space_before_labels", "method", "metric"])
    assert written(apart) == written(frame) == {OWN, ('" table"', OWN[0]), (OWN[0], "no")}
    gd = load_results(out, "comma").frame().query("method == 'gd' and metric == 'sim_aou' and subset == 'all'")["value"].mean()
    of_comma = apart[(apart["separator"] == '" table"') & (apart["method"] == "gd") & (apart["metric"] == "sim_aou")]
    assert of_comma["mean"].item() == pytest.approx(gd)


def test_contrasts_tell_other_prompts_apart(tmp_path):
    for name, separator in (("own", None), ("comma", " table")):
        run_sweep(study(methods=["gd", "lcgd"], seeds=[0, 1], separator=separator), tmp_path, name=name)
    found = contrasts(load_results(tmp_path).frame("per_query"), n_resamples=10)
    assert set(found["separator"]) == {"the task's own", '" table"'}
    assert set(found["draws"]) == {2}


def test_cells_that_say_nothing_of_their_prompts_are_as_the_task_has_them(tmp_path):
    run_sweep(study(), tmp_path, maker=Trivial)
    assert written(load_results(tmp_path).frame()) == {OWN}
