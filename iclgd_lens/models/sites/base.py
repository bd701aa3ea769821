"""The places of a hooked model, whatever class it has: their names, and how they are read, written and run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.sites.ownership import owned_by_this_thread

NamedHook = tuple[str, Callable[..., Any]]
"""A hook name and the function to run there, as `model.run_with_hooks` takes them."""

LastQuery = Callable[[Float[Tensor, "batch head key_pos"]], None]
"""What is done with attention's scores or pattern at every prompt's last token."""


@dataclass(frozen=True, eq=False)
class Keys:
    """What prompts' last tokens attend to, beside what hooks see: needed where scores have to be made again.

    Attributes:
        before: The cached keys that the prompts stand behind; None if they run whole.
        own: Which positions of the prompts themselves are no padding.
    """

    before: Float[Tensor, "before kv_head d_head"] | None
    own: Bool[Tensor, "batch pos"]


@dataclass(frozen=True, eq=False)
class HookSites(ABC):
    """The hook names of one model; see the package's table for what each holds.

    Attributes:
        model: The model whose sites these are.
        residual_in, residual_out, projection_in, keys, values, scores, pattern, head_out, attention_out: One hook name per layer.
        exchangeable_padding: Whether padding between a prompt's parts leaves attention as it was. False where attention
            depends on distances counted in array positions, as local windows do: there, prompts are batched by length.
    """

    model: HookedModel
    residual_in: tuple[str, ...]
    residual_out: tuple[str, ...]
    projection_in: tuple[str, ...]
    keys: tuple[str, ...]
    values: tuple[str, ...]
    scores: tuple[str, ...]
    pattern: tuple[str, ...]
    head_out: tuple[str, ...]
    attention_out: tuple[str, ...]
    exchangeable_padding: bool

    def __post_init__(self) -> None:
        held = (getattr(self, field.name) for field in fields(self))
        names = [name for place in held if isinstance(place, tuple) for name in place]
        if missing := [name for name in names if name not in self._points]:
            raise ValueError(f"the model has no hook named {missing[0]} ({len(missing)} needed hooks are missing)")

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def n_kv_heads(self) -> int:
        """The number of key and value heads: `n_heads`, or fewer with grouped-query attention."""
        cfg = self.model.cfg
        return int(cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads)

    @abstractmethod
    def project_from(self, layer: int, seen: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Turn what the hook at `projection_in[layer]` saw into what `W_K` and `W_V` of that layer multiply."""

    @abstractmethod
    def project_queries(self, layer: int, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """Multiply what the projections of a layer see by its `W_Q` and add its `b_Q`: attention queries before any rotation."""

    @abstractmethod
    def after_attention(self, layer: int) -> AfterAttention | None:
        """What a block does behind its heads, if it treats positions apart, one part after the other, no norm behind either and
        no hook on it.
        """

    @property
    @abstractmethod
    def output_weights(self) -> tuple[Float[Tensor, "head d_head d_model"], ...]:
        """Every layer's output projection `W_O`, the model's own, not a copy."""

    @abstractmethod
    def require_separate_heads(self) -> None:
        """Check that each head's scores and attended values depend on that head's keys and values alone, and linearly on values.

        Raises:
            ValueError: If keys are normalised over all heads together, or keys and values are clipped.
        """

    @abstractmethod
    def run(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch all_pos"], past: Any = None) -> None:
        """Run the model for what its hooks see.

        Args:
            tokens: The prompts, or what of them stands behind the cached keys and values.
            mask: 0 where there is padding, and 1 elsewhere, cached positions included.
            past: The cache, of the class that the model takes.
        """

    def at_scores(self, layer: int, keys: Keys, do: LastQuery) -> list[NamedHook]:
        """Make the hooks that hand a layer's scores at the last token, −inf where masked, to a function.

        Args:
            layer: Which layer.
            keys: What is attended to.
            do: The function.
        """

        def take(scores: Float[Tensor, "batch head query_pos key_pos"], hook: Any) -> None:
            # Hugging Face masks by the least finite number, TransformerLens by −inf.
            last = scores[:, :, -1]
            do(last.masked_fill(last <= torch.finfo(last.dtype).min / 2, -torch.inf))

        return [(self.scores[layer], take)]

    def at_pattern(self, layer: int, keys: Keys, do: LastQuery) -> list[NamedHook]:
        """Make the hooks that hand a layer's attention pattern at the last token to a function; arguments as for `at_scores`."""
        return [(self.pattern[layer], lambda pattern, hook: do(pattern[:, :, -1]))]

    @contextmanager
    def attach(self, hooks: Sequence[NamedHook], *, first_at_projections: bool = True) -> Iterator[None]:
        """Put hooks on the model within a `with` block; afterwards, also after an exception, they are off again.

        They run after the hooks that are there already; but at keys and values they run before any other, so that what they make of
        them is what the projections seem to have put out, and hooks that edit keys and values edit that.

        Args:
            hooks: Names and functions.
            first_at_projections: Whether they run first at keys and values.

        Raises:
            RuntimeError: If another thread has hooks on this model in this way.
        """
        before = {*self.keys, *self.values} if first_at_projections else set()
        model: Any = self.model
        with owned_by_this_thread(self.model):
            # What `model.hooks()` does, too; but a bridge looks all its names up anew at every call of that.
            model.context_level += 1
            level = model.context_level
            try:
                for name, hook in hooks:
                    if name not in before:
                        self._points[name].add_hook(hook, level=level)
                for name, hook in reversed(hooks):
                    if name in before:
                        self._points[name].add_hook(hook, level=level, prepend=True)
                yield
            finally:
                for name, _ in hooks:
                    self._points[name].remove_hooks("fwd", level=level)
                model.context_level -= 1

    @cached_property
    def _points(self) -> Mapping[str, Any]:
        points: Mapping[str, Any] = self.model.hook_dict
        return points


def in_every_block(cfg: Any, place: str) -> tuple[str, ...]:
    """The name of a place in each block of a model with this configuration."""
    return tuple(f"blocks.{layer}.{place}" for layer in range(cfg.n_layers))


def refuse_split_inputs(cfg: Any) -> None:
    """Refuse a model whose attention is set to take its inputs head by head.

    Raises:
        ValueError: If it is, saying how to undo it.
    """
    if cfg.use_split_qkv_input or cfg.use_attn_in:
        raise ValueError(
            "the model has separate attention inputs per head (use_split_qkv_input or use_attn_in); turn them off with "
            "model.set_use_split_qkv_input(False) and model.set_use_attn_in(False)"
        )
