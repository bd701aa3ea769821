"""Attention as a kernel smoother, and what demonstrations change in it.

Softmax attention at a query is `Σᵢ κ(q, kᵢ) vᵢ / Σᵢ κ(q, kᵢ)` with `κ(q, k) = exp(q·k / √d_head)`, a Nadaraya–Watson smoother of
the values (Tsai et al. 2019, section 2.2; Nadaraya 1964, Watson 1964). Over a prompt of demonstrations and a query it is a mixture,
exactly (He et al. 2022, section 3.1):

    attention = (1 − λ) · o_query + λ · o_demo

where λ is the attention mass on the demonstrations, `o_demo` the smoother over their tokens and `o_query` the one over the query's
(BOS among them). So the change against the zero-shot output `o_zsl` has two terms, and no other:

    o_icl − o_zsl = λ (o_demo − o_zsl)  +  (1 − λ) (o_query − o_zsl)
                    smoothing              drift

*Smoothing* brings the demonstrations' values in; *drift* is what demonstrations, through the layers below, changed in the query's
own attention and values.

>>> import torch
>>> nadaraya_watson(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0], [0.0]])).tolist()
[[0.75]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float, Num
from torch import Tensor

from iclgd_lens.checks import require_finite
from iclgd_lens.metrics.similarity import SCORE_ROUNDING, cosine, difference
from iclgd_lens.models.precision import wide
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.activations import Activations, require_not_updated, require_same_runs, require_zero_shot


@without_autocast()
def nadaraya_watson(
    kernel: Num[Tensor, "*batch query point"], values: Num[Tensor, "point value"]
) -> Float[Tensor, "*batch query value"]:
    """Average values with the weights that a kernel gives: `Σᵢ κ(q, xᵢ) yᵢ / Σᵢ κ(q, xᵢ)` (Nadaraya 1964; Watson 1964).

    Args:
        kernel: κ of every query with every point. With weights that are not negative, as attention's are, the estimate is an
            average; others, as of a linear kernel, may carry it outside the range of the values.
        values: What is smoothed, one vector per point, such as one-hot labels.

    Returns:
        The estimates; NaN for a query whose weights sum to nothing above zero, since dividing by a negative sum would turn the
        order of the points round.

    Raises:
        ValueError: If the kernel or the values are not finite, or they are not of the same points.
    """
    require_kernel(kernel, len(values))
    require_finite("values", values)
    kernel = kernel if kernel.is_floating_point() else kernel.to(values.dtype if values.is_floating_point() else torch.float32)
    total = kernel.sum(dim=-1, keepdim=True)
    weights = kernel / total.masked_fill(total <= 0, torch.nan)
    return einsum(weights, values.to(weights.dtype), "... query point, point value -> ... query value")


def require_kernel(kernel: Num[Tensor, "*batch query point"], n_points: int, name: str = "kernel") -> None:
    """Check that a kernel matrix can be used with so many points.

    Raises:
        ValueError: If it has fewer than two axes, its last axis is not of that length, there are no points, or an entry is not
            finite.
    """
    if kernel.ndim < 2 or kernel.shape[-1] != n_points or not n_points:
        raise ValueError(
            f"{name} must have the shape [..., query, point] with {n_points or 'one or more'} points; got {list(kernel.shape)}"
        )
    require_finite(name, kernel)


@dataclass(frozen=True, eq=False)
class Term:
    """One term of the change that demonstrations make, in the residual basis.

    Attributes:
        norm: ℓ2 length of the term.
        cosine: Its cosine with the change; NaN where either is zero.
        share: Its share of the change, `⟨term, change⟩ / ‖change‖²`; the shares of the two terms sum to 1. Negative where a term
            points away from the change, NaN where there is no change.
    """

    norm: Float[Tensor, "*batch"]
    cosine: Float[Tensor, "*batch"]
    share: Float[Tensor, "*batch"]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The change that demonstrations make to attention, split into smoothing and drift.

    Attributes:
        mass: `[query layer head]`: λ, the attention mass on the demonstrations.
        delta_norm: `[query layer]`: length of the change, summed over heads.
        smoothing: `[query layer]`: the term λ(o_demo − o_zsl), summed over heads.
        drift: `[query layer]`: the term (1−λ)(o_query − o_zsl), summed over heads.
        head_delta_norm: `[query layer head]`: length of each head's change.
        head_smoothing: `[query layer head]`: each head's smoothing, against that head's change.
        head_drift: `[query layer head]`: each head's drift, likewise.
    """

    mass: Float[Tensor, "query layer head"]
    delta_norm: Float[Tensor, "query layer"]
    smoothing: Term
    drift: Term
    head_delta_norm: Float[Tensor, "query layer head"]
    head_smoothing: Term
    head_drift: Term


@without_autocast()
def decompose(icl: Activations, zsl: Activations) -> Decomposition:
    """Split the in-context change of attention into smoothing and drift (module docstring).

    Terms are carried through `W_O`, before any norm that a model has behind it. Held at a time are three times `query × head ×
    d_model` numbers, for one layer; returned are numbers per query, layer and head.

    Args:
        icl: The queries in-context, captured with `keep=["head_out", "demonstration_out", "demonstration_attention"]`.
        zsl: The same zero-shot, captured with `keep=["head_out"]`.

    Raises:
        ValueError: If the runs are not of the same queries and model, one was made under an update, or `zsl` has a context.
        AttributeError: If they lack what is needed.
    """
    require_same_runs(icl, zsl)
    require_not_updated(icl=icl)
    require_zero_shot(zsl=zsl)
    mass = icl.demonstration_attention.sum(dim=-1)
    base, smoothed = wide(zsl.head_out), wide(icl.demonstration_out) - mass[..., None] * wide(zsl.head_out)
    changed = difference(icl.head_out, base, SCORE_ROUNDING, stored=icl.W_O[0].dtype)
    by_head, summed = [], []
    for layer, output in enumerate(icl.W_O):
        # Per head first; the sum over heads is what the layer adds to the residual stream.
        delta, smoothing = (
            einsum(x[:, layer], wide(output), "query head d_head, head d_head d_model -> query head d_model")
            for x in (changed, smoothed)
        )
        by_head.append(_terms(delta, smoothing))
        summed.append(_terms(delta.sum(dim=1), smoothing.sum(dim=1)))
    head_norm, head_smoothing, head_drift = _stacked(by_head)
    norm, smoothing_term, drift_term = _stacked(summed)
    return Decomposition(mass, norm, smoothing_term, drift_term, head_norm, head_smoothing, head_drift)


def _terms(delta: Float[Tensor, "*batch d_model"], smoothing: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Term, Term]:
    norm = delta.norm(dim=-1)

    def term(x: Float[Tensor, "*batch d_model"]) -> Term:
        along = einsum(x, delta, "... d_model, ... d_model -> ...")
        return Term(x.norm(dim=-1), cosine(x, delta), along / norm.square().masked_fill(norm == 0, torch.nan))

    return norm, term(smoothing), term(delta - smoothing)


def _stacked(layers: list[tuple[Tensor, Term, Term]]) -> tuple[Tensor, Term, Term]:
    def stacked(terms: list[Term]) -> Term:
        return Term(*(torch.stack([getattr(term, name) for term in terms], dim=1) for name in ("norm", "cosine", "share")))

    norms, smoothing, drift = zip(*layers, strict=True)
    return torch.stack(norms, dim=1), stacked(list(smoothing)), stacked(list(drift))
