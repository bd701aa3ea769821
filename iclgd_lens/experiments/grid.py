"""The cells of a study: what is run, told apart by everything that determines it, without a model being loaded.

Cells that share a model, an episode and an order of its demonstrations are a *group*: their queries are run zero-shot and
in-context once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from iclgd_lens.data.formats import PromptFormat
from iclgd_lens.data.registry import load_task
from iclgd_lens.data.tasks import Task
from iclgd_lens.experiments.cells import cell_digest
from iclgd_lens.experiments.methods import Control
from iclgd_lens.experiments.paper import PAPER
from iclgd_lens.experiments.protocol import TWINS
from iclgd_lens.experiments.study import ModelChoice, Study, Updates
from iclgd_lens.models.identity import model_digest

RUNS = "runs"
"""The method of the cell that holds what there is without an update: the queries zero-shot and in-context."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A point of the grid within its group.

    Attributes:
        digest: Tells it apart from every other, and names its file.
        method: `"gd"`, `"lcgd"` or `RUNS`.
        lr: The learning rate; None for `RUNS`.
        updates: How updates are made.
        control: What stands in the place of the update; None for the update itself.
    """

    digest: str
    method: str
    lr: float | None
    updates: Updates
    control: Control | None

    @property
    def about(self) -> str:
        """What it is, in words, within its group."""
        if self.method == RUNS:
            return "zero-shot and in-context"
        control = "" if self.control is None else f", {self.control}"
        return f"{self.method} at {self.lr:g}{control}"


@dataclass(frozen=True)
class Group:
    """Cells of one model, or one untrained twin of it, on one episode in one order.

    Attributes:
        model: The model.
        called: `"trained"`, or the twin's name.
        task: The task's name.
        k: The number of demonstrations, or `"fit"`.
        seed: The seed of the demonstrations and of the twin.
        order: The order of the demonstrations.
        digest: Tells it apart from other groups, of any study.
        cells: Its cells, those of one update together.
    """

    model: ModelChoice
    called: str
    task: str
    k: int | Literal["fit"]
    seed: int
    order: int
    digest: str
    cells: tuple[Cell, ...]

    @property
    def about(self) -> str:
        """What it is, in words."""
        model = self.model.shown if self.called == "trained" else f"{self.model.shown} ({self.called})"
        return f"{model}, {self.task}, k {self.k}, seed {self.seed}, order {self.order}"


def _rewritten(own: PromptFormat, written: PromptFormat) -> dict[str, str | None]:
    separator = None if written.separator == own.separator else json.dumps(written.separator, ensure_ascii=False)
    space = None if written.space_before_labels == own.space_before_labels else "yes" if written.space_before_labels else "no"
    return {"separator": separator, "space_before_labels": space}


Point = tuple[str, float | None, Updates, Control | None]
"""A cell without its digest."""


@dataclass(frozen=True)
class Grid:
    """A study's tasks, and what its names stand for.

    Attributes:
        study: The study.
        tasks: Its tasks by name, written as it says, with those that the control `"other_task"` takes demonstrations from.
        rewritten: By task, the columns that say what is written otherwise than the task has it: `separator`, as JSON writes it, and
            `space_before_labels`, yes or no. None for what is as the task has it.
        weights: What tells its models' weights apart, in the study's order.
    """

    study: Study
    tasks: Mapping[str, Task]
    rewritten: Mapping[str, Mapping[str, str | None]]
    weights: tuple[str, ...]

    @classmethod
    def of(cls, study: Study) -> Grid:
        """Load a study's tasks and find out which weights its models' names stand for.

        Raises:
            ValueError: As `load_task` and `model_digest`.
            OSError: As `load_task` and `model_digest`.
        """
        others = [study.other(task) for task in study.tasks]
        names = dict.fromkeys([*study.tasks, *(other for other in others if other)])
        own = {name: load_task(name, study.data) for name in names}
        tasks = {
            name: task.with_format(separator=study.separator, space_before_labels=study.space_before_labels)
            for name, task in own.items()
        }
        rewritten = {name: _rewritten(own[name].format, task.format) for name, task in tasks.items()}
        return cls(study, tasks, rewritten, tuple(model_digest(model.name) for model in study.models))

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups. Those of one model follow each other, and of these those of one twin."""
        study = self.study
        inner = {(called, task): tuple(self._inner(called, task)) for called in self.subjects for task in study.tasks}
        found = []
        for index, called, seed, task, k in product(range(len(study.models)), self.subjects, study.seeds, study.tasks, study.k):
            # A few demonstrations may have fewer orders than are wanted.
            for order in range(study.orders if k == "fit" else min(study.orders, math.factorial(k))):
                found.append(self._group(index, called, task, k, seed, order, inner[called, task]))
        return tuple(found)

    @property
    def subjects(self) -> tuple[str, ...]:
        """What each model and its twins are called."""
        return ("trained", *self.study.twins)

    def with_cells(self, digests: Collection[str]) -> list[Group]:
        """The groups that have any of these cells."""
        wanted = frozenset(digests)
        return [group for group in self.groups if any(cell.digest in wanted for cell in group.cells)]

    def __len__(self) -> int:
        return sum(len(group.cells) for group in self.groups)

    def _group(
        self,
        index: int,
        called: str,
        task: str,
        k: int | Literal["fit"],
        seed: int,
        order: int,
        inner: tuple[tuple[str, Point], ...],
    ) -> Group:
        model = self.study.models[index]
        key = {
            "weights": self.weights[index],
            "loaded": [model.backend, model.dtype, model.process_weights],
            "keep": TWINS.get(called),
            "task": self.tasks[task].digest,
            "k": k,
            "queries": self.study.queries,
            "seed": seed,
            "order": order,
            "names": [model.shown, task, called],
        }
        digest = cell_digest(key)
        # In two steps, so that a hundred thousand cells take seconds.
        cells = tuple(Cell(hashlib.sha256(f"{digest}{own}".encode()).hexdigest()[: len(digest)], *point) for own, point in inner)
        return Group(model, called, task, k, seed, order, digest, cells)

    def _inner(self, called: str, task: str) -> Iterator[tuple[str, Point]]:
        """What is the same in all groups of a model or twin on a task: every cell's place, and what determines it beside its
        group.
        """
        study, other = self.study, self.study.other(task)
        controls: list[Control | None] = [None, *(each for each in study.controls if called == "trained" or each == "random")]
        rates = dict.fromkeys(PAPER[task].lr if rate == "paper" else rate for rate in study.lr)
        for updates in study.updates:
            # Rows name the options, so that those without an update can be laid beside others.
            options = updates.options()
            yield json.dumps([RUNS, options]), (RUNS, None, updates, None)
            for lr, method, control in product(rates, study.methods, controls):
                # LCGD is compared with GD at the same rate.
                alpha = method == "lcgd" and "gd" in study.methods
                demonstrations = self.tasks[other].digest if other and control == "other_task" else None
                own = json.dumps([method, options, lr, control, alpha, demonstrations])
                yield own, (method, lr, updates, control)
