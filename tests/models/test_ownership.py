"""A model has the hooks of one thread at a time, and no run sees another thread's."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from iclgd_lens import capture, gd, lcgd, load_model, tangent_kernel
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.sites.ownership import _owners
from iclgd_lens.models.touched import same_at_every_position
from tests.models_zoo import make_demonstrations, make_model, make_queries

SECONDS = 10
"""How long a thread waits for another before a test fails."""

QUERIES, DEMONSTRATIONS = make_queries((3, 2)), make_demonstrations(2)


def attached_for_a_while(model: Any) -> None:
    with gd(make_model(), DEMONSTRATIONS, lr=0.1).attached(model):
        pass


JOBS: dict[str, Callable[[Any], Any]] = {
    "capture": lambda model: capture(model, QUERIES, context=DEMONSTRATIONS),
    "gd": lambda model: gd(model, DEMONSTRATIONS, lr=0.1),
    "lcgd": lambda model: lcgd(model, DEMONSTRATIONS, lr=0.1),
    "attached": attached_for_a_while,
    "tangent_kernel": lambda model: tangent_kernel(model, DEMONSTRATIONS, QUERIES),
}

on_all_jobs = pytest.mark.parametrize("name", list(JOBS))


@contextmanager
def stopped_within(model: Any, job: Callable[[Any], Any]) -> Iterator[Future[Any]]:
    """Another thread is in the middle of a job, where it first runs the model; it goes on when the block ends."""
    within, go_on = threading.Event(), threading.Event()

    @same_at_every_position
    def stop(value: Any, hook: Any) -> None:
        within.set()
        assert go_on.wait(SECONDS)

    with model.hooks(fwd_hooks=[("hook_embed", stop)]), ThreadPoolExecutor(1, "the other") as other:
        running = other.submit(job, model)
        try:
            assert within.wait(SECONDS)
            yield running
        finally:
            go_on.set()
            running.result(SECONDS)


@on_all_jobs
def test_what_another_thread_starts_meanwhile_is_refused_and_says_what_to_do(name):
    model = make_model()
    advice = r"thread 'the other_0' is running this model with hooks on it.*one after the other, or give every thread a model"
    with stopped_within(model, JOBS["capture"]), pytest.raises(RuntimeError, match=advice):
        JOBS[name](model)


@pytest.mark.parametrize("name", ["capture", "gd", "lcgd", "tangent_kernel"])
def test_a_job_of_any_kind_keeps_other_threads_off(name):
    model = make_model()
    with stopped_within(model, JOBS[name]), pytest.raises(RuntimeError, match="thread 'the other_0'"):
        JOBS["capture"](model)
    JOBS["capture"](model)


def test_an_attached_update_keeps_other_threads_off_until_it_is_detached():
    model = make_model()
    update = gd(model, DEMONSTRATIONS, lr=0.1)
    with ThreadPoolExecutor(1) as other:
        with update.attached(model), pytest.raises(RuntimeError, match="thread 'MainThread'"):
            other.submit(JOBS["capture"], model).result(SECONDS)
        found = other.submit(JOBS["capture"], model).result(SECONDS)
    assert torch.equal(found.attn_out, JOBS["capture"](model).attn_out)


def test_a_thread_that_is_refused_leaves_no_hook_and_spoils_nothing_for_the_other():
    model = make_model()
    expected = JOBS["capture"](model)
    hooks = sum(len(point.fwd_hooks) for point in model.hook_dict.values())
    with stopped_within(model, JOBS["capture"]) as running:
        for job in JOBS.values():
            with pytest.raises(RuntimeError, match="thread"):
                job(model)
    assert torch.equal(running.result().attn_out, expected.attn_out)
    assert sum(len(point.fwd_hooks) for point in model.hook_dict.values()) == hooks
    assert model.context_level == 0


def test_the_same_thread_nests_freely():
    model = make_model()
    update = gd(model, DEMONSTRATIONS, lr=0.1)
    with update.attached(model), update.attached(model):
        inner = capture(model, QUERIES, update=update)
        gd(model, DEMONSTRATIONS, lr=0.1)
        lcgd(model, DEMONSTRATIONS, lr=0.1)
    assert not torch.equal(inner.attn_out, capture(model, QUERIES).attn_out)
    with ThreadPoolExecutor(1) as other:
        other.submit(JOBS["capture"], model).result(SECONDS)


def test_threads_with_a_model_each_run_at_once():
    models = [make_model(seed=seed) for seed in range(2)]
    together = threading.Barrier(2)

    @same_at_every_position
    def meet(value: Any, hook: Any) -> None:
        together.wait(SECONDS)

    def run(model: Any) -> Any:
        with model.hooks(fwd_hooks=[("hook_embed", meet)]):
            return JOBS["capture"](model)

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(run, models, timeout=SECONDS))
    for one, model in zip(found, models, strict=True):
        assert torch.equal(one.attn_out, JOBS["capture"](model).attn_out)


def test_a_bridge_is_kept_to_one_thread_too():
    model = load_model("bundled", device="cpu", backend="bridge")
    with ThreadPoolExecutor(1) as other, sites_of(model).attach([]), pytest.raises(RuntimeError, match="thread 'MainThread'"):
        other.submit(JOBS["capture"], model).result(SECONDS)


def test_what_fails_within_lets_the_model_go():
    model = make_model()
    with pytest.raises(ZeroDivisionError), sites_of(model).attach([]):
        raise ZeroDivisionError
    with ThreadPoolExecutor(1) as other:
        other.submit(JOBS["capture"], model).result(SECONDS)


def test_a_block_may_be_left_in_another_thread_than_it_was_entered_in():
    model = make_model()
    attached = sites_of(model).attach([])
    with ThreadPoolExecutor(1) as other:
        other.submit(attached.__enter__).result(SECONDS)
        with pytest.raises(RuntimeError, match="thread"):
            JOBS["capture"](model)
        attached.__exit__(None, None, None)
    JOBS["capture"](model)


@pytest.mark.parametrize("left", [True, False], ids=["left", "never left"])
def test_no_model_is_kept_alive(left):
    model = make_model()
    seen, attached = weakref.ref(model), sites_of(model).attach([])
    before = len(_owners)
    attached.__enter__()
    assert len(_owners) == before + 1
    if left:
        attached.__exit__(None, None, None)
    del attached, model
    gc.collect()
    assert seen() is None
    assert len(_owners) == before
