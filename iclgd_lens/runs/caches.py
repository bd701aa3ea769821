"""Keys and values of a prompt's beginning, in the class of cache that each kind of model takes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformers.cache_utils import Cache as HuggingFaceCache
from transformers.cache_utils import DynamicCache, DynamicLayer

from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.sites import HookSites

logger = logging.getLogger(__name__)


class Cache(Protocol):
    """Keys and values of tokens that ran once."""

    def keys(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        """The keys at a layer, as attention there multiplies them."""

    def values(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        """The values at a layer, as attention there averages them."""

    def expanded(self, batch: int) -> Any:
        """A frozen view for a batch, as the model takes it; nothing is copied before attention joins them to its own."""


def run_into_cache(sites: HookSites, tokens: Int[Tensor, "pos"]) -> Cache | None:
    """Run a prompt's beginning once, and keep its keys and values; None for a model that keeps none to go on behind."""
    model = sites.model
    if not is_bridge(model):
        entries = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
        _run(sites, tokens, entries)
        return _TransformerCache(entries)
    # Without a configuration it keeps all tokens, also where layers look back a window: the rest is masked.
    found = DynamicCache()
    _run(sites, tokens, found)
    layers: list[Any] = found.layers
    if [layer.get_seq_length() for layer in layers] == [len(tokens)] * sites.n_layers:
        return _BridgeCache(layers)
    logger.warning("%s keeps no keys and values to go on behind: demonstrations run again with every query", model.cfg.architecture)
    return None


def _run(sites: HookSites, tokens: Int[Tensor, "pos"], cache: Any) -> None:
    # No hooks of its own, and none of another thread's either.
    with sites.attach([]):
        sites.run(tokens[None], torch.ones_like(tokens[None]), cache)


@dataclass(frozen=True, eq=False)
class _TransformerCache:
    """The cache of a `HookedTransformer`, `[1 pos kv_head d_head]` per layer."""

    cache: TransformerLensKeyValueCache

    def keys(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        return self.cache.entries[layer].past_keys[0]

    def values(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        return self.cache.entries[layer].past_values[0]

    def expanded(self, batch: int) -> TransformerLensKeyValueCache:
        entries: list[TransformerLensKeyValueCacheEntry] = [
            _SharedEntry(entry.past_keys.expand(batch, -1, -1, -1), entry.past_values.expand(batch, -1, -1, -1), frozen=True)
            for entry in self.cache.entries
        ]
        return TransformerLensKeyValueCache(entries, self.cache.previous_attention_mask.expand(batch, -1), frozen=True)


class _SharedEntry(TransformerLensKeyValueCacheEntry):
    """The keys and values of one layer that a whole batch shares. Joined to the batch's own they lie head by head, as attention
    multiplies them; position by position, they would be copied once more for every product.
    """

    def append(
        self, new_keys: Float[Tensor, "batch pos kv_head d_head"], new_values: Float[Tensor, "batch pos kv_head d_head"]
    ) -> tuple[Float[Tensor, "batch all_pos kv_head d_head"], Float[Tensor, "batch all_pos kv_head d_head"]]:
        return _joined(self.past_keys, new_keys), _joined(self.past_values, new_values)


def _joined(
    past: Float[Tensor, "batch past kv_head d_head"], new: Float[Tensor, "batch pos kv_head d_head"]
) -> Float[Tensor, "batch all_pos kv_head d_head"]:
    batch, n_past, heads, d_head = past.shape
    by_head = new.new_empty(batch, heads, n_past + new.shape[1], d_head)
    by_head[:, :, :n_past] = past.transpose(1, 2)
    by_head[:, :, n_past:] = new.transpose(1, 2)
    return by_head.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _BridgeCache:
    """The cache of a `TransformerBridge`, Hugging Face's, `[1 kv_head pos d_head]` per layer."""

    layers: list[Any]

    def keys(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        return rearrange(self.layers[layer].keys, "1 kv_head pos d_head -> pos kv_head d_head")

    def values(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        return rearrange(self.layers[layer].values, "1 kv_head pos d_head -> pos kv_head d_head")

    def expanded(self, batch: int) -> HuggingFaceCache:
        return HuggingFaceCache(layers=[_SharedLayer(layer, batch) for layer in self.layers])


class _SharedLayer(DynamicLayer):
    """The keys and values of one layer that a whole batch shares; what is joined to them is not kept."""

    def __init__(self, layer: Any, batch: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.past = tuple(past.expand(batch, -1, -1, -1) for past in (layer.keys, layer.values))
        self.keys, self.values = self.past

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.past
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)
