"""The paper's protocol: which episodes, at which rates, with which controls (Deutch et al. 2024, section 4 and Table 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from iclgd_lens.checks import in_order, require_bool, require_count, require_some_of
from iclgd_lens.data.formats import require_text
from iclgd_lens.data.registry import BUNDLED_TASKS, require_tasks
from iclgd_lens.data.tasks import require_k
from iclgd_lens.experiments.learning_rate import GRID, UPDATE_OPTIONS, held_out_seeds
from iclgd_lens.experiments.methods import CONTROLS, Control, Method, require_methods
from iclgd_lens.experiments.paper import PAPER
from iclgd_lens.models.untrained import Part
from iclgd_lens.updates.dual import UpdateSettings

Rate = Literal["auto", "paper"] | float

TWINS: Mapping[str, tuple[Part, ...]] = {
    "untrained": ("embed", "pos_embed", "ln", "unembed"),
    "untrained, ln kept": ("ln",),
}
"""The untrained twins by what the column `model` calls them, with the parts that they keep: the paper's baseline, which keeps
embeddings, layer norms and unembedding, and its variant, which keeps layer norms only."""


@dataclass(frozen=True)
class TaskPlan:
    """What is run of one task.

    Attributes:
        seeds: The seeds of the demonstrations.
        k: The number of demonstrations, or `"fit"`.
        n_queries: The number of queries at most.
        tuning_seeds: The held-out seeds that learning rates are chosen on.
    """

    seeds: tuple[int, ...]
    k: int | Literal["fit"]
    n_queries: int
    tuning_seeds: tuple[int, ...]


@dataclass(frozen=True)
class Protocol:
    """A whole study of one model. What is None has a default for each task: `plan` says which.

    Attributes:
        tasks: Names of tasks.
        seeds: The seeds of the demonstrations; by default those of the paper, 0 to 9 for bundled tasks and 0 to 2 for others.
        k: Demonstrations per episode, or `"fit"`; by default as many of 32 as fit, and 12 for bundled tasks.
        n_queries: Queries at most; by default 2000, and 32 for bundled tasks.
        orders: How many orders of the same demonstrations, where they have so many.
        lr: `"paper"`: the paper's learning rate for the task. `"auto"`: chosen for each task and method by `learning_rate.search`.
            A number: that rate for all.
        methods: `"gd"`, `"lcgd"` or both.
        controls: See `compare`. The twins have the control `"random"` at most.
        other_task: Where the control `"other_task"` takes demonstrations from; by default the next one of `tasks`.
        twins: Names out of `TWINS`.
        grid: The learning rates of `"auto"` and of the curve.
        n_tuning_seeds: How many held-out draws `"auto"` and the curve use; by default 10 for bundled tasks and 3 for others.
        n_tuning_queries: How many queries each of those has at most.
        lr_curve: Whether to measure similarity against learning rate, on the held-out draws.
        options: How updates are made, as in `gd`: `loss_on`, `readout`, `schedule`, `epochs` and `parameters`; the defaults are
            those of `gd`.
        separator: What stands between demonstrations, as in `load_task`; by default each task's own.
        space_before_labels: Whether a space stands before label words, as in `load_task`; by default as each task has it.

    Raises:
        ValueError: If anything is unknown, out of range or does not fit another.
    """

    tasks: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    k: int | Literal["fit"] | None = None
    n_queries: int | None = None
    orders: int = 3
    lr: Rate = "auto"
    methods: tuple[Method, ...] = ("gd", "lcgd")
    controls: tuple[Control, ...] = ("random",)
    other_task: str | None = None
    twins: tuple[str, ...] = tuple(TWINS)
    grid: tuple[float, ...] = GRID
    n_tuning_seeds: int | None = None
    n_tuning_queries: int = 64
    lr_curve: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: dict(UPDATE_OPTIONS))
    separator: str | None = None
    space_before_labels: bool | None = None

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Protocol:
        """Make a protocol of what `dataclasses.asdict` made of one, and JSON of that."""
        as_tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
        options = {name: tuple(value) if isinstance(value, list) else value for name, value in written["options"].items()}
        return cls(**as_tuples | {"options": options})

    def __post_init__(self) -> None:
        for name in ("tasks", "seeds", "grid", "methods", "controls", "twins"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, in_order(name, given))
        if not self.tasks:
            raise ValueError("no tasks: name at least one")
        for name in ("tasks", "seeds", "grid", "methods", "controls", "twins"):
            values = getattr(self, name) or ()
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} names {twice[0]!r} twice")
        require_methods(self.methods)
        require_some_of("controls", self.controls, CONTROLS)
        require_some_of("twins", self.twins, tuple(TWINS))
        for name in ("orders", "n_queries", "n_tuning_seeds", "n_tuning_queries"):
            if (value := getattr(self, name)) is not None:
                require_count(name, value)
        if self.k is not None:
            require_k(self.k)
        if self.seeds is not None and not self.seeds:
            raise ValueError("seeds must be at least one; got none")
        if self.separator is not None:
            require_text(self.separator, "the separator")
        if self.space_before_labels is not None:
            require_bool("space_before_labels", self.space_before_labels)
        self._check_rate()
        object.__setattr__(self, "options", {**UPDATE_OPTIONS, **self.options})
        UpdateSettings("gd", 0.0, **self.options)  # which checks the options
        for task in self.tasks:
            self.other(task)

    def _check_rate(self) -> None:
        if isinstance(self.lr, str):
            if self.lr not in get_args(get_args(Rate)[0]):
                raise ValueError(f"lr must be 'auto', 'paper' or a number, got {self.lr!r}")
            if self.lr == "paper" and (missing := [task for task in self.tasks if task not in PAPER]):
                raise ValueError(
                    f"lr='paper', but the paper has no learning rate for task {missing[0]!r}; use 'auto' or a number "
                    f"(it has one for {', '.join(PAPER)})"
                )
        elif not isinstance(self.lr, Real) or not 0 <= self.lr < float("inf"):
            raise ValueError(f"lr must be 'auto', 'paper' or a number that is finite and not negative, got {self.lr!r}")
        if not self.grid or any(not isinstance(lr, Real) or not 0 < lr < float("inf") for lr in self.grid):
            raise ValueError(f"grid must be learning rates above 0, got {list(self.grid)}")

    def require_tasks(self) -> None:
        """Check that all tasks are known here, as those of a protocol that was read need not be.

        Raises:
            ValueError: If one is not.
        """
        require_tasks([*self.tasks, *([self.other_task] if self.other_task else [])])

    def plan(self, task: str) -> TaskPlan:
        """What is run of a task, defaults filled in."""
        bundled = task in BUNDLED_TASKS
        seeds = self.seeds or (PAPER[task].seeds if task in PAPER else tuple(range(10 if bundled else 3)))
        return TaskPlan(
            seeds=seeds,
            k=self.k or (12 if bundled else "fit"),
            n_queries=self.n_queries or (32 if bundled else 2000),
            tuning_seeds=held_out_seeds(seeds, self.n_tuning_seeds or (10 if bundled else 3)),
        )

    def other(self, task: str) -> str | None:
        """The task that `"other_task"` takes demonstrations from; None without that control.

        Raises:
            ValueError: If there is none.
        """
        if "other_task" not in self.controls:
            return None
        after: Sequence[str] = [*self.tasks, *self.tasks][self.tasks.index(task) + 1 :]
        candidates = [self.other_task] if self.other_task else after
        if not candidates or candidates[0] == task:
            raise ValueError(f"the control 'other_task' needs a task other than {task!r}: name one as other_task, or run several")
        return candidates[0]
