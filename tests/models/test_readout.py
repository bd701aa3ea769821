"""The readout equals the model's own final norm and unembedding, without its hooks."""

import pytest
import torch

from iclgd_lens.benchmarks.memory import allocated_peak
from iclgd_lens.models import readout
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.models.readout import LogitLens
from tests.models_zoo import D_VOCAB, ZOO, make_model
from tests.reference import relative_error

NORMS = ["LN", "LNPre", "RMS", "RMSPre", None]


def residual(*batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (3 * torch.randn(*batch, 16, generator=generator) + 1).to(dtype)


def own_readout(model: HookedTransformer, stream: torch.Tensor) -> torch.Tensor:
    logits = model.unembed(model.ln_final(stream) if model.cfg.normalization_type else stream)
    cap = model.cfg.output_logits_soft_cap
    return cap * torch.tanh(logits / cap) if cap > 0 else logits


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("soft_cap", [-1.0, 5.0])
@pytest.mark.parametrize("final_rms", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_the_readout_is_the_model_s_final_norm_and_unembedding(norm, soft_cap, final_rms, eps):
    model = make_model(normalization_type=norm, output_logits_soft_cap=soft_cap, final_rms=final_rms, eps=eps)
    stream = residual(2, 5)
    torch.testing.assert_close(LogitLens.of(model)(stream), own_readout(model, stream), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("shape", ZOO)
def test_the_readout_of_the_last_layer_is_the_model_s_output(shape):
    model = make_model(shape)
    logits, cache = model.run_with_cache(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    torch.testing.assert_close(LogitLens.of(model)(cache["resid_post", -1]), logits, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("tokens", [[3], [D_VOCAB - 1, 0, 5], [7, 7]])
def test_a_readout_of_some_tokens_is_those_columns_in_their_order(norm, tokens):
    model = make_model(normalization_type=norm, output_logits_soft_cap=5.0)
    columns = LogitLens.of(model, torch.tensor(tokens))(residual(2, 5))
    torch.testing.assert_close(columns, LogitLens.of(model)(residual(2, 5))[..., tokens], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 3, 4)])
def test_any_leading_axes_are_kept(batch):
    model, stream = make_model(), residual(*batch)
    logits = LogitLens.of(model)(stream)
    assert logits.shape == (*batch, D_VOCAB)
    torch.testing.assert_close(logits.reshape(-1, D_VOCAB), LogitLens.of(model)(stream.reshape(-1, 16)), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_no_hook_fires(norm):
    model = make_model(normalization_type=norm)
    fired = []
    for point in model.hook_dict.values():
        point.add_hook(lambda value, hook: fired.append(hook.name))
    LogitLens.of(model)(residual(5))
    LogitLens.of(model, torch.tensor([1, 2]))(residual(5))
    assert fired == []
    own_readout(model, residual(1, 5))
    assert fired != []


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_the_model_s_own_readout(norm):
    model = make_model(normalization_type=norm, output_logits_soft_cap=5.0)
    ours, theirs = residual(5).requires_grad_(), residual(5).requires_grad_()
    LogitLens.of(model)(ours).square().sum().backward()
    own_readout(model, theirs).square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_kept_and_agrees_with_the_model(norm):
    model = make_model(normalization_type=norm, dtype=torch.bfloat16)
    stream = residual(5, dtype=torch.bfloat16)
    logits = LogitLens.of(model)(stream)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, own_readout(model, stream), rtol=0.02, atol=0.1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("soft_cap", [-1.0, 5.0])
@pytest.mark.parametrize("columns", [None, [7, 2, 9]])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("at_once", [1, 4, 10_000])
def test_the_cross_entropy_and_its_gradient_are_autograd_s(norm, soft_cap, columns, batch, at_once, monkeypatch):
    monkeypatch.setattr(readout, "COLUMNS_AT_ONCE_ON_CPU", at_once)
    model = make_model(normalization_type=norm, output_logits_soft_cap=soft_cap, dtype=torch.float64)
    stream = residual(*batch, 4, dtype=torch.float64).requires_grad_()
    targets = torch.tensor([2, 0, 1, 1])
    logits = own_readout(model, stream)[..., slice(None) if columns is None else columns]
    expected = torch.nn.functional.cross_entropy(
        logits.movedim(-1, 1) if batch else logits, targets.expand(*batch, -1), reduction="none"
    )
    expected = expected.mean(dim=-1)
    (gradient,) = torch.autograd.grad(expected.sum(), stream)
    tokens = None if columns is None else torch.tensor(columns)
    found, by_stream = LogitLens.of(model, tokens).cross_entropy(stream, targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(by_stream, gradient, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad
    assert not by_stream.requires_grad


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_cross_entropy_of_a_target_that_is_almost_impossible_is_finite(at_once, monkeypatch):
    monkeypatch.setattr(readout, "COLUMNS_AT_ONCE_ON_CPU", at_once)
    model = make_model(d_vocab=3)
    with torch.no_grad():
        model.unembed.b_U.copy_(torch.tensor([0.0, 400.0, 0.0]))
    found, gradient = LogitLens.of(model).cross_entropy(residual(2), torch.tensor([0, 0]))
    assert 300 < float(found) < 500
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_gradient_of_a_target_that_is_almost_certain_is_exact_relative_to_its_size(at_once, monkeypatch):
    monkeypatch.setattr(readout, "COLUMNS_AT_ONCE_ON_CPU", at_once)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = make_model(d_vocab=3, dtype=dtype)
        with torch.no_grad():
            model.unembed.b_U.copy_(torch.tensor([0.0, 18.0, 0.0]))
        gradients.append(LogitLens.of(model).cross_entropy(residual(2, dtype=dtype), torch.tensor([1, 1]))[1])
    assert 0 < gradients[1].norm() < 1e-5
    assert relative_error(gradients[0].double(), gradients[1]) < 1e-4


def test_of_the_logits_no_more_than_some_columns_are_held():
    model, rows = make_model(d_vocab=40_000), 64
    lens, stream = LogitLens.of(model), residual(rows)
    targets = torch.arange(rows)
    _, held = allocated_peak(lambda: lens.cross_entropy(stream, targets))
    assert held < 4 * rows * readout.COLUMNS_AT_ONCE_ON_CPU * 4 < rows * 40_000 * 4


def test_the_cross_entropy_in_half_precision_is_summed_in_float32():
    model = make_model(dtype=torch.bfloat16)
    found, gradient = LogitLens.of(model).cross_entropy(residual(4, dtype=torch.bfloat16), torch.tensor([2, 0, 1, 1]))
    expected, exact = LogitLens.of(make_model()).cross_entropy(residual(4), torch.tensor([2, 0, 1, 1]))
    assert (found.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(gradient.float(), exact, rtol=0.1, atol=0.02)
