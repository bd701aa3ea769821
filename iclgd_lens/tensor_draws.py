"""Random tensors that are the same on every device and under every default of torch's: float32 on the CPU, cast afterwards."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.checks import require_seed


def seeded(seed: int) -> torch.Generator:
    """Make a generator on the CPU.

    Raises:
        ValueError: If the seed is no whole number.
    """
    return torch.Generator(device="cpu").manual_seed(require_seed(seed))


def normal(generator: torch.Generator, *shape: int) -> Float[Tensor, "*shape"]:
    """Draw from N(0, 1)."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(generator: torch.Generator, *shape: int) -> Float[Tensor, "*shape"]:
    """Draw from the numbers between 0 and 1."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
