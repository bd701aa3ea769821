"""The plain model: what a hooked model computes once TransformerLens and this package are taken away.

Around a Hugging Face model, a `TransformerBridge` stands in for modules with components of its own. The plain model is a *view* of
the Hugging Face model: new module objects that hold the same parameters and buffers, and the original module wherever the bridge
put a component. No weight is copied (only rotary frequencies are), and the hooked model stays as it is. For a `HookedTransformer`,
whose Hugging Face model is gone, the view is of the `HookedTransformer` itself, hooks included.

Since the view has its own tables of parameters, a parameter can be put into the view alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from iclgd_lens.models.hooked import HookedModel, is_bridge

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""Where torch keeps a module's hooks."""


@dataclass(frozen=True, eq=False)
class PlainModel:
    """A view of the model that a hooked model is made of; its weights are the hooked model's own.

    Attributes:
        hooked: The hooked model.
        module: The view.
        views: The view of every module, by the `id` of the original module.
    """

    hooked: HookedModel
    module: nn.Module
    views: dict[int, nn.Module]

    @classmethod
    def of(cls, hooked: HookedModel) -> PlainModel:
        """Make the view."""
        views: dict[int, nn.Module] = {}
        root: Any = hooked
        return cls(hooked, _view(root.original_model if is_bridge(hooked) else root, views, hooks=not is_bridge(hooked)), views)

    @property
    def name(self) -> str:
        """What the plain model is, in words."""
        return "the plain Hugging Face model" if is_bridge(self.hooked) else "the model's own forward pass"

    def view(self, module: nn.Module) -> Any:
        """The view of a module of the hooked model; of a bridge's component, the view of the module that it stands in for."""
        return self.views[id(_original(module))]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks, in order."""
        hooked: Any = self.hooked
        return [self.view(block) for block in hooked.blocks]

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the unembedding."""
        hooked: Any = self.hooked
        found: nn.Module = self.view(hooked.ln_final)
        return found

    def logits(self, tokens: Int[Tensor, "batch pos"], last: int | None = None) -> Float[Tensor, "_rows last d_vocab"]:
        """Run whole prompts of equal length, without a cache.

        Args:
            tokens: The prompts.
            last: For how many tokens at the end logits are returned; all by default.
        """
        logits: Tensor
        if not is_bridge(self.hooked):
            logits = self.module(tokens, attention_mask=torch.ones_like(tokens))
        else:
            some = {"logits_to_keep": last} if last is not None and "logits_to_keep" in self._accepted else {}
            logits = self.module(input_ids=tokens, use_cache=False, **some).logits
        return logits if last is None else logits[:, -last:]

    @contextmanager
    def watched(self, modules: Sequence[nn.Module], *, outputs: bool = True) -> Iterator[list[Any]]:
        """Collect what modules of the view put out, or what they are given, in the order in which they run."""
        seen: list[Any] = []
        with ExitStack() as stack:
            for module in modules:
                if outputs:
                    handle = module.register_forward_hook(lambda module, given, out: seen.append(out))
                else:
                    handle = module.register_forward_pre_hook(lambda module, given: seen.append(given))
                stack.callback(handle.remove)
            yield seen

    @cached_property
    def _accepted(self) -> Any:
        return signature(type(self.module).forward).parameters


def first(out: Any) -> Tensor:
    """A module's output, or the first of several."""
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _original(module: nn.Module) -> nn.Module:
    """The module that a bridge's component stands in for; any other module itself."""
    while isinstance(module, GeneralizedComponent) and isinstance(module.original_component, nn.Module):
        module = module.original_component
    return module


def _view(module: nn.Module, views: dict[int, nn.Module], *, hooks: bool) -> nn.Module:
    module = _original(module)
    if id(module) in views:
        return views[id(module)]
    held = dict(module.__dict__)
    view = views[id(module)] = type(module).__new__(type(module))
    object.__setattr__(view, "__dict__", held)
    for table in HOOK_TABLES:
        if table in held:
            held[table] = OrderedDict(held[table] if hooks else ())
    held["_parameters"] = dict(module._parameters)
    # Rotary frequencies that depend on a prompt's length are written in place when they change.
    held["_buffers"] = {
        name: each.clone() if each is not None and name.endswith("inv_freq") else each for name, each in module._buffers.items()
    }
    held["_modules"] = {
        name: None if child is None else _view(child, views, hooks=hooks) for name, child in module._modules.items()
    }
    held["_compiled_call_impl"] = None
    _take_back_forward(module, held, view)
    return view


def _take_back_forward(module: nn.Module, held: dict[str, Any], view: nn.Module) -> None:
    """Let a view run its own modules where the original module had its `forward` replaced on the object."""
    forward = held.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is module:
        held["forward"] = MethodType(forward.__func__, view)
    elif "_old_forward" in held:  # accelerate's, which moves tensors between devices
        del held["forward"]
