"""What one demonstration's loss says about every layer: the projections' inputs, and the gradients at their outputs.

For a linear map that is all there is to know: ∂loss/∂W = Σᵢ xᵢ ⊗ gᵢ over the demonstration's tokens. Hooks read the inputs and keep
hold of the outputs; no gradient of a weight is formed, and backward goes no further than the lowest output that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.updates.inject import Parameter


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss in nats of the residual stream, at the output or at any layer.

    Attributes:
        of_rows: The loss of the residual stream at the positions that it depends on.
        positions: Which these are.
    """

    of_rows: Callable[[Float[Tensor, "pos d_model"]], Float[Tensor, ""]]
    positions: slice


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
    readout = _Readout(sites, loss, len(tokens))
    found: list[Float[Tensor, ""]] = []
    hooks = [*injected]
    for layer in range(sites.n_layers):
        # Below the first layer nothing is trained: its projections are leaves, where backward stops.
        hooks += recorder.hooks(layer, cut=layer == 0)
    hooks += readout.hooks(top)
    hooks.append((sites.residual_out[top], lambda residual, hook: found.append(readout.of(top, residual))))
    _run(sites, tokens, hooks)
    return recorder.gradients([loss_gradients(found[0], recorder.outputs())], found[0])


def layer_causal_gradients(
    sites: HookSites, tokens: Int[Tensor, "pos"], injected: list[NamedHook], loss: Loss, parameters: tuple[Parameter, ...]
) -> Gradients:
    """One forward pass; inside the hook at every block's output, that block's loss and its gradient."""
    recorder = Recorder(sites, parameters)
    readout = _Readout(sites, loss, len(tokens))
    values: list[Float[Tensor, ""]] = []
    found: list[tuple[Tensor, ...]] = []

    def take(residual: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor:
        value = readout.of(len(found), residual)
        found.append(loss_gradients(value, recorder.outputs()))
        recorder.forget_outputs()
        values.append(value.detach())
        return residual.detach()

    hooks = [*injected]
    for layer in range(sites.n_layers):
        hooks += [*recorder.hooks(layer, cut=True), *readout.hooks(layer)]
        hooks.append((sites.residual_out[layer], take))
    # The first block's input is the embedding, whose weights may ask for gradients too.
    hooks.insert(0, (sites.residual_in[0], lambda residual, hook: residual.detach()))
    _run(sites, tokens, hooks)
    return recorder.gradients(found, torch.stack(values).sum())


class _Readout:
    """The loss at a block's output, by the shortest way back.

    A loss of few positions, such as a label's, has no gradient at the others. Where the block's feed-forward part treats positions
    apart and no hook is on it, that part runs once more on these few alone, and going back through them costs little.
    """

    def __init__(self, sites: HookSites, loss: Loss, length: int) -> None:
        self.sites, self.loss = sites, loss
        self.sparse = 2 * len(range(length)[loss.positions]) < length
        self.between: list[Float[Tensor, "batch pos d_model"]] = []

    def hooks(self, layer: int) -> list[NamedHook]:
        if not (self.sparse and self.sites.feeds_forward_plainly(layer)):
            return []
        return [(self.sites.residual_between[layer], lambda residual, hook: self.between.append(residual))]

    def of(self, layer: int, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, ""]:
        if not self.between:
            return self.loss.of_rows(residual[0, self.loss.positions])
        rows = self.between.pop()[:, self.loss.positions]
        return self.loss.of_rows(self.sites.feed_forward(layer, rows)[0])


def loss_gradients(value: Float[Tensor, ""], outputs: list[Tensor], *, again: bool = False) -> tuple[Tensor, ...]:
    """Gradients of a loss; zero for what it does not depend on, as when a hook of the user's ablates an attention layer. With
    `again`, others can be taken of the same graph.
    """
    if not value.requires_grad:
        return tuple(torch.zeros_like(output) for output in outputs)
    return torch.autograd.grad(value, outputs, retain_graph=again, allow_unused=True, materialize_grads=True)


class Recorder:
    """Reads, layer by layer, the projections' inputs, and holds their outputs until their gradients are taken."""

    def __init__(self, sites: HookSites, parameters: tuple[Parameter, ...]) -> None:
        self.sites = sites
        self.trains_keys = bool({"W_K", "b_K"} & set(parameters))
        self.trains_values = bool({"W_V", "b_V"} & set(parameters))
        self.inputs: dict[int, Float[Tensor, "batch pos d_model"]] = {}
        self._outputs: list[Tensor] = []

    def hooks(self, layer: int, *, cut: bool) -> list[NamedHook]:
        """Hooks that record one layer; with `cut`, its projections' outputs become leaves of the graph."""

        def record_input(projection_in: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            self.inputs[layer] = self.sites.project_from(layer, projection_in).detach()

        def record_output(projected: Float[Tensor, "batch pos kv_head d_head"], hook: Any) -> Tensor:
            if cut:
                projected = projected.detach().requires_grad_()
            self._outputs.append(projected)
            return projected

        hooks: list[NamedHook] = [(self.sites.projection_in[layer], record_input)]
        if self.trains_keys:
            hooks.append((self.sites.keys[layer], record_output))
        if self.trains_values:
            hooks.append((self.sites.values[layer], record_output))
        return hooks

    def outputs(self) -> list[Tensor]:
        """The projections' outputs seen since they were last forgotten: keys and values of each layer, in order."""
        return self._outputs

    def forget_outputs(self) -> None:
        """Let go of the outputs, and with them of the graph behind them."""
        self._outputs = []

    def gradients(self, found: Sequence[tuple[Tensor, ...]], loss: Tensor) -> Gradients:
        """Sort gradients, given in the order of `outputs`, into keys and values."""
        flat = [gradient[0] for gradients in found for gradient in gradients]
        n_kinds = self.trains_keys + self.trains_values
        return Gradients(
            inputs=[self.inputs[layer][0] for layer in range(self.sites.n_layers)],
            keys=flat[::n_kinds] if self.trains_keys else None,
            values=flat[n_kinds - 1 :: n_kinds] if self.trains_values else None,
            loss=loss.detach(),
        )


def _run(sites: HookSites, tokens: Int[Tensor, "pos"], hooks: list[NamedHook]) -> None:
    # The mask is given, all ones: without it TransformerLens may take separators for padding.
    with sites.attach(hooks):
        sites.model(tokens[None], attention_mask=torch.ones_like(tokens[None]), return_type=None)
