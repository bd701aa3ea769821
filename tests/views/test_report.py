"""The report says what the frames say, and opens from disk in a browser without network."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from iclgd_lens import Protocol, attention_example, gd, lcgd, load_task, reproduce
from iclgd_lens.experiments.comparison import Comparison
from iclgd_lens.experiments.folder import RunFolder, write_frames, write_setting
from iclgd_lens.views.circuits import in_script, page
from iclgd_lens.views.figures import figures
from iclgd_lens.views.plots import SIMILARITIES
from iclgd_lens.views.report import EXAMPLE, sheets, summary, write_report
from tests.pages import opened
from tests.views.frames import drawn_again
from tests.views.test_attention import MARKUP, with_markup


@pytest.fixture(scope="module")
def folder(bundled, with_kernels, tmp_path_factory) -> Path:
    """A comparison of two draws with kernel views."""
    out = tmp_path_factory.mktemp("run")
    write_frames(out, Comparison.concatenated([with_kernels, drawn_again(with_kernels, 1, seed=1)]).frames)
    write_setting(out, bundled, "bundled", {"command": "kernels", "lr": 0.1})
    episode = load_task("bundled/remapped").episode(bundled, k=3, n_queries=4, seed=0)
    updates = {name: make(bundled, episode.demonstrations, lr=0.1) for name, make in (("gd", gd), ("lcgd", lcgd))}
    attention_example(bundled, episode, updates, range(3)).save(out / EXAMPLE)
    return out


@pytest.fixture(scope="module")
def run(folder) -> RunFolder:
    return RunFolder.read(folder)


@pytest.fixture(scope="module")
def written(run) -> Path:
    return write_report(run)


def test_the_summary_quotes_the_frame(run):
    text = " ".join(summary(run))
    frame = run.frames["frame"]
    right = frame[(frame["metric"] == "accuracy") & (frame["model"] == "trained") & (frame["method"] == "icl")]["value"].mean()
    assert "iclgd kernels: 2 draws of 3 demonstrations and 4 queries, on bundled (4 layers of 4 heads" in text
    assert "FT by LCGD on bundled/remapped 0.1" in text
    assert f"ICL {right:.2f}" in text
    assert text.count("LCGD − GD") == 2
    assert "SimAOU over 2 episodes: LCGD − GD" in text
    assert "SimAM_Δ over 2 episodes: LCGD − GD" in text
    assert "LCGD trained − untrained" in text
    assert "Smoothing makes" in text


def test_the_summary_is_about_true_updates(run):
    frame = run.frames["frame"]
    right = frame[(frame["metric"] == "accuracy") & frame["method"].isin(["gd", "lcgd"])]
    more = pd.concat([frame, right.assign(control="random_weights", value=0.0)], ignore_index=True)
    assert list(summary(replace(run, frames=run.frames | {"frame": more}))) == list(summary(run))


def test_draws_of_several_tasks_are_counted_task_by_task(run):
    frame = run.frames["frame"]
    two = pd.concat([frame, frame.assign(task="other")], ignore_index=True)
    assert next(iter(summary(replace(run, frames=run.frames | {"frame": two})))).startswith("iclgd kernels: 4 draws of 3 demon")


def test_updates_that_diverged_are_named(run):
    problems = pd.DataFrame({"problem": ["LCGD went wild"]})
    text = " ".join(summary(replace(run, frames=run.frames | {"problems": problems})))
    assert "Updates that diverged and are in no number: 1. The first: LCGD went wild" in text


def test_every_table_is_on_the_page_cell_by_cell(run, written):
    found, text = sheets(run), written.read_text()
    assert {"accuracy", "similarity", "layers", "kernels_tangent", "kernels_readings"} <= {sheet.name for sheet in found}
    for sheet in found:
        assert sheet.html() in text
        assert sheet.html().count("<tr>") == 1 + len(sheet.numbers)


def test_libraries_stand_on_the_page_once(written):
    text = written.read_text()
    assert text.count("var CircuitsVis=") == 1
    assert text.count("plotly.js v") == 1


def test_a_run_of_a_protocol_has_the_papers_tables(bundled, tmp_path):
    protocol = Protocol(tasks=("bundled/natural",), seeds=(0, 1), k=3, n_queries=4, orders=1, lr=0.1, twins=("untrained",))
    reproduce(bundled, protocol, tmp_path)
    write_setting(tmp_path, bundled, "bundled", {"command": "reproduce", "protocol": asdict(protocol)})
    found = RunFolder.read(tmp_path)
    assert {"table1", "table2", "table3"} <= {sheet.name for sheet in sheets(found)}
    path = write_report(found)
    assert path == tmp_path / "report.html"
    assert "iclgd reproduce" in path.read_text()
    assert 'id="attention"' not in path.read_text()
    (tmp_path / "heads.parquet").unlink()
    with pytest.raises(ValueError, match=r"heads\.parquet is missing: it is damaged, or another version wrote it"):
        write_report(RunFolder.read(tmp_path))


@pytest.mark.parametrize("width", [1280, 700])
def test_the_page_is_drawn_offline(chromium, run, written, width):
    with opened(chromium, written, width) as shown:
        figures = shown.locator(".figure")
        assert figures.count() == 12
        assert shown.locator(".js-plotly-plot").count() < 12  # each is drawn when it comes near
        for number in range(figures.count()):
            figures.nth(number).scroll_into_view_if_needed()
            drawn = figures.nth(number).locator("svg.main-svg").first
            drawn.wait_for()
            assert drawn.locator("path, rect, image").count() > 3
            box = drawn.bounding_box()
            assert 0.8 * width < box["width"] <= width
            height = figures.nth(number).evaluate("place => place.layout.height")
            assert figures.nth(number).bounding_box()["height"] == box["height"] == height > 300
        assert shown.locator("table").count() == written.read_text().count("<thead>")
        assert shown.locator(".iclgd-tokens .colored-tokens").count() == 3 * 3
        before = shown.locator(".iclgd-table").inner_html()
        for name, option in (("query", "2"), ("layer", "0"), ("head", "3")):
            shown.select_option(f"select[name={name}]", option)
            shown.wait_for_timeout(200)
            after = shown.locator(".iclgd-table").inner_html()
            assert after != before, name
            before = after
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert json.loads(shown.locator("pre").text_content()) == run.setting


def test_all_figures_are_drawn_before_the_page_is_printed(chromium, written):
    with opened(chromium, written) as shown:
        shown.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert shown.locator(".figure.js-plotly-plot").count() == shown.locator(".figure").count() == 12


def test_figures_are_drawn_one_by_one_by_a_library_that_is_there_before_they_are_seen(chromium, written):
    with opened(chromium, written) as shown:
        shown.wait_for_function("window.Plotly")
        assert shown.locator(".figure.js-plotly-plot").count() == 0
        shown.evaluate("""() => {
          const draw = Plotly.newPlot;
          let count = 0;
          window.together = [];
          Plotly.newPlot = (...given) => {
            if (count++ === 0) queueMicrotask(() => { together.push(count); count = 0; });
            return draw(...given);
          };
        }""")
        shown.evaluate("document.querySelector('.figure').scrollIntoView()")
        shown.locator(".figure.js-plotly-plot").nth(2).wait_for()
        assert set(shown.evaluate("together")) == {1}


OVERLAPS = """
[...document.querySelectorAll('.js-plotly-plot')].flatMap((plot) => {
  const whole = plot.getBoundingClientRect();
  const lines = (text) => (text.querySelector('.line') ? [...text.querySelectorAll('.line')] : [text]);
  const texts = [...plot.querySelectorAll('svg text')].flatMap(lines).filter((line) => line.textContent).map((text) => {
    const box = text.getBoundingClientRect();
    return { said: text.textContent, left: box.left, right: box.right, top: box.top + 1, bottom: box.bottom - 1 };
  });
  const outside = texts.filter((box) => box.left < whole.left || box.right > whole.right + 1);
  const met = texts.filter((one, index) => texts.slice(index + 1).some((other) =>
    one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom));
  return [...outside, ...met].map((box) => box.said);
})
"""


@pytest.fixture(scope="module")
def crowded(run) -> dict[str, go.Figure]:
    """The figures of six tasks with names far too long, and of two twins."""
    frames = {}
    for name, frame in run.frames.items():
        frame = pd.concat([frame, frame[frame["model"] == "untrained"].assign(model="untrained, ln kept")])
        frames[name] = pd.concat([frame.assign(task=f"task {task} whose name nobody thought about") for task in range(6)])
    of_curve = frames["frame"][frames["frame"]["metric"].isin([*SIMILARITIES, "accuracy"])]
    frames["curve"] = pd.concat([of_curve.assign(lr=lr) for lr in (0.0001, 0.001, 0.01, 0.1)])
    return {name: drawn.figure for name, drawn in figures(frames).items()}


@pytest.mark.parametrize("width", [1280, 700])
def test_texts_lie_within_their_figures_and_apart(chromium, crowded, tmp_path, width):
    written = {name: go.Figure(figure).update_layout(width=width - 60) for name, figure in crowded.items()}
    assert {"learning_rate", "trajectories", "heads_contribution_inner_kendall"} <= set(written)
    bodies = [figure.to_html(include_plotlyjs=False, full_html=False) for figure in written.values()]
    (tmp_path / "figures.html").write_text(page("figures", f"<script>{in_script(get_plotlyjs())}</script>{''.join(bodies)}"))
    with opened(chromium, tmp_path / "figures.html", width) as shown:
        shown.locator(".gtitle").nth(len(written) - 1).wait_for()
        assert shown.evaluate(OVERLAPS) == []


def test_markup_in_data_and_names_stays_text(chromium, run, folder, tmp_path):
    frames = {name: frame.assign(task=MARKUP) if "task" in frame else frame for name, frame in run.frames.items()}
    setting = json.loads(json.dumps(run.setting)) | {"note": MARKUP}
    setting["model"]["name"] = MARKUP
    write_frames(tmp_path, frames)
    (tmp_path / "setting.json").write_text(json.dumps(setting))
    from iclgd_lens import AttentionExample

    with_markup(AttentionExample.load(folder / EXAMPLE)).save(tmp_path / EXAMPLE)
    with opened(chromium, write_report(RunFolder.read(tmp_path))) as shown:
        shown.locator("#figure-figure2").scroll_into_view_if_needed()
        shown.locator("#figure-figure2 .xtick").wait_for()
        assert shown.locator("h1").text_content().endswith(f"{MARKUP} on {MARKUP}")
        assert shown.title().endswith(f"{MARKUP} on {MARKUP}")
        assert json.loads(shown.locator("pre").text_content()) == setting
        assert shown.locator("img").count() == 0
        assert shown.locator("#figure-figure2 .xtick").first.text_content().startswith(MARKUP[:30])
        assert shown.locator(".figure svg a").count() == 0
        token = shown.locator("[data-method=ICL] .colored-tokens span span").first
        assert token.text_content().replace("\xa0", " ") == MARKUP


@pytest.mark.slow
def test_a_large_run_stays_small_and_is_drawn_to_its_last_figure(chromium, run, tmp_path):
    """Six tasks, three draws, 24 layers of 16 heads, and an example of 900 tokens."""
    frame, gradients = run.frames["frame"], run.frames["gradients"]
    plain = frame[~frame["metric"].str.contains("tangent|proxy|hidden|contribution|coefficient|trajectory|cka|attention|label_a")]
    layered = plain[plain["layer"].notna() & (plain["layer"] == 0)]
    per_task = [plain[plain["layer"].isna()], *(layered.assign(layer=layer) for layer in range(24))]
    one = pd.concat(per_task)
    large = pd.concat([one.assign(task=f"task {task}", seed=one["seed"] + 2 * part) for task in range(6) for part in range(2)])
    deep = pd.concat([gradients[gradients["layer"] == 0].assign(layer=layer) for layer in range(24)])
    deep = pd.concat([deep.assign(task=f"task {task}") for task in range(6)])
    large = large[large["seed"] < 3].astype({"layer": "Int64"})
    corner = run.frames["heads"].query("layer == 0 and head == 0").drop(columns=["task", "layer", "head"])
    place = pd.MultiIndex.from_product([large["task"].unique(), range(24), range(16)], names=["task", "layer", "head"])
    write_frames(tmp_path, {**run.frames, "frame": large, "gradients": deep, "heads": corner.merge(place.to_frame(False), "cross")})
    (tmp_path / "setting.json").write_text(json.dumps(run.setting))
    from iclgd_lens import AttentionExample

    small = AttentionExample.load(run.path / EXAMPLE)
    n_queries, n_tokens = 2, 900
    cells = 3 * n_queries * 24 * 17
    rng = np.random.default_rng(0)
    import base64

    replace(
        small,
        demonstrations=(("word",) * 30,) * 30,
        labels=("yes",) * 30,
        queries=small.queries[:n_queries],
        shape=(3, n_queries, 24, 17),
        weights=base64.b64encode(rng.integers(0, 256, cells * n_tokens, dtype=np.uint8).tobytes()).decode(),
        scale=(0.01,) * cells,
        tau=(0.1,) * cells,
    ).save(tmp_path / EXAMPLE)
    path = write_report(RunFolder.read(tmp_path))
    assert path.stat().st_size < 15e6
    with opened(chromium, path) as shown:
        figures = shown.locator(".figure")
        figures.last.scroll_into_view_if_needed()
        figures.last.locator("svg.main-svg").first.wait_for()
