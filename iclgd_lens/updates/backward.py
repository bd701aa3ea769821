"""What one demonstration's loss says about every layer: the projections' inputs, and the gradients at their outputs.

For a linear map that is all there is to know: ∂loss/∂W = Σᵢ xᵢ ⊗ gᵢ over the demonstration's tokens. Hooks read the inputs and keep
hold of the outputs; no gradient of a weight is formed, and backward goes no further than the lowest output that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.updates.inject import Parameter


@dataclass(frozen=True, eq=False)
class Loss:
    """The mean cross-entropy in nats of a residual stream read out at some positions, at the output or at any layer.

    Attributes:
        lens: How logits are read.
        positions: Where.
        targets: What they should predict, as indices into the tokens that are read.
    """

    lens: LogitLens
    positions: slice
    targets: Int[Tensor, "pos"]


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one demonstration's loss says about every layer: xᵢ, and gᵢ = ∂loss/∂output at keys and values, None if untrained."""

    inputs: list[Float[Tensor, "pos d_model"]]
    keys: list[Float[Tensor, "pos kv_head d_head"]] | None
    values: list[Float[Tensor, "pos kv_head d_head"]] | None
    loss: Float[Tensor, ""]


def output_gradients(
    sites: HookSites, tokens: Int[Tensor, "pos"], injected: list[NamedHook], loss: Loss, parameters: tuple[Parameter, ...]
) -> Gradients:
    """One forward and one backward pass, from the loss at the output down to the first layer's keys and values."""
    recorder = Recorder(sites, parameters)
    top = sites.n_layers - 1
    rows = _Rows(sites, loss.positions, len(tokens))
    found: list[Float[Tensor, "row d_model"]] = []
    hooks = [*injected]
    for layer in range(sites.n_layers):
        # Below the first layer nothing is trained: its projections are leaves, where backward stops.
        hooks += recorder.hooks(layer, cut=layer == 0)
    hooks += rows.hooks(top)
    hooks.append((sites.residual_out[top], lambda residual, hook: found.append(rows.of(top, residual))))
    _run(sites, tokens, hooks)
    value, gradient = loss.lens.cross_entropy(found[0], loss.targets)
    return recorder.gradients([pull_back(found[0], recorder.take_outputs(), gradient)], value)


BLOCKS_AT_ONCE, ROWS_AT_ONCE = 4, 128
"""How many blocks are read out in one product: so many, as long as they have no more rows than this together. A product by `W_U`
passes over all of it for few rows as for many; with 4 blocks of a demonstration of 28 tokens it takes two thirds of the time.
"""


def layer_causal_gradients(
    sites: HookSites, tokens: Int[Tensor, "pos"], injected: list[NamedHook], loss: Loss, parameters: tuple[Parameter, ...]
) -> Gradients:
    """One forward pass; after every few blocks, their losses and each block's gradients."""
    recorder = Recorder(sites, parameters)
    rows = _Rows(sites, loss.positions, len(tokens))
    at_once = max(1, min(BLOCKS_AT_ONCE, ROWS_AT_ONCE // len(loss.targets)))
    values: list[Float[Tensor, "block"]] = []
    waiting: list[tuple[Float[Tensor, "row d_model"], list[Tensor]]] = []
    found: list[tuple[Tensor, ...]] = []

    def take(residual: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        layer = len(found) + len(waiting)
        waiting.append((rows.of(layer, residual), recorder.take_outputs()))
        if len(waiting) == at_once or layer == sites.n_layers - 1:
            stacked = torch.stack([of_block.detach() for of_block, _ in waiting])
            losses, gradients = loss.lens.cross_entropy(stacked, loss.targets)
            values.append(losses)
            found.extend(pull_back(*block, gradient) for block, gradient in zip(waiting, gradients, strict=True))
            waiting.clear()
        torch.set_grad_enabled(False)
        return residual.detach()

    hooks = [*injected]
    for layer in range(sites.n_layers):
        hooks += [*recorder.hooks(layer, cut=True), *rows.hooks(layer)]
        hooks.append((sites.residual_out[layer], take))
    _run(sites, tokens, hooks)
    return recorder.gradients(found, torch.cat(values).sum())


class _Rows:
    """A block's output at the positions that a loss depends on, by the shortest way back.

    A loss of few positions, such as a label's, has no gradient at the others. Where what a block does behind its heads treats
    positions apart and no hook is on it, it runs without a graph, and a graph for these few positions is made of what was read.
    """

    def __init__(self, sites: HookSites, positions: slice, length: int) -> None:
        self.sites, self.positions = sites, positions
        self.sparse = 2 * len(range(length)[positions]) < length
        self.parts: dict[int, AfterAttention] = {}
        self.read: list[Float[Tensor, "batch pos *width"]] = []

    def hooks(self, layer: int) -> list[NamedHook]:
        if not self.sparse or (part := self.sites.after_attention(layer)) is None:
            return []
        self.parts[layer] = part

        def read(tensor: Float[Tensor, "batch pos *width"], hook: Any) -> None:
            self.read.append(tensor[:, self.positions])

        def read_and_leave_graph(heads: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            read(heads, hook)
            torch.set_grad_enabled(False)

        at_heads = (self.sites.head_out[layer], read_and_leave_graph)
        return [(self.sites.residual_in[layer], read), at_heads, *((name, read) for name in part.known)]

    def of(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "row d_model"]:
        if layer not in self.parts:
            return residual[0, self.positions]
        torch.set_grad_enabled(True)
        residual_in, heads, *known = self.read
        self.read.clear()
        return self.parts[layer].again(residual_in, heads, known)[0]


def pull_back(
    value: Float[Tensor, "*shape"], outputs: list[Tensor], gradient: Float[Tensor, "*shape"] | None = None, *, again: bool = False
) -> tuple[Tensor, ...]:
    """Gradients by the projections' outputs of what has this gradient by a value, or of the value itself; zero for what it does not
    depend on, as when a hook of the user's ablates an attention layer. With `again`, others can be taken of the same graph.
    """
    if not value.requires_grad:
        return tuple(torch.zeros_like(output) for output in outputs)
    return torch.autograd.grad(value, outputs, gradient, retain_graph=again, allow_unused=True, materialize_grads=True)


class Recorder:
    """Reads, layer by layer, the projections' inputs, and holds their outputs until their gradients are taken."""

    def __init__(self, sites: HookSites, parameters: tuple[Parameter, ...]) -> None:
        self.sites = sites
        self.trains_keys = bool({"W_K", "b_K"} & set(parameters))
        self.trains_values = bool({"W_V", "b_V"} & set(parameters))
        self._seen: dict[int, Float[Tensor, "batch pos d_model"]] = {}
        self._outputs: list[Tensor] = []

    def hooks(self, layer: int, *, cut: bool) -> list[NamedHook]:
        """Hooks that record one layer; with `cut`, its projections' outputs become leaves of the graph, which begins there."""

        def record_input(projection_in: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            self._seen[layer] = projection_in.detach()

        def record_output(projected: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> Tensor:
            if cut:
                projected = projected.detach().requires_grad_()
                torch.set_grad_enabled(True)
            self._outputs.append(projected)
            return projected

        hooks: list[NamedHook] = [(self.sites.projection_in[layer], record_input)]
        if self.trains_keys:
            hooks.append((self.sites.keys[layer], record_output))
        if self.trains_values:
            hooks.append((self.sites.values[layer], record_output))
        return hooks

    def take_outputs(self) -> list[Tensor]:
        """Hand over the outputs, and with them the graph behind them."""
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_inputs(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """Hand over what the projections of a layer multiplied."""
        return self._seen.pop(layer)

    def gradients(self, found: Sequence[tuple[Tensor, ...]], loss: Tensor) -> Gradients:
        """Sort gradients, given in the order of `outputs`, into keys and values."""
        flat = [gradient[0] for gradients in found for gradient in gradients]
        n_kinds = self.trains_keys + self.trains_values
        return Gradients(
            inputs=[self.take_inputs(layer)[0] for layer in range(self.sites.n_layers)],
            keys=flat[::n_kinds] if self.trains_keys else None,
            values=flat[n_kinds - 1 :: n_kinds] if self.trains_values else None,
            loss=loss.detach(),
        )


def _run(sites: HookSites, tokens: Int[Tensor, "pos"], hooks: list[NamedHook]) -> None:
    """Run with hooks that begin and end graphs: what is before the first leaf is in none, and what it made is freed as it is used.

    TransformerLens copies attention's weights at every call. Held by a graph, each copy takes fresh memory, which costs more than
    the product.
    """
    with torch.no_grad(), sites.attach(hooks):
        sites.run(tokens[None], torch.ones_like(tokens[None]))
