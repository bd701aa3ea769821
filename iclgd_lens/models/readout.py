"""The readout: final norm and unembedding, applied to any layer's residual stream.

At the last layer this is the model's own output; at earlier layers it is the logit lens (nostalgebraist 2020), which
layer-causal gradient descent uses to give every block a loss of its own (Deutch et al. 2024, section 3.2). Only the columns of
`W_U` that are asked for are multiplied, and no hook of the model fires, so a user's hooks never see these readouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.models.hooked import HookedModel, is_bridge
from iclgd_lens.models.linear_maps import linear_map
from iclgd_lens.models.precision import wide

COLUMNS_AT_ONCE, COLUMNS_AT_ONCE_ON_CPU = 2**14, 2**11
"""How many columns of `W_U` a cross-entropy multiplies at once. Few stay in a processor's cache from the way there to the way back,
and their product is itself the faster; elsewhere a product of few columns would cost mostly its start.
"""


def column_blocks(weight: Float[Tensor, "d_model token"]) -> Iterator[tuple[slice, Float[Tensor, "d_model column"]]]:
    """Which columns are multiplied at once, and these columns."""
    width = COLUMNS_AT_ONCE_ON_CPU if weight.device.type == "cpu" else COLUMNS_AT_ONCE
    for start in range(0, weight.shape[1], width):
        columns = slice(start, start + width)
        yield columns, weight[:, columns]


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Reads logits from a residual stream: `norm(residual) @ W_U[:, tokens] + b_U[tokens]`, soft-capped where the model does.

    Attributes:
        model: The model whose final norm is used.
        weight: The columns of its unembedding.
        bias: Their biases.
    """

    model: HookedModel
    weight: Float[Tensor, "d_model token"]
    bias: Float[Tensor, "token"]

    @classmethod
    def of(cls, model: HookedModel, tokens: Int[Tensor, "token"] | None = None) -> LogitLens:
        """The readout of some vocabulary entries, in their order, or of all."""
        weight, bias = _unembedding(model)
        return cls(model, weight, bias) if tokens is None else cls(model, weight[:, tokens], bias[tokens])

    def __call__(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        """Read logits from residual-stream vectors of any layer."""
        return self._unembed(_final_norm(self.model, residual))

    def cross_entropy(
        self, residual: Float[Tensor, "*batch pos d_model"], targets: Int[Tensor, "pos"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch pos d_model"]]:
        """The mean cross-entropy over positions, and its gradient by the residual stream.

        The vocabulary is passed over once, some columns at a time, which are multiplied there and back while they are at hand; the
        sum of exponentials is kept relative to the largest logit so far. No more logits are held than of these columns, and
        autograd is used for the norm alone.

        Args:
            residual: Residual-stream vectors; gradients do not flow into what they were made from.
            targets: What each position should predict, as an index into the tokens that are read.

        Returns:
            The loss in nats, in at least float32, and its gradient in the dtype of `residual`.
        """
        with torch.enable_grad():
            leaf = residual.detach().requires_grad_()
            normed = _final_norm(self.model, leaf)
        with torch.no_grad():
            losses, by_normed = self._losses(normed.flatten(0, -2), targets.expand(normed.shape[:-1]).flatten())
            by_normed = (by_normed / len(targets)).view_as(normed).to(normed.dtype)
        return losses.view(normed.shape[:-1]).mean(dim=-1), torch.autograd.grad(normed, leaf, by_normed)[0]

    def _losses(
        self, normed: Float[Tensor, "row d_model"], targets: Int[Tensor, "row"]
    ) -> tuple[Float[Tensor, "row"], Float[Tensor, "row d_model"]]:
        """Each row's cross-entropy and its gradient, Σⱼ pⱼ uⱼ − uₜ = Σ_{j≠t} pⱼ (uⱼ − uₜ), the columns of targets t left aside."""
        weight = self.weight[:, targets].T
        target = self._capped((wide(normed) * wide(weight)).sum(dim=-1, keepdim=True) + wide(self.bias[targets, None]))
        top, others, pulled = target, torch.zeros_like(target), torch.zeros_like(wide(normed))
        for columns, of_columns in column_blocks(self.weight):
            logits = wide(self._capped(torch.addmm(self.bias[columns], normed, of_columns)))
            higher = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
            scale, top = (top - higher).exp(), higher
            error = (logits - top).exp_()
            index = (targets - columns.start)[:, None]
            nearest = index.clamp(0, of_columns.shape[1] - 1)
            error.scatter_(-1, nearest, error.gather(-1, nearest).masked_fill(index == nearest, 0.0))
            others = others * scale + error.sum(dim=-1, keepdim=True)
            pulled = pulled * scale + (error * self._slope(logits)).to(normed.dtype) @ of_columns.T
        total = others + (target - top).exp()
        gradient = (pulled - others * self._slope(target) * wide(weight)) / total
        return (total.log() + top - target).squeeze(-1), gradient

    def _unembed(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        return self._capped(normed @ self.weight + self.bias)

    def _capped(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        cap = self._cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _slope(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | float:
        """The derivative of the soft cap where it has these values."""
        return 1 - (logits / self._cap).square() if self._cap > 0 else 1.0

    @property
    def _cap(self) -> float:
        return float(self.model.cfg.output_logits_soft_cap)


def _unembedding(model: Any) -> tuple[Float[Tensor, "d_model token"], Float[Tensor, "token"]]:
    if not is_bridge(model):
        return model.unembed.W_U, model.unembed.b_U
    weight, bias = linear_map(model.unembed.original_component, model.cfg.d_model, model.cfg.dtype, "the unembedding")
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias


def _final_norm(model: Any, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    if is_bridge(model):
        normed: Tensor = model.ln_final.original_component(residual)
        return normed
    kind = model.cfg.normalization_type
    if kind is None:
        return residual
    norm: Any = model.ln_final
    scale, shift = getattr(norm, "w", None), getattr(norm, "b", None)
    # Norms are computed in float32 and cast back before their scale, as TransformerLens does in half precision.
    x = wide(residual)
    if kind.startswith("LN") and not model.cfg.final_rms:
        x = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
    else:
        x = F.rms_norm(x, x.shape[-1:], eps=norm.eps)
    x = x.to(residual.dtype)
    if scale is not None:
        x = x * scale
    return x if shift is None else x + shift
