"""Rotary frequencies, against those that the architecture's own rule gives in float32."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_lens.checking.whole import Subject, worst
from iclgd_lens.models.hooked import is_bridge


class NotApplicableError(Exception):
    """A row has nothing to say about this model; the message says why."""


def rotary_angles(subject: Subject) -> float:
    """By how many radians the angle of a rotation is off at the end of the context window, for frequencies rebuilt in float32.

    A `HookedTransformer` holds tables of sines and cosines instead, in the dtype of its weights; these are compared, rounded to it.

    Raises:
        NotApplicableError: If the model has no rotary positions, or keeps them in a form of its own.
    """
    if not is_bridge(subject.model):
        return _tables(subject.model)
    modules = [module for module in subject.plain.module.modules() if _frequencies(module) and hasattr(module, "config")]
    if not modules:
        raise NotApplicableError("the model holds no rotary frequencies")
    errors = []
    for module in modules:
        rebuilt = _rebuilt(module)
        for ours, theirs in _pairs(module, rebuilt, int(subject.model.cfg.n_ctx)):
            errors.append(_angle_error(ours, theirs, int(subject.model.cfg.n_ctx)))
    return worst(errors)


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    return {name: each for name, each in module._buffers.items() if name.endswith("inv_freq") and each is not None}


def _rebuilt(module: Any) -> nn.Module:
    """A new module of the same class and configuration, with float32 buffers on the CPU."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            made: nn.Module = type(module)(config=module.config)
    finally:
        torch.set_default_dtype(default)
    return made


def _pairs(module: Any, rebuilt: Any, n_ctx: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Frequencies of both, as they are; or where they depend on a prompt's length, after a short and after the longest prompt."""
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
    depends = any(kind in ("dynamic", "longrope") for kind in kinds.values())
    for length in (2, n_ctx) if depends else ():
        for each in (module, rebuilt):
            _run_at(each, length, kinds)
        yield from _both(module, rebuilt)
    if not depends:
        yield from _both(module, rebuilt)


def _both(module: nn.Module, rebuilt: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    theirs = _frequencies(rebuilt)
    yield from ((ours, theirs[name]) for name, ours in _frequencies(module).items())


def _run_at(module: Any, length: int, kinds: Iterable[str | None]) -> None:
    """Let a module choose its frequencies for a prompt of so many tokens."""
    device = next(iter(_frequencies(module).values())).device
    for layer_type in kinds:
        of_type = {} if layer_type is None else {"layer_type": layer_type}
        module(torch.zeros(1, 1, device=device), torch.tensor([[length - 1]], device=device), **of_type)


def _angle_error(ours: Tensor, theirs: Tensor, n_ctx: int) -> float:
    """Infinite for frequencies that are kept in less than float32, even where these happen to hold them."""
    if torch.finfo(ours.dtype).bits < 32 or ours.shape != theirs.shape:
        return math.inf
    return float((ours.double().cpu() - theirs.double()).abs().max()) * (n_ctx - 1)


def _tables(model: Any) -> float:
    """The largest difference of a sine or cosine from what the attention's own rule gives in float32 and in the model's dtype."""
    if model.cfg.positional_embedding_type != "rotary":
        raise NotApplicableError("the model has no rotary positions")
    errors = []
    for block in model.blocks:
        attention = copy.copy(block.attn)
        rows = len(attention.rotary_sin)
        made = attention.calculate_sin_cos_rotary(
            model.cfg.rotary_dim, rows, base=attention._rotary_base(), dtype=torch.promote_types(model.cfg.dtype, torch.float32)
        )
        for ours, theirs in zip((attention.rotary_sin, attention.rotary_cos), made, strict=True):
            rounded = theirs.to(model.cfg.dtype).to(ours.device)
            errors.append(math.inf if ours.dtype != model.cfg.dtype else float((ours.double() - rounded.double()).abs().max()))
    return worst(errors)
