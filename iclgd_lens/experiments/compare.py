"""One comparison, whole: ZSL, ICL and FT by each method on one episode, on a model and on its untrained twin.

>>> from iclgd_lens.data.registry import load_task
>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> episode = load_task("bundled/remapped").episode(model, k=4, n_queries=8, seed=0)
>>> frame = compare(model, episode, lr=0.01).frame
>>> [metric for metric in sorted(frame["metric"].unique()) if metric.startswith("sim")]
['sim_am', 'sim_am_delta', 'sim_am_zsl', 'sim_aou', 'sim_aou_norm']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from iclgd_lens.checks import in_order, require_one_of, require_some_of
from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.comparison import Comparison
from iclgd_lens.experiments.kernels import TICKS, require_kernel_views
from iclgd_lens.experiments.methods import CONTROLS, Control, Method, require_methods
from iclgd_lens.experiments.reference import Reference
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.updates.dual import ALL_PARAMETERS, LossOn, Readout, Schedule
from iclgd_lens.updates.inject import Parameter

IfDiverged = Literal["raise", "record"]


def compare(
    model: HookedModel,
    episode: Episode,
    methods: Iterable[Method] = ("gd", "lcgd"),
    *,
    lr: float | Mapping[str, float] = 0.01,
    untrained: HookedModel | None = None,
    controls: Iterable[Control] = ("random",),
    other: Episode | None = None,
    loss_on: LossOn = "demonstration",
    readout: Readout = "vocab",
    schedule: Schedule = "online",
    epochs: int = 1,
    parameters: Sequence[Parameter] = ALL_PARAMETERS,
    kernels: bool = False,
    batch_size: int | None = None,
    called: str = "trained",
    if_diverged: IfDiverged = "raise",
    on_run: Callable[[], None] | None = None,
) -> Comparison:
    """Compare what demonstrations do in-context with what gradient steps on them do.

    Args:
        model: The model.
        episode: The demonstrations and queries, tokenised for it.
        methods: `"gd"`, `"lcgd"` or both; α needs both.
        lr: The step size, or one for each method: similarities depend on it.
        untrained: An untrained twin, which then goes through all the same (`untrained_twin(model)`).
        controls: What else to put in the place of every update; see `Control`.
        other: An episode of another task, for the control `"other_task"`.
        loss_on: As in `gd` and `lcgd`, as are `readout`, `schedule`, `epochs` and `parameters`.
        readout: See `loss_on`.
        schedule: See `loss_on`.
        epochs: See `loss_on`.
        parameters: See `loss_on`.
        kernels: Add the kernel views of `iclgd_lens.kernels`: smoothing and drift, implied attention, label regression, tangent
            kernels and functional gradient descent. Their metrics, and what is held, are those of `kernel_rows`.
        batch_size: As in `capture`.
        called: What the column `model` says of the model.
        if_diverged: `"raise"` if an update becomes non-finite, or `"record"` it in `problems` and go on without it.
        on_run: Called after every run, of which there are `n_runs(methods, controls, untrained, kernels)`, fewer if a control has
            nothing to change or an update diverges.

    Raises:
        ValueError: If a method or control is unknown, methods or controls are a set, `if_diverged` is unknown, a method has no
            learning rate, the control `"other_task"` has no other episode, the kernel views are wanted and cannot be had
            (`require_kernel_views`), or as `capture`, `gd` and `lcgd` do.
        DivergedError: If an update becomes non-finite, unless that is to be recorded.
    """
    methods, controls = in_order("methods", methods), in_order("controls", controls)
    require_methods(methods)
    require_some_of("controls", controls, CONTROLS)
    require_one_of("if_diverged", if_diverged, get_args(IfDiverged))
    if "other_task" in controls and other is None:
        raise ValueError("the control 'other_task' needs other=, an episode of another task")
    rates = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(map(str, methods), lr)
    if missing := [method for method in methods if method not in rates]:
        raise ValueError(f"lr names no learning rate for {missing[0]!r}; got {rates}")
    if kernels:
        require_kernel_views(model, episode)
    options: dict[str, Any] = {"loss_on": loss_on, "readout": readout, "schedule": schedule, "epochs": epochs}
    options["parameters"] = tuple(parameters)
    return Comparison.concatenated(
        [
            Reference.of(subject, episode, called=name, batch_size=batch_size, on_run=on_run).compare(
                methods, rates, controls=controls, other=other, kernels=kernels, if_diverged=if_diverged, **options
            )
            for name, subject in ((called, model), ("untrained", untrained))
            if subject is not None
        ]
    )


def n_runs(
    methods: Iterable[Method], controls: Iterable[Control] = ("random",), untrained: bool = False, kernels: bool = False
) -> int:
    """How often `compare` calls `on_run`: zero-shot, in-context, each method's updates and runs, and the kernel views, for every
    model.
    """
    n_methods, updates = len(tuple(methods)), 1 + len(set(controls) - {"random"})
    return (2 + 2 * updates * n_methods + kernels * (TICKS + n_methods)) * (2 if untrained else 1)
