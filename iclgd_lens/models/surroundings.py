"""What torch's global settings do to new tensors, held off while weights are made or loaded.

Under `torch.inference_mode` new weights could never be differentiated; a default dtype, a default device and autocast change which
numbers are drawn, and which dtype a buffer gets.

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
def ordinary_tensors() -> Iterator[None]:
    """Make tensors as a fresh interpreter does: float32 on the CPU unless told otherwise, outside inference mode and autocast.

    Whether gradients are recorded is left as it is, and so are torch's random states.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.device("cpu"))
            for device in _DEVICES:
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        torch.set_default_dtype(dtype)
