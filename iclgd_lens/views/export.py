"""Writing figures: always as a page and their data as CSV, as pictures where a browser can draw them."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from plotly import graph_objects as go
from plotly.io import write_images

from iclgd_lens.files import written_whole

PICTURES = ("png", "svg")


def write_figure(figure: go.Figure, data: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write `name.html`, which needs `plotly.min.js` beside it and no network, and `name.csv`.

    Args:
        figure: The figure.
        data: The rows it was drawn from.
        folder: Where to write; made if it is missing.
        name: What the files are called.
    """
    page, table = folder / f"{name}.html", folder / f"{name}.csv"
    with written_whole(page) as partial:
        figure.write_html(partial, include_plotlyjs="directory")
    with written_whole(table) as partial:
        data.to_csv(partial, index=False)
    return [page, table]


def write_pictures(figures: dict[str, go.Figure], folder: Path) -> tuple[list[Path], str]:
    """Write every figure as PNG and SVG, if kaleido and a browser are there.

    Returns:
        The paths that were written, and, if none could be, why and what to do; otherwise an empty text.
    """
    names = [f"{name}.{suffix}" for name in figures for suffix in PICTURES]
    with TemporaryDirectory() as drawn:
        try:
            # All in one call, since starting the browser takes longest.
            repeated = [figure for figure in figures.values() for _ in PICTURES]
            write_images(
                fig=repeated,
                file=[Path(drawn) / name for name in names],
                width=[figure.layout.width for figure in repeated],
                height=[figure.layout.height for figure in repeated],
                scale=2,
            )
        except Exception as error:  # whatever kaleido or the browser says
            reason = str(error).strip().split("\n", maxsplit=1)[0].rstrip(".,")
            return [], (
                f"Figures were written as pages, not as PNG or SVG: {reason}. "
                "To have pictures, pip install 'iclgd-lens[figures]' and have Chrome or Chromium on the path."
            )
        for name in names:
            with written_whole(folder / name) as partial:
                shutil.copyfile(Path(drawn) / name, partial)
    return [folder / name for name in names], ""
