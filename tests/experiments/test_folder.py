"""A run's folder holds its frames and what is needed to run it again."""

import json
from importlib.metadata import version

import pandas as pd
import pytest

from iclgd_lens.experiments.folder import SETTING, RunFolder, write_frames, write_setting


def test_a_folder_is_read_as_it_was_written(bundled, tmp_path):
    frames = {"frame": pd.DataFrame({"value": [1.5, 2.5]}), "problems": pd.DataFrame({"problem": ["none"]})}
    write_frames(tmp_path, frames)
    write_setting(tmp_path, bundled, "bundled", {"command": "demo", "seeds": (1, 2)})
    run = RunFolder.read(tmp_path)
    assert set(run.frames) == {"frame", "problems"}
    pd.testing.assert_frame_equal(run.frames["frame"], frames["frame"])
    assert run.setting["model"]["name"] == "bundled"
    assert run.setting["model"]["n_layers"] == bundled.cfg.n_layers
    assert (run.setting["command"], run.setting["seeds"]) == ("demo", [1, 2])
    assert run.setting["versions"]["torch"] == version("torch")
    assert json.loads((tmp_path / SETTING).read_text()) == run.setting


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not the folder of a finished run"):
        RunFolder.read(tmp_path)
    write_frames(tmp_path, {"frame": pd.DataFrame({"value": [1.0]})})
    with pytest.raises(FileNotFoundError, match=SETTING):
        RunFolder.read(tmp_path)
