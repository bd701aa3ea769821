"""What updates are: gradients by autograd on the plain model's weights, and the plain model with edited weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from iclgd_lens.checking.plain import PlainModel, first
from iclgd_lens.checking.projections import Projection, flat_heads, projections_of
from iclgd_lens.checking.whole import Subject, log_probs, worst
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.precision import wide
from iclgd_lens.updates.dual import LossOn, ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd

LENGTH, N_LABEL = 7, 2
"""How many tokens the demonstration has, and how many of them are its label."""

STEP = 0.3
"""By how many nats the injected step lowers the loss, to first order."""

_FLOOR, _FLOOR_OF_BIAS = 1e-4, 1e-2
"""Relative to what a gradient's error is taken at least: to the largest of all layers, and a bias's to that of its weight. A key's
bias without rotary positions has no gradient at all.
"""


def gd_gradients(subject: Subject) -> float:
    """GD's ΔW of one step against autograd: the loss at the output of the plain model."""
    return _gradient_error(subject, gd, _output_loss)


def lcgd_gradients(subject: Subject) -> float:
    """LCGD's ΔW of one step against autograd: every block's input cut off, every block's output read out by the plain model."""
    return _gradient_error(subject, lcgd, _layer_causal_loss)


Loss = Callable[[PlainModel, Int[Tensor, "pos"], int], Float[Tensor, ""]]
"""A loss in nats of a prompt on the plain model, over so many tokens at its end."""


def _gradient_error(subject: Subject, method: Callable[..., ParameterUpdate], loss: Loss) -> float:
    demonstration = Demonstration(subject.prompts.draw(min(LENGTH, subject.prompts.n_ctx), seed=5), N_LABEL)
    by_loss: dict[LossOn, int] = {"demonstration": len(demonstration.tokens) - 1, "label": N_LABEL}
    errors = []
    for loss_on, n_predicted in by_loss.items():
        subject.count(demonstration.tokens)
        update = method(subject.model, [demonstration], lr=1.0, loss_on=loss_on)
        theirs = _gradients(subject, demonstration.tokens, loss, n_predicted)
        errors.append(_error_of_change(update, theirs))
    return worst(errors)


def _gradients(subject: Subject, tokens: Int[Tensor, "pos"], loss: Loss, n_predicted: int) -> list[dict[str, Tensor]]:
    """Every layer's gradients by the weights of its key and value projections."""
    plain = PlainModel.of(subject.model)
    by_layer = [projections_of(plain, layer) for layer in range(subject.sites.n_layers)]
    subject.count(tokens)
    with torch.inference_mode(False), torch.enable_grad():
        each: list[Projection] = [projection for of_layer in by_layer for projection in of_layer]
        for projection in each:
            projection.train()
        value = loss(plain, tokens.to(subject.model.cfg.device, copy=True), n_predicted)
        leaves = [leaf for projection in each for leaf in projection.leaves]
        found = iter(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
    gradients = []
    for of_layer in by_layer:
        of_this: dict[str, Tensor] = {}
        for projection in of_layer:
            of_this |= projection.read([next(found) for _ in projection.leaves])
        gradients.append(of_this)
    return gradients


def _error_of_change(update: ParameterUpdate, theirs: list[dict[str, Tensor]]) -> float:
    """The largest relative Frobenius error of −ΔW, at a learning rate of 1, over layers and parameters."""
    largest = max(float(wide(gradients[name]).norm()) for gradients in theirs for name in ("W_K", "W_V"))
    errors = []
    for layer, gradients in enumerate(theirs):
        for name, gradient in gradients.items():
            ours = -flat_heads(update.delta(name, layer))  # type: ignore[arg-type]
            of_weight = float(wide(gradients[f"W_{name[-1]}"]).norm())
            size = max(float(wide(gradient).norm()), _FLOOR * largest, _FLOOR_OF_BIAS * of_weight)
            errors.append(float((wide(ours) - wide(gradient)).norm()) / max(size, torch.finfo(torch.float32).tiny))
    return worst(errors)


def _output_loss(plain: PlainModel, tokens: Int[Tensor, "pos"], n_predicted: int) -> Float[Tensor, ""]:
    return _cross_entropy(plain.logits(tokens[None]), tokens, n_predicted)


def _layer_causal_loss(plain: PlainModel, tokens: Int[Tensor, "pos"], n_predicted: int) -> Float[Tensor, ""]:
    """The sum of all layers' losses. What comes out of every block goes to the final norm as a batch, in the place of what comes
    out of the last, so that the plain model itself makes all logits: norm, unembedding, caps and scales.
    """
    blocks = plain.blocks
    streams: list[Tensor] = []

    def cut(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    def read_out_all(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert len(streams) == len(blocks)
        return (torch.cat(streams), *args[1:])

    with _hooked(plain, cut, lambda block, args, out: streams.append(first(out)), read_out_all):
        logits = plain.logits(tokens[None])
    return len(blocks) * _cross_entropy(logits, tokens, n_predicted)


@contextmanager
def _hooked(plain: PlainModel, before: Any, after: Any, at_readout: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for block in plain.blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        stack.callback(_readout(plain).register_forward_pre_hook(at_readout).remove)
        yield


def _readout(plain: PlainModel) -> nn.Module:
    """The first module after the blocks: the final norm, or the unembedding of a model without norms."""
    hooked: Any = plain.hooked
    without = not is_bridge(hooked) and hooked.cfg.normalization_type is None
    module: nn.Module = plain.view(hooked.unembed if without else hooked.ln_final)
    return module


def _cross_entropy(logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "pos"], n_predicted: int) -> Float[Tensor, ""]:
    found = log_probs(logits[:, -n_predicted - 1 : -1])
    targets = tokens[-n_predicted:].expand(len(logits), -1)
    return -found.gather(-1, targets[..., None]).mean()


def injected_update(subject: Subject) -> float:
    """The change of log-probabilities under an attached update against that of the plain model with edited weights."""
    demonstration = Demonstration(subject.prompts.draw(min(LENGTH, subject.prompts.n_ctx), seed=6), N_LABEL)
    tokens = demonstration.tokens
    subject.count(tokens, tokens)
    steepness = float(gd(subject.model, [demonstration], lr=0.0).gradient_norms.double().square().sum())
    update = gd(subject.model, [demonstration], lr=STEP / steepness)
    with update.attached(subject.model):
        ours = _read_out_whole(subject, tokens)
    ours = ours - _read_out_whole(subject, tokens)
    edited = PlainModel.of(subject.model)
    for layer in range(subject.sites.n_layers):
        changes: dict[str, Tensor] = {name: flat_heads(update.delta(name, layer)) for name in update.settings.parameters}
        for projection in projections_of(edited, layer):
            projection.add(changes)
    subject.count(tokens)
    with torch.no_grad():
        theirs = log_probs(edited.logits(tokens[None].to(subject.model.cfg.device)))[0]
    theirs = theirs - log_probs(subject.plain_logits(tokens))
    return float((ours - theirs).abs().max() / theirs.abs().max())


def _read_out_whole(subject: Subject, tokens: Int[Tensor, "pos"]) -> Float[Tensor, "pos d_vocab"]:
    ((residual,),) = subject.read(tokens, subject.sites.residual_out[-1:])
    return subject.read_out(residual)
