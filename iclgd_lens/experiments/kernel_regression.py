"""The kernel views of the task, as rows: label regression, tangent kernels, and trajectories of functional gradient descent."""

from __future__ import annotations

import math
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
from iclgd_lens.experiments.measure import Row, metric_rows, per_head_rows
from iclgd_lens.kernels.alignment import centred_alignment
from iclgd_lens.kernels.functional import Alignment, align_trajectories, functional_gd
from iclgd_lens.kernels.labels import (
    HiddenKernel,
    choose_head,
    hidden_kernel,
    kernel_ridge,
    label_agreement,
    label_correlation,
    label_kernel,
    label_regression,
    median_bandwidth,
    one_hot_labels,
)
from iclgd_lens.kernels.linearity import label_step, linearity, own_layer_change
from iclgd_lens.kernels.tangent import TangentKernel
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate, UpdateSettings

RIDGE = 0.1
"""The ridge of kernel ridge regression with an RBF kernel, which is 1 at distance zero."""

SHUFFLES = 8
"""How many times the demonstrations' labels, or the demonstrations of a kernel, are dealt out anew in the controls."""

SMALLER_RATES = {"": 1.0, "_tenth": 0.1, "_hundredth": 0.01}
"""The parts of the learning rate at which the tangent kernel's prediction is checked, by the ending of the metric's name."""

STEPS = 4
"""How many steps of functional gradient descent, and epochs of GD and LCGD, layers are matched with."""

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
                whole = torch.tensor([getattr(chosen, metric) for chosen in best]).nanmean(dim=0, keepdim=True)
                each = torch.tensor([[getattr(chosen, metric) for chosen in layers] for layers in by_layer])
                for label, values in (
                    (f"{name}_head_{metric}", whole),
                    (f"{name}_layer_{metric}", each.nanmean(dim=0, keepdim=True)),
                ):
                    yield from ((method, control, _counted(row, best[0].scored_on)) for row in metric_rows(label, values))
            if control == "none":
                found = rearrange(label_agreement(estimates[0], target), "layer head query -> query layer head")
                for label, values in (
                    (f"{name}_head_agreement", found.flatten(1).nanmean(dim=1)),
                    (f"{name}_layer_agreement", found),
                ):
                    yield from ((method, "random", row) for row in metric_rows(label, values))
                if method == "icl":
                    yield from ((method, control, row) for row in per_head_rows(f"{name}_agreement", found))


def _counted(row: Row, n_queries: int) -> Row:
    """A row of a value over so many queries, all of them defined or none."""
    return row | {"n": n_queries * row["n"], "undefined": n_queries * row["undefined"]}


def majority_rows(targets: Mapping[str, Float[Tensor, "query label"]]) -> MetricRows:
    """What always giving the commonest label scores: the share of queries that a run, or the gold labels, give it."""
    for method, target in targets.items():
        share = one_hot_labels(target.argmax(dim=-1), target.shape[-1]).mean(dim=0).max()
        yield from ((method, "none", _counted(row, len(target))) for row in metric_rows("majority_agreement", share[None]))


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
                yield from ((method, control, _counted(row, len(target))) for row in correlated)


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
    estimate: Callable[..., Float[Tensor, "query label"]], kernels: Sequence[Float[Tensor, "layer row point"]], n_labels: int
) -> Float[Tensor, "layer query label"]:
    """Estimate layer by layer, from kernels of which the last is that of the queries; NaN where one is not finite."""
    found = kernels[-1].new_full((*kernels[-1].shape[:2], n_labels), torch.nan)
    for layer, of_layer in enumerate(zip(*kernels, strict=True)):
        if all(bool(kernel.isfinite().all()) for kernel in of_layer):
            found[layer] = estimate(*of_layer)
    return found


def tangent_rows(
    model: HookedModel,
    episode: Episode,
    kernel: TangentKernel,
    settings: UpdateSettings,
    attempt: Callable[[Callable[[], ParameterUpdate]], ParameterUpdate | None],
) -> MetricRows:
    """How well the tangent kernel predicts what a layer-causal step on the labels does to label logits, at a rate and below it.

    The step is one on the sum of the demonstrations' losses, as the prediction is, whatever the schedule of the update; its loss is
    on the first tokens of labels. Where the update's demonstrations follow one another, `tangent_online_…` is about such a step.
    Errors are given as their logarithms, since they differ by orders of magnitude.

    Args:
        model: The model.
        episode: The demonstrations and queries.
        kernel: Their tangent kernel.
        settings: The learning rate, schedule and parameters of the update in use.
        attempt: Makes an update; None where it diverges, which then has no rows.
    """
    rng = random.Random(f"tangent/{episode.seed}")
    orders = [shuffled(rng, range(episode.k)) for _ in range(SHUFFLES)]
    n_queries = len(episode.queries)
    for ending, part in SMALLER_RATES.items():
        lr = settings.lr * part
        make = partial(label_step, model, episode.demonstrations, episode.queries, lr=lr, parameters=settings.parameters)
        predicted = kernel.prediction(lr)
        if (step := attempt(partial(make, schedule="batch"))) is not None:
            own = own_layer_change(model, step, episode.queries).to(predicted)
            after = capture(model, episode.queries, update=step, keep=["lens_logits"]).lens_logits
            whole = rearrange(after, "query layer label -> layer query label").to(predicted) - kernel.query_logits
            at_random = [_error_and_cosine(kernel.shuffled(order).prediction(lr), own) for order in orders]
            for name, control, values in (
                ("tangent", "none", _error_and_cosine(predicted, own)),
                ("tangent", "random", torch.stack(at_random).nanmean(dim=0)),
                ("tangent_all_layers", "none", _error_and_cosine(predicted, whole)),
            ):
                yield from _tangent(name, ending, control, values, n_queries)
        if settings.schedule == "online" and (step := attempt(partial(make, schedule="online"))) is not None:
            own = own_layer_change(model, step, episode.queries).to(predicted)
            yield from _tangent("tangent_online", ending, "none", _error_and_cosine(predicted, own), n_queries)


def _error_and_cosine(
    predicted: Float[Tensor, "layer query label"], actual: Float[Tensor, "layer query label"]
) -> Float[Tensor, "two layer"]:
    found = linearity(predicted, actual)
    return torch.stack([found.error.log10(), found.cosine])


def _tangent(name: str, ending: str, control: str, values: Float[Tensor, "two layer"], n_queries: int) -> MetricRows:
    for metric, by_layer in zip(("log10_error", "cosine"), values, strict=True):
        rows = metric_rows(f"{name}_{metric}{ending}", by_layer[None])
        yield from (("lcgd", control, _counted(row, n_queries)) for row in rows)


def alignment_rows(
    kernel: TangentKernel, attention: Float[Tensor, "query layer head demonstration"], labels: Labels, seed: int
) -> MetricRows:
    """Centred alignment of the tangent kernel, the attention kernel (mean over heads) and the label kernel, layer by layer."""
    kernels = {
        "tangent": kernel.per_label,
        "attention": rearrange(attention.mean(dim=2), "query layer demonstration -> layer query demonstration"),
        "label": label_kernel(labels.queries, labels.demonstrations).to(kernel.per_label)[None],
    }
    rng = random.Random(f"alignment/{seed}")
    orders = torch.tensor([shuffled(rng, range(len(labels.demonstrations))) for _ in range(SHUFFLES)])
    for a, b in (("tangent", "attention"), ("tangent", "label"), ("attention", "label")):
        found = centred_alignment(kernels[a], kernels[b])
        # [layer, shuffle, query, demonstration]
        permuted = rearrange(kernels[b][..., orders], "layer query shuffle demonstration -> layer shuffle query demonstration")
        random_found = centred_alignment(kernels[a][:, None], permuted).nanmean(dim=1)
        for control, values in (("none", found), ("random", random_found)):
            yield from (("icl", control, row) for row in metric_rows(f"cka_{a}_{b}", values[None]))


def trajectory_rows(
    kernel: TangentKernel,
    queries: Float[Tensor, "query layer d_model"],
    demonstrations: Float[Tensor, "demonstration layer d_model"],
    lens_logits: Float[Tensor, "query layer label"],
    labels: Labels,
) -> MetricRows:
    """How well the layers of the in-context run go with iterates of functional gradient descent, by kernels of the last layer; and
    the probability of the gold label by the iterate that each layer is matched with (`…_gold_probability`).
    """
    layers = rearrange(wide(lens_logits), "query layer label -> layer query label").softmax(dim=-1)
    descents: dict[str, Callable[..., Float[Tensor, "iterate query label"]]] = {}
    points, asking = (x[:, -1] for x in (demonstrations, queries))
    if float(median_bandwidth(points)) > 0:
        between, to = (hidden_kernel(x, points, "rbf") for x in (points, asking))
        descents["trajectory_hidden"] = partial(functional_gd, between, to, lr=_stable_rate(between), steps=STEPS)
    theta = kernel.between[-1]
    rate = _stable_rate(rearrange(theta, "a b c d -> (a c) (b d)"))
    if math.isfinite(rate):
        descents["trajectory_tangent"] = partial(
            functional_gd,
            theta,
            kernel.to_queries[-1],
            lr=rate,
            steps=STEPS,
            start_points=kernel.demonstration_logits[-1],
            start_queries=kernel.query_logits[-1],
        )
    for control, dealt in labels.controls.items():
        targets = [one_hot_labels(each, labels.count).to(theta) for each in dealt]
        for name, descend in descents.items():
            iterates = [descend(targets=target).softmax(dim=-1) for target in targets]
            found = [align_trajectories(layers, each) for each in iterates]
            yield from _trajectory(name, "icl", control, found, len(queries))
            matched = torch.stack([each[alignment.match] for each, alignment in zip(iterates, found, strict=True)]).mean(dim=0)
            gold = rearrange(matched[:, torch.arange(len(queries)), labels.queries], "layer query -> query layer")
            yield from (("icl", control, row) for row in metric_rows(f"{name}_gold_probability", gold))


VANISHED = 1e-10
"""A tangent kernel no larger than this is what rounding leaves of none."""


def _stable_rate(kernel: Float[Tensor, "point point"]) -> float:
    """A learning rate for the cross-entropy, half of the largest stable one: its Hessian by the function is at most ½. Infinite for
    a kernel that has vanished.
    """
    largest = float(torch.linalg.eigvalsh(kernel.double())[-1])
    return 2 / largest if largest > VANISHED else math.inf


def epoch_rows(
    model: HookedModel,
    episode: Episode,
    update: ParameterUpdate,
    lens_logits: Float[Tensor, "query layer label"],
    zero_shot: Float[Tensor, "query label"],
) -> MetricRows:
    """How well the layers of the in-context run go with the epochs of an update made in several.

    Args:
        model: The model.
        episode: Its queries.
        update: An update of `STEPS` epochs.
        lens_logits: In-context logit-lens logits.
        zero_shot: The last layer's label logits without an update, which the trajectory starts from.
    """
    iterates = [zero_shot]
    for epochs in range(1, update.settings.epochs + 1):
        after = capture(model, episode.queries, update=update.first_epochs(epochs), keep=["lens_logits"])
        iterates.append(after.lens_logits[:, -1])
    layers = rearrange(wide(lens_logits), "query layer label -> layer query label").softmax(dim=-1)
    found = align_trajectories(layers, wide(torch.stack(iterates)).softmax(dim=-1))
    yield from _trajectory("trajectory_epochs", update.settings.method, "none", [found], len(zero_shot))


def _trajectory(name: str, method: str, control: str, found: Sequence[Alignment], n_queries: int) -> MetricRows:
    score = torch.tensor([alignment.score for alignment in found]).mean(dim=0, keepdim=True)
    match = torch.stack([alignment.match for alignment in found]).double().mean(dim=0, keepdim=True)
    for metric, values in ((f"{name}_score", score), (f"{name}_match", match)):
        yield from ((method, control, _counted(row, n_queries)) for row in metric_rows(metric, values))
