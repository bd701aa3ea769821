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

Parameter = Literal["W_K", "b_K", "W_V", "b_V"]
"""The parameters that an update may change, by their TransformerLens names."""

Deltas = Mapping[str, Float[Tensor, "layer *shape"]]
"""ΔW as `[layer d_model kv_head*d_head]` and Δb as `[layer kv_head*d_head]`, for some of the parameters."""


def injection_hooks(sites: HookSites, deltas: Deltas) -> list[NamedHook]:
    """Make the hooks that add `x ΔW + Δb` to every layer's keys and values.

    The hooks read `deltas` when they run, so changing its tensors in place changes what they add. `HookSites.attach` runs them
    in the right order with other hooks.
    """
    hooks: list[NamedHook] = []
    for layer in range(sites.n_layers):
        seen: dict[str, Tensor] = {}
        if deltas.keys() & {"W_K", "W_V"}:
            hooks.append((sites.projection_in[layer], _remember(seen)))
        for names, weight, bias in ((sites.keys, "W_K", "b_K"), (sites.values, "W_V", "b_V")):
            if deltas.keys() & {weight, bias}:
                hooks.append((names[layer], _add(sites, layer, seen, deltas.get(weight), deltas.get(bias))))
    return hooks


def _remember(seen: dict[str, Tensor]) -> Callable[..., None]:
    def remember(projection_in: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
        seen["input"] = projection_in

    return remember


def _add(
    sites: HookSites, layer: int, seen: dict[str, Tensor], weight: Tensor | None, bias: Tensor | None
) -> Callable[..., Tensor]:
    def add(projected: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> Float[Tensor, "batch pos kv_head d_head"]:
        if weight is not None:
            inputs = sites.project_from(layer, seen["input"])
            projected = projected + (inputs @ weight[layer].to(inputs.dtype)).view_as(projected)
        if bias is not None:
            projected = projected + bias[layer].to(projected.dtype).view(projected.shape[2:])
        return projected

    return add
