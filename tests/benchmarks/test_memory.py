"""Bytes are counted exactly."""

from __future__ import annotations

import gc

import torch

from iclgd_lens.benchmarks.growth import SHAPE
from iclgd_lens.benchmarks.memory import allocated_peak, graph_memory
from iclgd_lens.benchmarks.models import make_model

SMALL = SHAPE | {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_head": 8, "d_vocab": 20}


def test_graph_memory_is_what_autograd_keeps_and_gone_with_the_graph():
    model = make_model(SMALL, device="cpu")
    x = torch.ones(1000, requires_grad=True)
    with graph_memory(model) as memory:
        y = x.exp()  # keeps its result
        z = (y * y).sum()  # keeps y twice: one storage
    assert memory.now == memory.peak == 4000
    z.backward()
    del y, z
    gc.collect()
    assert (memory.now, memory.peak) == (0, 4000)
    weight = model.unembed.W_U
    with graph_memory(model) as memory:
        kept = torch.ones(3, 16, requires_grad=True) @ weight
    # The input, for the weight's gradient; and not the weight.
    assert memory.peak == 3 * 16 * 4
    assert kept.requires_grad


def test_the_peak_is_what_is_held_at_once_and_not_what_was_held_before():
    held = torch.zeros(5000)

    def work() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second.repeat(3) + held.sum()

    result, peak = allocated_peak(work)
    assert result.shape == (3000,)
    # What is repeated and what that adds up to, beside a number; the thousand before are gone by then.
    assert peak == 4 * (1000 + 3000 + 3000 + 1)
