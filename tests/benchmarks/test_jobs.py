"""The jobs on small models: what is timed agrees with the naive path, and what it is measured against does what it should."""

import math

import pytest
import torch
import torch.nn.functional as F

from iclgd_lens.benchmarks import floors
from iclgd_lens.benchmarks.floors import Products, layerwise_passes, output_passes
from iclgd_lens.benchmarks.jobs import JOBS, Setting, relative_error
from iclgd_lens.benchmarks.models import Sizes
from tests.models_zoo import make_demonstrations, make_model

SIZES = Sizes(k=3, demonstration=8, queries=4, query=6)


def small(shape: str) -> Setting:
    return Setting.of(shape, make_model(shape), SIZES)


@pytest.fixture(scope="module")
def bundled_setting() -> Setting:
    return Setting.named("bundled", SIZES, device="cpu")


@pytest.mark.parametrize("name", JOBS)
def test_results_agree_with_the_naive_path_on_the_bundled_model(name, bundled_setting):
    assert JOBS[name].prepare(bundled_setting).error() < 1e-4


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated"])
def test_results_agree_with_the_naive_path(name, shape):
    assert JOBS[name].prepare(small(shape)).error() < 1e-4


@pytest.mark.parametrize("name", JOBS)
def test_everything_that_is_timed_runs(name, bundled_setting):
    work = JOBS[name].prepare(bundled_setting)
    for step in (work.ours, work.other, work.floor):
        step()


def test_a_wrong_result_is_seen(monkeypatch):
    setting = small("three_layers")
    assert JOBS["gd"].prepare(setting).error() < 1e-4
    monkeypatch.setattr(
        "iclgd_lens.benchmarks.jobs.gd", lambda model, demonstrations, lr: actual(model, demonstrations, lr=1.01 * lr)
    )
    from iclgd_lens import gd as actual

    assert JOBS["gd"].prepare(setting).error() > 1e-3


def test_torchs_own_passes_find_the_gradients_of_keys_and_values(monkeypatch):
    """They stop at the first layer's keys and values, or at every layer's, and go no shorter way."""
    model, demonstration = make_model(), make_demonstrations(1)[0]
    found, original = [], torch.autograd.grad

    def kept(*arguments, **options):
        found.append(original(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(floors.torch.autograd, "grad", kept)
    output_passes(model, [demonstration.tokens])
    monkeypatch.undo()
    projected: list[torch.Tensor] = []
    hooks = [
        (f"blocks.{layer}.attn.hook_{kind}", lambda tensor, hook: projected.append(tensor))
        for layer in range(model.cfg.n_layers)
        for kind in "kv"
    ]
    logits = model.run_with_hooks(demonstration.tokens[None], fwd_hooks=hooks)
    expected = torch.autograd.grad(F.cross_entropy(logits[0, :-1], demonstration.tokens[1:]), projected)
    for ours, theirs in zip(found[0], expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * max(theirs.norm(), 1e-3)
    layerwise_passes(model, [demonstration.tokens])


def test_the_floor_multiplies_the_models_own_matrices():
    model = make_model("rotary_rms_grouped_gated")
    first = Products.of(model).blocks[0]
    x = torch.randn(1, 5, model.cfg.d_model)
    keys = x @ first.qkv[:, model.cfg.n_heads * model.cfg.d_head :][:, : 2 * model.cfg.d_head]
    expected = [torch.einsum("bpm,md->bpd", x, weight) for weight in model.blocks[0].attn._W_K]
    assert torch.allclose(keys, torch.cat(expected, dim=-1), atol=1e-5)
    assert first.mlp_in.shape == (model.cfg.d_model, 2 * model.cfg.d_mlp)


def test_relative_error_is_infinite_where_finiteness_differs():
    assert relative_error(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0])) == math.inf
    assert relative_error(torch.tensor([1.0, -math.inf]), torch.tensor([1.0, -math.inf])) == 0.0


def test_targets_are_met_on_their_side():
    assert JOBS["compare"].met(JOBS["compare"].target + 1)
    assert not JOBS["compare"].met(JOBS["compare"].target - 1)
    assert JOBS["gd"].met(JOBS["gd"].target - 0.1)
    assert not JOBS["gd"].met(JOBS["gd"].target + 0.1)
