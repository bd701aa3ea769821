"""The jobs that are measured: what we do, what it is measured against, what it cannot avoid, and how far it may be from that.

A job is measured against the naive path (`naive.py`), where it should be many times faster, or against passes that it must make
anyway, where it should be hardly slower. Before any time is taken, its result is checked against the naive path's on a part of the
episode; the naive path is what the check trusts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from iclgd_lens.benchmarks.floors import Products, Step, forward_passes, in_turn, layerwise_passes, output_passes
from iclgd_lens.benchmarks.models import Sizes, build_model, random_episode
from iclgd_lens.benchmarks.naive import PARAMETERS, naive_capture, naive_compare, naive_update, parameter
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.experiments.compare import compare
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd


@dataclass(frozen=True, eq=False)
class Setting:
    """What jobs run on.

    Attributes:
        name: What the model is called.
        model: The model.
        twin: Its untrained twin.
        episode: The demonstrations and queries.
        lr: The step size; so large that updates stand out of the rounding of the weights, which checks compare.
        checked: How many demonstrations and queries results are checked on.
    """

    name: str
    model: HookedTransformer
    twin: HookedTransformer
    episode: Episode
    lr: float = 0.1
    checked: int = 3

    @classmethod
    def of(cls, name: str, model: HookedTransformer, sizes: Sizes, seed: int = 0) -> Setting:
        """Draw an episode for a model, and a twin of it."""
        return cls(name, model, untrained_twin(model, seed=seed), random_episode(model, sizes, seed))

    @classmethod
    def named(
        cls, shape: str, sizes: Sizes, *, device: str | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Setting:
        """Build a model of a shape, and the rest for it."""
        return cls.of(shape, build_model(shape, device=device, dtype=dtype, seed=seed), sizes, seed)

    @property
    def part(self) -> Episode:
        """The part of the episode that results are checked on."""
        episode = self.episode
        return replace(episode, demonstrations=episode.demonstrations[: self.checked], queries=episode.queries[: self.checked])


@dataclass(frozen=True, eq=False)
class Work:
    """A job, prepared for a setting.

    Attributes:
        ours: Do it.
        other: Do what it is measured against.
        floor: The matrix products that it cannot avoid.
        error: The relative error of its results on the setting's part, against the naive path's.
    """

    ours: Step
    other: Step
    floor: Step
    error: Callable[[], float]


@dataclass(frozen=True, eq=False)
class Job:
    """Something to be measured.

    Attributes:
        title: What it is, and against what.
        target: How many times faster than the other it should be at least, or how many times slower at most.
        faster: Whether it should be faster.
        prepare: Prepares it.
    """

    title: str
    target: float
    faster: bool
    prepare: Callable[[Setting], Work]

    def met(self, ratio: float) -> bool:
        """Whether a ratio is as it should be: the other's time to ours if it should be faster, else ours to the other's."""
        return ratio >= self.target if self.faster else ratio <= self.target


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference relative to the norm of what is expected; infinite if they are not finite in the same places."""
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), finite):
        return float("inf")
    actual, expected = actual[finite].double(), expected[finite].double()
    return float((actual - expected).norm() / expected.norm())


def _icl_capture(setting: Setting) -> Work:
    model, episode = setting.model, setting.episode
    demonstrations, queries = episode.demonstrations, episode.queries
    products, n_before = Products.of(model), _context_length(episode)
    bodies = [len(query.tokens) - 1 for query in queries]

    def error() -> float:
        part = setting.part.queries
        ours, naive = capture(model, part, context=demonstrations), naive_capture(model, part, demonstrations)
        return max(relative_error(ours.kept[name], expected) for name, expected in naive.items())

    return Work(
        ours=lambda: capture(model, queries, context=demonstrations),
        other=lambda: naive_capture(model, queries, demonstrations),
        floor=in_turn(
            [
                products.forward(1, n_before),
                products.forward(len(queries), round(sum(bodies) / len(bodies)), n_before),
                products.readout(len(queries), backward=False),
            ]
        ),
        error=error,
    )


def _lcgd_label(setting: Setting) -> Work:
    model, episode = setting.model, setting.episode
    options: dict[str, Any] = {"lr": setting.lr, "loss_on": "label", "readout": "labels", "label_tokens": episode.label_tokens}
    products = Products.of(model)
    return Work(
        ours=lambda: lcgd(model, episode.demonstrations, **options),
        other=lambda: forward_passes(model, [each.tokens for each in episode.demonstrations]),
        floor=_per_demonstration(episode.demonstrations, lambda n: [products.forward(1, n), products.backward(1, through=False)]),
        error=lambda: _update_error(setting, "lcgd", options),
    )


def _lcgd_demonstration(setting: Setting) -> Work:
    model, episode = setting.model, setting.episode
    products, layers = Products.of(model), model.cfg.n_layers
    prompts = [each.tokens for each in episode.demonstrations]
    readouts = _per_demonstration(episode.demonstrations, lambda n: [products.readout(layers * (n - 1), backward=True)])
    return Work(
        ours=lambda: lcgd(model, episode.demonstrations, lr=setting.lr),
        other=in_turn([lambda: layerwise_passes(model, prompts), readouts]),
        floor=in_turn(
            [
                readouts,
                _per_demonstration(episode.demonstrations, lambda n: [products.forward(1, n), products.backward(n, through=False)]),
            ]
        ),
        error=lambda: _update_error(setting, "lcgd", {"lr": setting.lr}),
    )


def _gd(setting: Setting) -> Work:
    model, episode = setting.model, setting.episode
    products = Products.of(model)
    return Work(
        ours=lambda: gd(model, episode.demonstrations, lr=setting.lr),
        other=lambda: output_passes(model, [each.tokens for each in episode.demonstrations]),
        floor=_per_demonstration(
            episode.demonstrations,
            lambda n: [products.forward(1, n), products.backward(n, through=True), products.readout(n - 1, backward=True)],
        ),
        error=lambda: _update_error(setting, "gd", {"lr": setting.lr}),
    )


def _ft_capture(setting: Setting) -> Work:
    model, queries, part = setting.model, setting.episode.queries, setting.part
    sites, hooks = sites_of(model), gd(model, setting.episode.demonstrations, lr=setting.lr).fwd_hooks(model)
    products = Products.of(model)

    def ours() -> None:
        with sites.attach(hooks):
            capture(model, queries)

    def error() -> float:
        found = capture(model, part.queries, update=gd(model, part.demonstrations, lr=setting.lr))
        naive = naive_capture(naive_update(model, part.demonstrations, "gd", lr=setting.lr), part.queries)
        return max(relative_error(found.kept[name], expected) for name, expected in naive.items())

    bodies = [len(query.tokens) - 1 for query in queries]
    return Work(
        ours=ours,
        other=lambda: capture(model, queries),
        floor=in_turn(
            [
                products.forward(len(queries), round(sum(bodies) / len(bodies)), 1),
                products.readout(len(queries), backward=False),
            ]
        ),
        error=error,
    )


def _compare(setting: Setting) -> Work:
    episode = setting.episode
    models = {"trained": setting.model, "untrained": setting.twin}
    floors = [job.prepare(setting).floor for job in (ICL_CAPTURE, FT_CAPTURE, GD, LCGD_DEMONSTRATION)]
    # Without context the queries run three times: zero-shot, and under either update.
    one_model = [*floors, floors[1], floors[1]]

    def error() -> float:
        part = setting.part
        frame = compare(setting.model, part, lr=setting.lr, untrained=setting.twin).frame
        naive = naive_compare(models, part.demonstrations, part.queries, lr=setting.lr)
        # Where a change is mere rounding, ours is undefined, and the naive cosine is noise.
        rows = frame[(frame["control"] == "none") & (frame["subset"] == "all") & frame["layer"].notna() & (frame["undefined"] == 0)]
        about = ["model", "method", "metric", "layer"]
        ours = rows[rows["metric"].isin([metric for *_, metric in naive])].set_index(about)["value"]
        both = [(value, naive[key[:3]][key[3]]) for key, value in ours.items()]
        return relative_error(*torch.tensor(both).T)

    return Work(
        ours=lambda: compare(setting.model, episode, lr=setting.lr, untrained=setting.twin),
        other=lambda: naive_compare(models, episode.demonstrations, episode.queries, lr=setting.lr),
        floor=in_turn(one_model * len(models)),
        error=error,
    )


def _update_error(setting: Setting, method: str, options: dict[str, Any]) -> float:
    """The relative error of what the update adds to each layer's parameters, at the worst layer."""
    model, demonstrations = setting.model, setting.part.demonstrations
    update = {"gd": gd, "lcgd": lcgd}[method](model, demonstrations, **options)
    trained = naive_update(model, demonstrations, method, **options)
    return max(_layer_error(update, trained, model, layer) for layer in range(model.cfg.n_layers))


def _layer_error(update: ParameterUpdate, trained: HookedTransformer, model: HookedTransformer, layer: int) -> float:
    # All parameters together: the gradient of a key bias is zero but for rounding.
    ours = [update.delta(name, layer).flatten() for name in update.settings.parameters]
    naive = [(parameter(trained, layer, name) - parameter(model, layer, name)).detach().flatten() for name in PARAMETERS]
    return relative_error(torch.cat(ours), torch.cat(naive))


def _per_demonstration(demonstrations: Sequence[Demonstration], steps_of: Callable[[int], list[Step]]) -> Step:
    """For every demonstration, the steps for its length."""
    lengths = [len(each.tokens) for each in demonstrations]
    steps = {length: in_turn(steps_of(length)) for length in set(lengths)}
    return in_turn([steps[length] for length in lengths])


def _context_length(episode: Episode) -> int:
    return 1 + sum(len(each.tokens) - 1 + len(each.separator) for each in episode.demonstrations)


ICL_CAPTURE = Job("ICL capture of all queries, against full prompts one at a time", 15.0, True, _icl_capture)
LCGD_LABEL = Job("LCGD on labels read out over label words, against plain forward passes", 1.5, False, _lcgd_label)
LCGD_DEMONSTRATION = Job(
    "LCGD on whole demonstrations over the vocabulary, against torch's passes and unembedding products",
    1.25,
    False,
    _lcgd_demonstration,
)
GD = Job("GD on whole demonstrations, against torch's forward and backward passes", 1.15, False, _gd)
FT_CAPTURE = Job("Capture under an attached update, against zero-shot capture", 1.15, False, _ft_capture)
COMPARE = Job("A whole comparison with an untrained twin, against the naive one", 10.0, True, _compare)

JOBS: dict[str, Job] = {
    "icl-capture": ICL_CAPTURE,
    "lcgd-label": LCGD_LABEL,
    "lcgd-demonstration": LCGD_DEMONSTRATION,
    "gd": GD,
    "ft-capture": FT_CAPTURE,
    "compare": COMPARE,
}
"""All jobs by name."""
