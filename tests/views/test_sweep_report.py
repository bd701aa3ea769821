"""The page of a sweep is text where its studies, failures, models and tasks are called something: nothing in it is live."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from iclgd_lens import Study, run_sweep
from iclgd_lens.experiments.sweep_folder import SweepFolder
from iclgd_lens.experiments.sweep_results import SweepResults
from iclgd_lens.views.sweep_report import sweep_report

HOSTILE = "'\"><img src=x onerror=alert(1)></script><script>alert(2)</script><!-- &lt; $x$ "
IN_A_FILE_NAME = HOSTILE.replace("/", "")
PLAIN = "plain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study of two learning rates, one of which fails."""
    out = tmp_path_factory.mktemp("sweep")
    study = Study(
        models="bundled", tasks="bundled/remapped", seeds=[0, 1], k=2, queries=2, lr=[0.1, 1e30], executor={"kind": "debug"}
    )
    run_sweep(study, out, name=PLAIN)
    return out


class Parts(HTMLParser):
    """What a browser makes of a page: its elements with the names of their attributes, its text, and what scripts hold."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, ...]] = []
        self.texts: list[str] = []
        self.data: list[Any] = []
        self.within = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attrs)))
        self.within = "data" if ("type", "application/json") in attrs else tag

    def handle_endtag(self, tag: str) -> None:
        self.within = ""

    def handle_data(self, data: str) -> None:
        if self.within == "data":
            self.data.append(json.loads(data))
        elif self.within not in ("script", "style"):
            self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment",))


def page_called(folder: Path, name: str, monkeypatch) -> Parts:
    """The page of a sweep whose studies, failures, models and tasks are called so."""
    place, read = SweepFolder(folder), SweepResults.frame
    in_a_file = name.replace("/", "")
    ((_, study),) = place.studies().items()
    study["study"]["models"][0]["name"] = name
    failures = [failure.__class__(**{**vars(failure), "about": name, "reason": name}) for failure in place.failures()]

    def renamed(self: SweepResults, *arguments: Any) -> pd.DataFrame:
        return read(self, *arguments).assign(model_name=name, task=name)

    with monkeypatch.context() as patched:
        patched.setattr(SweepResults, "frame", renamed)
        patched.setattr(SweepFolder, "failures", lambda self: failures)
        patched.setattr(SweepFolder, "studies", lambda self: {in_a_file: study})
        return Parts(sweep_report(folder))


def strings_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings_of(each)]
    if isinstance(value, list):
        return [text for each in value for text in strings_of(each)]
    return [value] if isinstance(value, str) else []


def test_markup_in_names_and_reasons_adds_no_element_and_is_read_as_it_is(folder, monkeypatch):
    plain, hostile = (page_called(folder, name, monkeypatch) for name in (PLAIN, HOSTILE))
    assert hostile.elements == plain.elements
    assert ("img", "src", "onerror") not in hostile.elements
    text = "".join(hostile.texts)
    assert f"iclgd_lens sweep: {IN_A_FILE_NAME}" in text
    assert f"Sweep: {IN_A_FILE_NAME}" in text
    # Task and model in the tables, a failure's cell and reason, the setting.
    assert text.count(HOSTILE) > 4
    assert json.dumps(HOSTILE)[1:-1] in text


def test_markup_in_names_is_no_markup_in_figures(folder, monkeypatch):
    plain, hostile = (page_called(folder, name, monkeypatch) for name in (PLAIN, HOSTILE))
    assert len(hostile.data) == len(plain.data) > 0
    shown = [text for figure in hostile.data for text in strings_of(figure)]
    assert any("img src=x" in text for text in shown)
    # Plotly reads tags in its texts, and formulas between dollars.
    assert not [text for text in shown if "<img" in text or "<script" in text or "$x$" in text]
