"""Fixtures that several folders use: the bundled model, its untrained twin and one episode."""

import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from iclgd_lens import load_model, load_task, untrained_twin
from iclgd_lens.data.episodes import Episode
from iclgd_lens.models.hooked import HookedModel, NoHookedTransformerError

# The models here are so small that threads cost more than they bring.
torch.set_num_threads(1)
# Parallel workers are told to be 80 columns wide, and what commands print would fold there.
os.environ.pop("COLUMNS", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the numbers of the golden run anew")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    with skipping_without_hooked_transformer():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    with skipping_without_hooked_transformer():
        return (yield)


@contextmanager
def skipping_without_hooked_transformer() -> Iterator[None]:
    """TransformerLens 4 has bridges alone: what is built of a `HookedTransformer` cannot be tested with it."""
    try:
        yield
    except NoHookedTransformerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The system's Chromium, without a window."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("pages are looked at in Chromium, and none is installed here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def bundled() -> HookedModel:
    return load_model("bundled", device="cpu")


@pytest.fixture(scope="session")
def twin(bundled: HookedModel) -> HookedModel:
    return untrained_twin(bundled, seed=0)


@pytest.fixture(scope="session")
def episode(bundled: HookedModel) -> Episode:
    return load_task("bundled/remapped").episode(bundled, k=6, n_queries=12, seed=0)
