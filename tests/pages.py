"""Opening pages in a browser, with the network off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280) -> Iterator[Any]:
    """Open a page from disk; whatever it complains about, or asks the network for, is an error at the end."""
    context = browser.new_context(offline=True, viewport={"width": width, "height": 900})
    page, problems = context.new_page(), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: (problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url)
    )
    page.goto(path.as_uri())
    page.wait_for_timeout(300)  # React draws a little later
    yield page
    context.close()
    assert not problems
