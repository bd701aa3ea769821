"""`iclgd sweep` as a person runs it, and `iclgd report` on what it wrote."""

import pytest
from typer.testing import CliRunner

from iclgd_lens.cli import app

pytestmark = pytest.mark.slow

STUDY = """
models: bundled
tasks: [bundled/remapped, bundled/natural]
seeds: [0, 1, 2]
k: 4
queries: 4
lr: [0.01, 1.0e+30]
executor: {kind: debug}
"""


def run(*arguments: object):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "250", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine.yaml").write_text(STUDY)
    dry = run("sweep", folder / "mine.yaml", "--out", folder / "out", "--dry-run")
    assert [path.name for path in folder.iterdir()] == ["mine.yaml"]  # it writes nothing
    return folder, dry, run("sweep", folder / "mine.yaml", "--out", folder / "out")


def test_a_dry_run_says_what_would_be_run_and_what_it_takes(finished):
    _, dry, _ = finished
    assert dry.exit_code == 0, dry.output
    assert "108 cells in 12 groups: 1 model, 2 tasks, 3 seeds" in dry.output
    assert "0 done, 0 failed, 108 to run" in dry.output
    assert "  12 × runs" in dry.output
    assert "  24 × lcgd, random" in dry.output
    assert "bundled, bundled/remapped, k 4, seed 0, order 0: gd at 0.01" in dry.output
    assert "… and 88 more" in dry.output
    assert "From 5 probes here: about" in dry.output
    assert "MiB of results" in dry.output


def test_failures_are_printed_with_their_reasons_and_the_exit_status_says_so(finished):
    _, _, result = finished
    assert result.exit_code == 1, result.output
    assert "60 cells made, 0 were there, 48 failed." in result.output
    assert "DivergedError" in result.output
    assert "--retry-failed runs them again" in result.output
    assert "LCGD against GD, and trained against untrained" in result.output
    assert "all tasks" in result.output


def test_the_same_command_again_runs_nothing(finished):
    folder, _, _ = finished
    again = run("sweep", folder / "mine.yaml", "--out", folder / "out")
    assert "60 done, 48 failed, 0 to run" in again.output
    assert "0 cells made, 60 were there, 48 failed." in again.output


def test_the_report_shows_differences_with_their_episodes_means_and_failures(finished):
    folder, _, _ = finished
    (folder / "out" / "report.html").unlink()
    result = run("report", folder / "out")
    assert result.exit_code == 0, result.output
    page = (folder / "out" / "report.html").read_text()
    for expected in ("60 of 108 cells are done, 48 failed", "<th>episodes</th>", "<th>p, Holm</th>", "48 cells that failed"):
        assert expected in page
    assert 'class="figure"' in page


def test_wrong_studies_are_said_in_one_message(tmp_path):
    (tmp_path / "mine.yaml").write_text(STUDY + "colour: red\n")
    result = run("sweep", tmp_path / "mine.yaml")
    assert result.exit_code == 2
    assert "line 9: colour: there is no such key" in result.output.replace("\n", " ")
    assert run("sweep", tmp_path / "none.yaml").exit_code == 2


def test_a_folder_that_is_no_run_s_has_no_report(tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert "is not the folder of a finished run" in result.output.replace("\n", " ")
