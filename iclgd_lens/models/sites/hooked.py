"""The places of a `HookedTransformer`.

The hook nearest the projections' input, `ln1.hook_normalized`, fires before the norm's scale and shift are applied (unless they
were folded into the weights), so `project_from` applies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.sites.base import HookSites, in_every_block, refuse_split_inputs

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
        cfg = model.cfg
        reads_stream_directly = cfg.normalization_type is None or cfg.original_architecture in _POST_NORM_ARCHITECTURES
        normalised = "hook_resid_pre" if reads_stream_directly else "ln1.hook_normalized"

        return cls(
            model=model,
            residual_in=in_every_block(cfg, "hook_resid_pre"),
            residual_out=in_every_block(cfg, "hook_resid_post"),
            projection_in=in_every_block(cfg, normalised),
            keys=in_every_block(cfg, "attn.hook_k"),
            values=in_every_block(cfg, "attn.hook_v"),
            scores=in_every_block(cfg, "attn.hook_attn_scores"),
            pattern=in_every_block(cfg, "attn.hook_pattern"),
            head_out=in_every_block(cfg, "attn.hook_z"),
            attention_out=in_every_block(cfg, "hook_attn_out"),
            exchangeable_padding=not cfg.use_local_attn,
        )

    @override
    def project_from(self, layer: int, seen: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        norm: Any = self._block(layer).ln1
        # The same cast that the norm makes between its hook and its scale, for half-precision models.
        seen = seen.to(self.model.cfg.dtype)
        if self.projection_in[layer].endswith("hook_resid_pre") or not hasattr(norm, "w"):
            return seen
        return seen * norm.w + norm.b if hasattr(norm, "b") else seen * norm.w

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
    @override
    def output_weights(self) -> tuple[Float[Tensor, "head d_head d_model"], ...]:
        return tuple(self._block(layer).attn.W_O.detach() for layer in range(self.n_layers))

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
