"""Gradient descent on a function instead of on weights, and which of its iterates a model's layers are at.

A step in the function space of a kernel κ is `f ← f − η Σᵢ κ(·, xᵢ) ∂ℓ/∂f(xᵢ)`, the loss summed over demonstrations xᵢ. A
transformer can make one such step a layer (Cheng et al. 2024, arXiv 2312.06528, section 3). Whether one does is asked by
`align_trajectories`: it matches the label distributions that are read out after every layer with those of the iterates.

>>> import torch
>>> between_points, to_points = torch.eye(2), torch.tensor([[0.5, 0.0]])
>>> iterates = functional_gd(between_points, to_points, torch.eye(2), lr=1.0, steps=2)
>>> [[round(p, 3) for p in row] for row in iterates.softmax(dim=-1)[:, 0].tolist()]
[[0.5, 0.5], [0.622, 0.378], [0.683, 0.317]]
>>> align_trajectories(iterates.softmax(dim=-1), iterates.softmax(dim=-1)).match.tolist()
[0, 1, 2]
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_count, require_finite, require_one_of, require_positive
from iclgd_lens.kernels.smoother import require_kernel
from iclgd_lens.metrics.agreement import distribution_divergence
from iclgd_lens.models.precision import wide_dtype
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.updates.gradient import DivergedError

FunctionalLoss = Literal["squared", "cross_entropy"]


@without_autocast()
def functional_gd(
    between_points: Float[Tensor, "point point"] | Float[Tensor, "point point label label"],
    to_points: Float[Tensor, "query point"] | Float[Tensor, "query point label label"],
    targets: Float[Tensor, "point label"],
    *,
    lr: float,
    steps: int,
    loss: FunctionalLoss = "cross_entropy",
    start_points: Float[Tensor, "point label"] | None = None,
    start_queries: Float[Tensor, "query label"] | None = None,
) -> Float[Tensor, "iterate query label"]:
    """Run gradient descent in a kernel's function space: `f_c(q) ← f_c(q) − η Σᵢ Σ_c' κ(q, xᵢ)[c, c'] ∂ℓ/∂f_c'(xᵢ)`.

    For the squared loss and a positive definite kernel, iterates from zero converge to the kernel's interpolation of the targets
    where `lr` is below 2/λ_max, λ_max the largest eigenvalue of `between_points`, and diverge above.

    Args:
        between_points: κ(xᵢ, xⱼ) among the demonstrations: a scalar kernel, or one whose values are matrices over labels, as those
            of the tangent kernel of label logits are.
        to_points: κ(q, xᵢ), of the same kind.
        targets: yᵢ. For the cross-entropy distributions over labels, such as one-hot rows.
        lr: The step size η.
        steps: How many steps are made.
        loss: Summed over points: `"squared"`, ½ ‖f − y‖², or `"cross_entropy"` of softmax(f) against y, in nats.
        start_points: f at the demonstrations before the first step; zero by default.
        start_queries: f at the queries; zero by default.

    Returns:
        f at the queries before the first step and after every step, in at least float32. With the cross-entropy these are logits.

    Raises:
        ValueError: If shapes do not fit each other, there are no points, an entry of a tensor is not finite, targets of the
            cross-entropy are not distributions, or an option is unknown or out of range.
        DivergedError: If a step makes a value that is not finite: the learning rate is too large.
    """
    require_positive("lr", lr)
    require_count("steps", steps)
    require_one_of("loss", loss, get_args(FunctionalLoss))
    n_points, n_queries, n_labels = _check_shapes(between_points, to_points, targets)
    starts = (
        _start("start_points", start_points, (n_points, n_labels), targets),
        _start("start_queries", start_queries, (n_queries, n_labels), targets),
    )
    dtypes = (tensor.dtype for tensor in (between_points, to_points, targets, *starts))
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    if loss == "cross_entropy":
        targets = _distributions(targets, "targets of the cross-entropy")
    targets = targets.to(dtype)

    # Points and queries are moved by the same steps, so they are rows of one kernel and of one f; and a matrix-valued kernel is a
    # scalar one between (row, label) pairs. Each step is then one matrix product.
    kernel, f = torch.cat([between_points, to_points]).to(dtype), torch.cat(starts).to(dtype)
    if kernel.ndim == 4:
        kernel = rearrange(kernel, "row point c d -> (row c) (point d)")
    iterates = f.new_empty(steps + 1, n_queries, n_labels)
    iterates[0] = f[n_points:]
    for step in range(1, steps + 1):
        prediction = f[:n_points].softmax(dim=-1) if loss == "cross_entropy" else f[:n_points]
        gradient = prediction - targets
        f = f - lr * (kernel @ gradient.reshape(kernel.shape[1], -1)).view_as(f)
        if not bool(f.isfinite().all()):
            raise DivergedError(
                f"lr={lr:g} made functional gradient descent non-finite at step {step} of {steps}; use a smaller learning rate"
            )
        iterates[step] = f[n_points:]
    return iterates


@dataclass(frozen=True, eq=False)
class Alignment:
    """How two trajectories of label distributions go together.

    Attributes:
        similarity: `[layer iterate]`: 1 − JSD / ln 2, JSD the Jensen-Shannon divergence in nats averaged over queries (Lin 1991): 1
            for equal distributions, 0 for disjoint ones. In float64.
        match: `[layer]`: the iterate that each layer is matched with, never an earlier one than the layer before. The sum of the
            matched similarities is the largest that there is; of several such matches it is the one that is earliest at
            every layer.
        score: The mean of the matched similarities.
    """

    similarity: Float[Tensor, "layer iterate"]
    match: Int[Tensor, "layer"]
    score: float


def align_trajectories(layers: Float[Tensor, "layer query label"], iterates: Float[Tensor, "iterate query label"]) -> Alignment:
    """Match each layer with an iterate, in order, so that their label distributions are as alike as can be.

    Layers may share an iterate, and iterates may be left out. More iterates can only raise the score, so compare it with that of
    a control of as many. Memory is that of one layer against all iterates at a time, in float64.

    Args:
        layers: Probabilities of the labels after every layer, such as the softmax of `Activations.lens_logits`.
        iterates: Probabilities of the labels after every step, such as the softmax of what `functional_gd` returns.

    Raises:
        ValueError: If the two are not of the same queries and labels, one is empty, or rows are not distributions.
    """
    for name, trajectory in (("layers", layers), ("iterates", iterates)):
        if trajectory.ndim != 3 or 0 in trajectory.shape:
            raise ValueError(f"{name} must be [{name[:-1]} query label] and not empty; got {list(trajectory.shape)}")
    if layers.shape[1:] != iterates.shape[1:]:
        raise ValueError(
            f"layers and iterates must be of the same queries and labels; got {list(layers.shape)} and {list(iterates.shape)}"
        )
    layers, iterates = _distributions(layers, "layers"), _distributions(iterates, "iterates")
    divergence = torch.stack([distribution_divergence(layer, iterates).mean(dim=-1) for layer in layers])
    similarity = 1 - divergence / math.log(2)
    match = _best_monotone_match(similarity)
    return Alignment(similarity, match, float(similarity.gather(1, match[:, None]).mean()))


def _best_monotone_match(similarity: Float[Tensor, "layer iterate"]) -> Int[Tensor, "layer"]:
    """The non-decreasing match of the largest sum; ties go to the earlier iterate."""
    # best[ℓ][t]: the largest sum over layers 0 … ℓ of a match that has layer ℓ at iterate t.
    best = [similarity[0]]
    for row in similarity[1:]:
        best.append(row + best[-1].cummax(dim=0).values)
    match = [int(best[-1].argmax())]  # the first of equal ones, as below
    for sums in reversed(best[:-1]):
        match.append(int(sums[: match[-1] + 1].argmax()))
    return torch.tensor(match[::-1], device=similarity.device)


def _check_shapes(between_points: Tensor, to_points: Tensor, targets: Tensor) -> tuple[int, int, int]:
    """Validate the kernel and the targets; return the numbers of points, queries and labels."""
    if targets.ndim != 2 or 0 in targets.shape:
        raise ValueError(f"targets must be [point label] and not empty; got {list(targets.shape)}")
    n_points, n_labels = targets.shape
    for name, kernel, rows in (("between_points", between_points, "point"), ("to_points", to_points, "query")):
        labels = (n_labels, n_labels) if kernel.ndim == 4 else ()
        if kernel.ndim not in (2, 4) or kernel.shape[1:] != (n_points, *labels):
            raise ValueError(
                f"{name} must be [{rows} point] or [{rows} point label label] with the {n_points} points and {n_labels} labels of "
                f"targets; got {list(kernel.shape)}"
            )
        require_kernel(rearrange(kernel, "row point ... -> row ... point"), n_points, name)
    if len(between_points) != n_points:
        raise ValueError(f"between_points must be square in the points; got {list(between_points.shape)}")
    if between_points.ndim != to_points.ndim:
        raise ValueError(
            "between_points and to_points must be of one kernel, scalar or matrix-valued; got "
            f"{list(between_points.shape)} and {list(to_points.shape)}"
        )
    require_finite("targets", targets)
    return n_points, len(to_points), n_labels


def _start(name: str, given: Tensor | None, shape: tuple[int, int], like: Tensor) -> Tensor:
    """What f starts at: what is given, validated, or zero."""
    if given is None:
        return torch.zeros(shape, dtype=wide_dtype(like.dtype), device=like.device)
    if given.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}; got {list(given.shape)}")
    require_finite(name, given)
    return given


def _distributions(rows: Float[Tensor, "*batch label"], name: str) -> Float[Tensor, "*batch label"]:
    """Validate probabilities; return them in float64, their sums rid of rounding."""
    require_finite(name, rows)
    rows = rows.double()
    total = rows.sum(dim=-1, keepdim=True)
    if bool((rows < 0).any()) or bool(((total - 1).abs() > 1e-3).any()):
        raise ValueError(
            f"{name} must be probabilities over labels: no entry below 0, and every row with the sum 1 (put a softmax over logits)"
        )
    return rows / total
