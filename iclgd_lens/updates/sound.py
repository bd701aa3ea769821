"""What holds of every update in dual form, and is checked where one comes from a file or goes into one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from iclgd_lens.checks import require_finite

AXES: Mapping[str, tuple[str, ...]] = {
    "inputs": ("layer", "token", "d_model"),
    "key_errors": ("layer", "token", "kv_head", "d_head"),
    "value_errors": ("layer", "token", "kv_head", "d_head"),
    "demonstration": ("token",),
    "position": ("token",),
    "gradient_norms": ("layer", "step"),
    "losses": ("step",),
}
"""The tensors of a `ParameterUpdate`, by the names of their axes."""

_WHOLE_NUMBERS = ("demonstration", "position")
_WIDE = ("key_errors", "value_errors", "gradient_norms", "losses")
"""What is kept in at least float32, whatever the model's dtype is."""


def require_sound(tensors: Mapping[str, Tensor], epochs: int) -> None:
    """Check that tensors are those of one update.

    Args:
        tensors: By the names of `AXES`.
        epochs: The passes over the demonstrations that the update was made in.

    Raises:
        ValueError: If one has another dtype or number of axes, two differ in an axis that they share, an entry is not finite, or a
            demonstration's tokens are not one after another, or not the same in every epoch.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, axes in AXES.items():
        tensor = tensors[name]
        _require_dtype(name, tensor)
        if tensor.ndim != len(axes):
            raise ValueError(f"{name} must be [{' '.join(axes)}], and has the shape {list(tensor.shape)}")
        for axis, size in zip(axes, tensor.shape, strict=True):
            expected, first = sizes.setdefault(axis, (size, name))
            if size != expected or not size:
                raise ValueError(f"{name} has {size} along the axis {axis!r}, and {first} has {expected}")
    for name in ("inputs", "key_errors", "value_errors"):
        require_finite(name, tensors[name])
    demonstration, position, losses = (tensors[name].cpu() for name in ("demonstration", "position", "losses"))
    if bool((position < 0).any()):
        raise ValueError(f"position has a negative entry, {int(position.min())}")
    if bool((demonstration == -1).all()):
        return  # of a random update, which belongs to no demonstration and has no gradients
    for name in ("gradient_norms", "losses"):
        require_finite(name, tensors[name])
    _require_tokens_in_order(demonstration, position, epochs, len(losses))


def _require_dtype(name: str, tensor: Tensor) -> None:
    if name in _WHOLE_NUMBERS:
        wanted, right = "torch.int64", tensor.dtype == torch.long
    elif name in _WIDE:
        wanted, right = "torch.float32 or torch.float64", tensor.dtype in (torch.float32, torch.float64)
    else:
        wanted, right = "a floating-point dtype", tensor.is_floating_point()
    if not right:
        raise ValueError(f"{name} must have {wanted}, and has {tensor.dtype}")


def _require_tokens_in_order(
    demonstration: Int[Tensor, "token"], position: Int[Tensor, "token"], epochs: int, n_steps: int
) -> None:
    """Check that every epoch has the same tokens: those of demonstration 0, then of 1, …, each one's positions going up by one."""
    if len(demonstration) % epochs or n_steps % epochs:
        raise ValueError(f"{len(demonstration)} tokens and {n_steps} steps cannot be those of {epochs} epochs: some are missing")
    by_epoch = torch.stack([demonstration, position]).view(2, epochs, -1)
    first, positions = by_epoch[:, 0]
    if not torch.equal(by_epoch, by_epoch[:, :1].expand_as(by_epoch)):
        raise ValueError("the epochs have different tokens: some are missing")
    new, further = first.diff(), positions.diff()
    if int(first[0]) != 0 or bool(((new != 0) & (new != 1)).any()) or int(first[-1]) + 1 != n_steps // epochs:
        raise ValueError(
            f"demonstration must go from 0 to {n_steps // epochs - 1} in order, as there are {n_steps} steps: some are missing"
        )
    if bool((further[new == 0] != 1).any()):
        raise ValueError("a demonstration's tokens must be one after another in position: some are missing")
