"""What a comparison finds, as tidy frames, and how they are built up run by run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from iclgd_lens.data.episodes import Episode
from iclgd_lens.experiments.measure import Row

PARTS = ("frame", "queries", "gradients", "heads", "per_query", "problems")
"""The frames of a comparison."""

ABOUT = ("method", "lr", "control")
COLUMNS: dict[str, tuple[str, ...]] = {
    "frame": (*ABOUT, "subset", "layer", "metric", "value", "n", "undefined"),
    "queries": (*ABOUT, "query", "label", "is_gold", "probability"),
    "gradients": (*ABOUT, "layer", "step", "gradient_norm"),
    "heads": (*ABOUT, "layer", "head", "metric", "value", "n", "undefined"),
    "per_query": (*ABOUT, "query", "query_digest", "metric", "value"),
    "problems": (*ABOUT, "problem"),
}
"""The columns of each frame after those that say which episode, options and model a row is about."""

TYPES: dict[str, dict[str, str]] = {
    "frame": {"lr": "float64", "layer": "Int64", "value": "float64", "n": "int64", "undefined": "int64"},
    "queries": {"lr": "float64", "query": "int64", "is_gold": "bool", "probability": "float64"},
    "gradients": {"lr": "float64", "layer": "int64", "step": "int64", "gradient_norm": "float64"},
    "heads": {"lr": "float64", "layer": "int64", "head": "int64", "value": "float64", "n": "int64", "undefined": "int64"},
    "per_query": {"lr": "float64", "query": "int64", "value": "float64"},
    "problems": {"lr": "float64"},
}
"""The types of those of its columns that hold numbers."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare` found, as tidy frames.

    Columns that all share say where a row comes from: `task`, `k`, `seed`, `order`, `n_queries`, the options that the
    updates were made with, `model` (`"trained"` or `"untrained"`), `method` (the run that is described: `"zsl"`, `"icl"`, `"gd"`,
    `"lcgd"`), `lr`, and `control` (`"none"`, or what stands in the place of the update).

    Attributes:
        frame: One row per metric, layer and subset of queries. `layer` is missing for metrics of the whole model; `subset` is
            `"all"` or `"false_to_true"`; `value` is the mean over queries and heads of the `n` defined values, `undefined`
            others being left out (for `rec2ftp`, which is about the queries that finetuning corrects, those are the others).
        queries: One row per query and label word, of true updates: `label`, `is_gold`, and its `probability` among the label
            words.
        gradients: One row per layer and step of every true update: `gradient_norm`, the ℓ2 norm over the trained parameters.
        heads: One row per metric, layer and head, of true updates and over all queries: `sim_am` and `sim_am_delta`, and, where
            kernel views were wanted, those of them that are about a single head. `value`, `n` and `undefined` are as in `frame`.
        per_query: One row per metric and query, of true updates: SimAOU and SimAM_Δ, means over layers and heads, and whether the
            prediction is right; of runs without update the latter alone. `query_digest` is the same for the same query behind other
            demonstrations.
        problems: One row per update that diverged, with its `problem` in words; such an update has no other rows.
    """

    frame: pd.DataFrame
    queries: pd.DataFrame
    gradients: pd.DataFrame
    heads: pd.DataFrame
    per_query: pd.DataFrame
    problems: pd.DataFrame

    @property
    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames by name."""
        return {part: getattr(self, part) for part in PARTS}

    @classmethod
    def concatenated(cls, comparisons: Sequence[Comparison]) -> Comparison:
        """Join comparisons, in their order."""
        return cls(*(pd.concat([getattr(each, part) for each in comparisons], ignore_index=True) for part in PARTS))


@dataclass
class Rows:
    """The rows of a comparison while it is made.

    Attributes:
        source: The columns that are the same in all rows.
    """

    source: Mapping[str, Any]
    frame: list[Row] = field(default_factory=list)
    queries: list[Row] = field(default_factory=list)
    gradients: list[Row] = field(default_factory=list)
    heads: list[Row] = field(default_factory=list)
    per_query: list[Row] = field(default_factory=list)
    problems: list[Row] = field(default_factory=list)

    def add(self, part: str, rows: Iterable[Row], *, method: str, lr: float | None = None, control: str = "none") -> None:
        """Add rows about one run."""
        about = {**self.source, "method": method, "lr": lr, "control": control}
        getattr(self, part).extend({**about, **row} for row in rows)

    def comparison(self) -> Comparison:
        """Make frames of the rows."""
        return Comparison(**{part: self.made(part) for part in PARTS})

    def made(self, part: str) -> pd.DataFrame:
        """Make a frame of the rows of one part."""
        frame = pd.DataFrame(getattr(self, part), columns=[*self.source, *COLUMNS[part]])
        # Without any row it would hold objects, and would make objects of numbers that it is joined with.
        return frame.astype(TYPES[part])


def source_columns(episode: Episode, options: Mapping[str, Any], called: str) -> dict[str, Any]:
    """The columns that say where rows come from."""
    return {
        "task": episode.task,
        "k": episode.k,
        "seed": episode.seed,
        "order": episode.order,
        "n_queries": len(episode.queries),
        **options,
        "parameters": " ".join(options["parameters"]),
        "model": called,
    }
