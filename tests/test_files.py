"""Files are written whole or not at all."""

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from iclgd_lens.files import write_frame, written_whole


def test_what_was_written_is_there_at_the_end_with_its_folders_and_readable(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with written_whole(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["b.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    path.write_text("old")

    def interrupted() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["b.txt"]


def test_frames_are_written_whole(tmp_path):
    frame = pd.DataFrame({"layer": pd.array([0, pd.NA], dtype="Int64"), "value": [0.1, float("nan")]})
    path = write_frame(frame, tmp_path / "deep" / "results.parquet")
    assert_frame_equal(pd.read_parquet(path), frame)
    assert [file.name for file in path.parent.iterdir()] == ["results.parquet"]
