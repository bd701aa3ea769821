"""Running benchmarks: the results checked, then timed, as a tidy frame and a table.

>>> from iclgd_lens.benchmarks.jobs import Setting
>>> from iclgd_lens.benchmarks.models import Sizes
>>> setting = Setting.named("bundled", Sizes(k=4, demonstration=8, queries=4, query=6), device="cpu")
>>> frame = run_benchmarks(setting, ["ft-capture"], repeats=1)
>>> bool(frame["error"].iloc[0] < 1e-4)
True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from iclgd_lens.benchmarks.jobs import JOBS, Job, Setting
from iclgd_lens.benchmarks.timing import time_pair
from iclgd_lens.checks import require_some_of
from iclgd_lens.views.sheets import Column, Sheet

TOLERANCE = {64: 1e-8, 32: 1e-4, 16: 0.1}
"""How large the relative error of results may be, by the bits of the model's dtype."""


class DisagreementError(ValueError):
    """Our results are not the naive path's, so there is no point in timing them."""


def run_benchmarks(
    setting: Setting,
    jobs: Sequence[str] = tuple(JOBS),
    *,
    repeats: int = 5,
    on_job: Callable[[str], None] | None = None,
) -> pd.DataFrame:
    """Check and time jobs.

    Args:
        setting: What they run on.
        jobs: Their names in `JOBS`.
        repeats: How often each is run, and what it is measured against.
        on_job: Called with a job's name before it begins.

    Returns:
        One row per job. `ratio` is the other's time to ours (`kind` is `"times faster"`) or ours to the other's
        (`"times slower"`), the median over pairs, with quartiles `low` and `high`; `cpu_ratio` the same of processor time;
        `ours`, `other` and `floor` are median seconds; `over_floor` is the median ratio of our time to the floor's; peaks are in
        MiB.

    Raises:
        ValueError: If a job is unknown or `repeats` is not positive.
        DisagreementError: If a job's results are not the naive path's.
    """
    require_some_of("jobs", jobs, tuple(JOBS))
    rows = []
    for name in jobs:
        if on_job is not None:
            on_job(name)
        rows.append({"job": name, **_about(setting), **_measured(name, JOBS[name], setting, repeats)})
    return pd.DataFrame(rows)


def benchmark_table(frame: pd.DataFrame) -> Sheet:
    """The results for people."""
    numbers = frame.assign(
        verdict=["met" if met else "missed" for met in frame["met"]],
        wanted=[f"{'≥' if JOBS[job].faster else '≤'} {JOBS[job].target:g}" for job in frame["job"]],
    )
    shown = {"style": ".3g"}
    columns = (
        Column("job", "job"),
        Column("ours, s", "ours", **shown),
        Column("other, s", "other", **shown),
        Column("ratio", "ratio", low="low", high="high", style=".2f"),
        Column("of CPU time", "cpu_ratio", style=".2f"),
        Column("kind", "kind"),
        Column("target", "wanted"),
        Column("", "verdict"),
        Column("floor, s", "floor", **shown),
        Column("over floor", "over_floor", style=".2f"),
        Column("peak, MiB", "ours_peak", style=".0f"),
        Column("other's", "other_peak", style=".0f"),
        Column("error", "error", style=".0e"),
    )
    note = (
        "Median seconds; the ratio is the median over pairs, with quartiles. Floor: the matrix products that the job cannot avoid. "
        "Error: of our results, relative to the naive path's."
    )
    first = frame.iloc[0]
    title = f"Benchmarks on {first['model']} ({first['device']}, {first['dtype']}, {first['threads']} threads, k={first['k']})"
    return Sheet("benchmarks", title, numbers, columns, note)


def _measured(name: str, job: Job, setting: Setting, repeats: int) -> dict[str, Any]:
    work = job.prepare(setting)
    error, tolerance = work.error(), TOLERANCE[torch.finfo(setting.model.cfg.dtype).bits]
    if not error <= tolerance:
        raise DisagreementError(f"{name}: results differ from the naive path's by {error:.1e}, more than {tolerance:g}")
    device = str(setting.model.cfg.device)
    # The check has run both ways on a part, and full runs of the naive path can take very long.
    first, second = (work.other, work.ours) if job.faster else (work.ours, work.other)
    timing = time_pair(first, second, repeats=repeats, warm_up=0 if job.faster else 1, device=device)
    against_floor = time_pair(work.ours, work.floor, repeats=repeats, warm_up=1, device=device)
    ours, other = ("second", "first") if job.faster else ("first", "second")
    return {
        "kind": "times faster" if job.faster else "times slower",
        "target": job.target,
        "ratio": timing.ratio,
        "low": timing.low,
        "high": timing.high,
        "cpu_ratio": timing.cpu_ratio,
        "met": job.met(timing.ratio),
        "ours": getattr(timing, ours),
        "other": getattr(timing, other),
        "ours_peak": getattr(timing, f"{ours}_peak"),
        "other_peak": getattr(timing, f"{other}_peak"),
        "floor": against_floor.second,
        "over_floor": against_floor.ratio,
        "error": error,
        "repeats": repeats,
    }


def _about(setting: Setting) -> dict[str, Any]:
    cfg, episode = setting.model.cfg, setting.episode
    return {
        "model": setting.name,
        "device": str(cfg.device),
        "dtype": str(cfg.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "k": episode.k,
        "tokens": sum(len(each.tokens) for each in episode.demonstrations),
        "n_queries": len(episode.queries),
    }
