"""Models whose in-context learning is known: one step of gradient descent, and a Gaussian kernel smoother."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from iclgd_lens import ParameterUpdate, capture, sim_aou
from iclgd_lens.kernels.constructed import (
    GaussianSmoother,
    gaussian_smoother,
    linear_attention,
    positive_control,
    regression_episode,
    regression_model,
    regression_step,
)
from iclgd_lens.kernels.labels import label_regression
from iclgd_lens.models.hooked import HookedTransformer
from tests.models_zoo import make_model
from tests.reference import full_prompt

WIDTH, EXAMPLES, QUERIES = 6, 12, 5


@pytest.fixture(scope="module")
def regression() -> HookedTransformer:
    return regression_model(WIDTH, EXAMPLES, QUERIES, seed=3)


def data_of(model: HookedTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """The regression's x, y and the queries' x, in float64."""
    pairs = model.W_E[1:].detach().double()
    return pairs[:EXAMPLES, :WIDTH], pairs[:EXAMPLES, WIDTH:], pairs[EXAMPLES:, :WIDTH]


def similarity_to_icl(model: HookedTransformer, update: ParameterUpdate) -> Tensor:
    demonstrations, queries = regression_episode(model)
    with linear_attention(model):
        zsl = capture(model, queries)
        icl = capture(model, queries, context=demonstrations)
        return sim_aou(icl, capture(model, queries, update=update), zsl)


@pytest.mark.parametrize("seed", range(4))
def test_positive_control_reads_one_for_the_same_step_and_near_zero_for_an_unrelated_one(seed: int):
    control = positive_control(seed)
    assert control.same >= 0.999
    assert abs(control.unrelated) < 0.2
    assert control.n_queries == 16


def test_positive_control_is_the_same_every_time_and_another_for_another_seed():
    assert positive_control(5) == positive_control(5)
    assert positive_control(5) != positive_control(6)


def test_one_step_of_the_same_regression_has_similarity_one_for_every_query_and_rate(regression: HookedTransformer):
    for lr in (1e-4, 0.01, 1.0):
        assert (similarity_to_icl(regression, regression_step(regression, lr=lr)) > 0.99999).all()


def test_one_step_of_the_opposite_regression_has_similarity_minus_one(regression: HookedTransformer):
    targets = -data_of(regression)[1]
    assert (similarity_to_icl(regression, regression_step(regression, targets=targets)) < -0.99999).all()


def test_linear_attention_in_context_is_the_regression_s_closed_form(regression: HookedTransformer):
    x, y, x_query = data_of(regression)
    demonstrations, queries = regression_episode(regression)
    with linear_attention(regression):
        out = capture(regression, queries, context=demonstrations).attn_out[:, 0].double()
        alone = capture(regression, queries).attn_out
    expected = x_query @ x.T @ y / math.sqrt(2 * WIDTH)
    torch.testing.assert_close(out[:, WIDTH:], expected, atol=1e-4, rtol=1e-4)
    assert not out[:, :WIDTH].any()
    assert not alone.any()


def test_regression_step_is_what_autograd_says(regression: HookedTransformer):
    x, y, _ = data_of(regression)
    for targets in (None, torch.randn(EXAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))):
        update = regression_step(regression, targets=targets, lr=0.03)
        fitted = y if targets is None else targets.double()
        W = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
        losses = (x @ W - fitted).square().sum(dim=-1) / 2
        gradients = torch.stack([torch.autograd.grad(loss, W, retain_graph=True)[0] for loss in losses])
        delta = update.delta("W_V", 0)[0].double()
        torch.testing.assert_close(delta[:WIDTH, WIDTH:], -0.03 * gradients.sum(dim=0), atol=1e-5, rtol=1e-5)
        delta[:WIDTH, WIDTH:] = 0
        assert not delta.any()
        assert not update.delta("W_K", 0).any()
        torch.testing.assert_close(update.losses.double(), losses.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(update.gradient_norms[0].double(), gradients.flatten(1).norm(dim=1), atol=1e-5, rtol=1e-5)


def test_linear_attention_puts_masked_scores_for_their_softmax_in_every_layer():
    model = make_model()
    tokens = torch.tensor([[0, 1, 2, 3]])
    with linear_attention(model) as inside:
        assert inside is model
        _, cache = model.run_with_cache(tokens)
    causal = torch.ones(4, 4).tril()
    for layer in range(model.cfg.n_layers):
        scores = cache["attn_scores", layer].nan_to_num(neginf=0.0)
        assert torch.equal(cache["pattern", layer], scores)
        assert torch.equal(scores, scores * causal)
        assert scores[..., 1:, :].any()


def test_a_model_is_as_before_after_linear_attention_also_after_an_exception(regression: HookedTransformer):
    tokens = torch.tensor([[0, 1, 2, 3]])
    before = regression.run_with_cache(tokens)[1]["pattern", 0]
    with linear_attention(regression):
        assert not torch.equal(regression.run_with_cache(tokens)[1]["pattern", 0], before)
    assert torch.equal(regression.run_with_cache(tokens)[1]["pattern", 0], before)
    with pytest.raises(KeyError, match="within"), linear_attention(regression):
        raise KeyError("within")
    assert not any(point.fwd_hooks for point in regression.hook_dict.values())
    assert torch.equal(regression.run_with_cache(tokens)[1]["pattern", 0], before)


def test_building_a_model_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    regression_model(WIDTH, EXAMPLES, QUERIES)
    gaussian_smoother()
    positive_control()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["width", "examples", "queries"])
def test_regression_models_of_no_size_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        regression_model(**{name: 0})


def test_other_models_have_no_regression_step_or_episode():
    for model in (make_model(), gaussian_smoother().model):
        with pytest.raises(ValueError, match="need a model that regression_model made"):
            regression_step(model)
        with pytest.raises(ValueError, match="need a model that regression_model made"):
            regression_episode(model)


def test_targets_that_do_not_fit_and_rates_that_cannot_be_are_refused(regression: HookedTransformer):
    for targets in (torch.zeros(EXAMPLES, WIDTH + 1), torch.zeros(QUERIES, WIDTH), torch.full((EXAMPLES, WIDTH), math.nan)):
        with pytest.raises(ValueError, match=r"targets must be finite and have the shape \[12, 6\]"):
            regression_step(regression, targets=targets)
    with pytest.raises(ValueError, match="lr must be a number, finite and not negative"):
        regression_step(regression, lr=math.nan)


SMOOTHERS = [
    {},
    {"bandwidth": 2.0, "n_labels": 2},
    {"bandwidth": 0.2, "seed": 4},
    {"width": 3, "examples": 7, "queries": 1, "bandwidth": 0.3, "n_labels": 5, "seed": 2},
]


@pytest.fixture(params=SMOOTHERS, ids=["defaults", "broad", "narrow", "small"])
def smoother(request: pytest.FixtureRequest) -> GaussianSmoother:
    return gaussian_smoother(**request.param)


def attention_to_demonstrations(made: GaussianSmoother) -> Tensor:
    """`[query demonstration]`, from full prompts run one at a time; a demonstration is one token behind BOS."""
    found = []
    for query in made.queries:
        _, cache = made.model.run_with_cache(full_prompt(query, made.demonstrations)[None])
        found.append(cache["pattern", 0][0, 0, -1, 1:-1])
    return torch.stack(found).detach()


def test_the_closed_form_is_the_gaussian_kernel_s_estimate(smoother: GaussianSmoother):
    kernel = rbf_kernel(smoother.query_inputs.numpy(), smoother.inputs.numpy(), gamma=1 / (2 * smoother.bandwidth**2))
    expected = kernel @ np.eye(smoother.n_labels)[smoother.labels.numpy()] / kernel.sum(axis=1, keepdims=True)
    assert smoother.closed_form.dtype == torch.float64
    np.testing.assert_allclose(smoother.closed_form, expected, atol=1e-12)


def test_the_head_s_attention_is_the_gaussian_kernel_up_to_a_factor(smoother: GaussianSmoother):
    attention = attention_to_demonstrations(smoother).double()
    one_hot = torch.eye(smoother.n_labels, dtype=torch.float64)[smoother.labels]
    mass = attention.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention @ one_hot / mass, smoother.closed_form, atol=1e-5, rtol=0)
    # The factor is one that an estimator must divide by.
    assert (mass < 0.95).all()


def test_the_head_s_output_is_the_estimate_times_the_mass_on_the_demonstrations(smoother: GaussianSmoother):
    out = capture(smoother.model, smoother.queries, context=smoother.demonstrations).attn_out[:, 0]
    mass = attention_to_demonstrations(smoother).sum(dim=-1, keepdim=True)
    width = smoother.inputs.shape[1]
    assert not out[:, :width].any()
    torch.testing.assert_close(out[:, width:].double(), mass * smoother.closed_form, atol=1e-5, rtol=0)
    assert not capture(smoother.model, smoother.queries).attn_out.any()


def test_label_regression_over_captured_attention_recovers_the_closed_form(smoother: GaussianSmoother):
    run = capture(smoother.model, smoother.queries, context=smoother.demonstrations, keep=["demonstration_attention"])
    kernel = rearrange(run.demonstration_attention, "query layer head demonstration -> layer head query demonstration")
    found = label_regression(kernel, smoother.labels, smoother.n_labels)
    torch.testing.assert_close(found[0, 0].double(), smoother.closed_form, atol=1e-5, rtol=0)


def test_a_smoother_s_episode_is_what_it_says(smoother: GaussianSmoother):
    assert [demonstration.label for demonstration in smoother.demonstrations] == smoother.labels.tolist()
    assert set(smoother.labels.tolist()) == set(range(smoother.n_labels))
    for inputs, examples in ((smoother.inputs, smoother.demonstrations), (smoother.query_inputs, smoother.queries)):
        assert len(inputs) == len(examples)
        embedded = smoother.model.W_E[torch.stack([example.tokens[1] for example in examples])].double()
        assert torch.equal(embedded[:, : inputs.shape[1]], inputs)
        torch.testing.assert_close(inputs.norm(dim=-1), torch.ones(len(inputs), dtype=torch.float64), atol=1e-6, rtol=0)


def test_a_smoother_is_the_same_every_time_and_another_for_another_seed():
    assert torch.equal(gaussian_smoother(seed=1).closed_form, gaussian_smoother(seed=1).closed_form)
    assert not torch.equal(gaussian_smoother(seed=1).closed_form, gaussian_smoother(seed=2).closed_form)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"n_labels": 0}, "n_labels must be at least 1, got 0"),
        ({"bandwidth": 0.0}, "bandwidth must be a number, finite and above 0; got 0.0"),
        ({"bandwidth": -1.0}, "bandwidth must be a number, finite and above 0; got -1.0"),
        ({"bandwidth": math.inf}, "bandwidth must be a number, finite and above 0; got inf"),
        ({"bandwidth": "1"}, "bandwidth must be a number"),
        ({"bandwidth": 0.02}, r"bandwidth=0.02 is too small: the demonstration nearest to query \d+ gets less than exp\(-80\)"),
    ],
)
def test_what_makes_no_smoother_is_refused_by_name(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        gaussian_smoother(**change)


def test_the_smallest_bandwidth_that_is_let_through_is_still_exact():
    bandwidth = 0.2
    while True:
        try:
            made = gaussian_smoother(bandwidth=bandwidth)
        except ValueError:
            break
        attention = attention_to_demonstrations(made).double()
        estimate = attention @ torch.eye(3, dtype=torch.float64)[made.labels] / attention.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(estimate, made.closed_form, atol=1e-5, rtol=0)
        bandwidth *= 0.97
    assert bandwidth < 0.15


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_seed_means_the_same_under_every_default_of_torch_s(dtype):
    control, smoother = positive_control(seed=2), gaussian_smoother(seed=1)
    torch.set_default_dtype(dtype)
    try:
        found, again = positive_control(seed=2), gaussian_smoother(seed=1)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert positive_control(seed=2) == found == control
    with torch.device("meta"):
        elsewhere = gaussian_smoother(seed=1)
    for each in (again, elsewhere):
        assert torch.equal(each.inputs, smoother.inputs)
        assert torch.equal(each.model.W_E, smoother.model.W_E)
        assert torch.equal(each.model.W_Q, smoother.model.W_Q)


@pytest.mark.parametrize("make", [regression_model, positive_control, gaussian_smoother])
def test_a_seed_that_is_none_is_refused(make):
    for seed in (1.5, "a", None, True):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            make(seed=seed)
