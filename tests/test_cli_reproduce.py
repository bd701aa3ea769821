"""`iclgd reproduce` as a person runs it: offline, on the bundled model and on a local folder."""

import json

import pandas as pd
import pytest
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from iclgd_lens.cli import app
from tests.data.test_paper_prompts import FIXTURES
from tests.tokenizers_zoo import gpt2_style

SMALL = ("--seed", "0", "--seed", "1", "--orders", "2", "--queries", "4", "--k", "3", "--no-pictures", "--device", "cpu")


def run(*arguments: str):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "out"
    arguments = (*SMALL, "--out", out, "--lr-curve", "--grid", "0.01,0.1", "--tuning-seeds", "1", "--tuning-queries", "4")
    return out, arguments, run(*arguments)


def test_the_tables_are_printed_with_what_was_run(finished):
    _, _, result = finished
    assert result.exit_code == 0, result.output
    for expected in (
        "Table 1: trained against untrained",
        "untrained, ln kept",
        "Table 2: GD against LCGD",
        "Table 3: the setting",
        "FT accuracy, then loss, on seeds 1000",
        "Rec2FTP",
        "false to true",
        "JS from ICL",
        "order: sd of p",
        "shuffled labels",
        "other task",
        "LCGD above GD",
        "α small",
    ):
        assert expected in result.output


def test_tables_figures_frames_and_setting_are_written(finished):
    out, _, _ = finished
    for table in ("table1", "table2", "table3", "dai", "outputs", "controls", "claims"):
        assert {path.suffix for path in (out / "tables").glob(f"{table}.*")} == {".md", ".tex", ".csv"}
    for figure in ("figure2", "figure3", "figure4", "learning_rate"):
        assert {path.suffix for path in (out / "figures").glob(f"{figure}.*")} == {".html", ".csv"}
    assert len(pd.read_parquet(out / "frame.parquet")) > 1000
    assert json.loads((out / "setting.json").read_text())["model"]["name"] == "bundled"
    assert not list(out.rglob("*.partial"))


def test_the_same_command_again_makes_no_cell_and_prints_the_same(finished):
    out, arguments, first = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.parquet")}
    assert run(*arguments).output == first.output
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.parquet")} == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = gpt2_style()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_local_model_and_local_data_go_the_same_way_with_the_paper_s_settings(folder, tmp_path):
    tasks = [part for task in ("sst2", "cb") for part in ("--task", task)]
    more = ("--orders", "1", "--control", "random", "--no-pictures", "--out", tmp_path)
    result = run("--model", folder, *tasks, "--data", FIXTURES, *more)
    assert result.exit_code == 0, result.output
    assert folder.name in result.output
    table2 = pd.read_csv(tmp_path / "tables" / "table2.csv").set_index(["metric", "task"])
    assert table2.loc[("SimAM_Δ", "cb"), "paper lcgd"] == 0.382
    assert table2.loc[("SimAOU_norm", "sst2"), "paper gd"] == 0.111
    table3 = pd.read_csv(tmp_path / "tables" / "table3.csv").set_index("task")
    assert table3.loc["sst2", ["lr gd", "lr lcgd", "paper lr"]].tolist() == [0.0005] * 3
    assert table3.loc["cb", "lr gd"] == 0.08
    assert table3.loc["sst2", "seeds"] == "2, 3, 4"
    assert table3.loc["sst2", "rates from"] == "the paper"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "sst3"], "unknown task 'sst3'; did you mean 'sst"),
        (["--model", "gtp2"], "unknown model 'gtp2'; did you mean 'gpt2'"),
        (["--lr", "fast"], "lr must be 'auto', 'paper' or a number, got 'fast'"),
        (["--lr", "paper"], "no learning rate for task 'bundled/remapped'"),
        (["--grid", "1;2"], "--grid must be numbers with commas between them"),
        (["--control", "noise"], "controls must be some of"),
        (["--control", "none", "--control", "random"], "--control none stands alone"),
        (["--k", "0"], "k must be a number of demonstrations, at least 1"),
        (["--k", "many"], "k must be a number of demonstrations or 'fit'"),
        (["--k", "9999"], "longer than the model's context window"),
        (["--task", "sst2", "--lr", "0.1"], "no unknown"),
        (["--readout", "labels"], "needs loss_on='label'"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(tmp_path, arguments, message):
    if message == "no unknown":
        arguments, message = [*arguments, "--data", str(tmp_path / "nowhere")], "data folder"
    result = run("--out", tmp_path / "out", "--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error:")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
