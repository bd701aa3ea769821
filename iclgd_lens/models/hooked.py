"""What a hooked model is, in either of TransformerLens's worlds.

TransformerLens 3 has two: `HookedTransformer`, its own implementation of many architectures, and `TransformerBridge`, which puts
hooks around a Hugging Face model. TransformerLens 4 has the latter alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

try:
    from transformer_lens import HookedTransformer as HookedTransformer
except ImportError:  # TransformerLens 4
    HookedTransformer = None  # type: ignore[assignment,misc]


class NoHookedTransformerError(ImportError):
    """TransformerLens has no `HookedTransformer`, of which something is built."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} is built of TransformerLens's HookedTransformer, which TransformerLens 4 has no more; "
            "install it with pip install 'transformer-lens<4'"
        )


class HookedModel(Protocol):
    """What is asked of a hooked model; a `HookedTransformer` and a `TransformerBridge` both have it."""

    @property
    def cfg(self) -> Any:
        """Its configuration, with `n_layers`, `n_heads`, `d_model`, `d_head`, `n_ctx`, `d_vocab`, `device` and `dtype`."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, a Hugging Face one; None if it has none."""

    @property
    def hook_dict(self) -> Any:
        """Its hook points by name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it."""

    @property
    def hooks(self) -> Callable[..., AbstractContextManager[Any]]:
        """Put hooks on it for the time of a `with` block."""

    @property
    def run_with_hooks(self) -> Any:
        """Run it with hooks."""

    @property
    def named_parameters(self) -> Callable[[], Iterator[tuple[str, nn.Parameter]]]:
        """Its parameters by name, each once."""


def is_bridge(model: object) -> bool:
    """Whether a model is a `TransformerBridge`."""
    return isinstance(model, TransformerBridge)


def make_hooked_transformer(settings: dict[str, Any], *, what: str, tokenizer: Any = None) -> HookedTransformer:
    """Make a `HookedTransformer` of a configuration.

    Args:
        settings: The arguments of `HookedTransformerConfig`.
        what: What it is for, as a message names it.
        tokenizer: Its tokenizer.

    Raises:
        NoHookedTransformerError: If TransformerLens has the class no more.
    """
    if HookedTransformer is None:
        raise NoHookedTransformerError(what)
    from transformer_lens import HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated", category=DeprecationWarning)
        return HookedTransformer(HookedTransformerConfig(**settings), tokenizer=tokenizer)


def make_bridge(
    hf_model: Any, *, tokenizer: Any = None, name: str = "external", architecture: str | None = None
) -> TransformerBridge:
    """Put a `TransformerBridge` around a Hugging Face model, which is from then on run through it.

    Args:
        hf_model: The model, with eager attention.
        tokenizer: Its tokenizer.
        name: Becomes `cfg.model_name`.
        architecture: What TransformerLens knows it as; by default the name of its class.
    """
    # What components of a bridge draw at random when they are made is never used.
    with torch.random.fork_rng(devices=[]):
        return build_bridge_from_module(
            hf_model,
            architecture=architecture or type(hf_model).__name__,
            hf_config=hf_model.config,
            tokenizer=tokenizer,
            model_name=name,
        )


def is_hooked_transformer(model: object) -> bool:
    """Whether a model is a `HookedTransformer`, which there are none of in TransformerLens 4."""
    return HookedTransformer is not None and isinstance(model, HookedTransformer)


def require_in_one_place(named: Iterable[tuple[str, Tensor]]) -> None:
    """Check that parameters are all there, on one device.

    Raises:
        ValueError: If one is on the meta device, where accelerate puts what is off-loaded to the CPU or a disk, or two are on
            different devices.
    """
    devices: dict[torch.device, str] = {}
    for name, parameter in named:
        devices.setdefault(parameter.device, name)
    absent = next((name for device, name in devices.items() if device.type == "meta"), None)
    if absent is not None:
        raise ValueError(
            f"the weights of the model are not all in memory: {absent} is off-loaded (accelerate keeps it on the CPU or on a disk, "
            "and on the meta device here); load the model without device_map, on one device that holds it"
        )
    if len(devices) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"the model is split over several devices ({places}), which is not supported; load it on one that holds it, without "
            "device_map"
        )
