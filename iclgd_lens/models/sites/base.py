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
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.lengths import RopeSwitch, frequencies_at
from iclgd_lens.models.sites.ownership import owned_by_this_thread
from iclgd_lens.models.touched import is_of_a_library, what_a_user_put_on

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
        window: How many positions the shortest-sighted layer looks back; infinite where every layer sees the whole prompt. Windows
            are counted in array positions, so within one, padding between a prompt's parts changes what is seen.
        rope_switches: How rotary frequencies depend on the length of a forward pass; empty where they do not.
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
    window: float
    rope_switches: tuple[RopeSwitch, ...]

    def __post_init__(self) -> None:
        places = (getattr(self, field.name) for field in fields(self) if field.type == "tuple[str, ...]")
        names = [name for place in places for name in place]
        if missing := [name for name in names if not self._is_place(name)]:
            raise ValueError(_why_missing(self.model, missing))

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
    def project_queries(self, layer: int, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """Give what the projections of a layer see to its query projection: attention queries before any norm or rotation.

        Raises:
            ValueError: If the projection puts out something beside them.
        """

    @abstractmethod
    def after_attention(self, layer: int) -> AfterAttention | None:
        """What a block does behind its heads, if it treats positions apart, one part after the other, no norm behind either and
        no hook on it.
        """

    @abstractmethod
    def output_weight(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What a layer's output projection multiplies by, `W_O`: the model's own tensor where the projection is a plain linear
        layer, and otherwise, as with an adapter or int8 weights, measured.

        Raises:
            ValueError: If the projection is not linear.
        """

    @property
    def output_weights(self) -> tuple[Float[Tensor, "head d_head d_model"], ...]:
        """`output_weight` of every layer."""
        return tuple(self.output_weight(layer) for layer in range(self.n_layers))

    @property
    def exchangeable_padding(self) -> bool:
        """Whether prompts of different lengths may share a pass at every length that fits the context window."""
        return self.window >= self.model.cfg.n_ctx and not self.rope_switches

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

    def frequencies_at(self, length: int) -> tuple[int, ...]:
        """Tell the rotary frequencies of forward passes of different lengths apart: equal for lengths that have the same."""
        return frequencies_at(self.rope_switches, length)

    def what_tells_prompts_apart(self) -> str:
        """Name what a user put on the model that may tell positions or prompts apart; empty where there is nothing."""
        return what_a_user_put_on(self.model)

    def by_name(self, hooks: Sequence[NamedHook]) -> list[NamedHook]:
        """The same hooks at hook points alone, as `model.run_with_hooks(fwd_hooks=...)` takes them.

        Raises:
            ValueError: If a place is at no hook point of this model.
        """
        return list(hooks)

    def require_trainable(self) -> None:
        """Check that gradients can be taken at the key and value projections, and are those of their weights.

        Raises:
            ValueError: If the weights were made under inference mode, or a torch hook is on a projection.
        """
        if any(parameter.is_inference() for _, parameter in self.model.named_parameters()):
            raise ValueError(
                "the model's weights were made under torch.inference_mode(), and no gradient can be taken through such tensors; "
                "load or build the model outside of it"
            )

    @contextmanager
    def attach(self, hooks: Sequence[NamedHook], *, first_at_projections: bool = True) -> Iterator[None]:
        """Put hooks on the model within a `with` block; afterwards, also after an exception, they are off again.

        They run after the hooks that are there already; but at keys and values they run before any other, so that what they make of
        them is what the projections seem to have put out, and hooks that edit keys and values edit that. `model.reset_hooks()`
        leaves them on.

        Args:
            hooks: Names and functions.
            first_at_projections: Whether they run first at keys and values.

        Raises:
            RuntimeError: If another thread has hooks on this model in this way, or hooks were taken off within the block.
        """
        before = {*self.keys, *self.values} if first_at_projections else set()
        with owned_by_this_thread(self.model):
            off: list[Callable[[], bool]] = []
            try:
                off += [self._put(name, hook, first=False) for name, hook in hooks if name not in before]
                off += [self._put(name, hook, first=True) for name, hook in reversed(hooks) if name in before]
                yield
            finally:
                were_on = [take_off() for take_off in off]
            if not all(were_on):
                raise RuntimeError(
                    f"{were_on.count(False)} of {len(were_on)} hooks of this package were taken off while they were in use, so "
                    "what ran after that ran without them; model.reset_hooks() leaves them on, but "
                    "reset_hooks(including_permanent=True) does not: call it outside of the with block"
                )

    def _is_place(self, name: str) -> bool:
        """Whether a function can be put at a place of this name."""
        return name in self._points

    def _put(self, name: str, hook: Callable[..., Any], *, first: bool) -> Callable[[], bool]:
        """Put a function at a place; what is returned takes it off again, and says whether it was still on."""
        point = self._points[name]
        point.add_hook(hook, is_permanent=True, prepend=first)
        handle = point.fwd_hooks[0 if first else -1]

        def take_off() -> bool:
            was_on = any(each is handle for each in point.fwd_hooks)
            handle.hook.remove()
            point.fwd_hooks = [each for each in point.fwd_hooks if each is not handle]
            return was_on

        return take_off

    @cached_property
    def _points(self) -> Mapping[str, Any]:
        points: Mapping[str, Any] = self.model.hook_dict
        return points


def _why_missing(model: Any, missing: Sequence[str]) -> str:
    """What became of a hook point that is not there."""
    try:
        found = model.get_submodule(missing[0])
    except AttributeError:
        found = None
    if found is None or type(found) is HookPoint:
        return f"the model has no hook named {missing[0]} ({len(missing)} needed hooks are missing)"
    return (
        f"the hook point {missing[0]} has been replaced by a {type(found).__name__}, as sparse autoencoders are put in, and this "
        "package reads the model there; take it off first (with SAELens: model.reset_saes()), or put it at another hook point, "
        "such as hook_mlp_out"
    )


def refuse_hidden_hooks(ends: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Refuse torch hooks that edit what a module puts out after the hook point at which this package reads that.

    Args:
        ends: By their names, modules that end with a hook point, and a name of that point.

    Raises:
        ValueError: If one is there, naming the hook point where it belongs.
    """
    for name, (module, point) in ends.items():
        if any(not is_of_a_library(hook) for hook in module._forward_hooks.values()):
            raise ValueError(
                f"a torch hook on {name} may edit its output after the last hook point there, where this package cannot see it; "
                f"put it at {point} instead: model.add_hook({point!r}, hook)"
            )


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
