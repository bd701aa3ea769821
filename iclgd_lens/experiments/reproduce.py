"""Running a protocol: every task, draw, order and twin, cell by cell, so that a run that was stopped goes on where it was.

>>> from tempfile import TemporaryDirectory
>>> from iclgd_lens.models.loading import load_model
>>> protocol = Protocol(("bundled/remapped",), seeds=(0, 1), k=4, n_queries=4, orders=1, lr=0.01)
>>> with TemporaryDirectory() as folder:
...     results = reproduce(load_model("bundled"), protocol, folder)
>>> sorted(results.frame["model"].unique())
['trained', 'untrained', 'untrained, ln kept']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.cells import Cells, Frames, cell
from iclgd_lens.experiments.compare import compare, n_runs
from iclgd_lens.experiments.comparison import Comparison
from iclgd_lens.experiments.drawing import SeedDraw, draw_for_tuning, draw_to_report, load_tasks
from iclgd_lens.experiments.folder import FRAMES, write_frames
from iclgd_lens.experiments.learning_rate import choose, search, similarity_by_rate
from iclgd_lens.experiments.methods import Control, Method
from iclgd_lens.experiments.paper import PAPER
from iclgd_lens.experiments.protocol import TWINS, Protocol
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.untrained import untrained_twin


@dataclass(frozen=True, eq=False)
class Results:
    """What a protocol found.

    Attributes:
        protocol: What was run.
        frame: As in `Comparison`, of all cells.
        queries: As in `Comparison`.
        gradients: As in `Comparison`.
        heads: As in `Comparison`.
        per_query: As in `Comparison`.
        problems: As in `Comparison`.
        rates: The learning rates used, one row per task and method: `task`, `method`, `lr`.
        searched: What `learning_rate.search` found; empty unless the protocol's `lr` is `"auto"`.
        curve: What `similarity_by_rate` found on the model and on the first of the protocol's twins; empty unless the protocol has
            `lr_curve`.
    """

    protocol: Protocol
    frame: pd.DataFrame
    queries: pd.DataFrame
    gradients: pd.DataFrame
    heads: pd.DataFrame
    per_query: pd.DataFrame
    problems: pd.DataFrame
    rates: pd.DataFrame
    searched: pd.DataFrame
    curve: pd.DataFrame

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames by name."""
        return {name: getattr(self, name) for name in FRAMES}


NOT_NUMERIC = ("model_name", "tokenizer_name", "device", "n_devices", "seed", "init_weights")
"""What a model's configuration says of where it comes from and where it is, and not of what it computes."""


def reproduce(
    model: HookedModel,
    protocol: Protocol,
    out: str | Path,
    *,
    data: str | Path | None = None,
    batch_size: int | None = None,
    on_total: Callable[[int], None] | None = None,
    on_runs: Callable[[int, str], None] | None = None,
) -> Results:
    """Run a protocol on a model, or what is missing of it, and write its frames into a folder.

    Before anything runs, all tasks are loaded and all episodes are drawn, so bad input shows at once. Every cell (a task, a seed,
    an order of the demonstrations, and the model or a twin) is kept under `out/cells` as soon as it is done; cells are told apart
    by the model's weights, the episode's tokens and every option. The frames of all cells are written to `out` as parquet at the
    end.

    Args:
        model: The model; twins are made of it, one at a time, seeded with the draw's seed.
        protocol: What to run.
        out: The folder.
        data: The folder of local data, as in `load_task`.
        batch_size: As in `capture`.
        on_total: Called once with the number of runs in all.
        on_runs: Called after runs, with how many they were (those of a cell that was there already count too) and what they were
            about.

    Raises:
        ValueError: As `Task.episode`, `compare` and `choose` do.
        OSError: If data cannot be loaded or the folder cannot be written.
    """
    tasks = load_tasks(protocol, data)
    run = _Run(
        model,
        protocol,
        Cells(Path(out) / "cells"),
        _model_key(model),
        batch_size,
        on_runs or (lambda runs, about: None),
        {name: draw_to_report(protocol, tasks, name, model) for name in protocol.tasks},
        {name: draw_for_tuning(protocol, tasks[name], name, model) for name in protocol.tasks},
    )
    if on_total is not None:
        on_total(run.total())
    results = run.results()
    write_frames(Path(out), results.frames)
    return results


def _model_key(model: HookedModel) -> dict[str, Any]:
    """What a model's results depend on: its weights, their dtype, and the numbers of its configuration."""
    config = {
        name: value
        for name, value in sorted(vars(model.cfg).items())
        if name not in NOT_NUMERIC and isinstance(value, (bool, int, float, str, list, type(None)))
    }
    return {"weights": fingerprint(model), "dtype": str(model.cfg.dtype), "config": config}


@dataclass(frozen=True, eq=False)
class _Run:
    """A protocol on its way through its cells."""

    model: HookedModel
    protocol: Protocol
    cells: Cells
    model_key: Mapping[str, Any]
    batch_size: int | None
    report: Callable[[int, str], None]
    draws: Mapping[str, list[SeedDraw]]
    tuning: Mapping[str, list[Episode]]

    @property
    def subjects(self) -> dict[str, tuple[Control, ...]]:
        """What the model and its twins are called, each with its controls."""
        of_twins: tuple[Control, ...] = ("random",) if "random" in self.protocol.controls else ()
        return {"trained": self.protocol.controls, **dict.fromkeys(self.protocol.twins, of_twins)}

    @property
    def runs_per_episode(self) -> int:
        """The number of runs of the model and its twins on one order of one draw."""
        return sum(n_runs(self.protocol.methods, controls) for controls in self.subjects.values())

    def total(self) -> int:
        """The number of runs, those of cells that are there already included."""
        protocol = self.protocol
        n_episodes = sum(len(draw.episodes) for draws in self.draws.values() for draw in draws)
        n_searches = (protocol.lr == "auto") + protocol.lr_curve * (1 + len(self.curve_twins))
        per_search = len(protocol.methods) * len(protocol.grid)
        return n_episodes * self.runs_per_episode + n_searches * per_search * sum(map(len, self.tuning.values()))

    def results(self) -> Results:
        """Run or read all cells."""
        rates, searched, curves = [], [], []
        problems: list[dict[str, Any]] = []
        comparisons: list[Comparison] = []
        for name in self.protocol.tasks:
            found = self.searched(name)
            chosen = self.rates(name, found, problems)
            searched.append(found)
            rates += [{"task": name, "method": method, "lr": lr} for method, lr in chosen.items()]
            comparisons += [c for draw in self.draws[name] for c in self.comparisons(draw, chosen)]
            curves.append(self.curve(name))
        if not comparisons:
            raise ValueError("; ".join(f"{problem['task']}: {problem['problem']}" for problem in problems))
        whole = Comparison.concatenated(comparisons)
        return Results(
            self.protocol,
            whole.frame,
            whole.queries,
            whole.gradients,
            whole.heads,
            whole.per_query,
            pd.concat([whole.problems, pd.DataFrame(problems)], ignore_index=True) if problems else whole.problems,
            pd.DataFrame(rates, columns=["task", "method", "lr"]),
            pd.concat(searched, ignore_index=True),
            pd.concat(curves, ignore_index=True),
        )

    def rates(self, task: str, searched: pd.DataFrame, problems: list[dict[str, Any]]) -> dict[Method, float]:
        """The learning rate of every method on a task; why a method has none is added to the problems."""
        protocol = self.protocol
        if protocol.lr != "auto":
            lr = PAPER[task].lr if isinstance(protocol.lr, str) else float(protocol.lr)
            return dict.fromkeys(protocol.methods, lr)
        chosen: dict[Method, float] = {}
        for method in protocol.methods:
            try:
                chosen[method] = choose(searched[searched["method"] == method])[method]
            except ValueError as error:
                problems.append({"task": task, "model": "trained", "method": method, "problem": str(error)})
        return chosen

    def searched(self, task: str) -> pd.DataFrame:
        """The search for learning rates on a task; nothing unless they are `"auto"`."""
        if self.protocol.lr != "auto":
            return pd.DataFrame()
        return self._at_all_rates(f"{task}, learning rates", search, self.tuning[task], "trained")

    def curve(self, task: str) -> pd.DataFrame:
        """Similarity against learning rate on a task, of the model and of the paper's twin; nothing unless it is wanted."""
        if not self.protocol.lr_curve:
            return pd.DataFrame()
        about = f"{task}, learning-rate curve"
        curves = [
            self._at_all_rates(f"{about}, {called}", partial(similarity_by_rate, called=called), self.tuning[task], called)
            for called in ("trained", *self.curve_twins)
        ]
        return pd.concat(curves, ignore_index=True)

    @property
    def curve_twins(self) -> tuple[str, ...]:
        """The twins that the curve shows: the paper's baseline, where the protocol has it."""
        return self.protocol.twins[:1]

    def _at_all_rates(
        self, about: str, measure: Callable[..., pd.DataFrame], episodes: Sequence[Episode], called: str
    ) -> pd.DataFrame:
        """Measure at all rates of the grid, every episode and method a cell of its own."""
        protocol = self.protocol
        frames = []
        for episode in episodes:
            subject = cache(partial(self._subject, called, episode.seed))
            for method in protocol.methods:
                key = {
                    "names": [about, episode.task, episode.seed, called, method],
                    "episode": episode.digest,
                    "grid": protocol.grid,
                    "keep": TWINS.get(called),
                }
                where = f"{about}, seed {episode.seed}, {method}"
                make = partial(self._measure, measure, subject, episode, method)
                frames.append(self._cell(where, key, make, len(protocol.grid))["frame"])
        return pd.concat(frames, ignore_index=True)

    def _measure(
        self,
        measure: Callable[..., pd.DataFrame],
        subject: Callable[[], HookedModel],
        episode: Episode,
        method: Method,
        tick: Callable[[], None],
    ) -> Frames:
        how = {**self.protocol.options, "batch_size": self.batch_size, "on_run": tick}
        return {"frame": measure(subject(), [episode], [method], self.protocol.grid, **how)}

    def comparisons(self, draw: SeedDraw, rates: Mapping[Method, float]) -> Iterator[Comparison]:
        """The comparisons of the model and its twins on one draw, in every order; none if no method has a rate."""
        if not rates:
            self.report(len(draw.episodes) * self.runs_per_episode, "nothing to run")
            return
        for called, controls in self.subjects.items():
            # Made when first needed: a run that goes on may need none.
            subject = cache(partial(self._subject, called, draw.seed))
            for episode in draw.episodes:
                key = {
                    "names": [episode.task, episode.seed, episode.order, called],
                    "episode": episode.digest,
                    "rates": rates,
                    "controls": controls,
                    "other": draw.other.digest if draw.other and "other_task" in controls else None,
                    "keep": TWINS.get(called),
                }
                make = partial(self._compare, called, subject, controls, episode, draw.other, rates)
                about = f"{episode.task}, seed {episode.seed}, order {episode.order}, {called}"
                yield Comparison(**self._cell(about, key, make, n_runs(self.protocol.methods, controls)))

    def _subject(self, called: str, seed: int) -> HookedModel:
        return self.model if called == "trained" else untrained_twin(self.model, seed=seed, keep=TWINS[called])

    def _compare(
        self,
        called: str,
        subject: Callable[[], HookedModel],
        controls: tuple[Control, ...],
        episode: Episode,
        other: Episode | None,
        rates: Mapping[Method, float],
        tick: Callable[[], None],
    ) -> Frames:
        comparison = compare(
            subject(),
            episode,
            tuple(rates),
            lr={str(method): lr for method, lr in rates.items()},
            controls=controls,
            other=other,
            batch_size=self.batch_size,
            called=called,
            if_diverged="record",
            on_run=tick,
            **self.protocol.options,
        )
        return comparison.frames

    def _cell(
        self,
        about: str,
        key: Mapping[str, Any],
        make: Callable[[Callable[[], None]], Frames],
        count: int,
    ) -> Frames:
        """Read or make a cell; report its runs one by one as they are made, and those that were not needed at once."""
        ran = 0

        def tick() -> None:
            nonlocal ran
            ran += 1
            self.report(1, about)

        key = {"model": self.model_key, "options": {**self.protocol.options}, **key}
        frames = cell(self.cells, key, about, partial(make, tick))
        if ran < count:
            self.report(count - ran, about)
        return frames
