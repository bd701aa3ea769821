"""Examples of what is built of a `HookedTransformer` are left out where TransformerLens has none.

With `CHECK_SHAPES=1`, shapes and dtypes in annotations are checked while tests and examples run. It makes them take a quarter
longer, so it is off unless asked for; `tests/test_shapes.py`, a slow test, checks the main path without being asked.
"""

import os
from collections.abc import Generator
from typing import Any

import pytest

from tests.shapes import check_shapes, unchecked

if os.environ.get("CHECK_SHAPES"):
    check_shapes()

from iclgd_lens.models.hooked import HookedTransformer  # checked from its import on

collect_ignore = []
if HookedTransformer is None:
    collect_ignore += ["iclgd_lens/benchmarks/models.py", "iclgd_lens/benchmarks/run.py", "iclgd_lens/kernels/constructed.py"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Leave it to the package to refuse what is given wrong on purpose."""
    if item.get_closest_marker("unchecked_shapes") is None:
        return (yield)
    with unchecked():
        return (yield)
