"""Notebooks are committed without outputs, and say what they show and what they do not."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def test_there_are_five():
    assert [name[:2] for name in NOTEBOOKS] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_clean_and_says_what_it_does_not_show(name):
    cells = json.loads((FOLDER / name).read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "".join(cells[0]["source"]).startswith("# ")
    assert "".join(cells[-1]["source"]).startswith("## What this does not show")
    assert any("hub = False" in "".join(cell["source"]) for cell in code)
