"""What a module does to a vector, as a matrix: read from its weight where the module is that matrix alone, measured otherwise.

An adapter, a quantised layer or a parametrised weight has an attribute `weight` that is not what the module multiplies by. Such a
module is given the unit vectors, and what comes out is its matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iclgd_lens.models.precision import wide
from iclgd_lens.models.touched import is_untouched
from iclgd_lens.tensor_draws import normal, seeded

ROWS_AT_ONCE = 1024
"""How many unit vectors a module is given at once."""

LINEAR = {64: 1e-9, 32: 1e-4, 16: 0.05}
"""How far a module may be from a linear map with a bias, relative to what it puts out, by the bits of its dtype."""


@torch.no_grad()
def linear_map(
    module: nn.Module, n_in: int, dtype: torch.dtype, what: str
) -> tuple[Float[Tensor, "i o"], Float[Tensor, "o"] | None]:
    """The matrix W and the bias b of a module that computes `x W + b`.

    Args:
        module: The module.
        n_in: How many numbers it takes.
        dtype: The dtype of what it takes.
        what: What messages call it.

    Returns:
        The model's own tensors where the module is a plain linear layer, and new ones where they were measured.

    Raises:
        ValueError: If the module is not linear.
    """
    weight: Any = module.weight if type(module) in (nn.Linear, Conv1D) and is_untouched(module) else None
    if weight is not None and weight.is_floating_point():
        plain: Any = module
        return (weight.T if type(module) is nn.Linear else weight).detach(), None if plain.bias is None else plain.bias.detach()
    device = next(module.parameters()).device
    bias = module(torch.zeros(1, n_in, dtype=dtype, device=device))[0]
    measured = bias.new_empty(n_in, len(bias))
    for start in range(0, n_in, ROWS_AT_ONCE):
        units = torch.zeros(min(ROWS_AT_ONCE, n_in - start), n_in, dtype=dtype, device=device)
        units[torch.arange(len(units)), torch.arange(start, start + len(units))] = 1.0
        measured[start : start + len(units)] = module(units) - bias
    probe = normal(seeded(0), 2, n_in).to(device, dtype)
    found, expected = wide(module(probe)), wide(probe) @ wide(measured) + wide(bias)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny))
    if not error <= LINEAR[torch.finfo(dtype).bits]:
        raise ValueError(
            f"{what} ({type(module).__name__}) is not a linear map: its output is {error:.1e} off that of one, relative to the "
            "largest; what is carried through it head by head cannot be told apart"
        )
    return measured, bias if bool(bias.any()) else None
