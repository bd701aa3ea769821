"""A run's folder holds its frames and what is needed to run it again."""

import json
import platform
from importlib.metadata import version

import pandas as pd
import pytest

from iclgd_lens.experiments.comparison import COLUMNS, PARTS
from iclgd_lens.experiments.folder import REPORT, SETTING, RunFolder, begin_run, write_frames, write_setting
from iclgd_lens.models.fingerprint import fingerprint

PACKAGES = ("iclgd-lens", "transformer-lens", "torch", "transformers", "tokenizers", "datasets", "numpy")

FRAMES_WRITTEN = {
    name: pd.DataFrame([dict.fromkeys(["task", "k", "seed", "order", "n_queries", "model", *COLUMNS[name]], 1.5)]) for name in PARTS
}


@pytest.fixture
def written(bundled, tmp_path):
    write_frames(tmp_path, FRAMES_WRITTEN)
    write_setting(tmp_path, bundled, "bundled", {"command": "demo", "seeds": (1, 2)})
    return tmp_path


def test_a_folder_is_read_as_it_was_written(bundled, written):
    run = RunFolder.read(written)
    assert set(run.frames) == set(PARTS)
    for name, frame in FRAMES_WRITTEN.items():
        pd.testing.assert_frame_equal(run.frames[name], frame)
    assert run.setting["model"]["name"] == "bundled"
    assert run.setting["model"]["n_layers"] == bundled.cfg.n_layers
    assert (run.setting["model"]["fingerprint"], run.setting["model"]["dtype"]) == (fingerprint(bundled), "float32")
    assert (run.setting["command"], run.setting["seeds"]) == ("demo", [1, 2])
    assert run.setting["versions"] == {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    assert json.loads((written / SETTING).read_text()) == run.setting


def test_frames_of_an_earlier_run_of_another_command_are_not_read(written):
    write_frames(written, {"curve": FRAMES_WRITTEN["frame"], "mine": FRAMES_WRITTEN["frame"]})
    assert set(RunFolder.read(written).frames) == set(PARTS)


def test_a_run_that_was_begun_and_stopped_is_no_finished_run(written):
    (written / REPORT).write_text("of the run before")
    begin_run(written)
    assert not (written / REPORT).exists()
    with pytest.raises(FileNotFoundError, match="not the folder of a finished run"):
        RunFolder.read(written)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (SETTING, b'{"model": ', "is not JSON"),
        (SETTING, b"[1, 2]", "does not say which command was run on which model"),
        (SETTING, b'{"command": "demo", "model": {"name": "x"}}', "does not say which command was run on which model"),
        ("frame.parquet", b"PAR1 half", "is not a frame"),
        ("heads.parquet", None, "is missing"),
    ],
    ids=str,
)
def test_damaged_files_are_named(written, name, content, message):
    (written / name).unlink()
    if content is not None:
        (written / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{written / name} {message}.*it is damaged, or another version wrote it"):
        RunFolder.read(written)


def test_frames_without_a_column_or_rows_are_named(written):
    write_frames(written, {"queries": FRAMES_WRITTEN["queries"].drop(columns="order")})
    with pytest.raises(ValueError, match=r"queries\.parquet has no column 'order'"):
        RunFolder.read(written)
    write_frames(written, {"queries": FRAMES_WRITTEN["queries"], "frame": FRAMES_WRITTEN["frame"][:0]})
    with pytest.raises(ValueError, match=r"frame\.parquet has no rows"):
        RunFolder.read(written)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not the folder of a finished run"):
        RunFolder.read(tmp_path)
    write_frames(tmp_path, {"frame": pd.DataFrame({"value": [1.0]})})
    with pytest.raises(FileNotFoundError, match=SETTING):
        RunFolder.read(tmp_path)
    (tmp_path / "frame.parquet").rename(tmp_path / "other.parquet")
    (tmp_path / SETTING).write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"it needs setting\.json and frame\.parquet"):
        RunFolder.read(tmp_path)
