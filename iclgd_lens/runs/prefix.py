"""Prompts that share their beginning: the shared part runs once, and its keys and values are reused.

All queries of an episode come after the same tokens: BOS and the demonstrations in-context, BOS alone otherwise. A `Prefix`
holds the keys and values of those tokens, so that a batch of queries costs a forward pass over the queries' own tokens only. Which
prompts may share a beginning so is for `runs/passes.py` to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.runs.caches import Cache, run_into_cache


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt's beginning, and its keys and values.

    Attributes:
        sites: Those of the model that ran it.
        tokens: The beginning.
        cache: Its keys and values; None if prompts run whole, as they begin with nothing in common or the model cannot go on behind
            a cache.
    """

    sites: HookSites
    tokens: Int[Tensor, "pos"]
    cache: Cache | None

    @classmethod
    def run(cls, sites: HookSites, tokens: Int[Tensor, "pos"]) -> Prefix:
        """Run a prompt's beginning once."""
        tokens = tokens.to(sites.model.cfg.device)
        return cls(sites, tokens, run_into_cache(sites, tokens))

    @classmethod
    def unrun(cls, sites: HookSites, tokens: Int[Tensor, "pos"]) -> Prefix:
        """A beginning of prompts that all run whole."""
        return cls(sites, tokens.to(sites.model.cfg.device), None)

    @classmethod
    def empty(cls, sites: HookSites) -> Prefix:
        """The beginning of prompts that share nothing, or that are to be run whole."""
        return cls(sites, torch.empty(0, dtype=torch.long, device=sites.model.cfg.device), None)

    @property
    def length(self) -> int:
        """How many tokens it has."""
        return len(self.tokens)

    def keys(self, layer: int) -> Float[Tensor, "pos kv_head d_head"] | None:
        """The keys of its tokens at a layer, as attention there multiplies them; None where prompts run whole."""
        return None if self.cache is None else self.cache.keys(layer)

    def values(self, layer: int) -> Float[Tensor, "pos kv_head d_head"] | None:
        """The values of its tokens at a layer, as attention there averages them; None where prompts run whole."""
        return None if self.cache is None else self.cache.values(layer)

    def whole(self) -> Prefix:
        """The same beginning for prompts that run whole."""
        return replace(self, cache=None)

    def continue_with(self, bodies: Sequence[Int[Tensor, "_pos"]], fwd_hooks: Sequence[NamedHook]) -> None:
        """Run a batch of continuations, each padded on the left to the longest, for what the hooks see.

        Nothing is returned: what is wanted is read by hooks. At a hook, position -1 is every continuation's last token.

        Args:
            bodies: The tokens after the prefix, one sequence each.
            fwd_hooks: `(hook name, function)` pairs, run after any hooks already on the model.
        """
        device = self.tokens.device
        tokens = torch.nn.utils.rnn.pad_sequence(list(bodies), batch_first=True, padding_side="left").to(device)
        own = torch.nn.utils.rnn.pad_sequence([torch.ones_like(body) for body in bodies], batch_first=True, padding_side="left")
        before = self.tokens.expand(len(tokens), -1)
        mask = torch.cat([torch.ones_like(before), own.to(device)], dim=1)
        with self.sites.attach(fwd_hooks, first_at_projections=False):
            if self.cache is None:
                self.sites.run(torch.cat([before, tokens], dim=1), mask)
            else:
                self.sites.run(tokens, mask, self.cache.expanded(len(tokens)))
