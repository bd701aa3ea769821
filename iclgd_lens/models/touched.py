"""What a user put on a model: hooks at hook points, torch hooks, modules and methods in the place of the model's own.

Such code may do something else at every position and for every prompt, so what it sees has to be what it would see if each prompt
ran whole and by itself: prompts share neither a prefix nor a batch then. Hooks that treat every position of every prompt alike can
say so, and are the exception.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrize
from transformer_lens.hook_points import HookPoint

from iclgd_lens.models.hooked import HookedModel, is_bridge

Hook = TypeVar("Hook", bound=Callable[..., Any])

_MARK = "_iclgd_lens_same_at_every_position"

_LIBRARIES = ("torch", "transformers", "transformer_lens", "peft", "accelerate", "bitsandbytes", "sae_lens", "iclgd_lens")
"""Packages whose modules treat every prompt by itself, and whose torch hooks are part of how a model is run."""


def same_at_every_position(hook: Hook) -> Hook:
    """Say of a hook that it does the same at every position of every prompt, whatever stands beside it.

    While other hooks of a user are on a model, `capture` runs every prompt whole and by itself. With hooks that are marked so,
    prompts go on sharing their beginning and their batches, which is many times faster. Ablating a head at all positions, or adding
    one vector everywhere, may be marked; writing the last position alone may not, since the last position of a shared beginning is
    no prompt's last.

    Args:
        hook: A function for a hook point or for a torch hook, or a module put in the place of one of the model's. It is marked, not
            wrapped.

    Returns:
        The hook.

    Raises:
        TypeError: If the hook takes no mark, as a `functools.partial` or a bound method of a builtin does not.
    """
    try:
        setattr(hook, _MARK, True)
    except AttributeError as error:
        raise TypeError(f"{hook!r} cannot be marked; write it as a function of its own (def or lambda)") from error
    return hook


def what_a_user_put_on(model: HookedModel) -> str:
    """Name the first thing on a model that may tell positions or prompts apart; empty where there is none.

    Looked at are hooks at hook points, torch's forward hooks of single modules and of all, modules whose class comes from elsewhere
    than the model's own and the libraries that models are made of, and `forward` methods put on single modules.
    """
    if any((torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)):
        return "a torch hook on all modules"
    root: Any = model
    known = {*_LIBRARIES, _package(type(root.original_model)) if is_bridge(root) else "transformer_lens"}
    # A bridge's blocks are the Hugging Face model's, but what is around them there is no part of the bridge.
    around = root.original_model.named_modules(prefix="original_model") if is_bridge(root) else ()
    # Each module once, by its name in the bridge.
    for name, module in {id(module): (name, module) for name, module in (*around, *root.named_modules())}.values():
        if isinstance(module, HookPoint):
            for handle in module.fwd_hooks:
                if not _is_marked(hook := getattr(handle, "user_hook", None)) and not _is_of_a_bridge(hook):
                    return f"a hook at {name}"
            continue
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if any(not _is_marked(hook) and not is_of_a_library(hook) for hook in hooks):
            return f"a torch hook on {name or 'the model'}"
        if module is root:
            continue
        if _package(type(module)) not in known and not _is_marked(module):
            return f"a {type(module).__name__} in {name}"
        if (replaced := vars(module).get("forward")) is not None and not (_is_marked(replaced) or is_of_a_library(replaced)):
            return f"a forward method put on {name}"
    return ""


def is_untouched(module: nn.Module, *, but_read: bool = False) -> bool:
    """Whether a module runs the code of its class and nothing else: no torch hook, no parametrisation and no other `forward`.

    Args:
        module: The module.
        but_read: Allow torch hooks of this package, which read what a module is given.
    """
    hooks = [
        hook
        for found in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        for hook in found.values()
    ]
    if but_read:
        hooks = [hook for hook in hooks if _package(hook) != "iclgd_lens"]
    return not hooks and "forward" not in vars(module) and not parametrize.is_parametrized(module)


def _is_marked(hook: Any) -> bool:
    return getattr(hook, _MARK, False) is True


def _is_of_a_bridge(hook: Any) -> bool:
    """Whether a hook is one by which TransformerLens's bridges work; functions for hooks that it has for users are elsewhere."""
    return str(getattr(hook, "__module__", None)).startswith("transformer_lens.model_bridge.")


def _package(kind: Any) -> str:
    return str(getattr(kind, "__module__", None) or "").split(".")[0]


def is_of_a_library(hook: Any) -> bool:
    """Whether a hook or a method comes from one of the libraries that models are made of and run by, or from this package."""
    # A partial has no module of its own, but its function has.
    return _package(getattr(hook, "func", hook)) in _LIBRARIES
