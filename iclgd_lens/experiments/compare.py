"""One comparison, whole: ZSL, ICL and FT by each method on one episode, on a model and on its untrained twin.

>>> from iclgd_lens.data.registry import load_task
>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> episode = load_task("bundled/remapped").episode(model, k=4, n_queries=8, seed=0)
>>> frame = compare(model, episode, lr=0.01).frame
>>> sorted(frame["metric"].unique())
['accuracy', 'alpha_am', 'alpha_aou', 'rec2ftp', 'sim_am', 'sim_am_delta', 'sim_aou', 'sim_aou_norm']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.data.episodes import Episode
from iclgd_lens.metrics.agreement import correct, rec2ftp
from iclgd_lens.metrics.controls import random_update
from iclgd_lens.metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from iclgd_lens.runs.activations import Activations, Kept, capture
from iclgd_lens.updates.dual import LossOn, ParameterUpdate, Readout, Schedule
from iclgd_lens.updates.gradient import ALL_PARAMETERS, gd, lcgd
from iclgd_lens.updates.inject import Parameter

Method = Literal["gd", "lcgd"]
METHODS: dict[Method, Callable[..., ParameterUpdate]] = {"gd": gd, "lcgd": lcgd}

KEEP: tuple[Kept, ...] = ("attn_out", "query_scores", "label_log_probs")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found.

    Attributes:
        frame: One row per model × method × control × metric × layer. Columns: `task`, `k`, `seed`, `n_queries` and the options
            that the updates were made with say where a row comes from; `model` is `"trained"` or `"untrained"`; `method` is the
            run that is described (`"zsl"`, `"icl"`, `"gd"`, `"lcgd"`); `control` is `"none"`, or `"random"` where the update's
            effect was replaced by a random one of the same size; `metric` and `layer` (missing for metrics of the whole model);
            `value` is the mean over queries and heads of the `n` defined values, `undefined` others being left out (for
            `rec2ftp`, which is about the queries that finetuning corrects, those are the others).
    """

    frame: pd.DataFrame


def compare(
    model: HookedTransformer,
    episode: Episode,
    methods: Sequence[Method] = ("gd", "lcgd"),
    *,
    lr: float | Mapping[str, float] = 0.01,
    untrained: HookedTransformer | None = None,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    schedule: Schedule = "online",
    epochs: int = 1,
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
    batch_size: int = 32,
    on_run: Callable[[], None] | None = None,
) -> Comparison:
    """Compare what demonstrations do in-context with what gradient steps on them do.

    Args:
        model: The model.
        episode: The demonstrations and queries, tokenised for it.
        methods: `"gd"`, `"lcgd"` or both; α needs both.
        lr: The step size, or one for each method: similarities depend on it.
        untrained: An untrained twin, which then goes through all the same (`untrained_twin(model)`).
        loss_on: As in `gd` and `lcgd`, as are `readout`, `schedule`, `epochs` and `parameters`.
        readout: See `loss_on`.
        schedule: See `loss_on`.
        epochs: See `loss_on`.
        parameters: See `loss_on`.
        batch_size: As in `capture`.
        on_run: Called after every run, of which there are `n_runs(methods, untrained)`.

    Raises:
        ValueError: If a method is unknown or has no learning rate, or as `capture`, `gd` and `lcgd` do.
    """
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"methods must be some of {', '.join(METHODS)}; got {list(methods)}")
    rates = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(map(str, methods), lr)
    if missing := [method for method in methods if method not in rates]:
        raise ValueError(f"lr names no learning rate for {missing[0]!r}; got {rates}")
    options: dict[str, Any] = {"loss_on": loss_on, "readout": readout, "schedule": schedule, "epochs": epochs}
    tick = on_run or (lambda: None)

    rows: list[dict[str, Any]] = []
    for name, subject in {"trained": model, "untrained": untrained}.items():
        if subject is None:
            continue
        runs = _run(subject, episode, methods, rates, {**options, "parameters": parameters}, batch_size, tick)
        rows += [{"model": name, **row} for row in _measure(runs, methods, rates, episode.seed)]
    frame = pd.DataFrame(rows)
    source = {"task": episode.task, "k": episode.k, "seed": episode.seed, "n_queries": len(episode.queries)}
    for column, value in reversed((source | options | {"parameters": " ".join(parameters)}).items()):
        frame.insert(0, column, value)
    return Comparison(frame.astype({"layer": "Int64"}))


def n_runs(methods: Sequence[Method], untrained: bool) -> int:
    """How often `compare` calls `on_run`: zero-shot, in-context, and each method's update and run, for every model."""
    return (2 + 2 * len(methods)) * (2 if untrained else 1)


def _run(
    model: HookedTransformer,
    episode: Episode,
    methods: Sequence[Method],
    rates: dict[str, float],
    options: dict[str, Any],
    batch_size: int,
    tick: Callable[[], None],
) -> dict[str, Activations]:
    def seen(**how: Any) -> Activations:
        run = capture(model, episode.queries, keep=KEEP, batch_size=batch_size, **how)
        tick()
        return run

    runs = {"zsl": seen(), "icl": seen(context=episode.demonstrations)}
    for method in methods:
        update = METHODS[method](model, episode.demonstrations, lr=rates[method], label_tokens=episode.label_tokens, **options)
        tick()
        runs[method] = seen(update=update)
    return runs


def _measure(
    runs: dict[str, Activations], methods: Sequence[Method], rates: dict[str, float], seed: int
) -> Iterator[dict[str, Any]]:
    zsl, icl = runs["zsl"], runs["icl"]
    for name, run in runs.items():
        yield from _rows("accuracy", correct(run), method=name, lr=rates.get(name))
    yield from _rows("sim_am", sim_am(icl, zsl), method="zsl")
    for index, method in enumerate(methods):
        about: dict[str, Any] = {"method": method, "lr": rates[method]}
        yield from _rows("rec2ftp", rec2ftp(icl, runs[method], zsl), **about)
        random = random_update(runs[method], zsl, seed=len(methods) * seed + index)
        for control, ft in (("none", runs[method]), ("random", random)):
            about["control"] = control
            yield from _rows("sim_aou", sim_aou(icl, ft, zsl), **about)
            yield from _rows("sim_aou_norm", sim_aou_norm(icl, ft, zsl), **about)
            yield from _rows("sim_am", sim_am(icl, ft), **about)
            yield from _rows("sim_am_delta", sim_am_delta(icl, ft, zsl), **about)
            if method == "lcgd" and "gd" in runs:
                yield from _rows("alpha_aou", alpha(ft, runs["gd"], zsl, of="attn_out"), **about)
                yield from _rows("alpha_am", alpha(ft, runs["gd"], zsl, of="query_scores"), **about)


def _rows(metric: str, values: Tensor, *, method: str, lr: float | None = None, control: str = "none") -> Iterator[dict[str, Any]]:
    """One row per layer, `values` being `[query layer ...]`, or one row for `[query]` values of the whole model."""
    layers = [(None, values)] if values.ndim == 1 else list(enumerate(values.unbind(dim=1)))
    for layer, per_query in layers:
        defined = ~per_query.isnan()
        yield {
            "method": method,
            "lr": lr,
            "control": control,
            "layer": layer,
            "metric": metric,
            "value": per_query[defined].cpu().double().mean().item(),
            "n": int(defined.sum()),
            "undefined": int((~defined).sum()),
        }
