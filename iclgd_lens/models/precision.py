"""Half precision is fine for running models and too coarse for sums, norms and differences of what they compute."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for values of a dtype: at least float32, float64 where they are."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Cast to at least float32; a tensor that is wide already is returned as it is."""
    return x.to(wide_dtype(x.dtype))
