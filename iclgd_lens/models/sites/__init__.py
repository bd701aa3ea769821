"""Where a hooked model is read and written: the one place that knows hook names.

Everything else asks `sites_of(model)` for the name of a place, so that one implementation serves every model that has these
places. The places, for layer ℓ:

====================  ==========================================  =======================================================
`residual_in[ℓ]`      `[batch pos d_model]`                       the residual stream before block ℓ
`residual_out[ℓ]`     `[batch pos d_model]`                       the residual stream after block ℓ
`projection_in[ℓ]`    `[batch pos d_model]`                       what the key and value projections multiply
`keys[ℓ]`             `[batch pos kv_head d_head]`                output of the key projection, before any norm or rotation
`values[ℓ]`           `[batch pos kv_head d_head]`                output of the value projection
`scores[ℓ]`           `[batch head query_pos key_pos]`            attention scores before softmax, scaled and masked
`pattern[ℓ]`          `[batch head query_pos key_pos]`            attention, the softmax of the scores
`head_out[ℓ]`         `[batch pos head d_head]`                   each head's attended values, before the output projection
`attention_out[ℓ]`    `[batch pos d_model]`                       attention's output as it is added to the residual stream
====================  ==========================================  =======================================================

Scores and patterns at a prompt's last token are read by `at_scores` and `at_pattern`, since some models have no hook at scores.
"""

from __future__ import annotations

from iclgd_lens.models.hooked import HookedModel, is_bridge, is_hooked_transformer
from iclgd_lens.models.sites.base import HookSites, NamedHook
from iclgd_lens.models.sites.bridge import BridgeSites
from iclgd_lens.models.sites.hooked import TransformerSites
from iclgd_lens.models.sites.processing import warn_if_processed

__all__ = ["HookSites", "NamedHook", "sites_of", "warn_if_processed"]


def sites_of(model: HookedModel) -> HookSites:
    """Find the sites of a model.

    Raises:
        TypeError: If the model is neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: If it is one that these sites cannot serve, or it lacks a needed hook.
    """
    if is_hooked_transformer(model):
        return TransformerSites.of(model)
    if is_bridge(model):
        return BridgeSites.of(model)
    raise TypeError(
        f"need a model of transformer_lens, a HookedTransformer or a TransformerBridge, got {type(model).__name__}; load one with "
        "load_model(name), or wrap a Hugging Face model with load_model(hf_model=..., tokenizer=...)"
    )
