"""Learning rates: chosen by what finetuning does to the task, never by a similarity; and how similarities depend on them.

Similarities of both methods depend on the step size, so comparing GD with LCGD at one arbitrary rate misleads. `search` gives each
method the rate at which its finetuned model does the task best, on draws and queries that no result is reported on. No
in-context run is made there, so no similarity can be looked at. `similarity_by_rate` is the curve to show beside any choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count, islice
from typing import Any

import pandas as pd

from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.methods import METHODS, Method
from iclgd_lens.experiments.reference import Reference
from iclgd_lens.metrics.agreement import accuracy, label_loss
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ALL_PARAMETERS
from iclgd_lens.updates.gradient import DivergedError

GRID: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Two rates per decade, which span those of the paper with room on both sides."""

UPDATE_OPTIONS: Mapping[str, Any] = {
    "loss_on": "demonstration",
    "readout": "vocab",
    "schedule": "online",
    "epochs": 1,
    "parameters": ALL_PARAMETERS,
}
"""How updates are made where nothing else is said; the defaults of `gd` and `lcgd`."""


def held_out_seeds(reported: Collection[int], n: int = 3) -> tuple[int, ...]:
    """The first n seeds from 1000 on that are not among those reported."""
    return tuple(islice((seed for seed in count(1000) if seed not in set(reported)), n))


def search(
    model: HookedModel,
    episodes: Sequence[Episode],
    methods: Sequence[Method] = ("gd", "lcgd"),
    grid: Sequence[float] = GRID,
    *,
    batch_size: int | None = None,
    on_run: Callable[[], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Finetune with every method at every rate and measure how well that does the task.

    Args:
        model: The model.
        episodes: Held-out ones: `task.for_tuning().episode(model, seed=...)` with a seed that is not reported.
        methods: As in `compare`.
        grid: The learning rates to try.
        batch_size: As in `capture`.
        on_run: Called after every method, rate and episode.
        options: As in `gd`: `loss_on`, `readout`, `schedule`, `epochs`, `parameters`.

    Returns:
        One row per task, method, rate and episode: `accuracy` on the queries, `label_loss` (mean cross-entropy of the gold label
        among the label words, in nats) and `problem`, which is empty or says how the update diverged; both numbers are then
        missing.
    """
    rows = []
    for episode in episodes:
        for method in methods:
            for lr in grid:
                row: dict[str, Any] = {"task": episode.task, "method": method, "lr": float(lr), "seed": episode.seed}
                try:
                    update = METHODS[method](model, episode.demonstrations, lr=lr, label_tokens=episode.label_tokens, **options)
                    run = capture(model, episode.queries, update=update, keep=["label_log_probs"], batch_size=batch_size)
                    row |= {"accuracy": accuracy(run).item(), "label_loss": label_loss(run).nanmean().item(), "problem": ""}
                except DivergedError as error:
                    row |= {"accuracy": float("nan"), "label_loss": float("nan"), "problem": str(error)}
                rows.append(row)
                if on_run is not None:
                    on_run()
    return pd.DataFrame(rows)


def choose(searched: pd.DataFrame) -> dict[str, float]:
    """Choose every method's learning rate: the highest mean accuracy, of those the lowest mean loss, of those the lowest rate.

    A rate at which the update diverged, or an output became non-finite, in any episode is out.

    Args:
        searched: What `search` found for one task.

    Raises:
        ValueError: If a method diverged at every rate.
    """
    chosen = {}
    for method, group in searched.groupby("method", sort=False):
        sound = group.groupby("lr").filter(lambda at_rate: bool(at_rate[["accuracy", "label_loss"]].notna().all(axis=None)))
        if sound.empty:
            tried = ", ".join(f"{lr:g}" for lr in group["lr"].unique())
            raise ValueError(f"{method} diverged at every learning rate tried ({tried}), or no query has a gold label")
        means = sound.groupby("lr")[["accuracy", "label_loss"]].mean().round(12).reset_index()
        ranked = means.sort_values(["accuracy", "label_loss", "lr"], ascending=[False, True, True])
        chosen[str(method)] = float(ranked["lr"].iloc[0])
    return chosen


def similarity_by_rate(
    model: HookedModel,
    episodes: Sequence[Episode],
    methods: Sequence[Method] = ("gd", "lcgd"),
    grid: Sequence[float] = GRID,
    *,
    batch_size: int | None = None,
    called: str = "trained",
    on_run: Callable[[], None] | None = None,
    **options: Any,
) -> pd.DataFrame:
    """How every metric depends on the learning rate: the frame of `compare` at each of them, the runs without update made once.

    A rate at which a method diverges has no rows of that method; the frame is empty if none has any.

    Args:
        model: The model.
        episodes: What to measure on.
        methods: As in `compare`.
        grid: The learning rates.
        batch_size: As in `capture`.
        called: What the column `model` says of the model.
        on_run: Called after every method, rate and episode.
        options: As in `gd`: `loss_on`, `readout`, `schedule`, `epochs`, `parameters`.

    Raises:
        ValueError: As `capture`, `gd` and `lcgd` do, but for updates that diverge.
    """
    frames = []
    for episode in episodes:
        reference = Reference.of(model, episode, called=called, batch_size=batch_size)
        for method in methods:
            for lr in grid:
                try:
                    frame = reference.compare([method], {method: lr}, **{**UPDATE_OPTIONS, **options}).frame
                    frames.append(frame[frame["method"] == method])
                except DivergedError:
                    continue
                finally:
                    if on_run is not None:
                        on_run()
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
