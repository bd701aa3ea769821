"""Prompts that share their beginning: the shared part runs once, and its keys and values are reused.

All queries of an episode stand behind the same tokens: BOS and the demonstrations in-context, BOS alone otherwise. A `Prefix`
holds the keys and values of those tokens, so that a batch of queries costs a forward pass over the queries' own tokens only.
Hooks on the model fire in both runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from iclgd_lens.models.sites import NamedHook


@dataclass(frozen=True, eq=False)
class Prefix:
    """The keys and values of a prompt's beginning.

    Attributes:
        model: The model that ran it.
        length: How many tokens it has.
        cache: Its keys and values, `[1 pos kv_head d_head]` per layer; None for a prefix of no tokens.
    """

    model: HookedTransformer
    length: int
    cache: TransformerLensKeyValueCache | None

    @classmethod
    def run(cls, model: HookedTransformer, tokens: Int[Tensor, "pos"]) -> Prefix:
        """Run a prompt's beginning once."""
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, 1)
        batch = tokens[None].to(model.cfg.device)
        model(batch, attention_mask=torch.ones_like(batch), past_kv_cache=cache, return_type=None)
        return cls(model, len(tokens), cache)

    @classmethod
    def empty(cls, model: HookedTransformer) -> Prefix:
        """The beginning of prompts that share nothing, or that are to be run whole."""
        return cls(model, 0, None)

    def values(self, layer: int) -> Float[Tensor, "pos kv_head d_head"]:
        """The values of the prefix's tokens at a layer, as attention there averages them."""
        assert self.cache is not None, "a prefix of no tokens has no values"
        return self.cache.entries[layer].past_values[0]

    def continue_with(self, bodies: Sequence[Int[Tensor, "pos"]], fwd_hooks: Sequence[NamedHook]) -> None:
        """Run a batch of continuations, each padded on the left to the longest, for what the hooks see.

        Nothing is returned: what is wanted is read by hooks. At a hook, position -1 is every continuation's last token.

        Args:
            bodies: The tokens after the prefix, one sequence each.
            fwd_hooks: `(hook name, function)` pairs, run after any hooks already on the model.
        """
        device = self.model.cfg.device
        tokens = torch.nn.utils.rnn.pad_sequence(list(bodies), batch_first=True, padding_side="left").to(device)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(body) for body in bodies], batch_first=True, padding_side="left"
        ).to(device)
        self.model.run_with_hooks(
            tokens,
            attention_mask=mask,
            past_kv_cache=self._expanded(len(tokens)),
            return_type=None,
            fwd_hooks=[*fwd_hooks],
        )

    def _expanded(self, batch: int) -> TransformerLensKeyValueCache | None:
        """A frozen view of the cache for a batch; no key or value is copied before attention joins them to its own."""
        if self.cache is None:
            return None
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
