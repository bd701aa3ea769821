"""Which demonstration token does what: an update's first-order effect on attention, token by token.

In dual form an update is a sum over the tokens that it was trained on, and so is what it changes (Irie et al. 2022, section 3). Let
token i have the input `xᵢ` and the errors `eᵢ` at a head's values and `fᵢ` at its keys, and let a prompt's own tokens j have the
inputs `xⱼ`, values `vⱼ` and attention `A(q, j)` from the last token q. With the inputs of the layer held as they are, a head's
output `z = Σⱼ A(q, j) vⱼ` changes to first order by a sum over i of

    through values   Σⱼ A(q, j) ⟨xᵢ, xⱼ⟩ eᵢ
    through keys     Σⱼ A(q, j) ⟨xᵢ, xⱼ⟩ ⟨fᵢ, ∂s(q, j)/∂kⱼ⟩ (vⱼ − z)

`s` being the scores; where biases are trained too, `⟨xᵢ, xⱼ⟩` becomes `⟨xᵢ, xⱼ⟩ + 1`. The first is exact but for its product with
the second; the second is first order through the softmax. What lower layers' updates change in the layer's inputs is not in it.

The factor `Σⱼ A(q, j) (⟨xᵢ, xⱼ⟩ + 1)` is the unnormalised linear attention that the update pays to token i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_finite
from iclgd_lens.models.precision import wide
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.activations import Activations, require_zero_shot

if TYPE_CHECKING:
    from iclgd_lens.updates.dual import ParameterUpdate

LARGEST = 2**24
"""How many numbers a temporary may hold; queries are taken a few at a time to keep to it."""


@dataclass(frozen=True, eq=False)
class Attribution:
    """What every token that an update was trained on contributes to attention's output at the last query token.

    Attributes:
        coefficients: `[query layer head token]`: the linear attention that the update pays to the token,
            `Σⱼ A(q, j) (⟨xᵢ, xⱼ⟩ + 1)`; it may be negative. What it multiplies is the token's error at the values.
        through_values: `[query layer head token]`: the contribution through values, carried through `W_O`, as its component along
            the direction `along`.
        through_keys: `[query layer head token]`: the same through keys. Over heads and tokens, both together sum to the component
            of `change` along that direction.
        norms: `[query layer head token]`: ℓ2 length of the whole contribution in the residual basis.
        change: `[query layer d_model]`: the first-order change of attention's output: the sum of all contributions.
        along: `[query layer d_model]`: unit vectors; zero where there is no direction.
        demonstration: `[token]`: the demonstration that a token belongs to, as in the update.
        position: `[token]`: its position there, BOS being 0.
        examples: The digest of the demonstrations that the update was made on.
    """

    coefficients: Float[Tensor, "query layer head token"]
    through_values: Float[Tensor, "query layer head token"]
    through_keys: Float[Tensor, "query layer head token"]
    norms: Float[Tensor, "query layer head token"]
    change: Float[Tensor, "query layer d_model"]
    along: Float[Tensor, "query layer d_model"]
    demonstration: Int[Tensor, "token"]
    position: Int[Tensor, "token"]
    examples: str


@without_autocast()
def attribute(update: ParameterUpdate, zsl: Activations, along: Float[Tensor, "query layer d_model"] | None = None) -> Attribution:
    """Attribute an update's first-order effect to the tokens that it was trained on; see `ParameterUpdate.attribution`."""
    if along is not None:
        if along.shape != (expected := (len(zsl.labels), len(zsl.W_O), zsl.W_O[0].shape[-1])):
            raise ValueError(f"along must have the shape [query, layer, d_model] = {list(expected)}, got {list(along.shape)}")
        require_finite("along", along)
    layers = []
    for layer, output in enumerate(zsl.W_O):
        output = wide(output)
        gram = einsum(output, output, "head a d_model, head b d_model -> head a b")
        parts = []
        for rows, coefficients, values, keys in contributions(update, zsl, layer):
            whole = values + keys
            change = einsum(whole, output, "query head token d_head, head d_head d_model -> query d_model")
            direction = change if along is None else along[rows, layer].to(output)
            direction = direction / direction.norm(dim=-1, keepdim=True).masked_fill(~direction.any(dim=-1, keepdim=True), 1.0)
            # ⟨c W_O, d⟩ = ⟨c, W_O d⟩, and ‖c W_O‖² = c W_O W_Oᵀ cᵀ: contributions are never carried to d_model one by one.
            towards = einsum(output, direction, "head d_head d_model, query d_model -> query head d_head")
            along_values, along_keys = (
                einsum(x, towards, "query head token d_head, query head d_head -> query head token") for x in (values, keys)
            )
            squares = (einsum(whole, gram, "query head token a, head a b -> query head token b") * whole).sum(dim=-1)
            parts.append((coefficients, along_values, along_keys, squares.clamp(min=0.0).sqrt(), change, direction))
        layers.append([torch.cat(tensors) for tensors in zip(*parts, strict=True)])
    coefficients, through_values, through_keys, norms, first_order, directions = (
        torch.stack(tensors, dim=1) for tensors in zip(*layers, strict=True)
    )
    demonstration, position = (each.to(zsl.labels.device) for each in (update.demonstration, update.position))
    return Attribution(
        coefficients, through_values, through_keys, norms, first_order, directions, demonstration, position, update.examples
    )


def contributions(
    update: ParameterUpdate, zsl: Activations, layer: int
) -> Iterator[
    tuple[
        slice,
        Float[Tensor, "query head token"],
        Float[Tensor, "query head token d_head"],
        Float[Tensor, "query head token d_head"],
    ]
]:
    """The contributions to one layer's heads as vectors, before `W_O`, a few queries at a time.

    Yields:
        The rows of the queries, the coefficients, and the contributions through values and through keys. Held at a time are
        `query × token × (d_model + own_pos × (heads + 1))` numbers, at most about 2²⁴ unless one query needs more.

    Raises:
        ValueError: If the update belongs to another model, the run was made under an update, or the update was not
            made on demonstrations (`random_weights`).
        AttributeError: If the activations lack what is needed.
    """
    require_zero_shot(zsl=zsl)
    if zsl.model != update.fingerprint:
        raise ValueError(
            f"the activations are of another model than the update: theirs has the fingerprint {zsl.model}, the update's "
            f"{update.fingerprint}"
        )
    if bool((update.demonstration < 0).any()):
        raise ValueError("this update has no dual form over demonstration tokens: it was not made on demonstrations")
    heads = zsl.own_pattern.shape[2]
    group = heads // update.key_errors.shape[2]
    trained = {name: float(name in update.settings.parameters) for name in ("W_K", "b_K", "W_V", "b_V")}
    device = zsl.labels.device
    inputs = wide(update.inputs[layer].to(device))
    key_errors, value_errors = (
        repeat(wide(errors[layer].to(device)), "token kv_head d_head -> token (kv_head group) d_head", group=group)
        for errors in (update.key_errors, update.value_errors)
    )
    n_tokens, own_pos = len(inputs), zsl.own_inputs.shape[2]
    chunk = max(1, LARGEST // (n_tokens * (inputs.shape[1] + own_pos * (heads + 1))))
    for start in range(0, len(zsl.labels), chunk):
        rows = slice(start, start + chunk)
        pattern, gradients = wide(zsl.own_pattern[rows, layer]), wide(zsl.score_gradients[rows, layer])
        values = repeat(
            wide(zsl.own_values[rows, layer]), "query pos kv_head d_head -> query pos (kv_head group) d_head", group=group
        )
        products = einsum(wide(zsl.own_inputs[rows, layer]), inputs, "query pos d_model, token d_model -> query pos token")
        kernel = trained["W_V"] * products + trained["b_V"]
        coefficients = einsum(pattern, kernel, "query head pos, query pos token -> query head token")
        through_values = einsum(coefficients, value_errors, "query head token, token head d_head -> query head token d_head")
        kernel = trained["W_K"] * products + trained["b_K"]
        rising = einsum(gradients, key_errors, "query pos head d_head, token head d_head -> query head pos token")
        weighted = rising * kernel[:, None] * pattern[..., None]
        out = einsum(pattern, values, "query head pos, query pos head d_head -> query head d_head")
        through_keys = einsum(weighted, values, "query head pos token, query pos head d_head -> query head token d_head")
        through_keys = through_keys - weighted.sum(dim=2)[..., None] * out[:, :, None]
        yield rows, coefficients, through_values, through_keys
