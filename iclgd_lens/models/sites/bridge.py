"""The places of a `TransformerBridge`, alike in all architectures.

A bridge has hooks at the projections themselves: `attn.k.hook_in` is what they multiply, `attn.k.hook_out` what the key projection
puts out, before any norm or rotation. Where Hugging Face's own attention runs (GPT-Neo, OPT), it gives its pattern away only after
it has run, and no scores; there, scores are made again of queries and keys.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components.joint_qkv_attention import JointQKVAttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import PositionEmbeddingsAttentionBridge
from typing_extensions import override

from iclgd_lens.models.after_attention import AfterAttention
from iclgd_lens.models.hooked import HookedModel, require_in_one_place
from iclgd_lens.models.lengths import rope_switches, text_config, windows
from iclgd_lens.models.linear_maps import linear_map
from iclgd_lens.models.sites.base import (
    HookSites,
    Keys,
    LastQuery,
    NamedHook,
    in_every_block,
    refuse_hidden_hooks,
    refuse_split_inputs,
)
from iclgd_lens.models.touched import is_of_a_library

_SCORES_BEFORE_SOFTMAX = (JointQKVAttentionBridge, PositionEmbeddingsAttentionBridge)
"""Attention bridges that run attention step by step, with a hook at its scores; so do those derived from them."""

_PLAIN_ATTENTION = ("GPTNeoForCausalLM", "OPTForCausalLM")
"""Architectures whose scores are queries times keys, scaled, without rotation, and can be made again."""

_CACHE_NAMES = {"past_key_values", "layer_past"}
"""What bridges' attention looks for a cache under."""

_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "mup_width_scale")
"""What configurations call a factor between the unembedding and the logits."""


@dataclass(frozen=True, eq=False)
class BridgeSites(HookSites):
    """The hook names of a `TransformerBridge`, in compatibility mode or not."""

    @classmethod
    def of(cls, model: HookedModel) -> BridgeSites:
        """Find the sites of a model.

        Raises:
            ValueError: If it is one that these sites cannot serve, or it lacks a needed hook.
        """
        require_in_one_place(model.named_parameters())
        _refuse_unsupported(model)
        blocks: Any = cast(Any, model).blocks
        ends = {f"blocks.{layer}": (block, f"blocks.{layer}.hook_out") for layer, block in enumerate(blocks)}
        ends |= {f"blocks.{layer}.attn": (block.attn, f"blocks.{layer}.attn.hook_out") for layer, block in enumerate(blocks)}
        refuse_hidden_hooks(ends)
        return cls(
            model=model,
            residual_in=in_every_block(model.cfg, "hook_in"),
            residual_out=in_every_block(model.cfg, "hook_out"),
            projection_in=in_every_block(model.cfg, "attn.k.hook_in"),
            keys=in_every_block(model.cfg, "attn.k.hook_out"),
            values=in_every_block(model.cfg, "attn.v.hook_out"),
            scores=in_every_block(model.cfg, "attn.hook_attn_scores"),
            pattern=in_every_block(model.cfg, "attn.hook_pattern"),
            head_out=in_every_block(model.cfg, "attn.o.hook_in"),
            attention_out=in_every_block(model.cfg, "hook_attn_out"),
            window=min(windows(_hf_config(model)), default=math.inf),
            rope_switches=rope_switches(_hf_config(model)),
        )

    @override
    def project_queries(self, layer: int, inputs: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch head d_head"]:
        queries: Tensor = self._attention(layer).q.original_component(inputs)
        heads, width = self.model.cfg.n_heads, queries.shape[-1]
        if queries.ndim > inputs.ndim:
            return queries
        if width != heads * self.model.cfg.d_head:
            raise ValueError(
                f"the query projection of layer {layer} puts out {width} numbers, not {heads} heads of {self.model.cfg.d_head}: "
                "what else it makes, such as a gate, is not told apart from attention queries"
            )
        return rearrange(queries, "... (head d_head) -> ... head d_head", head=heads)

    @override
    def after_attention(self, layer: int) -> AfterAttention | None:
        return None

    @override
    def output_weight(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        cfg = self.model.cfg
        output = self._attention(layer).o.original_component
        what = f"the output projection of layer {layer}"
        weight, _ = linear_map(output, cfg.n_heads * cfg.d_head, cfg.dtype, what)
        return rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=cfg.n_heads)

    @override
    def require_trainable(self) -> None:
        super().require_trainable()
        for layer in range(self.n_layers):
            for name in "kv":
                projection = getattr(self._attention(layer), name).original_component
                if any(not is_of_a_library(hook) for hook in projection._forward_hooks.values()):
                    raise ValueError(
                        f"a torch hook on the {name.upper()} projection of layer {layer} edits its output before the hook point "
                        f"there, so the gradient of its weight cannot be read; put it at blocks.{layer}.attn.{name}.hook_out "
                        f"instead"
                    )

    @override
    def require_separate_heads(self) -> None:
        config, name = text_config(_hf_config(self.model)), _architecture(self.model)
        if (clip := getattr(config, "clip_qkv", None)) is not None:
            raise ValueError(f"{name} clips keys and values (clip_qkv={clip}); attribution is not supported for it")
        norm = getattr(self._attention(0), "k_norm", None)
        if norm is not None and norm.original_component.weight.numel() != self.model.cfg.d_head:
            raise ValueError(
                f"{name} normalises the keys of all heads together, so a head's scores depend on the others' keys; attribution to "
                "single heads is not defined for it"
            )

    @override
    def run(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch all_pos"], past: Any = None) -> None:
        with self._handing_over(past), self._fresh_rotary():
            cache = {} if past is None else {self._cache_name: past}
            self.model(tokens, attention_mask=mask, use_cache=past is not None, return_type=None, **cache, **self._one_logit)

    @override
    def at_scores(self, layer: int, keys: Keys, do: LastQuery) -> list[NamedHook]:
        return self._made_again(layer, keys, do) if self._runs_native else super().at_scores(layer, keys, do)

    @override
    def at_pattern(self, layer: int, keys: Keys, do: LastQuery) -> list[NamedHook]:
        if not self._runs_native:
            return super().at_pattern(layer, keys, do)
        return self._made_again(layer, keys, lambda scores: do(scores.softmax(dim=-1)))

    def _made_again(self, layer: int, keys: Keys, do: LastQuery) -> list[NamedHook]:
        """Scores `⟨q, kᵢ⟩ · scale` at the last token, as soon as the model's own keys are there."""
        config = text_config(_hf_config(self.model))
        scale = 1.0 if _architecture(self.model) == "GPTNeoForCausalLM" else 1 / math.sqrt(self.model.cfg.d_head)
        local = getattr(config, "attention_layers", ())[layer : layer + 1] == ["local"]
        queries: list[Float[Tensor, "batch head d_head"]] = []

        def remember(seen: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            queries[:] = [scale * seen[:, -1]]

        def multiply(own: Float[Tensor, "batch pos head d_head"], hook: Any) -> None:
            query = queries.pop()
            scores = einsum(query, own, "batch head d_head, batch pos head d_head -> batch head pos")
            scores = scores.masked_fill(~keys.own[:, None], -torch.inf)
            if keys.before is not None:
                before = einsum(query, keys.before, "batch head d_head, pos head d_head -> batch head pos")
                scores = torch.cat([before, scores], dim=-1)
            if local:
                far = torch.arange(scores.shape[-1], device=scores.device) < scores.shape[-1] - config.window_size
                scores = scores.masked_fill(far, -torch.inf)
            do(scores)

        return [(f"blocks.{layer}.attn.q.hook_out", remember), (self.keys[layer], multiply)]

    @contextmanager
    def _handing_over(self, past: Any) -> Iterator[None]:
        """Newer Hugging Face models hand their cache to attention under another name than bridges look for it there, which would
        then run without.
        """

        def hand_over(attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs if _CACHE_NAMES & kwargs.keys() else {**kwargs, "past_key_values": past}

        with ExitStack() as stack:
            if past is not None and not self._runs_native:
                for layer in range(self.n_layers):
                    stack.enter_context(self._attention(layer).register_forward_pre_hook(hand_over, with_kwargs=True))
            yield

    @contextmanager
    def _fresh_rotary(self) -> Iterator[None]:
        """Rotary frequencies that depend on how long a pass is are kept from one pass to the next. Here every pass begins with
        those of a model that has run nothing, and afterwards they are as they were.
        """
        if not self.rope_switches:
            yield
            return
        model: Any = self.model
        kept: list[tuple[Any, dict[str, Any], dict[str, Tensor]]] = []
        for module in model.original_model.modules():
            if not any(name.endswith("max_seq_len_cached") for name in vars(module)):
                continue
            state = {
                name: value for name, value in vars(module).items() if name.endswith(("max_seq_len_cached", "attention_scaling"))
            }
            frequencies = {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
            kept.append((module, state, frequencies))
            for name in state:
                if name.endswith("max_seq_len_cached"):
                    setattr(module, name, module.original_max_seq_len)
            for name in frequencies:
                if name.endswith("inv_freq") and "original" not in name:
                    original = getattr(module, f"{name.removesuffix('inv_freq')}original_inv_freq")
                    module._buffers[name] = original.clone().to(frequencies[name].device)
        try:
            yield
        finally:
            for module, state, frequencies in kept:
                for name, value in state.items():
                    setattr(module, name, value)
                module._buffers.update(frequencies)

    def _attention(self, layer: int) -> Any:
        model: Any = self.model
        return model.blocks[layer].attn

    @cached_property
    def _runs_native(self) -> bool:
        """Whether Hugging Face's own attention runs, which shows no scores."""
        return not isinstance(self._attention(0), _SCORES_BEFORE_SOFTMAX)

    @cached_property
    def _one_logit(self) -> dict[str, int]:
        """Nobody sees the logits, so they are made for one token, where the model can be told so."""
        return {"logits_to_keep": 1} if "logits_to_keep" in self._accepted else {}

    @cached_property
    def _cache_name(self) -> str:
        return "cache" if "cache" in self._accepted else "past_key_values"

    @cached_property
    def _accepted(self) -> Mapping[str, inspect.Parameter]:
        model: Any = self.model
        return inspect.signature(model.original_model.forward).parameters


def _hf_config(model: Any) -> Any:
    return model.original_model.config


def _architecture(model: Any) -> str:
    return str(model.cfg.architecture)


def _refuse_unsupported(model: Any) -> None:
    config, name = _hf_config(model), _architecture(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder–decoder: in-context learning is read in one stream of causal attention")
    # TransformerLens 3 takes BERT's attention for causal.
    causal = model.adapter.supports_causal_loss and model.cfg.attention_dir == "causal" and not name.endswith("ForMaskedLM")
    if not causal:
        raise ValueError(f"in-context learning is read at a prompt's end and needs causal attention, which {name} has not")
    blocks = getattr(model, "blocks", None)
    if blocks is None or len(blocks) != model.cfg.n_layers:
        raise ValueError(f"{name} is not one stack of blocks; such models are not supported")
    for layer, block in enumerate(blocks):
        if not hasattr(block, "attn"):
            raise ValueError(
                f"block {layer} of {name} has no attention, but a state-space or other recurrent layer, which has no keys and "
                "values to train"
            )
        _refuse_attention(block.attn, layer, model)
    if any(getattr(getattr(model, part, None), "original_component", None) is None for part in ("ln_final", "unembed")):
        raise ValueError(f"{name} with this configuration has no final norm before its unembedding; such models are not supported")
    text = text_config(config)
    if scaled := [each for each in _LOGIT_SCALES if getattr(text, each, None) not in (None, 1, 1.0)]:
        raise ValueError(f"{name} scales its logits ({scaled[0]}={getattr(text, scaled[0])}), which the readout does not do")
    if (attention := config._attn_implementation) not in (None, "eager"):
        raise ValueError(
            f"the model runs {attention!r} attention, which shows no scores; load it with attn_implementation='eager', or call "
            "set_attn_implementation('eager') on the Hugging Face model"
        )
    if model.original_model.training:
        raise ValueError("the model is in training mode, where dropout changes every run; call model.eval() first")
    refuse_split_inputs(model.cfg)


def _refuse_attention(attention: Any, layer: int, model: Any) -> None:
    config, name, kind = _hf_config(model), _architecture(model), type(attention).__name__
    if "MLA" in kind:
        raise ValueError(
            f"{name} has latent attention (MLA), whose keys and values come out of a shared compression: it has no key and value "
            "projections of the residual stream to train"
        )
    if missing := [each for each in "qkvo" if not hasattr(getattr(attention, each, None), "hook_out")]:
        raise ValueError(f"attention in block {layer} of {name} ({kind}) has no projection {missing[0]!r} of its own to hook")
    if model.cfg.positional_embedding_type == "alibi" or "ALiBi" in kind or getattr(text_config(config), "alibi", False):
        raise ValueError(
            f"{name} adds ALiBi to its attention scores, which depends on where a prompt begins: scores of runs with and without "
            "demonstrations cannot be compared"
        )
    plain = name in _PLAIN_ATTENTION
    if not plain and not isinstance(attention, _SCORES_BEFORE_SOFTMAX):
        raise ValueError(f"the bridge for {name} ({kind}) shows no attention scores before softmax, which similarities are made of")
