"""The report of a run: one page that opens from disk without a network.

It says in words what was run and what came out, and holds the tables, the figures, an example of attention and the setting.
JavaScript libraries stand in it once. Whatever comes from data is text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from iclgd_lens.experiments.folder import EXAMPLE, REPORT, SETTING, RunFolder, other_version
from iclgd_lens.experiments.protocol import Protocol
from iclgd_lens.experiments.reproduce import Results
from iclgd_lens.experiments.results import EPISODE, summarise
from iclgd_lens.files import write_text
from iclgd_lens.views.attention import AttentionExample
from iclgd_lens.views.circuits import asset, circuitsvis_script, in_script, json_in_script, page
from iclgd_lens.views.figures import figures
from iclgd_lens.views.kernel_tables import has_kernel_views, kernel_tables, kernel_verdict
from iclgd_lens.views.names import RUN_NAMES, counted, listed
from iclgd_lens.views.paper_tables import paper_tables
from iclgd_lens.views.sheets import Sheet
from iclgd_lens.views.tables import comparison_tables, verdict


def write_report(run: RunFolder) -> Path:
    """Write a run's report into its folder, and return its path.

    Raises:
        OSError: If it cannot be written.
    """
    path = run.path / REPORT
    write_text(path, report(run))
    return path


def report(run: RunFolder) -> str:
    """Make the page of a run."""
    example = AttentionExample.load(run.path / EXAMPLE) if (run.path / EXAMPLE).is_file() else None
    name = str(run.setting["model"]["name"])
    tasks = ", ".join(map(str, run.frames["frame"]["task"].unique()))
    parts = [
        f"<style>{asset('report.css')}</style>",
        f"<h1>In-context learning against gradient descent: {escape(tasks)} on {escape(name)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in summary(run)),
        '<nav><a href="#tables">tables</a> <a href="#figures">figures</a> '
        f'{"" if example is None else "<a href=#attention>attention</a> "}<a href="#setting">setting</a></nav>',
        '<h2 id="tables">Tables</h2>',
        *(sheet.html() for sheet in sheets(run)),
        *figure_section({name: drawn.figure for name, drawn in figures(run.frames).items()}),
        *([] if example is None else _attention(example)),
        '<h2 id="setting">Setting</h2>',
        "<p>Everything that was set, with versions; the seeds make the same draws on every machine.</p>",
        f"<pre>{escape(json.dumps(run.setting, indent=2))}</pre>",
    ]
    return page(f"iclgd_lens: {tasks} on {name}", "\n".join(parts))


def summary(run: RunFolder) -> Iterable[str]:
    """Say in words what was run and what came out, every number from the frames."""
    frame, model = run.frames["frame"], run.setting["model"]
    draws = len(frame[EPISODE].drop_duplicates())
    rates = frame[frame["lr"].notna()].groupby(["task", "method"], sort=False)["lr"].unique()
    each = "; ".join(f"{RUN_NAMES[method]} on {task} {listed(values)}" for (task, method), values in rates.items())
    used = f" Learning rates: {each}." if each else ""
    shape = f"{model['n_layers']} layers of {model['n_heads']} heads, d_model {model['d_model']}, {model['dtype']}"
    yield (
        f"iclgd {run.setting['command']}: {counted(draws, 'draw')} of {listed(frame['k'])} demonstrations and "
        f"{listed(frame['n_queries'])} queries, on {model['name']} ({shape}).{used}"
    )
    accuracy = frame[(frame["metric"] == "accuracy") & (frame["model"] == "trained") & (frame["control"] == "none")]
    means = summarise(accuracy, by=["method"]).set_index("method")["mean"]
    shares = [f"{RUN_NAMES[method]} {means[method]:.2f}" for method in RUN_NAMES if method in means.index]
    yield f"Right for this share of the queries: {', '.join(shares)}."
    for metric in ("sim_aou", "sim_am_delta"):
        if metric in set(frame["metric"]):
            yield verdict(frame, metric)
    if has_kernel_views(frame):
        yield kernel_verdict(frame)
    if diverged := len(run.frames["problems"]):
        yield f"Updates that diverged and are in no number: {diverged}. The first: {run.frames['problems']['problem'].iloc[0]}"


def sheets(run: RunFolder) -> list[Sheet]:
    """The tables of a run.

    Raises:
        ValueError: If the run's protocol is of another version.
    """
    frame = run.frames["frame"]
    if "protocol" in run.setting:
        try:
            protocol = Protocol.from_json(run.setting["protocol"])
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise other_version(run.path / SETTING, f"holds no protocol ({error})") from None
        results = Results(protocol, **run.frames)
        found = paper_tables(results, run.setting["model"]["name"])
    else:
        found = comparison_tables(frame)
    return [*found, *(kernel_tables(frame) if has_kernel_views(frame) else [])]


def figure_section(drawn: Mapping[str, go.Figure]) -> list[str]:
    """The parts of a page that show figures, with the library that draws them."""
    return [
        '<h2 id="figures">Figures</h2>',
        f'<script type="text/plain" id="plotly">{in_script(get_plotlyjs())}</script>',
        *(_figure(name, figure) for name, figure in drawn.items()),
        f"<script>{asset('report.js')}</script>",
    ]


def _figure(name: str, figure: go.Figure) -> str:
    """A figure's place, as wide as the page, with what is to be drawn there (`report.js`)."""
    shown = go.Figure(figure).update_layout(width=None, autosize=True)
    data = f'<script type="application/json">{json_in_script(shown.to_json())}</script>'
    return f'<div class="figure" id="figure-{name}" style="height: {shown.layout.height}px">{data}</div>'


def _attention(example: AttentionExample) -> list[str]:
    return [
        '<h2 id="attention">Attention</h2>',
        f"<p>What each token of the demonstrations weighs for a query of {escape(example.task)}: in-context attention, and the "
        "attention that updates imply, as shares of all tokens. A gradient step pays a label's last token nothing, so τ leaves "
        "these out.</p>",
        circuitsvis_script(),
        example.view().body,
    ]
