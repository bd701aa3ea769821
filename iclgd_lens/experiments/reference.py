"""What updates of a model are compared with, and the rows that every update and every control in its place adds.

The queries are run zero-shot and in-context once; then a comparison is made update by update, in whatever order and number a caller
wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from iclgd_lens.data.controls import permuted, shuffled_labels
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.experiments.comparison import Comparison, Rows, source_columns
from iclgd_lens.experiments.kernels import kernel_rows
from iclgd_lens.experiments.measure import (
    alpha_rows,
    by_chunks,
    gradient_rows,
    output_rows,
    per_head_rows,
    per_query_rows,
    query_rows,
    rec2ftp_rows,
    run_rows,
    similarities,
    similarity_rows,
)
from iclgd_lens.experiments.methods import METHODS, Control, Method
from iclgd_lens.metrics.agreement import correct, false_to_true
from iclgd_lens.metrics.controls import random_update
from iclgd_lens.metrics.similarity import sim_am
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.runs.activations import Activations, Kept
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import DivergedError
from iclgd_lens.updates.random_weights import random_weights

T = TypeVar("T")

KEEP: tuple[Kept, ...] = ("attn_out", "query_scores", "label_log_probs", "lens_logits")

OF_HEADS = ("sim_am", "sim_am_delta")
"""The similarities that the frame of heads has."""

OF_QUERIES = ("sim_aou", "sim_am_delta")
"""The similarities that the frame of queries one by one has."""


@dataclass(frozen=True, eq=False)
class Finetuned:
    """An update that a method made on an episode's demonstrations, and the queries under it.

    Attributes:
        method: The method.
        lr: Its learning rate.
        update: The update.
        run: The queries.
    """

    method: str
    lr: float
    update: ParameterUpdate
    run: Activations

    @property
    def about(self) -> dict[str, Any]:
        """The columns that say which update a row is about."""
        return {"method": self.method, "lr": self.lr}


@dataclass(frozen=True, eq=False)
class Reference:
    """What updates of a model are compared with: an episode's queries zero-shot and in-context.

    Attributes:
        model: The model.
        episode: The demonstrations and queries.
        called: What the column `model` says of it.
        zsl: The queries zero-shot.
        icl: The queries in-context.
        run: Runs the queries; keyword arguments are those of `capture`.
        tick: Called after every run.
    """

    model: HookedModel
    episode: Episode
    called: str
    zsl: Activations
    icl: Activations
    run: Callable[..., Activations]
    tick: Callable[[], None]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        episode: Episode,
        *,
        called: str = "trained",
        batch_size: int | None = None,
        on_run: Callable[[], None] | None = None,
    ) -> Reference:
        """Run the queries zero-shot and in-context; arguments as in `compare`."""
        tick = on_run or (lambda: None)

        def run(**how: Any) -> Activations:
            activations = capture(model, episode.queries, keep=KEEP, batch_size=batch_size, **how)
            tick()
            return activations

        return cls(model, episode, called, run(), run(context=episode.demonstrations), run, tick)

    def compare(
        self,
        methods: Sequence[Method],
        rates: Mapping[str, float],
        *,
        controls: Sequence[Control] = (),
        other: Episode | None = None,
        kernels: bool = False,
        if_diverged: Literal["raise", "record"] = "raise",
        **options: Any,
    ) -> Comparison:
        """Compare with every method at its rate, and with every control in its place.

        Args:
            methods: As in the function `compare`, as are `controls`, `other`, `kernels` and `if_diverged`.
            rates: The learning rate of every method.
            controls: See `methods`.
            other: See `methods`.
            kernels: See `methods`.
            if_diverged: See `methods`.
            options: How updates are made: `loss_on`, `readout`, `schedule`, `epochs` and `parameters`.
        """
        rows = self.rows(options)
        self.add_runs(rows)

        def unless_diverged(made: Callable[[], T], **about: Any) -> T | None:
            try:
                return made()
            except DivergedError as error:
                if if_diverged == "raise":
                    raise
                rows.add("problems", [{"problem": str(error)}], **about)
                return None

        made: dict[str, Finetuned] = {}
        for method in methods:
            make = partial(self.finetuned, method, rates[method], options)
            if (finetuned := unless_diverged(make, method=method, lr=rates[method])) is not None:
                made[method] = finetuned
        for name, each in made.items():
            # α compares LCGD with the true GD, also when a control stands in the place of LCGD.
            gd_run = made["gd"].run if name == "lcgd" and "gd" in made else None
            self.add_finetuned(rows, each, gd_run)
            for control in controls:
                add = partial(self.add_control, rows, control, each, options, other, gd_run)
                unless_diverged(add, **each.about, control=control)
        if kernels:

            def in_epochs(method: str, epochs: int) -> ParameterUpdate:
                longer = {**options, "epochs": epochs}
                return self._update(method, rates[method], longer)

            def attempt(method: str, made: Callable[[], ParameterUpdate]) -> ParameterUpdate | None:
                return unless_diverged(made, method=method, lr=rates[method])

            everything = {"zsl": self.zsl, "icl": self.icl, **{method: each.run for method, each in made.items()}}
            updates = {method: each.update for method, each in made.items()}
            for part, name, about_control, views in kernel_rows(
                self.model, self.episode, everything, updates, options["parameters"], in_epochs, attempt, self.tick
            ):
                rows.add(part, views, method=name, lr=rates.get(name), control=about_control)
        return rows.comparison()

    def rows(self, options: Mapping[str, Any]) -> Rows:
        """An empty frame's beginning: what all rows about this model and episode share."""
        return Rows(source_columns(self.episode, options, self.called))

    def finetuned(self, method: str, lr: float, options: Mapping[str, Any]) -> Finetuned:
        """Make an update on the demonstrations and run the queries under it.

        Raises:
            DivergedError: If it becomes non-finite.
        """
        update = self._update(method, lr, options)
        return Finetuned(method, lr, update, self.run(update=update))

    def add_runs(self, rows: Rows) -> None:
        """Add rows about the runs without update."""
        for name, run in (("zsl", self.zsl), ("icl", self.icl)):
            rows.add("frame", run_rows(run, self.episode.label_tokens), method=name)
            rows.add("queries", query_rows(run, self.episode.label_words), method=name)
            rows.add("per_query", per_query_rows("accuracy", correct(run), self._digests), method=name)
        rows.add("frame", output_rows(self.icl, self.zsl), method="zsl")

    def add_finetuned(self, rows: Rows, finetuned: Finetuned, gd_run: Activations | None = None) -> None:
        """Add rows about an update; with α where there is a run under GD's, to compare this one of LCGD with."""
        about = finetuned.about
        rows.add("gradients", gradient_rows(finetuned.update), **about)
        rows.add("queries", query_rows(finetuned.run, self.episode.label_words), **about)
        self._add_outputs(rows, finetuned.run, about)
        found = self._add_similarities(rows, finetuned.run, gd_run, about)
        for metric in OF_HEADS:
            rows.add("heads", per_head_rows(metric, found[metric]), **about)
        each = {**{metric: found[metric] for metric in OF_QUERIES}, "accuracy": correct(finetuned.run)}
        for metric, values in each.items():
            rows.add("per_query", per_query_rows(metric, values, self._digests), **about)

    def add_control(
        self,
        rows: Rows,
        control: Control,
        finetuned: Finetuned,
        options: Mapping[str, Any],
        other: Episode | None = None,
        gd_run: Activations | None = None,
    ) -> None:
        """Add rows about a control in the place of an update; none if it has nothing to change.

        Raises:
            DivergedError: If an update that it makes becomes non-finite.
        """
        ft = self._controlled(control, finetuned, options, other)
        if ft is None:
            return
        about = {**finetuned.about, "control": control}
        if control != "random":  # which changes what attention did, and no output
            self._add_outputs(rows, ft, about)
        self._add_similarities(rows, ft, gd_run, about)

    @cached_property
    def _unchanged(self) -> Tensor:
        # The same for every update and control.
        return by_chunks(sim_am, self.icl, self.zsl)

    @cached_property
    def _digests(self) -> list[str]:
        return [query.digest for query in self.episode.queries]

    def _update(
        self,
        method: str,
        lr: float,
        options: Mapping[str, Any],
        demonstrations: Sequence[Demonstration] | None = None,
        source: Episode | None = None,
    ) -> ParameterUpdate:
        """An update on demonstrations of an episode, by default on this one's own."""
        source = source or self.episode
        demonstrations = source.demonstrations if demonstrations is None else demonstrations
        update = METHODS[method](self.model, demonstrations, lr=lr, label_tokens=source.label_tokens, **options)
        self.tick()
        return update

    def _controlled(
        self, control: Control, finetuned: Finetuned, options: Mapping[str, Any], other: Episode | None
    ) -> Activations | None:
        """Run the queries with a control in the place of the update; None if it has nothing to change."""
        # Wrong demonstrations are the same for every method, random directions are not.
        seed = self.episode.seed
        own_seed = len(METHODS) * seed + tuple(METHODS).index(finetuned.method)
        if control == "random":
            return random_update(finetuned.run, self.zsl, own_seed)
        if control == "random_weights":
            instead = random_weights(finetuned.update, own_seed)
            self.tick()
            return self.run(update=instead)
        remade = partial(self._update, finetuned.method, finetuned.lr, options)
        if control == "other_task":
            assert other is not None  # checked at the entrance
            return self.run(update=remade(source=other))
        demonstrations = (shuffled_labels if control == "shuffled_labels" else permuted)(self.episode, seed)
        return None if demonstrations is None else self.run(update=remade(demonstrations))

    def _add_outputs(self, rows: Rows, ft: Activations, about: Mapping[str, Any]) -> None:
        rows.add("frame", run_rows(ft, self.episode.label_tokens), **about)
        rows.add("frame", output_rows(self.icl, ft), **about)
        rows.add("frame", rec2ftp_rows(self.icl, ft, self.zsl), **about)

    def _add_similarities(
        self, rows: Rows, ft: Activations, gd_run: Activations | None, about: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        found = similarities(self.icl, ft, self.zsl, self._unchanged)
        rows.add("frame", similarity_rows(found, false_to_true(self.icl, ft, self.zsl)), **about)
        if gd_run is not None:
            rows.add("frame", alpha_rows(ft, gd_run, self.zsl), **about)
        return found
