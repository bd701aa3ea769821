"""Controls: what a similarity reads when there is nothing to find."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.models.precision import wide
from iclgd_lens.runs.activations import Activations, require_same_runs, require_zero_shot
from iclgd_lens.tensor_draws import normal, seeded


def random_update(ft: Activations, zsl: Activations, seed: int = 0) -> Activations:
    """Replace what an update did by a change in a random direction and of the same size (Dai et al. 2023, random baseline).

    Every vector of `attn_out` and `query_scores` becomes the zero-shot one plus a Gaussian vector scaled to the length of the
    change that the update made; where it made none, none is made. Put in the place of `ft` in any similarity, it shows what that
    similarity gives away for free.

    Args:
        ft: The queries run under an update.
        zsl: The same zero-shot.
        seed: Seeds the directions; drawn on the CPU in float32, so a seed means the same on every device and in every dtype.

    Raises:
        ValueError: If the runs are not of the same queries and model, `zsl` has a context or was made under an update, or the seed
            is no whole number.
        AttributeError: If `attn_out` or `query_scores` was not kept in one of the runs.
    """
    require_same_runs(ft, zsl)
    require_zero_shot(zsl=zsl)
    generator = seeded(seed)
    real = {
        "attn_out": torch.ones_like(ft.attn_out, dtype=torch.bool),
        "query_scores": ft.query_mask[:, None, None].expand_as(ft.query_scores),
    }

    def replaced(name: str) -> Float[Tensor, "*batch component"]:
        base = getattr(zsl, name)
        change = wide(ft.kept[name]) - wide(base)
        noise = normal(generator, *base.shape).to(change) * real[name]
        length = change.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
        return base + (noise * length).to(base.dtype)

    return ft.with_kept(**{name: replaced(name) for name in real})
