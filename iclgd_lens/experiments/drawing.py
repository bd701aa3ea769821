"""What a protocol runs on: the episodes of every task, to report on and to choose learning rates on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.registry import load_task
from iclgd_lens.data.tasks import Task
from iclgd_lens.experiments.protocol import Protocol
from iclgd_lens.models.hooked import HookedModel


@dataclass(frozen=True, eq=False)
class SeedDraw:
    """What is run for one seed of a task.

    Attributes:
        seed: The seed.
        episodes: The same demonstrations and queries, in every order of the demonstrations.
        other: Demonstrations of another task, where the control `"other_task"` is wanted.
    """

    seed: int
    episodes: tuple[Episode, ...]
    other: Episode | None


def load_tasks(protocol: Protocol, data: str | Path | None) -> dict[str, Task]:
    """Load the tasks of a protocol, and those that the control `"other_task"` takes demonstrations from, by name.

    Raises:
        ValueError: As `load_task`.
        OSError: As `load_task`.
    """
    others = (protocol.other(task) for task in protocol.tasks)
    return {
        name: load_task(name, data, separator=protocol.separator, space_before_labels=protocol.space_before_labels)
        for name in dict.fromkeys([*protocol.tasks, *filter(None, others)])
    }


def tunes(protocol: Protocol) -> bool:
    """Whether a protocol needs held-out draws."""
    return protocol.lr == "auto" or protocol.lr_curve


def draw_to_report(protocol: Protocol, tasks: Mapping[str, Task], name: str, model: HookedModel) -> list[SeedDraw]:
    """Draw what is reported of a task: every seed, in every order.

    Raises:
        ValueError: As `Task.episode`.
    """
    plan, other_name = protocol.plan(name), protocol.other(name)
    task = tasks[name].for_reporting() if tunes(protocol) else tasks[name]
    draws = []
    for seed in plan.seeds:
        first = task.episode(model, k=plan.k, n_queries=plan.n_queries, seed=seed)
        # As many as the true ones, so that it is another task and not another number of steps.
        other = None if other_name is None else tasks[other_name].demonstrations(model, k=first.k, seed=seed)
        # A few demonstrations may have fewer orders than are wanted.
        orders = range(min(protocol.orders, math.factorial(first.k)))
        draws.append(SeedDraw(seed, tuple(first.reordered(order) for order in orders), other))
    return draws


def draw_for_tuning(protocol: Protocol, task: Task, name: str, model: HookedModel) -> list[Episode]:
    """Draw what learning rates are chosen on; nothing if the protocol chooses none.

    Raises:
        ValueError: As `Task.episode`.
    """
    if not tunes(protocol):
        return []
    held_out, plan = task.for_tuning(), protocol.plan(name)
    return [held_out.episode(model, k=plan.k, n_queries=protocol.n_tuning_queries, seed=seed) for seed in plan.tuning_seeds]
