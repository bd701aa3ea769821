"""The kernel views of learning, as rows: how far tangent kernels predict steps, what they align with, and whether layers go with
iterates of functional gradient descent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.data.episodes import Episode
from iclgd_lens.draws import shuffled
from iclgd_lens.experiments.kernel_regression import SHUFFLES, Labels, MetricRows
from iclgd_lens.experiments.measure import metric_rows, over_queries
from iclgd_lens.kernels.alignment import centred_alignment
from iclgd_lens.kernels.functional import Alignment, align_trajectories, functional_gd
from iclgd_lens.kernels.labels import hidden_kernel, label_kernel, median_bandwidth, one_hot_labels
from iclgd_lens.kernels.linearity import label_step, linearity, own_layer_change
from iclgd_lens.kernels.tangent import TangentKernel
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate, UpdateSettings

SMALLER_RATES = {"": 1.0, "_tenth": 0.1, "_hundredth": 0.01}
"""The parts of the learning rate at which the tangent kernel's prediction is checked, by the ending of the metric's name."""

STEPS = 4
"""How many steps of functional gradient descent, and epochs of GD and LCGD, layers are matched with."""

VANISHED = 1e-10
"""A tangent kernel no larger than this is what rounding leaves of none."""


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
        yield from (("lcgd", control, over_queries(row, n_queries)) for row in rows)


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
    score = torch.tensor([alignment.score for alignment in found], dtype=torch.float32).mean(dim=0, keepdim=True)
    match = torch.stack([alignment.match for alignment in found]).double().mean(dim=0, keepdim=True)
    for metric, values in ((f"{name}_score", score), (f"{name}_match", match)):
        yield from ((method, control, over_queries(row, n_queries)) for row in metric_rows(metric, values))
