"""What the clock and the memory gauge report; how long anything takes is not tested."""

import math
from multiprocessing import get_context

import pytest
import torch

from iclgd_lens.benchmarks import timing
from iclgd_lens.benchmarks.timing import fit_exponent, time_pair


def test_both_run_in_turns_and_the_first_to_run_changes():
    calls = []
    found = time_pair(lambda: calls.append("a"), lambda: calls.append("b"), repeats=3, warm_up=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert found.repeats == 3
    assert found.low <= found.ratio <= found.high


@pytest.mark.slow
@pytest.mark.parametrize("kernel_mark", [True, False])
def test_peak_memory_is_what_a_run_takes_beyond_what_was_held(kernel_mark, tmp_path):
    # In a process of its own: one that has run much else gives memory back at times of its own choosing.
    context = get_context("spawn")
    with context.Pool(1) as pool:
        pool.apply(require_peaks, (kernel_mark, tmp_path))


def require_peaks(kernel_mark, tmp_path):
    held = torch.ones(2**23)

    def take(mib):
        def work():
            # For a while, so that a look now and then sees it.
            for _ in range(40):
                torch.ones(mib * 2**18)

        return work

    if not kernel_mark:
        (tmp_path / "status").symlink_to("/proc/self/status")
        (tmp_path / "clear_refs").mkdir()
        timing._PROCESS = tmp_path
    found = time_pair(take(40), take(10), repeats=3)
    if math.isnan(found.first_peak):
        return  # this system does not tell the memory of a process
    assert 30 < found.first_peak < 60
    assert 5 < found.second_peak < 30
    assert len(held)


def test_where_memory_is_not_told_it_is_nan(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_PROCESS", tmp_path / "none")
    found = time_pair(lambda: None, lambda: None, repeats=1)
    assert math.isnan(found.first_peak)


def test_nothing_to_time_is_refused():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        time_pair(lambda: None, lambda: None, repeats=0)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    sizes = [10, 20, 40, 80]
    exact = fit_exponent(sizes, [3 * size**power for size in sizes])
    assert math.isclose(exact.value, power, abs_tol=1e-9)
    assert exact.error < 1e-6
    noisy = fit_exponent(sizes, [3 * size**power * noise for size, noise in zip(sizes, (1.1, 0.9, 1.1, 0.9), strict=True)])
    assert abs(noisy.value - power) < 3 * noisy.error


def test_two_sizes_have_no_error():
    assert math.isnan(fit_exponent([1, 2], [1, 2]).error)


@pytest.mark.parametrize(("sizes", "costs"), [([1], [1.0]), ([2, 2], [1.0, 2.0]), ([1, 2], [1.0]), ([1, 2], [0.0, 1.0])])
def test_what_cannot_be_fitted_is_refused(sizes, costs):
    with pytest.raises(ValueError, match=r"exponent wants|must be positive"):
        fit_exponent(sizes, costs)
