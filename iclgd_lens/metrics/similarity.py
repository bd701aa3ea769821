"""How alike two changes are: the paper's similarities, one number per query, layer and head.

Three runs of the same queries are compared: zero-shot (ZSL), in-context (ICL) and finetuned (FT). `h` is the attention output at
the last query token and `m` the vector of its attention scores, before softmax, to the query's own tokens.

==================  ============================================  =====================================
`sim_aou`           cos(h_ICL − h_ZSL, h_FT − h_ZSL)              Deutch et al. 2024, section 3.1
`sim_aou_norm`      the same with every h scaled to length 1      Dai et al. 2023, section 4.2
`sim_am`            cos(m_ICL, m_FT)                              Dai et al. 2023, section 4.2
`sim_am_delta`      cos(m_ICL − m_ZSL, m_FT − m_ZSL)              Deutch et al. 2024, section 3.1
`alpha`             cos(LCGD − ZSL, GD − ZSL), of h or of m       Deutch et al. 2024, Figure 2
==================  ============================================  =====================================

All are computed in float32 or better, lie in [−1, 1], and are NaN where undefined, that is where one of the two vectors is zero. A
difference that is no larger than what rounding leaves of two equal vectors counts as zero: its direction would be noise. This
happens in earnest in the first layer of rotary models, where demonstrations cannot change scores within the query.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.models.precision import wide
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.activations import Activations, require_same_runs, require_zero_shot

OUTPUT_ROUNDING, SCORE_ROUNDING = 8, 64
"""A difference of outputs or scores counts as zero up to so many units of rounding in float32 (or float64), relative to the longer
vector. Scores want more: they are sums of products that cancel. For values stored in half precision it is one unit of that, if
larger."""


def sim_aou(icl: Activations, ft: Activations, zsl: Activations) -> Float[Tensor, "query layer"]:
    """Similarity of attention output updates: cos(h_ICL − h_ZSL, h_FT − h_ZSL) (Deutch et al. 2024, section 3.1).

    Raises:
        ValueError: If the runs are not of the same queries and model, or `zsl` has a context or was made under an update.
    """
    require_same_runs(icl, ft, zsl)
    require_zero_shot(zsl=zsl)
    return cosine(difference(icl.attn_out, zsl.attn_out, OUTPUT_ROUNDING), difference(ft.attn_out, zsl.attn_out, OUTPUT_ROUNDING))


def sim_aou_norm(icl: Activations, ft: Activations, zsl: Activations) -> Float[Tensor, "query layer"]:
    """`sim_aou` with each h scaled to unit length first (Dai et al. 2023, section 4.2).

    Kept to compare with published numbers; it misleads. For two changes that share nothing, h = z + noise and h' = z + noise' of
    equal length with independent noise orthogonal to z, it tends to (1 − ‖z‖/‖h‖)/2, which is 1/4 when ‖h‖ = 2‖z‖.

    Raises:
        ValueError: If the runs are not of the same queries and model, or `zsl` has a context or was made under an update.
    """
    require_same_runs(icl, ft, zsl)
    require_zero_shot(zsl=zsl)
    stored = zsl.attn_out.dtype
    unit_icl, unit_ft, unit_zsl = (_unit(run.attn_out) for run in (icl, ft, zsl))
    return cosine(difference(unit_icl, unit_zsl, OUTPUT_ROUNDING, stored), difference(unit_ft, unit_zsl, OUTPUT_ROUNDING, stored))


def sim_am(icl: Activations, ft: Activations) -> Float[Tensor, "query layer head"]:
    """Similarity of attention maps: cos(m_ICL, m_FT) (Dai et al. 2023, section 4.2).

    Its reference is the same with the zero-shot run in the place of the finetuned one, `sim_am(icl, zsl)`: scores within the query
    are alike whatever is done, so the value itself says little.

    Raises:
        ValueError: If the runs are not of the same queries and model.
    """
    require_same_runs(icl, ft)
    return cosine(wide(icl.query_scores), wide(ft.query_scores))


def sim_am_delta(icl: Activations, ft: Activations, zsl: Activations) -> Float[Tensor, "query layer head"]:
    """Similarity of attention map updates: cos(m_ICL − m_ZSL, m_FT − m_ZSL) (Deutch et al. 2024, section 3.1).

    Raises:
        ValueError: If the runs are not of the same queries and model, or `zsl` has a context or was made under an update.
    """
    require_same_runs(icl, ft, zsl)
    require_zero_shot(zsl=zsl)
    return cosine(
        difference(icl.query_scores, zsl.query_scores, SCORE_ROUNDING),
        difference(ft.query_scores, zsl.query_scores, SCORE_ROUNDING),
    )


def alpha(
    lcgd: Activations, gd: Activations, zsl: Activations, of: Literal["attn_out", "query_scores"] = "attn_out"
) -> Float[Tensor, "query layer"] | Float[Tensor, "query layer head"]:
    """How alike LCGD's and GD's updates are: the cosine of their changes relative to ZSL (Deutch et al. 2024, Figure 2).

    Args:
        lcgd: The queries run under an LCGD update.
        gd: The same under a GD update.
        zsl: The same zero-shot.
        of: The change of attention outputs, giving `[query layer]`, or of attention scores, giving `[query layer head]`.

    Raises:
        ValueError: If `of` is something else, the runs are not of the same queries and model, or `zsl` has a context or was made
            under an update.
    """
    if of == "attn_out":
        return sim_aou(lcgd, gd, zsl)
    if of == "query_scores":
        return sim_am_delta(lcgd, gd, zsl)
    raise ValueError(f"of must be 'attn_out' or 'query_scores', got {of!r}")


def _unit(x: Float[Tensor, "*batch component"]) -> Float[Tensor, "*batch component"]:
    """Scale to length 1; a zero vector becomes NaN. Dividing by the largest entry first keeps squares in range."""
    x = wide(x)
    x = x / x.abs().amax(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


def difference(
    a: Float[Tensor, "*batch component"],
    b: Float[Tensor, "*batch component"],
    rounding: float,
    stored: torch.dtype | None = None,
) -> Float[Tensor, "*batch component"]:
    """Subtract: a − b, or zero where that is no longer than rounding explains; `stored` is the dtype that a and b come from."""
    storage = torch.finfo(stored or a.dtype).eps
    a, b = wide(a), wide(b)
    unit = max(rounding * torch.finfo(a.dtype).eps, storage)
    change = a - b
    longest = torch.maximum(a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True))
    return change.masked_fill(change.norm(dim=-1, keepdim=True) <= unit * longest, 0.0)


@without_autocast()
def cosine(a: Float[Tensor, "*#batch component"], b: Float[Tensor, "*#batch component"]) -> Float[Tensor, "*batch"]:
    """Cosine along the last axis, NaN where a vector is zero or not finite."""
    return einsum(_unit(a), _unit(b), "... component, ... component -> ...").clamp(-1.0, 1.0)
