"""A block's feed-forward part, once more for the way back: what its products came to is known, so they are not made again.

A loss of few positions goes back through these alone, which needs a graph of its own. With one or two rows a product by a weight
costs about as much as reading it, so making one again would double the cost of that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A block's feed-forward part.

    Attributes:
        block: The block.
        products: Hook names of what its input is multiplied to: before the activation, and where it is gated, beside it.
        out: Hook name of what it adds to the residual stream.
    """

    block: Any
    products: tuple[str, ...]
    out: str

    def again(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        products: Sequence[Float[Tensor, "batch pos d_mlp"]],
        out: Float[Tensor, "batch pos d_model"],
    ) -> Float[Tensor, "batch pos d_model"]:
        """The block's output as a function of the residual stream in front of this part, given what was read at its hooks."""
        mlp = self.block.mlp
        normed = self.block.ln2(residual)
        weights = [mlp.W_gate, mlp.W_in] if len(products) > 1 else [mlp.W_in]
        before, *beside = (_product(normed, weight, known) for weight, known in zip(weights, products, strict=True))
        hidden = mlp.act_fn(before)
        if beside:
            hidden = hidden * beside[0] + mlp.b_in
        elif mlp.cfg.is_layer_norm_activation():
            hidden = mlp.ln(hidden)
        return residual + _product(hidden, mlp.W_out, out)


def _product(
    x: Float[Tensor, "*batch i"], weight: Float[Tensor, "i o"], known: Float[Tensor, "*batch o"]
) -> Float[Tensor, "*batch o"]:
    """`x @ weight` plus a constant, whose value is known."""
    product: Tensor = _KnownProduct.apply(x, weight.detach(), known.detach())
    return product


class _KnownProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, known: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return known.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        # With the weight in front: of two rows, a product by its transpose takes up to four times longer on a processor.
        return (weight @ gradients[0].mT).mT, None, None
