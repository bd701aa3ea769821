"""Timing two ways of doing something against each other, and fitting how a cost grows.

Both are run in turns in one process, so that what else the machine does falls on both alike, and the number that counts is the
median of the ratios of neighbouring runs. Peak memory is what a run takes beyond what was held before it.

>>> fit_exponent([1, 2, 4], [3.0, 12.0, 48.0]).value
2.0
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from iclgd_lens.checks import require_count

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"
"""What `clear_refs` takes as the wish to reset the high-water mark of resident memory."""

_SAMPLING_SECONDS = 0.005
_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """How long two ways of doing something take.

    Attributes:
        first: Median seconds of the first.
        second: Median seconds of the second.
        ratio: Median of the ratios of the first's seconds to the second's, pair by pair.
        low: Lower quartile of these ratios.
        high: Upper quartile of them.
        cpu_ratio: Median of the ratios of processor time, which other work on the machine hardly changes as long as there is one
            thread.
        first_peak: Median over runs of the peak memory of the first in MiB, beyond what was held before; NaN where unknown.
        second_peak: The same of the second.
        repeats: How many pairs were run.
    """

    first: float
    second: float
    ratio: float
    low: float
    high: float
    cpu_ratio: float
    first_peak: float
    second_peak: float
    repeats: int


@dataclass(frozen=True)
class Exponent:
    """The power of its size that a cost grows with.

    Attributes:
        value: The slope of log cost over log size, by least squares.
        error: Its standard error; NaN for two sizes, which any line fits.
    """

    value: float
    error: float


@dataclass(frozen=True)
class _Run:
    seconds: float
    cpu_seconds: float
    peak: float


def time_pair(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    repeats: int = 5,
    warm_up: int = 1,
    device: str | torch.device = "cpu",
) -> Timing:
    """Run two callables in turns, the one that begins changing from pair to pair.

    Args:
        first: The one whose time is above the line of the ratio.
        second: The one below it.
        repeats: How many pairs to time.
        warm_up: How many pairs to run before, untimed.
        device: Where they run; on CUDA, its clock is waited for and its memory is counted.

    Raises:
        ValueError: If there is nothing to time.
    """
    require_count("repeats", repeats)
    for _ in range(warm_up):
        first()
        second()
    pairs: list[tuple[_Run, _Run]] = []
    for number in range(repeats):
        if number % 2:
            other, one = _measure(second, device), _measure(first, device)
            pairs.append((one, other))
        else:
            pairs.append((_measure(first, device), _measure(second, device)))
    low, ratio, high = np.quantile([one.seconds / other.seconds for one, other in pairs], [0.25, 0.5, 0.75])
    firsts, seconds = zip(*pairs, strict=True)
    return Timing(
        first=float(np.median([run.seconds for run in firsts])),
        second=float(np.median([run.seconds for run in seconds])),
        ratio=float(ratio),
        low=float(low),
        high=float(high),
        cpu_ratio=float(np.median([one.cpu_seconds / other.cpu_seconds for one, other in pairs])),
        first_peak=float(np.median([run.peak for run in firsts])),
        second_peak=float(np.median([run.peak for run in seconds])),
        repeats=repeats,
    )


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fit the power that a cost grows with: least squares of log cost on log size.

    Raises:
        ValueError: If there are fewer than two different sizes, not as many costs, or a number is not positive.
    """
    if len(sizes) != len(costs) or len(set(sizes)) < 2:
        raise ValueError(f"an exponent wants at least two different sizes and as many costs; got {len(sizes)} and {len(costs)}")
    if min(*sizes, *costs) <= 0:
        raise ValueError("sizes and costs must be positive")
    fit = stats.linregress(np.log(sizes), np.log(costs))
    return Exponent(round(float(fit.slope), 12), float(fit.stderr) if len(sizes) > 2 else math.nan)


def _measure(work: Callable[[], Any], device: str | torch.device) -> _Run:
    gc.collect()
    watch = _cuda_peak(device) if torch.device(device).type == "cuda" else _resident_peak()
    with watch as peak:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        run = time.perf_counter() - wall, time.process_time() - processor
        del result
    return _Run(*run, peak=peak[0])


@contextmanager
def _cuda_peak(device: str | torch.device) -> Iterator[list[float]]:
    peak: list[float] = []
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield peak
    peak.append((torch.cuda.max_memory_allocated(device) - before) / _MIB)


@contextmanager
def _resident_peak() -> Iterator[list[float]]:
    """Peak resident memory by the kernel's own mark where it can be reset, else by looking often."""
    peak: list[float] = []
    _return_freed_memory()
    before = _status("VmRSS")
    try:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        marked = _status("VmHWM") - before < 1
    except OSError:
        marked = False
    if marked:
        yield peak
        peak.append(_status("VmHWM") - before)
    else:
        with _sampled() as seen:
            yield peak
        peak.append(max(seen) - before)


@contextmanager
def _sampled() -> Iterator[list[float]]:
    seen, done = [_status("VmRSS")], threading.Event()

    def look() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            seen.append(_status("VmRSS"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        seen.append(_status("VmRSS"))


def _status(field: str) -> float:
    """A line of the process's status in MiB; NaN where the system keeps none."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
    except OSError:
        return math.nan
    return int(found[1]) / 1024 if found else math.nan


def _return_freed_memory() -> None:
    """Ask the C library to give memory that is free back to the system, so that it is not there to be taken unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
