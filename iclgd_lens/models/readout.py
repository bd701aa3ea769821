"""The readout: final norm and unembedding, applied to any layer's residual stream.

At the last layer this is the model's own output; at earlier layers it is the logit lens (nostalgebraist 2020), which
layer-causal gradient descent uses to give every block a loss of its own (Deutch et al. 2024, section 3.2). Only the columns of
`W_U` that are asked for are multiplied, and no hook of the model fires, so a user's hooks never see these readouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.models.precision import wide


@dataclass(frozen=True, eq=False)
class LogitLens:
    """Reads logits from a residual stream: `norm(residual) @ W_U[:, tokens] + b_U[tokens]`, soft-capped where the model does.

    Attributes:
        model: The model whose final norm is used.
        weight: The columns of its unembedding.
        bias: Their biases.
    """

    model: HookedTransformer
    weight: Float[Tensor, "d_model token"]
    bias: Float[Tensor, "token"]

    @classmethod
    def of(cls, model: HookedTransformer, tokens: Int[Tensor, "token"] | None = None) -> LogitLens:
        """The readout of some vocabulary entries, in their order, or of all."""
        weight, bias = model.unembed.W_U, model.unembed.b_U
        return cls(model, weight, bias) if tokens is None else cls(model, weight[:, tokens], bias[tokens])

    def __call__(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        """Read logits from residual-stream vectors of any layer."""
        return self._unembed(_final_norm(self.model, residual))

    def cross_entropy(
        self, residual: Float[Tensor, "*batch pos d_model"], targets: Int[Tensor, "pos"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch pos d_model"]]:
        """The mean cross-entropy over positions, and its gradient by the residual stream.

        All vectors go through the unembedding in one product there and one back, which are most of the cost; autograd is used for
        the norm alone, so that of the logits no more than two copies are held.

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
            logits = wide(self._unembed(normed))
            error = logits.softmax(dim=-1)
            index = targets.expand(logits.shape[:-1])[..., None]
            # log Σ exp, by the largest logit's own probability, which is never small.
            log_sum = logits.amax(dim=-1) - error.amax(dim=-1).log()
            losses = (log_sum - logits.gather(-1, index).squeeze(-1)).mean(dim=-1)
            error.scatter_add_(-1, index, error.new_full((), -1.0).expand(index.shape))
            if (cap := self._cap) > 0:
                error *= 1 - (logits / cap).square()
            by_normed = error.to(residual.dtype) @ self.weight.T / len(targets)
        return losses, torch.autograd.grad(normed, leaf, by_normed)[0]

    def _unembed(self, normed: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch token"]:
        logits = normed @ self.weight + self.bias
        cap = self._cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    @property
    def _cap(self) -> float:
        return float(self.model.cfg.output_logits_soft_cap)


def _final_norm(model: HookedTransformer, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
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
