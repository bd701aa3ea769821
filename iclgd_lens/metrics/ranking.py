"""How alike two weightings of the same tokens are, by rank and by weight, along the last axis.

Dai et al. 2023 (section 4.2) compare the attention that in-context learning and finetuning pay to training tokens by Kendall's rank
correlation and by the recall of the heaviest tokens; Spearman's is added.

>>> import torch
>>> a, b = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([1.0, 3.0, 2.0])
>>> round(float(kendall_tau(a, b)), 3), float(spearman_rho(a, b)), float(top_k_recall(a, b, k=1))
(0.333, 0.5, 0.0)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from iclgd_lens.checks import is_whole
from iclgd_lens.metrics.similarity import cosine
from iclgd_lens.models.precision import wide
from iclgd_lens.tensor_draws import seeded, uniform


def kendall_tau(a: Float[Tensor, "*#batch token"], b: Float[Tensor, "*#batch token"]) -> Float[Tensor, "*batch"]:
    """Kendall's rank correlation τ-b (Kendall 1945), by scipy; leading axes broadcast.

    NaN where a side is constant or has an entry that is not finite.

    Raises:
        ValueError: If the two are not of the same tokens, or of fewer than two.
    """
    rows_a, rows_b = _rows(a, b)
    # The p-value that scipy finds beside it is not used; asymptotic, it costs least, but for two tokens it divides by zero.
    method: Literal["asymptotic", "exact"] = "asymptotic" if rows_a.shape[-1] > 2 else "exact"
    pairs = zip(_flat(rows_a), _flat(rows_b), strict=True)
    found = [float(stats.kendalltau(x, y, method=method).statistic) for x, y in pairs]
    return torch.tensor(found, dtype=rows_a.dtype, device=rows_a.device).view(rows_a.shape[:-1])


def spearman_rho(a: Float[Tensor, "*#batch token"], b: Float[Tensor, "*#batch token"]) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation (Spearman 1904): Pearson's of the ranks, ties sharing their mean; leading axes broadcast.

    NaN where a side is constant or has an entry that is not finite.

    Raises:
        ValueError: As `kendall_tau`.
    """
    rows = _rows(a, b)
    ranks = [torch.from_numpy(stats.rankdata(_flat(x), axis=-1, nan_policy="propagate")).view(x.shape) for x in rows]
    return cosine(*(x - x.mean(dim=-1, keepdim=True) for x in ranks)).to(rows[0])


def weight_cosine(a: Float[Tensor, "*#batch token"], b: Float[Tensor, "*#batch token"]) -> Float[Tensor, "*batch"]:
    """The cosine of two weightings, in float32 or better; leading axes broadcast. Weights that are not negative have a high one for
    free.

    NaN where a side is zero or has an entry that is not finite.

    Raises:
        ValueError: As `kendall_tau`.
    """
    return cosine(*_rows(a, b))


def top_k_recall(a: Float[Tensor, "*#batch token"], b: Float[Tensor, "*#batch token"], k: int) -> Float[Tensor, "*batch"]:
    """The share of the k heaviest tokens of `a` that are among the k heaviest of `b` (Dai et al. 2023, the authors' code).

    Tokens tied for the last places share them, so that recall is its mean over all ways to break ties; by chance it is k/n.
    NaN where an entry is not finite.

    Raises:
        ValueError: As `kendall_tau`, or if k is not between 1 and the number of tokens.
    """
    rows_a, rows_b = _rows(a, b)
    if not is_whole(k) or not 1 <= k <= rows_a.shape[-1]:
        raise ValueError(f"k must be between 1 and the number of tokens, {rows_a.shape[-1]}; got {k}")
    return (_among_heaviest(rows_a, k) * _among_heaviest(rows_b, k)).sum(dim=-1) / k


def shuffled_weights(weights: Float[Tensor, "*batch token"], seed: int = 0) -> Float[Tensor, "*batch token"]:
    """Deal every row's weights out anew among its tokens: the random baseline of the measures here.

    Args:
        weights: The weights.
        seed: Seeds the dealing; drawn on the CPU in float32, so a seed means the same on every device and in every dtype.

    Raises:
        ValueError: If there are fewer than two tokens, or the seed is no whole number.
    """
    if _length(weights) < 2:
        raise ValueError(f"need two tokens or more to deal weights out among; got {_length(weights)}")
    order = uniform(seeded(seed), *weights.shape).argsort(dim=-1)
    return weights.gather(-1, order.to(weights.device))


def _rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if _length(a) != _length(b) or _length(a) < 2:
        raise ValueError(f"need two weightings of the same tokens, two or more; got {_length(a)} and {_length(b)}")
    x, y = torch.broadcast_tensors(wide(a), wide(b))
    broken = ~(x.isfinite() & y.isfinite()).all(dim=-1, keepdim=True)
    return x.masked_fill(broken, torch.nan), y.masked_fill(broken, torch.nan)


def _length(weights: Tensor) -> int:
    """How many tokens are weighed; one by a single number."""
    return weights.shape[-1] if weights.ndim else 1


def _flat(rows: Float[Tensor, "*batch token"]) -> np.ndarray:
    return rows.detach().reshape(-1, rows.shape[-1]).cpu().double().numpy()


def _among_heaviest(rows: Float[Tensor, "*batch token"], k: int) -> Float[Tensor, "*batch token"]:
    """1 for tokens above the k-th weight, and for those that equal it a share of the places that are left."""
    threshold = rows.topk(k, dim=-1).values[..., -1:]
    above, tied = (rows > threshold).to(rows), (rows == threshold).to(rows)
    return above + tied * (k - above.sum(dim=-1, keepdim=True)) / tied.sum(dim=-1, keepdim=True)
