"""Counting bytes exactly: what a computation allocates, and what autograd keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from iclgd_lens.models.hooked import HookedTransformer

T = TypeVar("T")


def allocated_peak(work: Callable[[], T], device: str | torch.device | None = None) -> tuple[T, int]:
    """Run something, and count what tensors on a device take at most beyond what was held before, in bytes.

    On CUDA the allocator counts; elsewhere torch's profiler reports every allocation, which makes the run slower.

    Args:
        work: What to run.
        device: Where it runs; the CPU by default.

    Returns:
        Its result, and the bytes.
    """
    if torch.device(device or "cpu").type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        return result, torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak


@dataclass
class GraphMemory:
    """Bytes that autograd keeps for going back, other than weights; of a view, those that are seen through it.

    Attributes:
        now: How many there are.
        peak: How many there were at most.
    """

    now: int = 0
    peak: int = 0
    _counts: dict[tuple[int, int], int] = field(default_factory=dict)

    def take(self, tensor: Tensor) -> None:
        """Count a tensor that is kept, once however often it is."""
        key = tensor.data_ptr(), tensor.nbytes
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self.now += tensor.nbytes
            self.peak = max(self.peak, self.now)

    def drop(self, tensor: Tensor) -> None:
        """Count a tensor that is no longer kept."""
        key = tensor.data_ptr(), tensor.nbytes
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
            self.now -= tensor.nbytes


class _Kept:
    """A tensor that autograd keeps, counted until it lets go."""

    def __init__(self, tensor: Tensor, memory: GraphMemory) -> None:
        self.tensor, self.memory = tensor, memory
        memory.take(tensor)

    def __del__(self) -> None:
        self.memory.drop(self.tensor)


@contextmanager
def graph_memory(model: HookedTransformer) -> Iterator[GraphMemory]:
    """Count, within a `with` block, what autograd keeps: exactly, on any device, whatever the allocator does."""
    memory = GraphMemory()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor | _Kept:
        return tensor if tensor.untyped_storage().data_ptr() in weights else _Kept(tensor, memory)

    def unpack(kept: Tensor | _Kept) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield memory
