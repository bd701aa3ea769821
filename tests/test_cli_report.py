"""`iclgd report` as a person runs it."""

from tests.test_cli import run, small_demo


def test_the_report_of_a_folder_is_written_anew(tmp_path):
    assert small_demo(tmp_path, "--episodes", "1").exit_code == 0
    page = tmp_path / "report.html"
    page.unlink()
    result = run("report", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"Report: {page}" in result.output
    assert "<p>iclgd demo: 1 draw of 3 demonstrations and 4 queries" in page.read_text()


def test_another_folder_is_refused_in_one_line(tmp_path):
    result = run("report", str(tmp_path))
    assert result.exit_code == 2
    assert "is not the folder of a finished run" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
