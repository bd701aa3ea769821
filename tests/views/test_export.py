"""Figures on disk: pages that need no network, their data, and pictures where they can be drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from plotly import graph_objects as go

from iclgd_lens.views.export import write_figure, write_pictures

DATA = pd.DataFrame({"task": ["a", "b"], "value": [1 / 3, float("nan")]})
WRITE_IMAGES = "iclgd_lens.views.export.write_images"


def figure(height: float = 1.0) -> go.Figure:
    return go.Figure(go.Bar(x=["a"], y=[height], name="a bar"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_page_its_library_and_its_data_are_written(tmp_path):
    paths = write_figure(figure(), DATA, tmp_path / "new" / "figures", "alpha")
    assert [path.name for path in paths] == ["alpha.html", "alpha.csv"]
    assert names(tmp_path / "new" / "figures") == ["alpha.csv", "alpha.html", "plotly.min.js"]
    pd.testing.assert_frame_equal(pd.read_csv(paths[1]), DATA, check_exact=False, rtol=1e-15)


def test_a_page_fetches_nothing_from_the_network(tmp_path):
    page, _ = write_figure(figure(), DATA, tmp_path, "alpha")
    text = page.read_text(encoding="utf-8")
    assert "a bar" in text
    assert re.findall(r"""\b(?:src|href)\s*=\s*["']([^"']*)""", text) == ["plotly.min.js"]
    assert not re.search(r"""@import|\bimport\s*\(|\bimport\s+[^;]*from\s*["']https?:""", text)
    assert "http" not in text
    assert len(text) < 50_000 < (tmp_path / "plotly.min.js").stat().st_size


def test_several_figures_share_the_library_and_a_second_writing_replaces_the_first(tmp_path):
    for name in ("one", "two", "two"):
        page, table = write_figure(figure(7.25 if name == "two" else 1.0), DATA, tmp_path, name)
    assert names(tmp_path) == ["one.csv", "one.html", "plotly.min.js", "two.csv", "two.html"]
    write_figure(figure(3.125), DATA[:1], tmp_path, "two")
    assert "3.125" in page.read_text(encoding="utf-8")
    assert "7.25" not in page.read_text(encoding="utf-8")
    assert len(pd.read_csv(table)) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Image export requires kaleido.\nInstall it with pip."),
        RuntimeError("Kaleido requires Google Chrome to be installed.\n\nSee the docs."),
        TimeoutError(),
    ],
    ids=["no kaleido", "no browser", "says nothing"],
)
def test_without_a_browser_nothing_is_written_and_the_message_says_why_and_what_to_do(tmp_path, monkeypatch, error):
    def fail(fig, file, **how):
        Path(file[0]).write_bytes(b"half a picture")
        raise error

    monkeypatch.setattr(WRITE_IMAGES, fail)
    paths, problem = write_pictures({"alpha": figure(), "layers": figure()}, tmp_path)
    assert paths == []
    assert names(tmp_path) == []
    assert problem.startswith("Figures were written as pages, not as PNG or SVG: ")
    assert str(error).split("\n")[0] in problem
    assert "\n" not in problem
    assert "pip install 'iclgd-lens[figures]'" in problem
    assert "Chrome" in problem


def test_pictures_that_were_there_stay_when_new_ones_cannot_be_drawn(tmp_path, monkeypatch):
    (tmp_path / "alpha.png").write_bytes(b"old")

    def fail(fig, file, **how):
        raise RuntimeError("no browser")

    monkeypatch.setattr(WRITE_IMAGES, fail)
    write_pictures({"alpha": figure()}, tmp_path)
    assert (tmp_path / "alpha.png").read_bytes() == b"old"


def test_a_user_who_stops_it_is_obeyed(tmp_path, monkeypatch):
    def stopped(fig, file, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(WRITE_IMAGES, stopped)
    with pytest.raises(KeyboardInterrupt):
        write_pictures({"alpha": figure()}, tmp_path)


def test_every_figure_is_drawn_as_png_and_svg_in_one_call(tmp_path, monkeypatch):
    calls = []

    def draw(fig, file, **how):
        calls.append(how)
        for drawn, path in zip(fig, file, strict=True):
            Path(path).write_text(f"{Path(path).suffix} of {drawn.data[0].y[0]}")

    monkeypatch.setattr(WRITE_IMAGES, draw)
    paths, problem = write_pictures({"alpha": figure(1.5), "layers": figure(2.5)}, tmp_path / "new")
    assert problem == ""
    assert len(calls) == 1
    assert [path.name for path in paths] == ["alpha.png", "alpha.svg", "layers.png", "layers.svg"]
    assert names(tmp_path / "new") == sorted(path.name for path in paths)
    assert [path.read_text() for path in paths] == [".png of 1.5", ".svg of 1.5", ".png of 2.5", ".svg of 2.5"]
