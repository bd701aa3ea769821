"""Random draws that are the same on every machine.

They go through `random.Random.random`, the one method whose stream Python promises to keep for a given seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

MOST_SEED = 2**31 - 1
"""The largest seed that commands and studies take."""


def shuffled(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Return the items in random order."""
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def reordered(rng: random.Random, items: Sequence[T]) -> list[T]:
    """Return the items in a random order that is not the one they are in; they must not all be alike."""
    order = shuffled(rng, items)
    while order == list(items):
        order = shuffled(rng, items)
    return order


def pick(rng: random.Random, items: Sequence[T]) -> T:
    """Return one item, each as likely as another."""
    return items[int(rng.random() * len(items))]
