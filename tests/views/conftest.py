"""One comparison with kernel views, which is what costs; `frames.py` makes others of it."""

from __future__ import annotations

import pytest

from iclgd_lens import Comparison, compare, load_task
from iclgd_lens.models.hooked import HookedModel


@pytest.fixture(scope="session")
def with_kernels(bundled: HookedModel, twin: HookedModel) -> Comparison:
    """One episode, with a twin and kernel views."""
    episode = load_task("bundled/remapped").episode(bundled, k=3, n_queries=4, seed=0)
    return compare(bundled, episode, lr=0.1, untrained=twin, kernels=True)
