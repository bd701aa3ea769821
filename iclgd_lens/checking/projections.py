"""The key and value projections of the plain model, as modules whose weights can be trained by autograd and edited.

Most are an `nn.Linear` or a `Conv1D`: a leaf of autograd, or an edited weight, takes the place of the weight in the view of the
model and nowhere else. Where one module makes queries, keys and values together, its rows are told apart by the bridge's own
splitting of the weight, applied to a weight that holds the numbers of its rows. Where a projection is another module (an
adapter, quantised weights), the gradient at its output is contracted with its input, and an edit is added to its output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from iclgd_lens.checking.plain import PlainModel
from iclgd_lens.models.hooked import is_bridge

Letter = Literal["K", "V"]
Changes = Mapping[str, Float[Tensor, "..."]]
"""What is added to `W_K` or `W_V`, as `[d_model kv_head*d_head]`, and to `b_K` or `b_V`, as `[kv_head*d_head]`."""


@dataclass(eq=False)
class Projection(ABC):
    """A module of the plain model that makes keys, values, or both.

    Attributes:
        module: The module, of a view that only this projection changes.
        rows: Which of its outputs are keys and which values; None for all.
        leaves: What gradients are taken of, once `train` was called and the model has run.
    """

    module: Any
    rows: Mapping[Letter, Int[Tensor, "row"] | None]
    leaves: list[Tensor] = field(default_factory=list)

    @abstractmethod
    def train(self) -> None:
        """Put leaves of autograd into the view."""

    @abstractmethod
    def read(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Sort the gradients of `leaves` into `W_K`, `b_K`, `W_V` and `b_V`, in the layout of `Changes`."""

    @abstractmethod
    def add(self, changes: Changes) -> None:
        """Edit the view's weights; the model's own stay as they are."""

    def _of(self, kind: Letter, outputs: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch row"]:
        rows = self.rows[kind]
        return outputs if rows is None else outputs[..., rows]

    def _all(self, changes: Changes, letter: Literal["W", "b"], zeros: Float[Tensor, "*batch out"]) -> Float[Tensor, "*batch out"]:
        """Changes of one sort for all outputs of the module, 0 for those that are neither keys nor values."""
        for kind, rows in self.rows.items():
            change = changes[f"{letter}_{kind}"].to(zeros)
            if rows is None:
                zeros = change
            else:
                zeros[..., rows] = change
        return zeros


class LinearProjection(Projection):
    """An `nn.Linear`, whose weight is `[out in]`, or a `Conv1D`, whose weight is `[in out]`."""

    @override
    def train(self) -> None:
        weight, bias = self.module.weight.detach(), self.module.bias
        self._put(weight.clone(), weight.new_zeros(self._width) if bias is None else bias.detach().clone())
        self.leaves = [self.module.weight.requires_grad_(), self.module.bias.requires_grad_()]

    @override
    def read(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        weight, bias = gradients
        found = {f"W_{kind}": self._of(kind, self._inputs_first(weight)) for kind in self.rows}
        return found | {f"b_{kind}": self._of(kind, bias) for kind in self.rows}

    @override
    def add(self, changes: Changes) -> None:
        weight, bias = self.module.weight.detach(), self.module.bias
        by_input = self._all(changes, "W", torch.zeros_like(self._inputs_first(weight)))
        at_output = self._all(changes, "b", weight.new_zeros(self._width))
        self._put(weight + self._inputs_first(by_input), at_output if bias is None else bias.detach() + at_output)

    def _put(self, weight: Tensor, bias: Tensor) -> None:
        of_view: dict[str, Any] = self.module._parameters
        of_view["weight"], of_view["bias"] = nn.Parameter(weight, False), nn.Parameter(bias, False)

    def _inputs_first(self, weight: Float[Tensor, "_a _b"]) -> Float[Tensor, "_c _d"]:
        """From the module's layout to `[in out]`, or back."""
        return weight if isinstance(self.module, Conv1D) else weight.T

    @property
    def _width(self) -> int:
        return int(self._inputs_first(self.module.weight).shape[1])


class OtherProjection(Projection):
    """Any module from `[*batch in]` to `[*batch out]`, seen from outside."""

    @override
    def train(self) -> None:
        self._inputs: list[Tensor] = []

        def add_leaf(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            self._inputs.append(given[0].detach())
            self.leaves.append(torch.zeros_like(out).requires_grad_())
            return out + self.leaves[-1]

        self.module.register_forward_hook(add_leaf)

    @override
    def read(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        (at_output,), (inputs,) = gradients, self._inputs
        rows, flat = inputs.flatten(0, -2), at_output.flatten(0, -2)
        found = {f"W_{kind}": rows.T @ self._of(kind, flat) for kind in self.rows}
        return found | {f"b_{kind}": self._of(kind, flat).sum(dim=0) for kind in self.rows}

    @override
    def add(self, changes: Changes) -> None:
        def edit(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
            weight = self._all(changes, "W", out.new_zeros(given[0].shape[-1], out.shape[-1]))
            return out + given[0] @ weight + self._all(changes, "b", out.new_zeros(out.shape[-1]))

        self.module.register_forward_hook(edit)


class HeadProjection(Projection):
    """The attention of a `HookedTransformer`, whose weights are `[head d_model d_head]`."""

    @override
    def train(self) -> None:
        for name in self._names:
            leaf = nn.Parameter(self.module._parameters[name].detach().clone())
            self.module._parameters[name] = leaf
            self.leaves.append(leaf)

    @override
    def read(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name.lstrip("_"): flat_heads(gradient) for name, gradient in zip(self._names, gradients, strict=True)}

    @override
    def add(self, changes: Changes) -> None:
        for name in self._names:
            weight = self.module._parameters[name].detach()
            change = changes[name.lstrip("_")].to(weight)
            by_head = rearrange(change, "... (head d_head) -> head ... d_head", head=len(weight))
            self.module._parameters[name] = nn.Parameter(weight + by_head, False)

    @property
    def _names(self) -> list[str]:
        """Those of grouped heads begin with an underscore."""
        return [name for name in self.module._parameters if name.lstrip("_") in ("W_K", "b_K", "W_V", "b_V")]


def flat_heads(weight: Float[Tensor, "head *d_model d_head"]) -> Float[Tensor, "*d_model head_d_head"]:
    """From TransformerLens's layout to that of `Changes`."""
    return rearrange(weight, "head ... d_head -> ... (head d_head)")


def projections_of(plain: PlainModel, layer: int) -> list[Projection]:
    """The modules that make a layer's keys and values. They change the view, so it should be one that nobody else uses."""
    hooked: Any = plain.hooked
    attention = hooked.blocks[layer].attn
    if not is_bridge(hooked):
        return [HeadProjection(plain.view(attention), {"K": None, "V": None})]
    if isinstance(attention, JointQKVAttentionBridge) and "qkv" in attention.submodules:
        module = plain.view(attention.qkv)
        return [_projection(module, _rows_of(attention, plain.view(attention), module))]
    return [_projection(plain.view(attention.k), {"K": None}), _projection(plain.view(attention.v), {"V": None})]


def _projection(module: nn.Module, rows: Mapping[Letter, Int[Tensor, "row"] | None]) -> Projection:
    return LinearProjection(module, rows) if type(module) in (nn.Linear, Conv1D) else OtherProjection(module, rows)


def _rows_of(attention: Any, plain_attention: nn.Module, fused: Any) -> dict[Letter, Int[Tensor, "row"]]:
    """Which outputs of a fused projection are keys and which values, in the order of heads."""
    n_in, n_out = fused.weight.shape if isinstance(fused, Conv1D) else fused.weight.shape[::-1]
    numbers = torch.arange(n_out, dtype=torch.float32, device=fused.weight.device)
    weight = numbers.expand(n_in, n_out).clone()
    numbered = _with(fused, "_parameters", weight=nn.Parameter(weight if isinstance(fused, Conv1D) else weight.T.clone(), False))
    if fused.bias is not None:
        numbered._parameters["bias"] = nn.Parameter(numbers, False)
    (name,) = (name for name, module in plain_attention._modules.items() if module is fused)
    # The modules that the bridge makes for the parts draw weights first, at random.
    with torch.random.fork_rng(devices=[]):
        _, keys, values = attention.split_qkv_matrix(_with(plain_attention, "_modules", **{name: numbered}))
    return {"K": keys.weight[:, 0].long(), "V": values.weight[:, 0].long()}


def _with(module: nn.Module, table: str, **entries: Any) -> Any:
    """The same module but for some entries of one of its tables; the module itself stays as it is."""
    changed = type(module).__new__(type(module))
    object.__setattr__(changed, "__dict__", module.__dict__ | {table: {**module.__dict__[table], **entries}})
    return changed
