"""Where a hooked model is read and written: the one module that knows hook names.

Everything else asks a `HookSites` for the name of a place, so that one implementation serves every model that has these
places. The places, for layer ℓ:

====================  ==========================================  =======================================================
`residual_in[ℓ]`      `[batch pos d_model]`                       the residual stream before block ℓ
`residual_out[ℓ]`     `[batch pos d_model]`                       the residual stream after block ℓ
`projection_in[ℓ]`    `[batch pos d_model]`, via `project_from`   what the key and value projections multiply
`keys[ℓ]`             `[batch pos kv_head d_head]`                output of the key projection, before any rotation
`values[ℓ]`           `[batch pos kv_head d_head]`                output of the value projection
`scores[ℓ]`           `[batch head query_pos key_pos]`            attention scores before softmax, scaled and masked
`pattern[ℓ]`          `[batch head query_pos key_pos]`            attention, the softmax of the scores
`head_out[ℓ]`         `[batch pos head d_head]`                   each head's attended values, before the output projection
`attention_out[ℓ]`    `[batch pos d_model]`                       attention's output as it is added to the residual stream
====================  ==========================================  =======================================================

On a `HookedTransformer` the hook nearest the projections' input, `ln1.hook_normalized`, fires before the norm's scale and
shift are applied (unless they were folded into the weights), so `project_from` applies them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.models.after_attention import AfterAttention

NamedHook = tuple[str, Callable[..., Any]]
"""A hook name and the function to run there, as `model.run_with_hooks` takes them."""

PROCESSED_NORMS = ("LNPre", "RMSPre")
"""`cfg.normalization_type` of models whose norm weights were folded into the matrices that read from them."""

_POST_NORM_ARCHITECTURES = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
_KEYS_NORMALISED_TOGETHER = (*_POST_NORM_ARCHITECTURES, "OlmoeForCausalLM")


@dataclass(frozen=True)
class HookSites:
    """The hook names of one model; see the module's table for what each holds.

    Attributes:
        model: The model whose sites these are.
        residual_in, residual_out, projection_in, keys, values, scores, pattern, head_out, attention_out: One hook name per layer.
        exchangeable_padding: Whether padding between a prompt's parts leaves attention as it was. False where attention
            depends on distances counted in array positions, as local windows do: there, prompts are batched by length.
    """

    model: HookedTransformer
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

    @classmethod
    def of(cls, model: HookedTransformer) -> HookSites:
        """Find the sites of a model.

        Raises:
            TypeError: If the model is not a `HookedTransformer`.
            ValueError: If its configuration is one that these sites cannot serve, or it lacks a needed hook.
        """
        if not isinstance(model, HookedTransformer):
            raise TypeError(
                f"need a transformer_lens HookedTransformer, got {type(model).__name__}; "
                "load one with load_model(name) or HookedTransformer.from_pretrained_no_processing(name)"
            )
        _refuse_unsupported(model)
        cfg = model.cfg
        reads_stream_directly = cfg.normalization_type is None or cfg.original_architecture in _POST_NORM_ARCHITECTURES
        normalised = "hook_resid_pre" if reads_stream_directly else "ln1.hook_normalized"

        def at(place: str) -> tuple[str, ...]:
            return tuple(f"blocks.{layer}.{place}" for layer in range(cfg.n_layers))

        sites = cls(
            model=model,
            residual_in=at("hook_resid_pre"),
            residual_out=at("hook_resid_post"),
            projection_in=at(normalised),
            keys=at("attn.hook_k"),
            values=at("attn.hook_v"),
            scores=at("attn.hook_attn_scores"),
            pattern=at("attn.hook_pattern"),
            head_out=at("attn.hook_z"),
            attention_out=at("hook_attn_out"),
            exchangeable_padding=not cfg.use_local_attn,
        )
        sites._check_hooks_exist()
        return sites

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def n_kv_heads(self) -> int:
        """The number of key and value heads: `n_heads`, or fewer with grouped-query attention."""
        cfg = self.model.cfg
        return int(cfg.n_heads if cfg.n_key_value_heads is None else cfg.n_key_value_heads)

    def project_from(self, layer: int, seen: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Turn what the hook at `projection_in[layer]` saw into what `W_K` and `W_V` of that layer multiply."""
        norm: Any = self.model.blocks[layer].ln1
        # The same cast that the norm makes between its hook and its scale, for half-precision models.
        seen = seen.to(self.model.cfg.dtype)
        if self.projection_in[layer].endswith("hook_resid_pre") or not hasattr(norm, "w"):
            return seen
        return seen * norm.w + norm.b if hasattr(norm, "b") else seen * norm.w

    def project_queries(self, layer: int, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        """Multiply what the projections of a layer see by its `W_Q` and add its `b_Q`: attention queries before any rotation."""
        attention: Any = self.model.blocks[layer].attn
        return einsum(inputs, attention.W_Q, "... d_model, head d_model d_head -> ... head d_head") + attention.b_Q

    def after_attention(self, layer: int) -> AfterAttention | None:
        """What a block does behind its heads, if it treats positions apart, one part after the other, no norm behind either and
        no hook on it.
        """
        cfg, block = self.model.cfg, self.model.blocks[layer]
        if cfg.attn_only or cfg.parallel_attn_mlp or cfg.num_experts is not None or cfg.load_in_4bit:
            return None
        if cfg.use_normalization_before_and_after or cfg.original_architecture in _POST_NORM_ARCHITECTURES:
            return None
        gated = hasattr(block.mlp, "hook_pre_linear")
        if gated and cfg.is_layer_norm_activation():
            return None  # gated in name only
        names = ("hook_attn_out", "hook_resid_mid", "ln2", "mlp", "hook_mlp_in", "hook_mlp_out", "hook_resid_post")
        parts = [block.attn.hook_result, *(getattr(block, name) for name in names if hasattr(block, name))]
        modules = [module for part in parts for module in part.modules()]
        if any(each._forward_hooks or each._forward_pre_hooks or each._backward_hooks for each in modules):
            return None
        products = ("mlp.hook_pre", "mlp.hook_pre_linear") if gated else ("mlp.hook_pre",)
        return AfterAttention(
            block,
            attended=self.attention_out[layer],
            products=tuple(f"blocks.{layer}.{place}" for place in products),
            out=f"blocks.{layer}.hook_mlp_out",
        )

    @property
    def output_weights(self) -> tuple[Float[Tensor, "head d_head d_model"], ...]:
        """Every layer's output projection `W_O`, the model's own, not a copy."""
        return tuple(self.model.blocks[layer].attn.W_O.detach() for layer in range(self.n_layers))

    def require_separate_heads(self) -> None:
        """Check that each head's scores and attended values depend on that head's keys and values alone, and linearly on values.

        Raises:
            ValueError: If keys are normalised over all heads together, or keys and values are clipped.
        """
        cfg = self.model.cfg
        if cfg.original_architecture in _KEYS_NORMALISED_TOGETHER:
            raise ValueError(
                f"{cfg.original_architecture} normalises the keys of all heads together, so a head's scores depend on the others' "
                "keys; attribution to single heads is not defined for it"
            )
        if cfg.clip_qkv is not None:
            raise ValueError(f"the model clips keys and values (clip_qkv={cfg.clip_qkv}); attribution is not supported for it")

    @contextmanager
    def attach(self, hooks: Sequence[NamedHook]) -> Iterator[None]:
        """Put hooks on the model within a `with` block; afterwards, also after an exception, they are off again.

        At keys and values they run before any other hook, so that what they make of them is what the projections seem to have put
        out, and hooks that edit keys and values edit that. Everywhere else they run after the hooks that are there already.
        """
        at_projections = {*self.keys, *self.values}
        with self.model.hooks():
            level = self.model.context_level
            for name, hook in hooks:
                if name not in at_projections:
                    self.model.add_hook(name, hook, level=level)
            for name, hook in reversed(hooks):
                if name in at_projections:
                    self.model.add_hook(name, hook, level=level, prepend=True)
            yield

    def _check_hooks_exist(self) -> None:
        needed = (
            *self.residual_in,
            *self.residual_out,
            *self.projection_in,
            *self.keys,
            *self.values,
            *self.scores,
            *self.pattern,
            *self.head_out,
            *self.attention_out,
        )
        missing = [name for name in needed if name not in self.model.hook_dict]
        if missing:
            raise ValueError(f"the model has no hook named {missing[0]} ({len(missing)} needed hooks are missing)")


def warn_if_processed(model: HookedTransformer) -> None:
    """Warn where weights were processed, since steps on them are not the steps of the model as it was trained.

    Gradient descent is not invariant to a change of parameters: folding a norm's scale into `W_K` changes the gradient of
    `W_K` by that scale squared in effect, so an update of a folded model is another update.
    """
    if processing := _processing(model):
        warnings.warn(
            f"this model's weights are processed: {processing}. Neither gradient descent nor the attention output is invariant to "
            "that: updates and similarities will differ from those of the model as trained. Load it with load_model(name) or "
            "from_pretrained_no_processing(name) to compare with the paper.",
            UserWarning,
            stacklevel=4,  # the line that called gd or lcgd
        )


def _processing(model: HookedTransformer) -> str | None:
    """Say how a model's weights were processed when it was loaded, where that can be seen."""
    if model.cfg.normalization_type in PROCESSED_NORMS:
        return f"its layer norms are folded into them (normalization_type={model.cfg.normalization_type!r})"
    output = model.blocks[0].attn.W_O.detach()
    if bool(output.any()) and output.mean(dim=-1).abs().max() < 1e-4 * output.abs().mean():
        return "those that write to the residual stream are centred"
    return None


def _refuse_unsupported(model: HookedTransformer) -> None:
    cfg = model.cfg
    if cfg.use_split_qkv_input or cfg.use_attn_in:
        raise ValueError(
            "the model has separate attention inputs per head (use_split_qkv_input or use_attn_in); turn them off with "
            "model.set_use_split_qkv_input(False) and model.set_use_attn_in(False)"
        )
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
