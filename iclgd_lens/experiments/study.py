"""A study: a grid of comparisons, as a file that is checked before anything runs.

A file names what is varied; every combination of it is run:

    models: [bundled]
    tasks: [bundled/remapped, bundled/natural]
    seeds: [0, 1, 2]
    k: [4, 12]
    lr: [0.01, 0.1]

What it leaves out has the defaults of `Study`. A list of one may be written without brackets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, ValidationInfo, field_validator

from iclgd_lens.checks import require_some_of
from iclgd_lens.data.escapes import unescaped
from iclgd_lens.data.formats import require_text
from iclgd_lens.data.registry import require_tasks
from iclgd_lens.draws import MOST_SEED
from iclgd_lens.experiments.checked_yaml import read_checked
from iclgd_lens.experiments.learning_rate import UPDATE_OPTIONS
from iclgd_lens.experiments.methods import Control, Method
from iclgd_lens.experiments.paper import PAPER
from iclgd_lens.experiments.protocol import TWINS
from iclgd_lens.models.identity import require_model, shown_name
from iclgd_lens.models.loading import Backend, parse_device
from iclgd_lens.updates.dual import LossOn, Readout, Schedule, UpdateSettings
from iclgd_lens.updates.inject import Parameter


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"{twice[0]!r} is named twice")
    return values


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelChoice(_Strict):
    """A model of a study, and how it is loaded; as in `load_model`.

    Attributes:
        name: `"bundled"`, a folder, or a name that TransformerLens or the hub knows.
        backend: As in `load_model`.
        dtype: The dtype of the weights.
        device: A torch device; by default CUDA where there is one, else the CPU.
        process_weights: As in `load_model`.
    """

    name: str
    backend: Backend = "auto"
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str | None = None
    process_weights: bool = False

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        require_model(name)
        return name

    @property
    def shown(self) -> str:
        """What it is called in results: its name, or its folder's, without the path."""
        return shown_name(self.name)


class Updates(_Strict):
    """How updates are made, as in `gd`."""

    loss_on: LossOn = UPDATE_OPTIONS["loss_on"]
    readout: Readout = UPDATE_OPTIONS["readout"]
    schedule: Schedule = UPDATE_OPTIONS["schedule"]
    epochs: Annotated[int, Field(ge=1)] = UPDATE_OPTIONS["epochs"]
    parameters: Annotated[tuple[Parameter, ...], BeforeValidator(_listed)] = UPDATE_OPTIONS["parameters"]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `gd`.

        Raises:
            ValueError: If they do not go together.
        """
        options = self.model_dump()
        UpdateSettings("gd", 0.0, **options)
        return options


class Local(_Strict):
    """Run on this machine, in worker processes.

    Attributes:
        kind: `"local"`.
        workers: How many processes.
        threads: Torch threads of each; by default the cores are shared out, and 1 for the bundled model.
        gpus: How many GPUs there are; workers take them in turns. 0 hides them.
        timeout_min: After how many minutes a worker is stopped, and started again.
    """

    kind: Literal["local"] = "local"
    workers: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[int, Field(ge=0)] = Field(default_factory=torch.cuda.device_count)
    timeout_min: Annotated[int, Field(ge=1)] = 7 * 24 * 60


class Slurm(_Strict):
    """Run as an array of jobs on a SLURM cluster.

    Attributes:
        kind: `"slurm"`.
        workers: The size of the array.
        parallel: How many of them may run at once.
        partition: As in `sbatch`, as are `account`, `qos` and `constraint`.
        account: See `partition`.
        qos: See `partition`.
        constraint: See `partition`.
        gpus: GPUs of each worker, which uses one.
        cpus: Cores of each worker, and its torch threads.
        mem_gb: Memory of each worker.
        timeout_min: Time limit of each worker in minutes. One that comes to it, or is preempted, is queued again.
        requeues: How often it is.
        setup: Shell commands before a worker starts, such as the activation of an environment.
        more: Further options of `sbatch`.
    """

    kind: Literal["slurm"]
    workers: Annotated[int, Field(ge=1)] = 8
    parallel: Annotated[int, Field(ge=1)] = 256
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: Annotated[int, Field(ge=0)] = 1
    cpus: Annotated[int, Field(ge=1)] = 4
    mem_gb: Annotated[float, Field(gt=0)] = 32
    timeout_min: Annotated[int, Field(ge=1)] = 4 * 60
    requeues: Annotated[int, Field(ge=0)] = 10
    setup: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()
    more: dict[str, str | int | bool] = Field(default_factory=dict)


class Debug(_Strict):
    """Run in this process, one cell after the other.

    Attributes:
        kind: `"debug"`.
        threads: Torch threads; by default 1 for the bundled model, else torch's choice.
    """

    kind: Literal["debug"]
    workers: Literal[1] = 1
    threads: Annotated[int, Field(ge=1)] | None = None


Rate = Literal["paper"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]

Several = BeforeValidator(_listed)


class Study(_Strict):
    r"""A grid: every model × task × seed × order × k × method × learning rate × control, and the same on untrained twins.

    Attributes:
        models: The models: names, or mappings as in `ModelChoice`.
        tasks: Names of tasks, as in `load_task`.
        separator: What stands between demonstrations, as in `load_task`; by default each task's own. `\n` is a line break, also
            where YAML leaves it as a backslash and a letter.
        space_before_labels: Whether a space stands before label words, as in `load_task`; by default as each task has it.
        seeds: The seeds of the demonstrations, and of the twins.
        orders: How many orders of the same demonstrations, where they have so many.
        k: Numbers of demonstrations, or `"fit"`, as in `Task.episode`.
        queries: Queries of an episode, at most.
        methods: `"gd"`, `"lcgd"` or both; where both, α compares them at the same rate.
        lr: Learning rates; `"paper"` is the paper's for the task.
        controls: As in `compare`.
        twins: Names of untrained twins, as in `Protocol`; they have the control `"random"` at most.
        other_task: Where the control `"other_task"` takes demonstrations from; by default the next one of `tasks`.
        updates: How updates are made, one or several ways.
        data: The folder of local data, as in `load_task`.
        batch_size: As in `capture`; changes no result but by rounding.
        executor: Where it runs: `Local`, `Slurm` or `Debug`, by `kind`.

    Raises:
        ValueError: If a name is unknown, a number out of range, or something does not go together; all of it at once, as pydantic's
            `ValidationError`.
    """

    models: Annotated[tuple[ModelChoice, ...], Several, Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Several, Field(min_length=1)]
    separator: str | None = None
    space_before_labels: StrictBool | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, le=MOST_SEED)], ...], Several, Field(min_length=1)]
    orders: Annotated[int, Field(ge=1)] = 1
    k: Annotated[tuple[Literal["fit"] | Annotated[int, Field(ge=1)], ...], Several, Field(min_length=1)] = ("fit",)
    queries: Annotated[int, Field(ge=1)] = 64
    methods: Annotated[tuple[Method, ...], Several, Field(min_length=1)] = ("gd", "lcgd")
    lr: Annotated[tuple[Rate, ...], Several, Field(min_length=1)]
    controls: Annotated[tuple[Control, ...], Several] = ("random",)
    twins: Annotated[tuple[str, ...], Several] = ("untrained",)
    other_task: Annotated[str | None, Field(validate_default=True)] = None
    updates: Annotated[tuple[Updates, ...], Several, Field(min_length=1)] = (Updates(),)
    data: str | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    executor: Annotated[Local | Slurm | Debug, Field(discriminator="kind", validate_default=True)] = Local()

    @field_validator("models", mode="before")
    @classmethod
    def _by_name(cls, models: Any) -> Any:
        return [{"name": model} if isinstance(model, str) else model for model in _listed(models)]

    @field_validator("models", "tasks", "seeds", "k", "methods", "lr", "controls", "twins", "updates")
    @classmethod
    def _no_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return _different(values)

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        require_tasks(list(tasks))
        return tasks

    @field_validator("separator")
    @classmethod
    def _line_breaks(cls, separator: str | None) -> str | None:
        if separator is None:
            return None
        require_text(separator, "the separator")
        return unescaped("the separator", separator)

    @field_validator("lr")
    @classmethod
    def _paper_has_rates(cls, rates: tuple[Rate, ...], info: ValidationInfo) -> tuple[Rate, ...]:
        missing = [task for task in info.data.get("tasks", ()) if task not in PAPER]
        if "paper" in rates and missing:
            raise ValueError(f"the paper has no learning rate for task {missing[0]!r} (it has one for {', '.join(PAPER)})")
        return rates

    @field_validator("twins")
    @classmethod
    def _known_twins(cls, twins: tuple[str, ...]) -> tuple[str, ...]:
        require_some_of("twins", twins, tuple(TWINS))
        return twins

    @field_validator("other_task")
    @classmethod
    def _other_is_there(cls, other: str | None, info: ValidationInfo) -> str | None:
        tasks, wanted = info.data.get("tasks", ()), "other_task" in info.data.get("controls", ())
        if other is None:
            if wanted and len(tasks) == 1:
                raise ValueError(f"the control 'other_task' needs a task other than {tasks[0]!r}: name one here, or several tasks")
            return None
        require_tasks([other])
        if not wanted:
            raise ValueError("this is for the control 'other_task', which is not among the controls")
        if other in tasks:
            raise ValueError(f"{other!r} is one of the tasks itself; leave it out, and each takes the next one's")
        return other

    @field_validator("updates")
    @classmethod
    def _go_together(cls, updates: tuple[Updates, ...]) -> tuple[Updates, ...]:
        for each in updates:
            each.options()
        return updates

    @field_validator("executor")
    @classmethod
    def _devices_are_here(cls, executor: Local | Slurm | Debug, info: ValidationInfo) -> Local | Slurm | Debug:
        if not isinstance(executor, Slurm):
            for model in info.data.get("models", ()):
                parse_device(model.device)
        if isinstance(executor, Local) and executor.gpus > torch.cuda.device_count():
            raise ValueError(f"gpus is {executor.gpus}, but this machine has {torch.cuda.device_count()}")
        return executor

    def other(self, task: str) -> str | None:
        """The task that the control `"other_task"` takes demonstrations from; None without that control."""
        if "other_task" not in self.controls:
            return None
        return self.other_task or self.tasks[(self.tasks.index(task) + 1) % len(self.tasks)]

    @classmethod
    def read(cls, path: str | Path) -> Study:
        """Read a study from a YAML file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not YAML, has an unknown key, an unknown name, or what does not go together; the message gives
                the line and the reason of each.
        """
        return read_checked(Path(path), cls, "a study is a mapping, as in `models: bundled`")
