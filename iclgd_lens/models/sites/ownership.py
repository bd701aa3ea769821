"""One thread at a time: hooks are on the model, so what another thread ran meanwhile would run under them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from iclgd_lens.models.hooked import HookedModel


@dataclass
class _Owner:
    """The thread that has hooks on a model, and how often it has put some on that are not off again."""

    thread: threading.Thread
    depth: int = 0


_owners: WeakKeyDictionary[HookedModel, _Owner] = WeakKeyDictionary()
"""Of every model that has hooks of this package on it."""

_looking = threading.RLock()
"""Held while owners are looked at. The same thread may come here once more in between, where a context manager that was never left
is collected.
"""


@contextmanager
def owned_by_this_thread(model: HookedModel) -> Iterator[None]:
    """Keep other threads' hooks off a model within a `with` block; the same thread may come in again.

    Raises:
        RuntimeError: If another thread is within such a block.
    """
    me = threading.current_thread()
    with _looking:
        owner = _owners.setdefault(model, _Owner(me))
        if owner.thread is not me:
            raise RuntimeError(
                f"the thread {owner.thread.name!r} is running this model with hooks on it, under which this thread ({me.name!r}) "
                "would run, too: let captures, gradient steps and attached updates of one model follow one after the other, or "
                "give every thread a model of its own (load_model loads another)"
            )
        owner.depth += 1
    try:
        yield
    finally:
        with _looking:
            owner.depth -= 1
            if not owner.depth:
                del _owners[model]
