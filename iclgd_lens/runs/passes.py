"""Which prompts run together, and which of them run after the cached beginning: only where nobody can tell.

A prompt's results are those of the prompt alone, run whole. Prompts share a pass, or a cached beginning, only where that changes
nothing:

- Code of a user's on the model (`models/touched.py`) may treat positions and prompts differently. Then every prompt runs whole and
  by itself, in the order given, so that the code sees what `model.run_with_hooks(prompt)` would show it.
- Where a layer looks back a window, padding between a prompt's parts would move tokens out of it. Prompts longer than the window
  share a pass only with others of their length.
- Where rotary frequencies depend on the length of a pass, a prompt goes on after a cached beginning only if that ran with the same
  frequencies, and shares a pass only with prompts that have the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from iclgd_lens.models.sites import HookSites

WORKING_BYTES, WORKING_BYTES_ON_CPU = 2**30, 64 * 2**20
"""About what a layer may hold for a batch of automatic size. On processors larger batches are slower, as they overflow the caches:
64 queries after 900 tokens took GPT-2-small 0.75 times as long in batches of 8 as in batches of 32.
"""


@dataclass(frozen=True, eq=False)
class Pass:
    """Prompts that run together.

    Attributes:
        rows: `[batch]`: which of the prompts.
        whole: Whether they run whole, and not after the cached beginning.
    """

    rows: Int[Tensor, "batch"]
    whole: bool


def passes(
    sites: HookSites,
    own: Sequence[int],
    n_before: int = 0,
    *,
    cached: bool = False,
    n_after: int = 0,
    batch_size: int | None = None,
) -> Iterator[Pass]:
    """Split prompts into passes.

    Args:
        sites: The model's.
        own: How many tokens each prompt has of its own.
        n_before: How many tokens the prompts begin with in common.
        cached: Whether keys and values of these are there to go on after.
        n_after: How many tokens a further pass may add to each prompt.
        batch_size: How many prompts run at once at most; by default so many that a layer holds about `WORKING_BYTES` for them.
    """
    if sites.what_tells_prompts_apart():
        yield from (Pass(torch.tensor([row]), whole=True) for row in range(len(own)))
        return
    groups: dict[tuple[bool, tuple[int, ...], int], list[int]] = {}
    for row in sorted(range(len(own)), key=own.__getitem__):
        length = n_before + own[row]
        frequencies = sites.frequencies_at(length)
        shares = cached and frequencies == sites.frequencies_at(n_before)
        # Padding stands between what is common and what is a prompt's own; without anything in common, in front.
        padded = (shares or n_before == 0) and length + n_after <= sites.window
        groups.setdefault((shares, frequencies, 0 if padded else length), []).append(row)
    for (shares, _, _), rows in groups.items():
        longest = own[rows[-1]]
        size = batch_size or (
            fitting_batch_size(sites, longest, n_before) if shares else fitting_batch_size(sites, n_before + longest, 0)
        )
        for start in range(0, len(rows), size):
            yield Pass(torch.tensor(rows[start : start + size]), whole=not shares)


def fitting_batch_size(sites: HookSites, n_own: int, n_before: int) -> int:
    """How many prompts to run at once, so that a layer holds about `WORKING_BYTES` for them."""
    cfg = sites.model.cfg
    # Keys and values joined to those in front, scores on their way to a pattern, hidden units, and logits.
    attention = (n_before + n_own) * (2 * sites.n_kv_heads * cfg.d_head + 3 * cfg.n_heads * n_own)
    rest = 4 * n_own * (cfg.d_mlp or 0) + 2 * cfg.d_vocab
    budget = WORKING_BYTES_ON_CPU if str(cfg.device) == "cpu" else WORKING_BYTES
    return int(max(1, budget // ((attention + rest) * cfg.dtype.itemsize)))
