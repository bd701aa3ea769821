"""The readout: final norm and unembedding, applied to any layer's residual stream.

At the last layer this is the model's own output; at earlier layers it is the logit lens (nostalgebraist 2020), which
layer-causal gradient descent uses to give every block a loss of its own (Deutch et al. 2024, section 3.2). Only the columns of
`W_U` that are asked for are multiplied, and no hook of the model fires, so a user's hooks never see these readouts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.models.precision import wide


def read_out(
    model: HookedTransformer,
    residual: Float[Tensor, "*batch d_model"],
    tokens: Int[Tensor, "token"] | None = None,
) -> Float[Tensor, "*batch token"]:
    """Read logits from a residual stream: `norm(residual) @ W_U[:, tokens] + b_U[tokens]`, soft-capped where the model does.

    Args:
        model: The model whose final norm and unembedding are used.
        residual: Residual-stream vectors of any layer.
        tokens: The vocabulary entries to read, or None for all.

    Returns:
        Logits, in the order of `tokens`.
    """
    weight, bias = model.unembed.W_U, model.unembed.b_U
    if tokens is not None:
        weight, bias = weight[:, tokens], bias[tokens]
    logits = _final_norm(model, residual) @ weight + bias
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


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
