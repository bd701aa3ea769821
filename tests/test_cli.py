"""The command as a person runs it."""

import json
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from typer.testing import CliRunner

from iclgd_lens import AttentionExample, load_task
from iclgd_lens.cli import app
from iclgd_lens.models.hooked import HookedModel
from tests.models_zoo import require_hooked_transformer


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160", "NO_COLOR": "1"})


def small_demo(folder, *more: str):
    return run("demo", "--episodes", "2", "--k", "3", "--queries", "4", "--device", "cpu", "--out", str(folder), *more)


def assert_reported(folder: Path, model: HookedModel, words: str, seed: int = 0) -> None:
    """The report begins with these words, and its example is of the first episode, of three demonstrations and four queries."""
    page = (folder / "report.html").read_text()
    assert f"<p>{words}" in page
    assert 'id="attention"' in page
    first = load_task("bundled/remapped").episode(model, k=3, n_queries=4, seed=seed)
    example = AttentionExample.load(folder / "attention.json")
    assert ["".join(tokens) for tokens in example.demonstrations] == [model.to_string(d.tokens[1:]) for d in first.demonstrations]
    assert [query["text"] for query in example.queries] == [model.to_string(query.tokens[1:]) for query in first.queries]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A demonstration's output and folder, in whose name is what the console might read as markup."""
    folder = tmp_path_factory.mktemp("demo") / "x[red]["
    result = small_demo(folder)
    assert result.exit_code == 0, result.output
    return result.output, folder


def test_demo_prints_its_tables_and_writes_tidy_results(bundled, ran):
    output, folder = ran
    for expected in ("FT by LCGD", "SimAOU_norm", "SimAM, ZSL ref.", "α of h", "layer 3", "frame.parquet", "no evidence"):
        assert expected in output
    frame = pd.read_parquet(folder / "frame.parquet")
    assert set(frame["seed"]) == {0, 1}
    assert not frame.duplicated(["seed", "model", "method", "control", "subset", "layer", "metric"]).any()
    assert_reported(folder, bundled, "iclgd demo: 2 draws of 3 demonstrations and 4 queries, on bundled (")


def test_brackets_in_paths_are_printed_as_they_are(ran):
    assert "x[red][" in ran[0]


def test_demo_repeats_with_the_same_seed_and_changes_with_another(ran, tmp_path):
    assert small_demo(tmp_path, "--seed", "1", "--episodes", "1").exit_code == 0
    both, again = (pd.read_parquet(folder / "frame.parquet") for folder in (ran[1], tmp_path))
    first, second = (both[both["seed"] == seed].reset_index(drop=True) for seed in (0, 1))
    assert_frame_equal(second, again)
    assert not first["value"].equals(second["value"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "bundled/remaped"], "did you mean 'bundled/remapped'"),
        (["--task", "x"], "Known tasks: bundled/remapped, bundled/natural"),
        (["--device", "tpu"], "here there is cpu"),
        (["--k", "40"], "16 would fit"),
        (["--lr", "1e30"], "use a smaller learning rate"),
        (["--readout", "labels"], "needs loss_on='label'"),
        (["--queries", "0"], "Invalid value for '--queries'"),
        (["--episodes", "0"], "Invalid value for '--episodes'"),
        (["--k", "many"], "number of demonstrations or 'fit'"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do_and_leaves_nothing_behind(tmp_path, arguments, message):
    result = run("demo", "--episodes", "1", "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_the_separator_and_the_space_are_those_that_are_typed_and_the_setting_says_them(bundled, ran, tmp_path):
    assert small_demo(tmp_path, "--separator", " table", "--no-space-before-labels").exit_code == 0
    setting, plain = (json.loads((folder / "setting.json").read_text()) for folder in (tmp_path, ran[1]))
    assert (setting["separator"], setting["space_before_labels"]) == (" table", False)
    assert (plain["separator"], plain["space_before_labels"]) == (load_task("bundled/remapped").format.separator, True)
    example = AttentionExample.load(tmp_path / "attention.json")
    typed = load_task("bundled/remapped", separator=" table").episode(bundled, k=3, n_queries=4)
    assert bundled.to_string(typed.demonstrations[0].separator) == "table"
    assert ["".join(tokens) for tokens in example.demonstrations] == [bundled.to_string(d.tokens[1:]) for d in typed.demonstrations]


@pytest.mark.parametrize("command", ["demo", "kernels", "reproduce"])
@pytest.mark.parametrize(
    ("typed", "message"),
    [(r"a\d", r"--separator has \d in 'a\\d'"), (r"\n", "makes no tokens of the separator '\\n'")],
)
def test_a_separator_is_read_with_its_escapes_by_every_command(tmp_path, command, typed, message):
    result = run(command, "--separator", typed, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in result.output


def test_demo_trains_on_labels_when_asked(bundled, tmp_path):
    assert small_demo(tmp_path, "--loss-on", "label", "--readout", "labels").exit_code == 0
    frame = pd.read_parquet(tmp_path / "frame.parquet")
    assert (frame["loss_on"].unique(), frame["readout"].unique()) == (["label"], ["labels"])
    assert_reported(tmp_path, bundled, "iclgd demo: 2 draws")


def test_train_bundled_writes_weights_and_prints_what_they_can_do(tmp_path):
    require_hooked_transformer()
    result = run("train-bundled", "--steps", "1", "--episodes", "1", "--out", str(tmp_path / "w.safetensors"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "w.safetensors").is_file()
    assert "untrained ICL" in result.output


def test_train_bundled_refuses_a_folder_before_it_trains(tmp_path):
    result = run("train-bundled", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "it is a folder" in result.output
