"""What a block does behind its heads, once more for the way back: what its products came to is known, so they are not made again.

A loss of few positions goes back through these alone, which needs a graph of its own. With one or two rows a product by a weight
costs about as much as reading it, so making one again would double the cost of that way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_PARTS = 8
"""Into how many parts at most a product of few rows is cut."""


@dataclass(frozen=True, eq=False)
class AfterAttention:
    """The output projection of a block's heads, and its feed-forward part.

    Attributes:
        block: The block.
        attended: Hook name of what attention adds to the residual stream.
        products: Hook names of what the feed-forward part's input is multiplied to: before the activation, and where it is gated,
            beside it.
        out: Hook name of what the feed-forward part adds to the residual stream.
    """

    block: Any
    attended: str
    products: tuple[str, ...]
    out: str

    @property
    def known(self) -> tuple[str, ...]:
        """All hook names, in the order in which they fire."""
        return (self.attended, *self.products, self.out)

    def again(
        self,
        residual: Float[Tensor, "batch pos d_model"],
        heads: Float[Tensor, "batch pos head d_head"],
        known: Sequence[Float[Tensor, "batch pos _width"]],
    ) -> Float[Tensor, "batch pos d_model"]:
        """The block's output as a function of its input and of what its heads put out, given what was read at `known`."""
        mlp = self.block.mlp
        attended, *products, out = known
        between = residual + _product(heads.flatten(2), self.block.attn.W_O.flatten(0, 1), attended)
        normed = self.block.ln2(between)
        weights = [mlp.W_gate, mlp.W_in] if len(products) > 1 else [mlp.W_in]
        before, *beside = (_product(normed, weight, product) for weight, product in zip(weights, products, strict=True))
        hidden = mlp.act_fn(before)
        if beside:
            hidden = hidden * beside[0] + mlp.b_in
        elif mlp.cfg.is_layer_norm_activation():
            hidden = mlp.ln(hidden)
        return between + _product(hidden, mlp.W_out, out)


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
        (gradient,) = gradients
        rows = gradient.flatten(0, -2)
        # A product of few rows is read from the weights at the speed of memory, but torch gives it to one thread. In parts it is a
        # batch of products, which threads share; and with the weights in front, two rows take no longer than one.
        parts = weight.unflatten(0, (math.gcd(len(weight), _PARTS), -1))
        by_rows = torch.bmm(parts, rows.mT.expand(len(parts), -1, -1)).flatten(0, 1).mT
        return by_rows.reshape(*gradient.shape[:-1], len(weight)), None, None
