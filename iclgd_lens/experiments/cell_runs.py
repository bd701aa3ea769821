"""Making the cells of a study: what cells share is made once and kept while it is needed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import pandas as pd
import torch

from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.comparison import PARTS
from iclgd_lens.experiments.grid import RUNS, Cell, Grid, Group
from iclgd_lens.experiments.protocol import TWINS
from iclgd_lens.experiments.reference import Finetuned, Reference
from iclgd_lens.experiments.study import ModelChoice
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.updates.gradient import DivergedError

T = TypeVar("T")


class CellRuns:
    """Makes cells one by one, those of a group after each other.

    A model is loaded once for all that follow each other, a twin made once for its seed, an episode drawn once for its orders; a
    group's queries are run zero-shot and in-context once, and an update that several cells are about is made once.

    Args:
        grid: The study's grid.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._kept: dict[str, tuple[object, object]] = {}
        self._not_loaded: dict[ModelChoice, OSError | ValueError] = {}

    def __call__(self, group: Group, cell: Cell) -> dict[str, pd.DataFrame]:
        """Make a cell.

        Returns:
            The frames of `Comparison` that have rows of it, by name, with the columns `model_name`, `dtype`, `separator` and
            `space_before_labels` in front; the last two are those of `Grid.rewritten`.

        Raises:
            ValueError: As `load_model`, `Task.episode`, `capture`, `gd` and `lcgd`.
            OSError: As `load_model`.
            DivergedError: If an update becomes non-finite.
        """
        try:
            return self._made(group, cell)
        except DivergedError:  # which costs nothing that the next cells share
            raise
        except Exception:
            self.forget()
            raise

    def _made(self, group: Group, cell: Cell) -> dict[str, pd.DataFrame]:
        reference = self._reference(group)
        rows = reference.rows(cell.updates.options())
        if cell.method == RUNS:
            reference.add_runs(rows)
        else:
            finetuned = self._finetuned(group, cell, cell.method)
            with_gd = cell.method == "lcgd" and "gd" in self._grid.study.methods
            gd_run = self._finetuned(group, cell, "gd").run if with_gd else None
            if cell.control is None:
                reference.add_finetuned(rows, finetuned, gd_run)
            else:
                other = self._other(group, reference.episode) if cell.control == "other_task" else None
                reference.add_control(rows, cell.control, finetuned, cell.updates.options(), other, gd_run)
        frames = {part: rows.made(part) for part in PARTS if part == "frame" or getattr(rows, part)}
        about = {"model_name": group.model.shown, "dtype": group.model.dtype, **self._grid.rewritten[group.task]}
        for frame in frames.values():
            for place, (column, value) in enumerate(about.items()):
                frame.insert(place, column, value)
        return frames

    def load(self, group: Group) -> None:
        """Load a group's model, if it is not the one that is loaded."""
        self._model(group)

    def forget(self) -> None:
        """Let go of everything but the model, as after running out of memory."""
        self._kept = {name: kept for name, kept in self._kept.items() if name == "model"}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _reference(self, group: Group) -> Reference:
        return self._once("reference", group.digest, lambda: self._run(group), drops=("gd", "lcgd"))

    def _run(self, group: Group) -> Reference:
        model = self._model(group)
        subject = model if group.called == "trained" else self._twin(group, model)
        drawn = (group.model, group.task, group.k, group.seed)
        task, queries = self._grid.tasks[group.task], self._grid.study.queries
        first = self._once("episode", drawn, lambda: task.episode(model, k=group.k, n_queries=queries, seed=group.seed))
        episode = first.reordered(group.order)
        return Reference.of(subject, episode, called=group.called, batch_size=self._grid.study.batch_size)

    def _model(self, group: Group) -> HookedModel:
        choice = group.model

        def load() -> HookedModel:
            # A hub that is away is not asked again for every cell.
            if choice in self._not_loaded:
                raise self._not_loaded[choice]
            try:
                return load_model(
                    choice.name,
                    backend=choice.backend,
                    device=choice.device,
                    dtype=getattr(torch, choice.dtype),
                    process_weights=choice.process_weights,
                )
            except (OSError, ValueError) as error:
                self._not_loaded[choice] = error
                raise

        return self._once("model", choice, load, drops=("twin", "episode", "reference", "gd", "lcgd"))

    def _twin(self, group: Group, model: HookedModel) -> HookedModel:
        key = (group.model, group.called, group.seed)
        return self._once("twin", key, lambda: untrained_twin(model, seed=group.seed, keep=TWINS[group.called]))

    def _finetuned(self, group: Group, cell: Cell, method: str) -> Finetuned:
        reference, lr = self._reference(group), cell.lr
        assert lr is not None  # cells of methods have one
        key = (group.digest, lr, cell.updates)
        return self._once(method, key, lambda: reference.finetuned(method, lr, cell.updates.options()))

    def _other(self, group: Group, episode: Episode) -> Episode:
        name = self._grid.study.other(group.task)
        assert name is not None  # the control is among the study's
        # As many as the true ones, so that it is another task and not another number of steps.
        return self._grid.tasks[name].demonstrations(self._model(group), k=episode.k, seed=group.seed)

    def _once(self, what: str, key: object, make: Callable[[], T], drops: tuple[str, ...] = ()) -> T:
        """What was made of this kind last, if it is what is wanted; otherwise it is let go of, with all that it `drops`, and what
        is wanted is made.
        """
        if what in self._kept and self._kept[what][0] == key:
            return self._kept[what][1]  # type: ignore[return-value]  # the kind says which type it is
        for name in (what, *drops):
            self._kept.pop(name, None)
        made = make()
        self._kept[what] = (key, made)
        return made
