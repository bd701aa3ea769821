"""Torch's global settings, held off while weights are made or loaded, and while a model is run.

Under `torch.inference_mode` new weights could never be differentiated; a default dtype, a default device and autocast change which
numbers are drawn, which dtype a buffer gets, and how products are rounded.

>>> with torch.inference_mode(), ordinary_tensors():
...     torch.ones(1).is_inference(), torch.get_default_dtype()
(False, torch.float32)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes that tensors have, also where the caller has `torch.autocast` on, which would round every product."""
    with ExitStack() as stack:
        for kind in _DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors as a fresh interpreter does: float32 on the CPU unless told otherwise, outside inference mode and autocast.

    Whether gradients are recorded is left as it is, and so are torch's random states.
    """
    with torch.inference_mode(False), without_autocast(), ExitStack() as stack:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        # Such a mode is looked at by every call of torch, so one is entered only where it changes something.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Compute as a fresh interpreter does (`ordinary_tensors`), without recording gradients until that is switched on within."""
    with ordinary_tensors(), torch.no_grad():
        yield
