"""The kernel views of the task, as rows: label regression with attention and with hidden states as the kernel."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.data.episodes import Episode
from iclgd_lens.draws import shuffled
from iclgd_lens.experiments.measure import Row, metric_rows, over_queries, per_head_rows
from iclgd_lens.kernels.labels import (
    HiddenKernel,
    choose_head,
    hidden_kernel,
    kernel_ridge,
    label_agreement,
    label_correlation,
    label_regression,
    median_bandwidth,
    one_hot_labels,
)
from iclgd_lens.models.precision import wide

RIDGE = 0.1
"""The ridge of kernel ridge regression with an RBF kernel, which is 1 at distance zero."""

SHUFFLES = 8
"""How many times the demonstrations' labels, or the demonstrations of a kernel, are dealt out anew in the controls."""

MetricRows = Iterator[tuple[str, str, Row]]
"""Rows with the method and control that they are about; those with a `head` belong to the frame of heads."""


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of an episode, and how the demonstrations' are dealt out in the control.

    Attributes:
        demonstrations: `[demonstration]`: class indices.
        queries: `[query]`: class indices.
        count: How many classes there are.
        shuffled: `SHUFFLES` times `[demonstration]`: class indices dealt out anew, at random; none where all are alike.
    """

    demonstrations: Int[Tensor, "demonstration"]
    queries: Int[Tensor, "query"]
    count: int
    shuffled: tuple[Int[Tensor, "demonstration"], ...]

    @classmethod
    def of(cls, episode: Episode) -> Labels:
        """Read the labels of an episode.

        Raises:
            ValueError: If a demonstration or a query has no class index, or one that is not of the label words'.
        """
        count = len(episode.label_words)
        demonstrations = _known("demonstration", [each.label for each in episode.demonstrations], count)
        queries = _known("query", [each.label for each in episode.queries], count)
        # Among the shuffles may be the order as it is: without it, few demonstrations would be labelled worse than by chance.
        rng = random.Random(f"labels of demonstrations/{episode.seed}")
        alike = bool((demonstrations == demonstrations[0]).all())
        dealt = [torch.tensor(shuffled(rng, demonstrations.tolist())) for _ in range(0 if alike else SHUFFLES)]
        return cls(demonstrations, queries, count, tuple(dealt))

    @property
    def controls(self) -> dict[str, tuple[Int[Tensor, "demonstration"], ...]]:
        """The demonstrations' labels under each control; what comes of several is averaged."""
        return {"none": (self.demonstrations,)} | ({"shuffled_labels": self.shuffled} if self.shuffled else {})


def _known(kind: str, labels: Sequence[int | None], count: int) -> Int[Tensor, "example"]:
    for number, label in enumerate(labels):
        if label is None:
            raise ValueError(f"{kind} {number} has no label index, which kernel regression of labels needs")
        if not 0 <= label < count:
            raise ValueError(f"{kind} {number} has the label index {label}, but there are {count} label words, counted from 0")
    return torch.tensor(labels)


def head_rows(
    attention: Float[Tensor, "query layer head demonstration"],
    labels: Labels,
    targets: Mapping[str, Float[Tensor, "query label"]],
    name: str,
    seed: int,
) -> MetricRows:
    """Label regression with heads' attention as the kernel: the best head of all (`{name}_head_…`) and of every layer
    (`{name}_layer_…`), chosen on one half of the queries and scored on the other, beside the same with shuffled labels and, under
    the control `"random"`, the mean over heads; and, of every head, how well it agrees with ICL (`{name}_agreement`).

    Args:
        attention: In-context attention to every demonstration.
        labels: The episode's labels.
        targets: By method, the label probabilities that are to be reconstructed.
        name: What metrics are called by.
        seed: Seeds the split of the queries.
    """
    kernel = rearrange(attention, "query layer head demonstration -> layer head query demonstration")
    for control, dealt in labels.controls.items():
        estimates = [label_regression(kernel, each.to(kernel.device), labels.count) for each in dealt]
        for method, target in targets.items():
            best = [choose_head(estimate, target, seed) for estimate in estimates]
            by_layer = [[choose_head(layer[None], target, seed) for layer in estimate] for estimate in estimates]
            for metric in ("agreement", "correlation"):
                whole = torch.tensor([getattr(chosen, metric) for chosen in best], dtype=torch.float32).nanmean(dim=0, keepdim=True)
                each = torch.tensor([[getattr(chosen, metric) for chosen in layers] for layers in by_layer], dtype=torch.float32)
                for label, values in (
                    (f"{name}_head_{metric}", whole),
                    (f"{name}_layer_{metric}", each.nanmean(dim=0, keepdim=True)),
                ):
                    yield from ((method, control, over_queries(row, best[0].scored_on)) for row in metric_rows(label, values))
            if control == "none":
                found = rearrange(label_agreement(estimates[0], target), "layer head query -> query layer head")
                for label, values in (
                    (f"{name}_head_agreement", found.flatten(1).nanmean(dim=1)),
                    (f"{name}_layer_agreement", found),
                ):
                    yield from ((method, "random", row) for row in metric_rows(label, values))
                if method == "icl":
                    yield from ((method, control, row) for row in per_head_rows(f"{name}_agreement", found))


def majority_rows(targets: Mapping[str, Float[Tensor, "query label"]]) -> MetricRows:
    """What always giving the commonest label scores: the share of queries that a run, or the gold labels, give it."""
    for method, target in targets.items():
        share = one_hot_labels(target.argmax(dim=-1), target.shape[-1]).mean(dim=0).max()
        yield from ((method, "none", over_queries(row, len(target))) for row in metric_rows("majority_agreement", share[None]))


def hidden_rows(
    queries: Float[Tensor, "query layer d_model"],
    demonstrations: Float[Tensor, "demonstration layer d_model"],
    labels: Labels,
    targets: Mapping[str, Float[Tensor, "query label"]],
) -> MetricRows:
    """Label regression with kernels of hidden states, zero-shot, layer by layer: Nadaraya–Watson with each, and kernel ridge with
    the RBF kernel.
    """
    points, asking = (rearrange(x, "example layer d_model -> layer example d_model") for x in (demonstrations, queries))
    kernels = {kind: _kernels(asking, points, kind) for kind in get_args(HiddenKernel)}
    among = _kernels(points, points, "rbf")
    for control, dealt in labels.controls.items():
        estimates: dict[str, list[Float[Tensor, "layer query label"]]] = defaultdict(list)
        for each in dealt:
            regress = partial(label_regression, labels=each.to(points.device), n_labels=labels.count)
            for kind, kernel in kernels.items():
                estimates[kind].append(_where_defined(regress, [kernel], labels.count))
            ridge = partial(kernel_ridge, values=one_hot_labels(each, labels.count), ridge=RIDGE)
            estimates["ridge"].append(_where_defined(ridge, [among, kernels["rbf"]], labels.count))
        for method, target in targets.items():
            for kind, found in estimates.items():
                stacked = torch.stack(found)
                agreed = rearrange(label_agreement(stacked, target).nanmean(dim=0), "layer query -> query layer")
                yield from ((method, control, row) for row in metric_rows(f"hidden_{kind}_agreement", agreed))
                correlated = metric_rows(f"hidden_{kind}_correlation", label_correlation(stacked, target).nanmean(dim=0)[None])
                yield from ((method, control, over_queries(row, len(target))) for row in correlated)


def _kernels(
    queries: Float[Tensor, "layer query d_model"], points: Float[Tensor, "layer point d_model"], kind: HiddenKernel
) -> Float[Tensor, "layer query point"]:
    """Kernels of hidden states, layer by layer; NaN in layers where the points do not differ enough to have a bandwidth."""
    if kind != "rbf":
        return hidden_kernel(queries, points, kind)
    found = wide(queries).new_full((*queries.shape[:2], points.shape[1]), torch.nan)
    differing = median_bandwidth(points) > 0
    if bool(differing.any()):
        found[differing] = hidden_kernel(queries[differing], points[differing], kind)
    return found


def _where_defined(
    estimate: Callable[..., Float[Tensor, "query label"]], kernels: Sequence[Float[Tensor, "layer _row point"]], n_labels: int
) -> Float[Tensor, "layer query label"]:
    """Estimate layer by layer, from kernels of which the last is that of the queries; NaN where one is not finite."""
    found = kernels[-1].new_full((*kernels[-1].shape[:2], n_labels), torch.nan)
    for layer, of_layer in enumerate(zip(*kernels, strict=True)):
        if all(bool(kernel.isfinite().all()) for kernel in of_layer):
            found[layer] = estimate(*of_layer)
    return found
