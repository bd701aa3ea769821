"""The change so far while gradient steps are made: tokens as they come in, and what the next step is run with.

A step needs the weights that earlier steps left. Adding each demonstration's `Σᵢ xᵢ ⊗ eᵢ` to ΔW passes over memory of the size of
all trained weights at every step, which costs more than the product itself. So recent tokens are injected in dual form,
`x ΔW = Σᵢ ⟨x, xᵢ⟩ eᵢ`, and only when there are twice as many of them as an input has dimensions they are summed up in one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.models.precision import wide, wide_dtype
from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.updates.backward import Gradients
from iclgd_lens.updates.inject import PARAMETERS_OF, Kind, Parameter, add_bias, change_hooks


class RunningUpdate:
    """The pairs (xᵢ, eᵢ) of all tokens seen, and the change that they make.

    Args:
        sites: Where the model is read.
        parameters: What is trained.
        n_tokens: How many tokens there will be.
        lr: The step size.

    Attributes:
        inputs: `[layer token d_model]`: xᵢ, in the model's dtype; so far filled up to the tokens recorded.
        errors: `[layer token width]` for keys and values: eᵢ in at least float32; zero for what is not trained.
    """

    def __init__(self, sites: HookSites, parameters: Sequence[Parameter], n_tokens: int, lr: float) -> None:
        cfg = sites.model.cfg
        self.sites, self.parameters, self.lr = sites, parameters, lr
        width = sites.n_kv_heads * cfg.d_head
        of: dict[str, Any] = {"dtype": wide_dtype(cfg.dtype), "device": cfg.device}
        self.inputs = torch.empty(sites.n_layers, n_tokens, cfg.d_model, dtype=cfg.dtype, device=cfg.device)
        self.errors = {kind: torch.zeros(sites.n_layers, n_tokens, width, **of) for kind in PARAMETERS_OF}
        # In half precision the detour by the tokens would round twice.
        self._limit = 2 * cfg.d_model if cfg.dtype == wide_dtype(cfg.dtype) else 0
        self._recorded = self._active = self._summed = 0
        self._weights: dict[str, Float[Tensor, "layer d_model width"]] = {}
        self._biases = {kind: torch.zeros(sites.n_layers, width, **of) for kind in PARAMETERS_OF if self._trained("b", kind)}

    def record(self, found: Gradients) -> Float[Tensor, "layer"]:
        """Take in a demonstration's tokens, without effect yet; return the gradient's norm per layer."""
        start, self._recorded = self._recorded, self._recorded + len(found.inputs[0])
        tokens = slice(start, self._recorded)
        torch.stack(found.inputs, out=self.inputs[:, tokens])
        squares = torch.zeros_like(self.errors["keys"][:, 0, 0])
        of: dict[Kind, Any] = {"keys": found.keys, "values": found.values}
        likeness = _products(self.inputs[:, tokens])
        for kind, gradients in of.items():
            if gradients is None:
                continue
            flat = wide(rearrange(gradients, "layer pos kv_head d_head -> layer pos (kv_head d_head)"))
            torch.mul(flat, -self.lr, out=self.errors[kind][:, tokens])
            if self._trained("W", kind):
                squares += (likeness * _products(flat)).sum(dim=(1, 2)).clamp_min(0.0)
            if self._trained("b", kind):
                squares += flat.sum(dim=1).square().sum(dim=-1)
        return squares.sqrt()

    def apply(self) -> None:
        """Let all tokens that were recorded take effect."""
        new = slice(self._active, self._recorded)
        for kind, bias in self._biases.items():
            bias += self.errors[kind][:, new].sum(dim=1)
        self._active = self._recorded
        if self._active - self._summed > self._limit:
            self._sum_up()

    def hooks(self) -> list[NamedHook]:
        """The hooks that add what is in effect to every layer's keys and values, read when they run."""
        return change_hooks(self.sites, self._changes)

    def _changes(self, layer: int, x: Float[Tensor, "batch pos d_model"]) -> dict[Kind, Tensor]:
        found: dict[Kind, Tensor] = {}
        if not self._active:
            return found
        recent = slice(self._summed, self._active)
        likeness = x @ self.inputs[layer, recent].T
        for kind in PARAMETERS_OF:
            if self._trained("W", kind):
                found[kind] = likeness @ self.errors[kind][layer, recent].to(x.dtype)
                if self._weights:
                    found[kind] = found[kind] + x @ self._weights[kind][layer].to(x.dtype)
            if kind in self._biases:
                found[kind] = add_bias(found.get(kind), self._biases[kind][layer], x)
        return found

    def _sum_up(self) -> None:
        tokens = slice(self._summed, self._active)
        for kind in PARAMETERS_OF:
            if not self._trained("W", kind):
                continue
            if kind not in self._weights:
                errors = self.errors[kind]
                self._weights[kind] = errors.new_zeros(len(errors), self.inputs.shape[-1], errors.shape[-1])
            for layer, weight in enumerate(self._weights[kind]):
                weight.addmm_(wide(self.inputs[layer, tokens]).T, self.errors[kind][layer, tokens])
        self._summed = self._active

    def _trained(self, letter: str, kind: str) -> bool:
        return f"{letter}_{kind[0].upper()}" in self.parameters


def _products(vectors: Float[Tensor, "layer pos width"]) -> Float[Tensor, "layer pos pos"]:
    """⟨vᵢ, vⱼ⟩, whose products make ‖Σᵢ xᵢ ⊗ gᵢ‖² = Σᵢⱼ ⟨xᵢ, xⱼ⟩⟨gᵢ, gⱼ⟩ without forming the sum; these terms cancel, hence in
    float64 where there is one.
    """
    vectors = wide(vectors) if vectors.device.type == "mps" else vectors.double()
    return vectors @ vectors.mT
