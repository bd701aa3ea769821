"""What the site shows that lies beside these pages: the notebooks."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

MATHJAX = re.compile(r'<script[^>]*src="https?://[^"]*mathjax[^"]*"[^>]*></script>', re.IGNORECASE)
"""What plotly fetches for formulas, of which our figures have none."""

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have figures in notebooks drawn by a script in the page: what plotly puts there otherwise is for Jupyter alone."""
    os.environ["PLOTLY_RENDERER"] = "notebook"
    return config


@event_priority(100)  # before they are turned into pages
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the notebooks as if they lay in the folder of pages."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(NOTEBOOKS.parent), config.site_dir, config.use_directory_urls))
    return files


def on_post_page(output: str, **_: object) -> str:
    """Take out of pages what would be fetched from another host."""
    return MATHJAX.sub("", output)
