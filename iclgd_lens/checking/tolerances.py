"""How far two computations of the same number may be apart, by the dtype of the model's weights.

Two correct computations differ by rounding alone: sums in another order, a prompt in one piece or in two. Rounding grows with
depth, so the bounds are for deep models; a fault of the kinds that the check looks for is larger by orders of magnitude. Errors are
relative to a size that each row states, except where a unit stands beside them.

- *float64* rounds at 1e-16. Rotary positions and some norms are computed in float32 whatever the weights are, hence 1e-5.
- *float32* rounds at 6e-8. Log-probabilities and captures of 30 layers agree to about 1e-5, gradients to about 1e-4, since a
  gradient is a sum of terms that cancel. The effect of an update is a difference of two runs, and loses the digits that they share.
- *half precision* rounds at 4e-3 (bfloat16) or 5e-4 (float16), and a batch of another shape is summed in another order.
"""

from __future__ import annotations

from typing import Literal

import torch

Quantity = Literal["outputs", "captures", "attention", "gradients", "effect"]
"""What is compared."""

_TOLERANCES: dict[Quantity, dict[int, float]] = {
    # Log-probabilities, relative to the largest.
    "outputs": {64: 1e-5, 32: 1e-4, 16: 0.05},
    # Attention outputs, scores and label log-probabilities, relative to the largest of the layer or of the prompt.
    "captures": {64: 1e-5, 32: 5e-4, 16: 0.08},
    # Probabilities, absolute; and one matrix product, relative to the largest entry of the layer.
    "attention": {64: 1e-5, 32: 1e-4, 16: 0.03},
    # Changes of weights, as the Frobenius norm of the difference relative to that of the change.
    "gradients": {64: 1e-5, 32: 2e-3, 16: 0.25},
    # Changes of log-probabilities, relative to the largest.
    "effect": {64: 1e-4, 32: 5e-3, 16: 0.5},
}

ROTARY = 1e-6
"""How far a rotary frequency may be off, relative to 1 radian per token: some units of float32's last place."""


def tolerance(quantity: Quantity, dtype: torch.dtype) -> float:
    """How far two computations of a quantity may be apart for weights of a dtype."""
    return _TOLERANCES[quantity][min(torch.finfo(dtype).bits, 64)]
