"""Kernel smoothing against plain loops, and the terms of the in-context change against full prompts run one at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from iclgd_lens.kernels.smoother import Decomposition, Term, decompose, nadaraya_watson
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import ATTENTION, capture
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import ZOO, in_float64, make_demonstrations, make_model, make_queries
from tests.reference import cosine, full_prompt, relative_error

LENGTHS = (3, 1, 2)
"""Shorter than the local windows of the zoo, so that every query sees some demonstration."""
IN_CONTEXT = ("head_out", "demonstration_out", "demonstration_attention")
NORMED_BEHIND = ("norms_before_and_after", "post_norm")
"""Shapes whose attention output passes a norm on its way to the residual stream."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("signed", [False, True], ids=["positive", "signed"])
def test_smoothing_is_the_kernel_weighted_mean_of_the_values(signed):
    kernel, values = random(2, 3, 5) if signed else random(2, 3, 5).exp(), random(5, 4)
    assert bool((kernel.sum(dim=-1) < 0).any()) == signed
    found = nadaraya_watson(kernel, values)
    assert found.shape == (2, 3, 4)
    for batch in range(2):
        for query in range(3):
            weights = kernel[batch, query].tolist()
            if sum(weights) <= 0:
                assert found[batch, query].isnan().all()
                continue
            for value in range(4):
                expected = sum(w * float(y) for w, y in zip(weights, values[:, value], strict=True)) / sum(weights)
                assert float(found[batch, query, value]) == pytest.approx(expected, rel=1e-10)


def test_smoothing_takes_whole_numbers_as_values_and_is_undefined_where_no_point_has_weight():
    kernel = torch.tensor([[1.0, 3.0], [0.0, 0.0], [1.0, -1.0]])
    found = nadaraya_watson(kernel, torch.tensor([[1, 0, 1], [0, 1, -1]]))
    assert found.dtype == torch.float32
    assert found[0].tolist() == [0.25, 0.75, -0.5]
    assert found[1:].isnan().all()


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.ones(2), r"kernel must have the shape .* with 2 points; got \[2\]"),
        (torch.ones(2, 3), r"with 2 points; got \[2, 3\]"),
        (torch.tensor([[1.0, math.nan], [math.inf, 1.0]]), "kernel has 2 of 4 entries that are not finite"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(kernel, message):
    with pytest.raises(ValueError, match=message):
        nadaraya_watson(kernel, torch.eye(2))


def runs(model: HookedTransformer, lengths: tuple[int, ...] = LENGTHS) -> tuple[Activations, Activations]:
    queries, context = make_queries(lengths), make_demonstrations()
    return capture(model, queries, context=context, keep=IN_CONTEXT), capture(model, queries, keep=["head_out"])


def naive_terms(model: HookedTransformer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """λ `[query layer head]`, smoothing and drift `[query layer head d_model]`, and the change of attention's own output."""
    context, mass, smoothing, drift, change = make_demonstrations(), [], [], [], []
    n_context = sum(len(d.tokens) - 1 + len(d.separator) for d in context)
    group = model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)
    for query in make_queries(LENGTHS):
        (_, icl), (_, zsl) = (model.run_with_cache(full_prompt(query, c)[None]) for c in (context, None))
        for layer in range(model.cfg.n_layers):
            change.append(icl[f"blocks.{layer}.hook_attn_out"][0, -1] - zsl[f"blocks.{layer}.hook_attn_out"][0, -1])
            for head in range(model.cfg.n_heads):
                pattern = icl[f"blocks.{layer}.attn.hook_pattern"][0, head, -1]
                values = icl[f"blocks.{layer}.attn.hook_v"][0, :, head // group]
                base = zsl[f"blocks.{layer}.attn.hook_z"][0, -1, head]
                of_demonstrations, of_query, weight = (torch.zeros_like(x) for x in (base, base, pattern[0]))
                for token, (attention, value) in enumerate(zip(pattern, values, strict=True)):
                    if 1 <= token <= n_context:
                        of_demonstrations += attention * value
                        weight += attention
                    else:
                        of_query += attention * value
                W_O = model.blocks[layer].attn.W_O[head]
                mass.append(weight)
                smoothing.append((of_demonstrations - weight * base) @ W_O)
                drift.append((of_query - (1 - weight) * base) @ W_O)
    shape = (len(LENGTHS), model.cfg.n_layers, model.cfg.n_heads)
    terms = (torch.stack(x).detach().view(*shape, *rest) for x, rest in ((mass, ()), (smoothing, (-1,)), (drift, (-1,))))
    return *terms, torch.stack(change).detach().view(*shape[:2], -1)


def assert_is_term(found: Term, expected: Tensor, delta: Tensor) -> None:
    assert relative_error(found.norm, expected.norm(dim=-1)) < 1e-8
    flat = list(zip(expected.flatten(0, -2), delta.flatten(0, -2), strict=True))
    cosines = torch.tensor([cosine(x, d) for x, d in flat], dtype=torch.float64).view_as(found.cosine)
    shares = torch.stack([(x @ d) / (d @ d) for x, d in flat]).view_as(found.share)
    assert relative_error(found.cosine, cosines) < 1e-8
    assert relative_error(found.share, shares) < 1e-8


@pytest.mark.parametrize("shape", ZOO)
def test_terms_equal_those_of_full_prompts_and_make_up_the_change(shape):
    # In float64: where a term is small, its cosine is as uncertain as the difference of two outputs.
    model = in_float64(make_model(shape))
    mass, smoothing, drift, change = naive_terms(model)
    found = decompose(*runs(model))
    assert relative_error(found.mass, mass) < 1e-8
    if shape not in NORMED_BEHIND:
        assert relative_error((smoothing + drift).sum(2), change) < 1e-8
    assert relative_error(found.head_delta_norm, (smoothing + drift).norm(dim=-1)) < 1e-8
    assert relative_error(found.delta_norm, (smoothing + drift).sum(2).norm(dim=-1)) < 1e-8
    for term, by_head, expected in (
        (found.smoothing, found.head_smoothing, smoothing),
        (found.drift, found.head_drift, drift),
    ):
        assert_is_term(by_head, expected, smoothing + drift)
        assert_is_term(term, expected.sum(2), (smoothing + drift).sum(2))
    assert torch.allclose(found.smoothing.share + found.drift.share, torch.tensor(1.0, dtype=torch.float64))
    assert torch.allclose(found.head_smoothing.share + found.head_drift.share, torch.tensor(1.0, dtype=torch.float64))


def test_where_no_demonstration_is_seen_there_is_no_smoothing_and_without_a_change_nothing_is_defined():
    # Rotary and with a window of 4: the first layer sees the query's own tokens alone, the second what these saw before.
    found = decompose(*runs(make_model("local_rotary", window_size=4), (5, 9)))
    assert not found.mass.any()
    assert not found.smoothing.norm.any()
    assert found.smoothing.cosine.isnan().all()
    assert found.drift.share[0, 1] == pytest.approx(1.0, rel=1e-5)
    assert found.drift.cosine[0, 1] == pytest.approx(1.0, rel=1e-5)
    assert found.smoothing.share[0, 1] == 0.0
    unchanged = [(0, 0), (1, 0), (1, 1)]
    assert not any(found.delta_norm[at] or found.head_delta_norm[at].any() for at in unchanged)
    for term in (found.smoothing, found.drift, found.head_smoothing, found.head_drift):
        assert all(term.share[at].isnan().all() and term.cosine[at].isnan().all() for at in unchanged)


def test_of_a_layer_without_values_nothing_is_defined():
    model = make_model()
    with torch.no_grad():
        model.blocks[1].attn.W_V.zero_()
        model.blocks[1].attn.b_V.zero_()
    found: Decomposition = decompose(*runs(model))
    assert found.mass[:, 1].all()
    assert not found.delta_norm[:, 1].any()
    assert not found.head_smoothing.norm[:, 1].any()
    for term in (found.smoothing, found.drift, found.head_smoothing, found.head_drift):
        assert term.share[:, 1].isnan().all()
        assert term.cosine[:, 1].isnan().all()
        assert term.share[:, [0, 2]].isfinite().all()


def test_runs_of_other_queries_or_models_are_refused():
    icl, _ = runs(make_model("one_layer"))
    with pytest.raises(ValueError, match="not of the same queries"):
        decompose(icl, runs(make_model("one_layer"), (5, 2))[1])
    with pytest.raises(ValueError, match="not of the same model"):
        decompose(icl, runs(make_model("one_layer", seed=1))[1])


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_what_was_not_kept_is_named(name):
    icl, zsl = runs(make_model("one_layer"))
    with pytest.raises(AttributeError, match=f"{name} was not kept"):
        decompose(replace(icl, kept={other: tensor for other, tensor in icl.kept.items() if other != name}), zsl)
    with pytest.raises(AttributeError, match="head_out was not kept"):
        decompose(icl, replace(zsl, kept={}))


def test_runs_under_an_update_are_refused():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries(LENGTHS)
    update = lcgd(model, demonstrations, lr=0.05)
    icl = capture(model, queries, context=demonstrations, keep=IN_CONTEXT)
    ft = capture(model, queries, update=update, keep=["head_out", *ATTENTION])
    with pytest.raises(ValueError, match="zsl is a run under an update"):
        decompose(icl, ft)
    with pytest.raises(ValueError, match="zsl is a run under an update"):
        update.attribution(ft)


def test_a_zero_shot_run_that_has_a_context_or_an_update_is_refused():
    model, queries, demonstrations = make_model("one_layer"), make_queries(), make_demonstrations()
    keep = ["head_out", "demonstration_out", "demonstration_attention"]
    icl = capture(model, queries, context=demonstrations, keep=keep)
    with pytest.raises(ValueError, match="zsl is a run with demonstrations in its context"):
        decompose(icl, icl)
    update = gd(model, demonstrations, lr=0.1)
    with pytest.raises(ValueError, match="zsl is a run under an update"):
        decompose(icl, capture(model, queries, update=update, keep=["head_out"]))


def test_values_that_are_not_finite_and_no_points_are_refused():
    with pytest.raises(ValueError, match="values has 1 of 2 entries that are not finite"):
        nadaraya_watson(torch.ones(1, 2), torch.tensor([[1.0], [torch.nan]]))
    with pytest.raises(ValueError, match="with one or more points"):
        nadaraya_watson(torch.ones(1, 0), torch.ones(0, 1))
