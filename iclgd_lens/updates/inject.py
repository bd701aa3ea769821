"""Running a model as if its key and value projections had been changed, by hooks alone.

A changed projection gives `x (W + ΔW) + b + Δb`; the model computes `x W + b`, and a hook at the projection's output adds
`x ΔW + Δb`. No weight is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.models.touched import same_at_every_position

Parameter = Literal["W_K", "b_K", "W_V", "b_V"]
"""The parameters that an update may change, by their TransformerLens names."""

Kind = Literal["keys", "values"]
"""Which projection's output."""

Deltas = Mapping[str, Float[Tensor, "layer *shape"]]
"""ΔW as `[layer d_model kv_head*d_head]` and Δb as `[layer kv_head*d_head]`, for some of the parameters."""

Changes = Callable[[int, Float[Tensor, "batch pos d_model"]], Mapping[Kind, Float[Tensor, "batch pos width"]]]
"""What is added to a layer's keys and values, as a function of the layer and of what its projections multiply."""

PARAMETERS_OF: Mapping[Kind, tuple[Parameter, Parameter]] = {"keys": ("W_K", "b_K"), "values": ("W_V", "b_V")}
"""The weight and the bias of each projection."""


def injection_hooks(sites: HookSites, deltas: Deltas) -> list[NamedHook]:
    """Make the hooks that add `x ΔW + Δb` to every layer's keys and values.

    The hooks read `deltas` when they run, so changing its tensors in place changes what they add. `HookSites.attach` runs them
    in the right order with other hooks.
    """

    def changes(layer: int, x: Float[Tensor, "batch pos d_model"]) -> dict[Kind, Tensor]:
        found: dict[Kind, Tensor] = {}
        for kind, (weight, bias) in PARAMETERS_OF.items():
            if weight in deltas:
                found[kind] = x @ deltas[weight][layer].to(x.dtype)
            if bias in deltas:
                found[kind] = add_bias(found.get(kind), deltas[bias][layer], x)
        return found

    return change_hooks(sites, changes)


def add_bias(
    change: Float[Tensor, "batch pos width"] | None, bias: Float[Tensor, "width"], x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos width"]:
    """Add a bias to a change, or make it one for as many tokens as x has."""
    bias = bias.to(x.dtype)
    return bias.expand(*x.shape[:-1], -1) if change is None else change + bias


def change_hooks(sites: HookSites, changes: Changes) -> list[NamedHook]:
    """Make the hooks that add something to every layer's keys and values. Once a layer has run, they hold nothing of it."""
    return [hook for layer in range(sites.n_layers) for hook in _of_layer(sites, layer, changes)]


def _of_layer(sites: HookSites, layer: int, changes: Changes) -> list[NamedHook]:
    seen: list[Tensor] = []
    found: dict[Kind, Tensor] = {}

    def remember(projection_in: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        seen[:] = [projection_in]

    def add(kind: Kind) -> Callable[..., Tensor]:
        def to(projected: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> Float[Tensor, "batch pos kv_head d_head"]:
            if seen:
                found.clear()
                found.update(changes(layer, seen.pop()))
            change = found.pop(kind, None)
            return projected if change is None else projected + change.reshape(projected.shape)

        return to

    hooks: list[NamedHook] = [(sites.projection_in[layer], remember)]
    hooks += [(sites.keys[layer], add("keys")), (sites.values[layer], add("values"))]
    return [(name, same_at_every_position(hook)) for name, hook in hooks]
