"""What all figures share: colours, error bars, grids of panels, and how the numbers of draws are told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape
from itertools import count, takewhile

import pandas as pd
from plotly import graph_objects as go
from plotly.subplots import make_subplots

from iclgd_lens.experiments.results import EPISODE

COLOURS = {
    "zsl": "#56B4E9",
    "icl": "#000000",
    "gd": "#0072B2",
    "lcgd": "#D55E00",
    "functional": "#E69F00",
    "alpha_aou": "#009E73",
    "alpha_am": "#CC79A7",
}
"""From the palette of Okabe and Ito, which is safe for the colour-blind."""
DOTS = ("dot", "dash", "dashdot")


def rows_of(frame: pd.DataFrame, metrics: Collection[str], methods: Collection[str]) -> pd.DataFrame:
    """The rows of some metrics and methods of true updates, over all queries."""
    true = (frame["control"] == "none") & (frame["subset"] == "all")
    return frame[true & frame["method"].isin(methods) & frame["metric"].isin(metrics)]


def some(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """The rows.

    Raises:
        ValueError: If there are none.
    """
    if rows.empty:
        raise ValueError(f"the frame has no rows of {what}")
    return rows


def error_bars(group: pd.DataFrame) -> dict[str, object]:
    """Error bars of one standard deviation, of what `summarise` found."""
    return {"type": "data", "array": group["sd"], "thickness": 1, "width": 2}


def draws(frame: pd.DataFrame, per: Sequence[str] = ("task",)) -> str:
    """How many draws of demonstrations there are in each group, in words."""
    counts = frame.drop_duplicates(EPISODE).groupby(list(per), sort=False).size()
    low, high = counts.min(), counts.max()
    number = str(low) if low == high else f"{low} to {high}"
    several = [column for column in per if frame[column].nunique() > 1]
    pooled = f" of k = {', '.join(map(str, sorted(frame['k'].unique())))}" if "k" not in per and varies_k(frame) else ""
    return f"{number} draw{'s' if high > 1 else ''}{' per ' if several else ''}{' and '.join(several)}{pooled}"


def varies_k(frame: pd.DataFrame) -> bool:
    """Whether k is varied on purpose, as it is not where each draw has as many demonstrations as fit."""
    return bool((frame.groupby(["task", "seed"])["k"].nunique() > 1).any())


def shown_text(name: str, most: int = 72) -> str:
    """A name from data as plotly shows it letter by letter: no tags, no formulas, and no longer than so many characters."""
    short = name if len(name) <= most else f"{name[: most - most // 2 - 1]}…{name[-(most // 2) :]}"
    return escape(short, quote=False).replace("$", "&#36;")


def shown_texts(names: Sequence[str], most: int) -> list[str]:
    """Names as `shown_text` shows each, but without what all begin with where short forms would look alike."""
    shown = [shown_text(name, most) for name in names]
    if len(set(shown)) == len(set(names)):
        return shown
    shared = len([*takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))])
    return [shown_text(f"…{name[shared:]}", most) for name in names]


def titled(title: str, note: str) -> str:
    """A figure's title, and below it, smaller, what it is over."""
    return f"{title}<br><span style='font-size:13px'>{note}</span>"


def tick_step(largest: int, most: int = 6) -> int:
    """How far ticks on whole numbers from 0 are apart, so that there are no more than `most` behind the first: 1, 2, 5, 10, …"""
    return next(step for power in count() for step in (10**power, 2 * 10**power, 5 * 10**power) if largest <= most * step)


def grid(rows: Sequence[str], columns: Sequence[str], *, x_title: str, y_title: str = "", gap: float = 0.08) -> go.Figure:
    """Panels: a row for every task, named where there are several, by as many letters as there is room for."""
    names = shown_texts(rows, 72 // len(columns))
    figure = make_subplots(
        rows=len(rows),
        cols=len(columns),
        subplot_titles=[f"{name}<br>{column}" if len(rows) > 1 else column for name in names for column in columns],
        x_title=x_title,
        horizontal_spacing=gap,
        vertical_spacing=0.3 / max(len(rows), 2),
    )
    # Beside every row, as nobody sees the whole of a figure of many.
    return figure.update_yaxes(title_text=y_title, col=1)


def on_one_scale(figure: go.Figure) -> go.Figure:
    """The figure with one y axis for all panels, from 0."""
    figure.update_yaxes(rangemode="tozero", matches="y")
    # Which the first one is, and plotly warns of an axis that matches itself.
    return figure.update_layout(yaxis_matches=None)


def styled(figure: go.Figure, rows: int = 1) -> go.Figure:
    """The figure in the style of all, for so many rows of panels."""
    figure.update_annotations(font_size=14)
    figure.update_yaxes(title_font_size=14)
    figure.update_layout(
        template="plotly_white",
        width=1000,
        height=265 + 250 * rows,
        title_font_size=16,
        margin={"t": 135, "b": 80, "l": 80, "r": 60},
        # Hung 70 points below the panels, and so below the axis title; the margin grows with the legend's rows.
        legend={"orientation": "h", "y": -70 / (50 + 250 * rows), "yanchor": "top", "x": 0.5, "xanchor": "center"},
    )
    return figure
