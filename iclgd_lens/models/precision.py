"""Half precision is fine for running models and too coarse for sums, norms and differences of what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for values of a dtype: at least float32, float64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast to at least float32; a tensor that is wide already is returned as it is."""
    return x.to(wide_dtype(x.dtype))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the dtypes that tensors have, also where the caller has `torch.autocast` on, which would round every product."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def ordinary_modes() -> Iterator[None]:
    """Compute as torch does when nothing is set: in the dtypes of the tensors, on tensors' own devices and not under inference
    mode, without gradients until they are switched on. What the caller has set holds again afterwards.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_autocast())
        if (default := torch.get_default_dtype()) != torch.float32:
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
