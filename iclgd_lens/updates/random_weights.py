"""A random update of the size of a real one, in weight space."""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.models.precision import wide
from iclgd_lens.tensor_draws import normal, seeded
from iclgd_lens.updates.dual import ParameterUpdate


def random_weights(update: ParameterUpdate, seed: int = 0) -> ParameterUpdate:
    """Make an update whose every ΔW and Δb is Gaussian and as long, layer by layer, as in the update given.

    Its dual form has a token for every coordinate of the projections' input, with that unit vector as input, and one with input
    zero for the biases; they belong to no demonstration (index −1), and no gradient or loss stands behind them (NaN).

    Args:
        update: The update whose norms are matched, up to rounding.
        seed: Seeds the directions; drawn on the CPU in float32, so a seed means the same on every device and in every dtype.

    Raises:
        ValueError: If the seed is no whole number.
    """
    generator = seeded(seed)
    n_layers, _, d_model = update.inputs.shape
    device = update.inputs.device
    norms = update.norms

    def errors(kind: str, like: Float[Tensor, "layer token kv_head d_head"]) -> Float[Tensor, "layer drawn kv_head d_head"]:
        heads = like.shape[2]
        drawn = normal(generator, n_layers, d_model + 1, heads * like.shape[3]).to(device, wide(like).dtype)
        weight, bias = drawn[:, :-1], drawn[:, -1:]

        def scaled(x: Float[Tensor, "layer *rest"], name: str) -> Float[Tensor, "layer *rest"]:
            length = norms.get(name)
            if length is None:
                return torch.zeros_like(x)
            return x * (length.to(x) / x.flatten(1).norm(dim=1)).view(-1, 1, 1)

        weight = scaled(weight, f"W_{kind}")
        # Δb is the sum of all errors, so the last token takes back what the others add to it.
        bias = scaled(bias, f"b_{kind}") - weight.sum(dim=1, keepdim=True)
        return rearrange(torch.cat([weight, bias], dim=1), "layer token (head d_head) -> layer token head d_head", head=heads)

    inputs = torch.eye(d_model + 1, d_model, dtype=update.inputs.dtype, device=device)
    return replace(
        update,
        inputs=inputs.expand(n_layers, -1, -1),
        key_errors=errors("K", update.key_errors),
        value_errors=errors("V", update.value_errors),
        demonstration=torch.full((d_model + 1,), -1, device=device),
        position=torch.arange(d_model + 1, device=device),
        gradient_norms=torch.full_like(update.gradient_norms, torch.nan),
        losses=torch.full_like(update.losses, torch.nan),
        examples="",
    )
