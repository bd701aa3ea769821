"""`iclgd check` as a person runs it."""

import dataclasses

from typer.testing import CliRunner

from iclgd_lens.checking import check as module
from iclgd_lens.cli import app


def run(*arguments: str):
    return CliRunner().invoke(app, ["check", *arguments], env={"COLUMNS": "80", "NO_COLOR": "1", "TERMINAL_WIDTH": "80"})


def test_a_model_that_keeps_the_promises_exits_with_0_and_fits_80_columns():
    result = run("bundled", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "10 promises hold on this model, 1 are not applicable." in result.output
    assert "tokens ran" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines()), result.output


def test_a_model_that_does_not_exits_with_1_and_says_what_to_do(monkeypatch):
    first, *rest = module._PROMISES
    broken = dataclasses.replace(first, error=lambda subject: 0.5)
    monkeypatch.setattr(module, "_PROMISES", (broken, rest[-1]))
    result = run("bundled", "--device", "cpu", "--backend", "bridge")
    assert result.exit_code == 1
    assert "5.0e-01" in result.output
    assert "Load the model as the other class" in result.output


def test_a_model_that_is_not_there_is_one_line():
    result = run("bundlet")
    assert result.exit_code == 2
    assert "did you mean" in result.output
    assert "Traceback" not in result.output
