"""How cost and memory grow with the work: times over a decade of every size, as fitted powers, and what a step's graph holds.

Costs are measured on a model small enough for every point to take little time; a power says how a cost grows once it is large, so
small overheads make fitted powers too low, and never too high.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from iclgd_lens.benchmarks.memory import allocated_peak, graph_memory
from iclgd_lens.benchmarks.models import Sizes, make_model, random_episode
from iclgd_lens.benchmarks.timing import fit_exponent
from iclgd_lens.checks import require_count
from iclgd_lens.data.episodes import Episode
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.gradient import gd, lcgd
from iclgd_lens.views.sheets import Column, Sheet

SHAPE: dict[str, Any] = {
    "n_layers": 4,
    "d_model": 256,
    "n_heads": 4,
    "d_head": 64,
    "n_ctx": 2048,
    "d_vocab": 5000,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
}
"""The model whose costs are measured, but for what is varied."""

WORK: dict[str, Callable[[HookedTransformer, Episode], Any]] = {
    "ICL capture": lambda model, episode: capture(model, episode.queries, context=episode.demonstrations),
    "GD": lambda model, episode: gd(model, episode.demonstrations, lr=0.1),
    "LCGD": lambda model, episode: lcgd(model, episode.demonstrations, lr=0.1),
}


@dataclass(frozen=True)
class Axis:
    """A size that is varied over a decade.

    Attributes:
        name: What it is.
        sizes: Its values.
        works: Whose cost is measured, out of `WORK`.
        of: The model's shape and the episode's sizes at a value.
    """

    name: str
    sizes: tuple[int, ...]
    works: tuple[str, ...]
    of: Callable[[int], tuple[dict[str, Any], Sizes]]


_SIZES = Sizes(k=8, demonstration=24, queries=16, query=24)

AXES = (
    Axis("demonstrations", (6, 12, 24, 60), tuple(WORK), lambda n: (SHAPE, replace(_SIZES, k=n))),
    Axis("queries", (16, 32, 64, 160), ("ICL capture",), lambda n: (SHAPE, replace(_SIZES, queries=n))),
    Axis("layers", (2, 4, 8, 20), tuple(WORK), lambda n: (SHAPE | {"n_layers": n}, _SIZES)),
    Axis("vocabulary", (5000, 10000, 20000, 50000), ("GD", "LCGD"), lambda n: (SHAPE | {"d_vocab": n}, _SIZES)),
    Axis("tokens of a demonstration", (16, 32, 64, 160), tuple(WORK), lambda n: (SHAPE, replace(_SIZES, demonstration=n))),
)


def measure_growth(
    axes: Sequence[Axis] = AXES, *, repeats: int = 3, device: str | None = None, on_axis: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """Time works along axes.

    Returns:
        One row per axis and work: `sizes`, the median `seconds` at each, and the fitted `exponent` with its standard `error`.

    Raises:
        ValueError: If `repeats` is not positive.
    """
    require_count("repeats", repeats)
    rows = []
    for axis in axes:
        if on_axis is not None:
            on_axis(axis.name)
        seconds: dict[str, list[float]] = {work: [] for work in axis.works}
        for size in axis.sizes:
            shape, sizes = axis.of(size)
            model = make_model(shape, device=device)
            episode = random_episode(model, sizes)
            for work in axis.works:
                seconds[work].append(_median_seconds(partial(WORK[work], model, episode), repeats, model))
        for work, found in seconds.items():
            exponent = fit_exponent(axis.sizes, found)
            row = {"axis": axis.name, "work": work, "sizes": list(axis.sizes), "seconds": found}
            rows.append(row | {"exponent": exponent.value, "error": exponent.error})
    return pd.DataFrame(rows)


def graph_growth(layers: Sequence[int] = (6, 12, 24), *, shape: dict[str, Any] = SHAPE, device: str | None = None) -> pd.DataFrame:
    """What the graphs of GD and LCGD hold at most, in models of several depths.

    Returns:
        One row per method and depth: `method`, `layers`, `bytes`.
    """
    rows = []
    for depth in layers:
        model = make_model(shape | {"n_layers": depth}, device=device)
        episode = random_episode(model, replace(_SIZES, k=2, queries=1))
        for name, make in (("GD", gd), ("LCGD", lcgd)):
            with graph_memory(model) as memory:
                make(model, episode.demonstrations, lr=0.1)
            rows.append({"method": name, "layers": depth, "bytes": memory.peak})
    return pd.DataFrame(rows)


def capture_growth(
    queries: Sequence[int] = (16, 32, 64, 160), *, shape: dict[str, Any] = SHAPE, sizes: Sizes = _SIZES, device: str | None = None
) -> pd.DataFrame:
    """What in-context captures of several numbers of queries allocate at most, and how much of it they keep.

    Returns:
        One row per number of queries: `queries`, `kept` and `peak` in bytes.
    """
    model, rows = make_model(shape, device=device), []
    for n in queries:
        episode = random_episode(model, replace(sizes, queries=n))
        run, peak = allocated_peak(partial(capture, model, episode.queries, context=episode.demonstrations), model.cfg.device)
        rows.append({"queries": n, "kept": sum(tensor.nbytes for tensor in run.kept.values()), "peak": peak})
    return pd.DataFrame(rows)


def growth_table(frame: pd.DataFrame) -> Sheet:
    """What `measure_growth` found, for people."""
    numbers = frame.assign(
        over=[f"{min(sizes)} to {max(sizes)}" for sizes in frame["sizes"]],
        least=[min(seconds) for seconds in frame["seconds"]],
        most=[max(seconds) for seconds in frame["seconds"]],
    )
    columns = (
        *(Column(name, key) for name, key in (("size", "axis"), ("work", "work"), ("over", "over"))),
        Column("seconds", "least", style=".3f"),
        Column("to", "most", style=".3f"),
        Column("grows with the power", "exponent", spread="error", style=".2f"),
    )
    return Sheet("growth", "How cost grows", numbers, columns, "A power of 1 is linear; ± its standard error.")


def graph_table(frame: pd.DataFrame) -> Sheet:
    """What `graph_growth` found, for people: a column per depth."""
    wide = frame.pivot(index="method", columns="layers", values="bytes") / 2**20
    wide.columns = [f"{layers} layers" for layers in wide.columns]
    columns = (Column("method", "method"), *(Column(name, name, style=".2f") for name in wide.columns))
    return Sheet("graph", "What the graph holds, MiB", wide.reset_index(), columns, "Without weights, at most at any one time.")


def capture_table(frame: pd.DataFrame) -> Sheet:
    """What `capture_growth` found, for people."""
    numbers = frame.assign(kept=frame["kept"] / 2**20, peak=frame["peak"] / 2**20)
    columns = (Column("queries", "queries"), Column("kept", "kept", style=".2f"), Column("peak", "peak", style=".2f"))
    return Sheet("capture", "What a capture allocates, MiB", numbers, columns, "The peak is all that is held at any one time.")


def _median_seconds(work: Callable[[], Any], repeats: int, model: HookedTransformer) -> float:
    found = []
    work()
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.device(model.cfg.device or "cpu").type == "cuda":
            torch.cuda.synchronize(model.cfg.device)
        found.append(time.perf_counter() - start)
    return float(np.median(found))
