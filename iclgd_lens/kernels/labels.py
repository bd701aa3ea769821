"""In-context learning as kernel regression of labels.

The prediction is `ŷ(q) = Σᵢ yᵢ κ(q, i) / Σᵢ κ(q, i)` over the demonstrations' labels, with attention as the kernel (Han et al.
2025, arXiv 2305.12766), or with a kernel of hidden states beside it.

>>> import torch
>>> label_regression(torch.tensor([[0.6, 0.2, 0.2]]), torch.tensor([1, 0, 0]), n_labels=2).tolist()
[[0.4000000059604645, 0.6000000238418579]]
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from iclgd_lens.checks import require_count, require_finite, require_one_of, require_positive
from iclgd_lens.kernels.smoother import nadaraya_watson, require_kernel
from iclgd_lens.metrics.similarity import cosine
from iclgd_lens.models.precision import wide
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.tensor_draws import seeded

HiddenKernel = Literal["linear", "cosine", "rbf"]


def one_hot_labels(labels: Int[Tensor, "demonstration"], n_labels: int) -> Float[Tensor, "demonstration label"]:
    """Write labels as rows of 0 and 1.

    Raises:
        ValueError: If a label is not one of 0 to `n_labels - 1`, or there are no classes.
    """
    require_count("n_labels", n_labels)
    _require_indices("labels", labels)
    if bool(((labels < 0) | (labels >= n_labels)).any()):
        raise ValueError(f"labels must be class indices from 0 to {n_labels - 1}; got {labels.tolist()}")
    return torch.nn.functional.one_hot(labels.long(), n_labels).float()


def _require_indices(name: str, labels: Tensor) -> None:
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name} must be class indices, one row of whole numbers; got {labels.dtype} of the shape {list(labels.shape)}"
        )


def label_regression(
    kernel: Float[Tensor, "*batch query demonstration"], labels: Int[Tensor, "demonstration"], n_labels: int
) -> Float[Tensor, "*batch query label"]:
    """Regress the label on the demonstrations' labels, with a kernel (Han et al. 2025; Nadaraya 1964, Watson 1964).

    Args:
        kernel: κ of every query with every demonstration, such as `Activations.demonstration_attention` or `label_attention`.
        labels: The demonstrations' class indices.
        n_labels: How many classes there are.

    Returns:
        For a kernel that is not negative, probabilities; NaN for a query whose weights sum to nothing above zero.

    Raises:
        ValueError: If a label is out of range, there are no demonstrations or classes, or the kernel is not finite or does not fit.
    """
    return nadaraya_watson(wide(kernel), one_hot_labels(labels, n_labels))


def label_kernel(
    queries: Int[Tensor, "query"], demonstrations: Int[Tensor, "demonstration"]
) -> Float[Tensor, "query demonstration"]:
    """The kernel that knows the answer: 1 where labels are equal.

    Raises:
        ValueError: If a label is unknown, that is negative, or no whole number.
    """
    for name, labels in (("queries", queries), ("demonstrations", demonstrations)):
        _require_indices(f"labels of {name}", labels)
        if bool((labels < 0).any()):
            unknown = int((labels < 0).nonzero()[0, 0])
            raise ValueError(f"labels of {name} must be known; number {unknown} is {int(labels[unknown])}")
    return (queries[:, None] == demonstrations[None]).float()


@without_autocast()
def hidden_kernel(
    queries: Float[Tensor, "*#batch query d_model"],
    points: Float[Tensor, "*#batch point d_model"],
    kind: HiddenKernel,
    bandwidth: float | None = None,
) -> Float[Tensor, "*batch query point"]:
    """A kernel of hidden states: `"linear"`, ⟨a, b⟩; `"cosine"`; or `"rbf"`, exp(−‖a − b‖² / (2 bandwidth²)).

    Args:
        queries: Hidden states.
        points: Those of the demonstrations.
        kind: Which kernel. The linear and the cosine kernel may be negative.
        bandwidth: Of the RBF kernel; by default `median_bandwidth(points)`.

    Returns:
        The kernel, in float32 or better; the cosine is NaN where a state is zero.

    Raises:
        ValueError: If `kind` is unknown, the bandwidth is not above 0 or belongs to another kernel, or an entry is not finite.
    """
    require_one_of("kind", kind, get_args(HiddenKernel))
    if bandwidth is not None and (not isinstance(bandwidth, Real) or isinstance(bandwidth, bool)):
        raise ValueError(f"bandwidth must be a number, got {bandwidth!r}")
    if bandwidth is not None and kind != "rbf":
        raise ValueError(f"only the 'rbf' kernel has a bandwidth; got bandwidth={bandwidth!r} with {kind!r}")
    if queries.shape[-1] != points.shape[-1]:
        raise ValueError(f"queries are {queries.shape[-1]} wide and points {points.shape[-1]}; they must be states of one model")
    queries, points = wide(queries), wide(points)
    for name, states in (("queries", queries), ("points", points)):
        require_finite(name, states)
    if kind == "linear":
        return einsum(queries, points, "... query d_model, ... point d_model -> ... query point")
    if kind == "cosine":
        return cosine(queries[..., :, None, :], points[..., None, :, :])
    width = median_bandwidth(points) if bandwidth is None else torch.tensor(bandwidth, dtype=points.dtype, device=points.device)
    if not bool(((width > 0) & width.isfinite()).all()):
        found = f"bandwidth={bandwidth!r}" if bandwidth is not None else "the median distance between the points is 0"
        raise ValueError(f"the bandwidth must be a finite number above 0; {found}")
    # Scaled before it is squared: the square of a small bandwidth is 0 in float32.
    return torch.exp(-(_distances(queries, points) / width[..., None, None]).square() / 2)


@without_autocast()
def median_bandwidth(points: Float[Tensor, "*batch point d_model"]) -> Float[Tensor, "*batch"]:
    """The median of the distances between different points (the median heuristic, Garreau et al. 2017).

    Raises:
        ValueError: If there are fewer than two points, or an entry is not finite.
    """
    n = points.shape[-2]
    if n < 2:
        raise ValueError(f"the median distance between points needs two of them, got {n}; give a bandwidth")
    require_finite("points", points)
    above = torch.ones(n, n, dtype=torch.bool, device=points.device).triu(1)
    ordered = _distances(wide(points), wide(points))[..., above].sort(dim=-1).values
    count = ordered.shape[-1]
    return (ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2


def _distances(
    a: Float[Tensor, "*#batch query d_model"], b: Float[Tensor, "*#batch point d_model"]
) -> Float[Tensor, "*batch query point"]:
    # The default takes differences of squares for many points, which near points do not survive.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def kernel_ridge(
    between_points: Float[Tensor, "point point"],
    to_points: Float[Tensor, "query point"],
    values: Float[Tensor, "point value"],
    ridge: float,
) -> Float[Tensor, "query value"]:
    """Kernel ridge regression, `κ(q, ·) (K + ridge I)⁻¹ y`, by scikit-learn, in float64.

    Args:
        between_points: K among the demonstrations, symmetric and positive semi-definite.
        to_points: κ of queries with demonstrations.
        values: What is regressed, such as one-hot labels.
        ridge: The ridge, above 0.

    Raises:
        ValueError: If a kernel or a value is not finite, they do not fit, or the ridge is not a finite number above 0.
    """
    require_positive("ridge", ridge)
    require_finite("values", values)
    for name, kernel in (("between_points", between_points), ("to_points", to_points)):
        require_kernel(kernel, len(values), name)
    if len(between_points) != len(values):
        raise ValueError(f"between_points must be square; got {list(between_points.shape)}")
    solver = KernelRidge(alpha=ridge, kernel="precomputed")
    known, y, asked = (x.detach().cpu().double().numpy() for x in (between_points, values, to_points))
    return torch.from_numpy(solver.fit(known, y).predict(asked)).to(wide(to_points))


def label_agreement(
    estimates: Float[Tensor, "*batch query label"], target: Float[Tensor, "query label"]
) -> Float[Tensor, "*batch query"]:
    """Say for each query whether the label of the highest estimate is that of the highest target: 1 or 0.

    Where n labels share the highest estimate and the target's is among them, it is 1/n, so that an estimate that says nothing
    scores chance. NaN where an entry is not finite.

    Raises:
        ValueError: If the two are not of the same queries and labels.
    """
    _require_same_labels(estimates, target)
    highest = (estimates == estimates.amax(dim=-1, keepdim=True)).to(wide(estimates))
    share = highest / highest.sum(dim=-1, keepdim=True)
    wanted = target.argmax(dim=-1, keepdim=True).expand(*share.shape[:-1], 1)
    finite = estimates.isfinite().all(dim=-1) & target.isfinite().all(dim=-1)
    return share.gather(-1, wanted).squeeze(-1).masked_fill(~finite, torch.nan)


@dataclass(frozen=True)
class ChosenHead:
    """A head chosen on one half of the queries, and its score on the other.

    Attributes:
        layer: Its layer.
        head: Its number there.
        agreement: The share of the other half's queries for which it gives the target's label; NaN where it gives none.
        correlation: Pearson correlation of its estimates with the target's probabilities there, over queries and labels; NaN where
            one is constant.
        chosen_on: How many queries it was chosen on.
        scored_on: How many queries the other half has.
    """

    layer: int
    head: int
    agreement: float
    correlation: float
    chosen_on: int
    scored_on: int


def choose_head(
    estimates: Float[Tensor, "layer head query label"], target: Float[Tensor, "query label"], seed: int = 0
) -> ChosenHead:
    """Choose the head whose label regression correlates best with a run's label probabilities (Han et al. 2025), honestly: on one
    half of the queries, to be scored on the other.

    Heads without a correlation, because an estimate is undefined or constant, are chosen only if all are so. Ties go to the first.

    Args:
        estimates: `label_regression` with every head's attention.
        target: Label probabilities of the run that is to be reconstructed, or gold labels as one-hot rows.
        seed: Seeds the split.

    Raises:
        ValueError: If there are fewer than four queries, estimates and target do not fit, or the seed is no whole number.
    """
    n = len(target)
    if n < 4:
        raise ValueError(f"choosing a head on one half of the queries and scoring it on the other needs at least 4, got {n}")
    if estimates.ndim != 4:
        raise ValueError(f"estimates must have the shape [layer, head, query, label]; got {list(estimates.shape)}")
    agreed = label_agreement(estimates, target)
    order = torch.randperm(n, generator=seeded(seed), dtype=torch.long, device="cpu").to(target.device)
    choosing, scoring = order[: n // 2], order[n // 2 :]
    score = label_correlation(estimates[:, :, choosing], target[choosing]).nan_to_num(nan=-2.0)
    layer, head = divmod(int(score.flatten().argmax()), estimates.shape[1])
    chosen = estimates[layer, head, scoring]
    return ChosenHead(
        layer,
        head,
        agreement=float(agreed[layer, head, scoring].nanmean()),
        correlation=float(label_correlation(chosen, target[scoring])),
        chosen_on=len(choosing),
        scored_on=len(scoring),
    )


def label_correlation(
    estimates: Float[Tensor, "*batch query label"], target: Float[Tensor, "query label"]
) -> Float[Tensor, "*batch"]:
    """Pearson's correlation of estimates with a run's label probabilities, over queries and labels (Han et al. 2025).

    NaN where one is constant or an entry is not finite.

    Raises:
        ValueError: If the two are not of the same queries and labels.
    """
    _require_same_labels(estimates, target)
    a, b = wide(estimates).flatten(-2), wide(target).flatten()
    a, b = (x - x.mean(dim=-1, keepdim=True) for x in (a, b))
    return cosine(a.masked_fill(a.abs() < 1e-6, 0.0), b.masked_fill(b.abs() < 1e-6, 0.0))


def _require_same_labels(estimates: Tensor, target: Tensor) -> None:
    if target.ndim != 2 or estimates.shape[-2:] != target.shape:
        raise ValueError(
            f"estimates {list(estimates.shape)} and target {list(target.shape)} are not of the same queries and labels"
        )
