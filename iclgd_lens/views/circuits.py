"""CircuitsVis views that work offline, several on a page, and with any text in them.

CircuitsVis carries its JavaScript with it, but parses token strings as HTML, writes data into a script without escaping
`</script>`, and leaves its `div` open, so that a second view on a page nests in the first. Here the same elements are written so
that none of this can happen.
"""

from __future__ import annotations

import json
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import uuid4

from circuitsvis.utils.render import RenderedHTML

from iclgd_lens.files import write_text


class View(RenderedHTML):
    """A CircuitsVis view that shows itself in Jupyter and needs no network.

    Attributes:
        body: The view itself, for a page that holds `circuitsvis_script()` once.
        local_src: The view with everything that it needs, for a cell or a page of its own.
        cdn_src: The same: nothing is loaded from anywhere.
    """

    def __init__(self, body: str) -> None:
        whole = f"{circuitsvis_script()}\n{body}"
        super().__init__(local_src=whole, cdn_src=whole)
        self.body = body

    def _repr_html_(self) -> str:
        return self.local_src

    def save(self, path: str | Path, title: str = "iclgd_lens") -> Path:
        """Write the view as a page of its own, and return its path.

        Raises:
            OSError: If the file cannot be written.
        """
        write_text(Path(path), page(title, self.local_src))
        return Path(path)


@cache
def circuitsvis_script() -> str:
    """CircuitsVis's own JavaScript, and the style of views, to stand once on a page (1.3 MB)."""
    bundle = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # The map of its sources is not there to be loaded.
    bundle = in_script(bundle.rsplit("//# sourceMappingURL", 1)[0])
    # Once, also where several views stand on a page: a second run registers everything in it again, and complains.
    once = f"if (!window.CircuitsVis) {{ {bundle} }}"
    return f"<script>{once}</script>\n<style>{asset('attention.css')}</style>\n<script>{asset('attention.js')}</script>"


def asset(name: str) -> str:
    """Read a file that ships with the views."""
    return (files("iclgd_lens.views") / "assets" / name).read_text(encoding="utf-8")


def in_script(code: str) -> str:
    """Write JavaScript so that nothing in it ends the script that it stands in; its strings mean the same."""
    return code.replace("</script", r"<\/script")


def json_in_script(written: str) -> str:
    """Write JSON so that nothing in it ends the script that it stands in."""
    return written.replace("<", r"\u003c")


def script_json(value: Any) -> str:
    """Write a value as JSON for a script."""
    return json_in_script(json.dumps(value, allow_nan=False))


def element(name: str, properties: dict[str, Any], caption: str) -> View:
    """Make a view of one of CircuitsVis's elements, such as `"AttentionHeads"`, below a line that says what it shows."""
    identity = _identity()
    call = f'CircuitsVis.render("{identity}", CircuitsVis.{name}, {script_json(properties)})'
    about = f'<p class="iclgd-about">{escape(caption)}</p>'
    return View(f'<div class="iclgd-view">{about}<div id="{identity}"></div></div>\n<script>{call}</script>')


def drawn_by(function: str, data: Any) -> View:
    """Make a view that a function of `attention.js` draws from data."""
    identity = _identity()
    call = f'{function}(document.getElementById("{identity}"), {script_json(data)})'
    return View(f'<div class="iclgd-view" id="{identity}"></div>\n<script>{call}</script>')


def page(title: str, body: str) -> str:
    """Put a body into an HTML page with a title, which is text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _identity() -> str:
    return f"iclgd-{uuid4().hex[:12]}"
