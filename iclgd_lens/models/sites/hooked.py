"""The places of a `HookedTransformer`.

No hook point shows what the key and value projections multiply: `ln1.hook_normalized` fires before the norm's scale and shift. So
their input is read where attention takes it, by a torch hook on the attention module, and `blocks.{layer}.attn.key_input` is the
name of that place here. Hooks for `model.run_with_hooks` are at hook points alone (`by_name`): they read `ln1.hook_normalized` and
apply scale and shift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.sites.base import HookSites, NamedHook, in_every_block, refuse_hidden_hooks, refuse_split_inputs
from iclgd_lens.models.touched import is_untouched, same_at_every_position

_POST_NORM_ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_KEYS_NORMALISED_TOGETHER = (*_POST_NORM_ARCHITECTURES, "OlmoeForCausalLM")


@dataclass(frozen=True, eq=False)
class TransformerSites(HookSites):
    """The hook names of a `HookedTransformer`."""

    @classmethod
    def of(cls, model: HookedModel) -> TransformerSites:
        """Find the sites of a model.

        Raises:
            ValueError: If its configuration is one that these sites cannot serve, or it lacks a needed hook.
        """
        _refuse_unsupported(model.cfg)
        cfg, blocks = model.cfg, cast(Any, model).blocks
        refuse_hidden_hooks({f"blocks.{layer}": (block, f"blocks.{layer}.hook_resid_post") for layer, block in enumerate(blocks)})
        return cls(
            model=model,
            residual_in=in_every_block(cfg, "hook_resid_pre"),
            residual_out=in_every_block(cfg, "hook_resid_post"),
            projection_in=in_every_block(cfg, "attn.key_input"),
            keys=in_every_block(cfg, "attn.hook_k"),
            values=in_every_block(cfg, "attn.hook_v"),
            scores=in_every_block(cfg, "attn.hook_attn_scores"),
            pattern=in_every_block(cfg, "attn.hook_pattern"),
            head_out=in_every_block(cfg, "attn.hook_z"),
            attention_out=in_every_block(cfg, "hook_attn_out"),
            window=cfg.window_size if cfg.use_local_attn else math.inf,
            rope_switches=(),
        )

    @override
    def _is_place(self, name: str) -> bool:
        return name.endswith(".attn.key_input") or super()._is_place(name)

    @override
    def _put(self, name: str, hook: Callable[..., Any], *, first: bool) -> Callable[[], bool]:
        if not name.endswith(".attn.key_input"):
            return super()._put(name, hook, first=first)
        attention = self._block(int(name.split(".")[1])).attn

        def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hook(kwargs["key_input"], hook=None)

        handle = attention.register_forward_pre_hook(read, with_kwargs=True)

        def take_off() -> bool:
            was_on = handle.id in attention._forward_pre_hooks
            handle.remove()
            return was_on

        return take_off

    @override
    def by_name(self, hooks: Sequence[NamedHook]) -> list[NamedHook]:
        return [self._at_normalized(*each) if each[0].endswith(".attn.key_input") else each for each in hooks]

    def _at_normalized(self, name: str, hook: Callable[..., Any]) -> NamedHook:
        """A function for attention's input, put at the nearest hook point before it."""
        layer = int(name.split(".")[1])
        cfg, block = self.model.cfg, self._block(layer)
        norm = block.ln1
        if not is_untouched(norm) or not is_untouched(block.attn, but_read=True):
            raise ValueError(
                f"a torch hook on blocks.{layer}.ln1 or on blocks.{layer}.attn changes what the projections multiply after the "
                "last hook point before them, so hooks by name cannot read it; run within `with update.attached(model)`, which "
                "reads attention's own input"
            )
        if cfg.normalization_type is None or cfg.original_architecture in _POST_NORM_ARCHITECTURES:
            return f"blocks.{layer}.hook_resid_pre", hook

        def scaled(normalized: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            # The same cast that the norm makes between its hook and its scale, for half-precision models.
            x = normalized.to(cfg.dtype)
            if hasattr(norm, "w"):
                x = x * norm.w
            of_input(x + norm.b if hasattr(norm, "b") else x, hook=hook)

        of_input = hook
        return f"blocks.{layer}.ln1.hook_normalized", same_at_every_position(scaled)

    @override
    def project_queries(self, layer: int, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        attention: Any = self._block(layer).attn
        return einsum(inputs, attention.W_Q, "... d_model, head d_model d_head -> ... head d_head") + attention.b_Q

    @override
    def after_attention(self, layer: int) -> AfterAttention | None:
        cfg, block = self.model.cfg, self._block(layer)
        if cfg.attn_only or cfg.parallel_attn_mlp or cfg.num_experts is not None or cfg.load_in_4bit:
            return None
        if cfg.use_normalization_before_and_after or cfg.original_architecture in _POST_NORM_ARCHITECTURES:
            return None
        gated = hasattr(block.mlp, "hook_pre_linear")
        if gated and cfg.is_layer_norm_activation():
            return None  # gated in name only
        if not _is_as_made(block):
            return None
        products = ("mlp.hook_pre", "mlp.hook_pre_linear") if gated else ("mlp.hook_pre",)
        return AfterAttention(
            block,
            attended=self.attention_out[layer],
            products=tuple(f"blocks.{layer}.{place}" for place in products),
            out=f"blocks.{layer}.hook_mlp_out",
        )

    @override
    def output_weight(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        weight: Tensor = self._block(layer).attn.W_O
        return weight.detach()

    @override
    def require_separate_heads(self) -> None:
        cfg = self.model.cfg
        if cfg.original_architecture in _KEYS_NORMALISED_TOGETHER:
            raise ValueError(
                f"{cfg.original_architecture} normalises the keys of all heads together, so a head's scores depend on the others' "
                "keys; attribution to single heads is not defined for it"
            )
        if cfg.clip_qkv is not None:
            raise ValueError(f"the model clips keys and values (clip_qkv={cfg.clip_qkv}); attribution is not supported for it")

    @override
    def run(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch all_pos"], past: Any = None) -> None:
        # The mask is given, all ones if need be: without it TransformerLens may take separators for padding.
        self.model(tokens, attention_mask=mask[:, -tokens.shape[1] :], past_kv_cache=past, return_type=None)

    def _block(self, layer: int) -> Any:
        model: Any = self.model
        return model.blocks[layer]


_UP_TO_HEADS = (
    "ln1.",
    "hook_resid_pre",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_rot",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
)
"""Hook points of a block that fire no later than its heads' output is there; only what comes after that is made again."""


def _is_as_made(block: nn.Module) -> bool:
    """Whether a block consists of TransformerLens's own modules, as they were made, with no hook on what comes after its heads."""
    for name, module in block.named_modules():
        if isinstance(module, HookPoint):
            if type(module) is not HookPoint or (not name.startswith(_UP_TO_HEADS) and not is_untouched(module)):
                return False
        elif not type(module).__module__.startswith(("transformer_lens.", "torch.")) or not is_untouched(module, but_read=True):
            return False
    return True


def _refuse_unsupported(cfg: Any) -> None:
    refuse_split_inputs(cfg)
    if cfg.positional_embedding_type == "shortformer":
        raise ValueError("shortformer models are not supported: their keys and values are made from different inputs")
    if cfg.positional_embedding_type == "alibi":
        raise ValueError(
            "ALiBi models are not supported: TransformerLens shifts their attention scores by constants that depend on the longest "
            "prompt run so far, so scores of different runs cannot be compared"
        )
    if cfg.attention_dir != "causal":
        raise ValueError(f"in-context learning is read at a prompt's end and needs causal attention, got {cfg.attention_dir}")
    if cfg.ungroup_grouped_query_attention:
        raise ValueError(
            "the model's grouped keys and values are spread over all heads, and TransformerLens cannot cache them so; turn it "
            "off with model.set_ungroup_grouped_query_attention(False)"
        )
    if cfg.load_in_4bit:
        raise ValueError("models loaded in 4 bits are not supported: their key and value weights have no plain form")
