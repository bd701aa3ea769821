"""What README and docs say is so: their code runs, their commands exist, and the reference describes the exported names."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer
import yaml

import iclgd_lens
from iclgd_lens.cli import app
from iclgd_lens.experiments.study import Study

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for _, of, code in BLOCK.findall(page.read_text(encoding="utf-8")) if of == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands() -> list[tuple[str, str]]:
    """Every line of a console block that calls `iclgd`, with its page."""
    lines = [(name(page), line) for page in PAGES for code in blocks(page, "") for line in code.splitlines()]
    parts = [(page, part.strip()) for page, line in lines for part in line.split("#")[0].split("&&")]
    return [(page, part) for page, part in parts if part.startswith("iclgd ")]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_code_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": page.stem}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{name(page)}, block {number}", "exec"), scope)


def test_kinds_of_blocks_are_known():
    """So that none is left out here by a misspelt language."""
    assert {of for page in PAGES for _, of, _ in BLOCK.findall(page.read_text(encoding="utf-8"))} == {"", "python", "yaml", "toml"}


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_exist_with_their_options(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for file in re.findall(r"\S+\.yaml", command):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("models: bundled")
    monkeypatch.chdir(tmp_path)
    _, called, *arguments = shlex.split(command)
    group = typer.main.get_command(app)
    assert called in group.commands, f"{page}: {command}"
    group.commands[called].make_context(called, arguments)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name)
def test_studies_are_valid(page: Path):
    for code in blocks(page, "yaml"):
        Study.model_validate(yaml.safe_load(code))


def test_the_reference_describes_what_is_exported_and_nothing_else():
    pages = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = re.findall(r"^::: iclgd_lens\.(\w+)$", pages, re.MULTILINE)
    listed = re.findall(r"`(\w+)`", "".join(line for line in (DOCS / "reference" / "index.md").open() if line.startswith("| [")))
    assert sorted(described) == sorted(iclgd_lens.__all__) == sorted(listed)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
            target = page.parent / link
            # Notebooks are put among the pages when the site is made.
            assert target.exists() or (ROOT / "notebooks" / target.name).exists(), f"{name(page)}: {link}"


def test_version_and_changelog_and_citation_agree():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version[1]
    assert f"\n## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_figures_show_what_their_captions_say():
    drawing = load(DOCS / "figures" / "draw.py")
    dependence = drawing.layer_dependence()
    assert (dependence["gd"] > 1e-3).all()
    assert torch.equal(dependence["lcgd"] > 0, torch.ones_like(dependence["lcgd"]).tril() > 0)
    torch.testing.assert_close(dependence["lcgd"][-1], dependence["gd"][-1], rtol=1e-3, atol=1e-5)  # the top layer's steps are one
    lengths = torch.tensor([1.2, 2.0, 4.0])
    scaled, plain = drawing.unrelated_changes(lengths)
    torch.testing.assert_close(scaled, (1 - 1 / lengths) / 2, rtol=0, atol=0.01)
    torch.testing.assert_close(plain, torch.zeros(3), rtol=0, atol=0.01)
    assert drawing.causality().data
    assert drawing.free_similarity().data
    assert {f"{figure}.svg" for figure in drawing.FIGURES} <= {path.name for path in (DOCS / "figures").iterdir()}
