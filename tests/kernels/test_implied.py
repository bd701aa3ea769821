"""In-context and implied attention to the same tokens, against full prompts and demonstrations run one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.kernels.implied import (
    agreement,
    by_demonstration,
    demonstration_queries,
    icl_attention,
    implied_attention,
    other_demonstrations,
    proxy_attention,
    without_ends,
)
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.capture import ATTENTION, capture
from iclgd_lens.updates.attribution import Attribution
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import ZOO, in_float64, make_demonstrations, make_model, make_queries
from tests.reference import cosine, full_prompt, relative_error

LR = 0.05
LENGTHS = (4, 1, 6)
METHODS = {"gd": gd, "lcgd": lcgd}
READINGS = {"contribution": "norms", "coefficient": "coefficients"}

pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def n_tokens(demonstrations: Sequence[Demonstration]) -> int:
    return sum(len(d.tokens) - 1 for d in demonstrations)


def attributed(model: HookedTransformer, demonstrations: Sequence[Demonstration], method: str = "lcgd", **options) -> Attribution:
    update = METHODS[method](model, demonstrations, lr=LR, **options)
    return update.attribution(capture(model, make_queries(LENGTHS), keep=ATTENTION))


@pytest.mark.parametrize("shape", ZOO)
def test_in_context_attention_is_the_patterns_over_the_context_rid_of_separators(shape):
    model, queries, context = in_float64(make_model(shape)), make_queries(LENGTHS), make_demonstrations(4)
    assert {len(d.separator) for d in context} == {0, 1, 2}
    n_context = sum(len(d.tokens) - 1 + len(d.separator) for d in context)
    found = icl_attention(capture(model, queries, context=context, keep=["context_scores"]), context)
    assert found.shape == (len(queries), model.cfg.n_layers, model.cfg.n_heads, n_tokens(context))
    for number, query in enumerate(queries):
        with torch.no_grad():
            _, cache = model.run_with_cache(full_prompt(query, context)[None])
        pattern = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1] for layer in range(model.cfg.n_layers)])
        # NaN where a local window hides the whole context.
        renormalised = pattern / pattern[..., 1 : n_context + 1].sum(dim=-1, keepdim=True)
        expected, position = [], 1
        for demonstration in context:
            for _ in demonstration.tokens[1:]:
                expected.append(renormalised[..., position])
                position += 1
            position += len(demonstration.separator)
        assert relative_error(found[number], torch.stack(expected, dim=-1)) < 1e-8


def test_in_context_attention_sums_to_one_without_separators_and_to_less_with_them():
    model, queries, context = make_model(), make_queries(LENGTHS), make_demonstrations()
    bare = [replace(d, separator=d.separator[:0]) for d in context]
    for demonstrations, whole in ((bare, True), (context, False)):
        run = capture(model, queries, context=demonstrations, keep=["context_scores"])
        total = icl_attention(run, demonstrations).sum(dim=-1)
        assert bool((total < 0.999).all()) != whole
        assert bool(((total - 1).abs() < 1e-5).all()) == whole


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("method", METHODS)
def test_implied_attention_is_the_attributions_summed_over_epochs_behind_bos(method, reading, epochs):
    model, demonstrations = make_model("rotary_rms_grouped_gated"), make_demonstrations(4)
    attribution = attributed(model, demonstrations, method, epochs=epochs)
    found = implied_attention(attribution, demonstrations, reading)
    weights = getattr(attribution, READINGS[reading])
    columns, n_trained = [], 0
    for number, demonstration in enumerate(demonstrations):
        for position in range(1, len(demonstration.tokens)):
            of_this = [
                token
                for token, place in enumerate(zip(attribution.demonstration.tolist(), attribution.position.tolist(), strict=True))
                if place == (number, position)
            ]
            n_trained += len(of_this)
            columns.append(sum(weights[..., token] for token in of_this))
    assert n_trained == epochs * n_tokens(demonstrations)
    assert relative_error(found, torch.stack(columns, dim=-1)) < 1e-6


def test_the_contribution_is_the_default_reading():
    demonstrations = make_demonstrations()
    attribution = attributed(make_model(), demonstrations)
    default, contribution, coefficient = (
        implied_attention(attribution, demonstrations, *reading) for reading in ((), ("contribution",), ("coefficient",))
    )
    assert torch.equal(default, contribution)
    assert (default >= 0).all()
    assert (coefficient < 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_gradient_steps_pay_no_attention_to_what_nothing_in_the_loss_attends_to(method):
    model, demonstrations = make_model(), make_demonstrations(4)
    lasts = torch.tensor([len(d.tokens) - 1 for d in demonstrations]).cumsum(0) - 1
    is_last = torch.zeros(n_tokens(demonstrations), dtype=torch.bool).index_fill_(0, lasts, True)
    for options in ({}, {"epochs": 2}):
        attribution = attributed(model, demonstrations, method, loss_on="demonstration", **options)
        found = implied_attention(attribution, demonstrations)
        assert not found[..., is_last].any()
        assert (found[..., ~is_last] > 0).all()
        assert implied_attention(attribution, demonstrations, "coefficient")[..., is_last].all()
        context = capture(model, make_queries(LENGTHS), context=demonstrations, keep=["context_scores"])
        assert (icl_attention(context, demonstrations)[..., is_last] > 0).all()


def naive_proxy(models: Sequence[HookedTransformer], demonstrations: Sequence[Demonstration]) -> Tensor:
    """Softmax of inner products of attention queries; demonstration j run alone by `models[j]`, queries by the first."""

    def attention_queries(model: HookedTransformer, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens[None])
        return torch.stack([cache[f"blocks.{layer}.attn.hook_q"][0] for layer in range(model.cfg.n_layers)])

    trained = [q for m, d in zip(models, demonstrations, strict=True) for q in attention_queries(m, d.tokens)[:, 1:].unbind(dim=1)]
    rows = []
    for query in make_queries(LENGTHS):
        asking = attention_queries(models[0], query.tokens)[:, -1]
        weights = torch.stack([(asking * one).sum(dim=-1) for one in trained], dim=-1).exp()
        rows.append(weights / weights.sum(dim=-1, keepdim=True))
    return torch.stack(rows)


@pytest.mark.parametrize("shape", ZOO)
def test_the_proxy_is_the_softmax_over_attention_queries_of_demonstrations_run_alone(shape):
    model, demonstrations = in_float64(make_model(shape)), make_demonstrations(4)
    assert len({len(demonstration.tokens) for demonstration in demonstrations}) > 1
    zsl = capture(model, make_queries(LENGTHS), keep=["own_inputs"])
    found = proxy_attention(model, zsl, demonstration_queries(model, demonstrations))
    assert relative_error(found, naive_proxy([model] * 4, demonstrations)) < 1e-8
    assert torch.allclose(found.sum(dim=-1), torch.ones((), dtype=found.dtype))


def test_weights_are_numbers_and_hold_no_graph():
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries(LENGTHS)
    update, zsl = lcgd(model, demonstrations, lr=LR), capture(model, queries, keep=ATTENTION)
    icl = capture(model, queries, context=demonstrations, keep=["context_scores"])
    assert not implied_attention(update.attribution(zsl), demonstrations).requires_grad
    assert not icl_attention(icl, demonstrations).requires_grad
    assert not proxy_attention(model, zsl, demonstration_queries(model, demonstrations)).requires_grad


def test_half_precision_is_weighed_in_float32():
    model, demonstrations = make_model(dtype=torch.bfloat16), make_demonstrations()
    update, queries = lcgd(model, demonstrations, lr=LR), make_queries(LENGTHS)
    zsl = capture(model, queries, keep=ATTENTION)
    icl = capture(model, queries, context=demonstrations, keep=["context_scores"])
    for weights in (
        proxy_attention(model, zsl, demonstration_queries(model, demonstrations)),
        implied_attention(update.attribution(zsl), demonstrations),
        icl_attention(icl, demonstrations),
    ):
        assert weights.dtype == torch.float32
        assert weights.shape == (3, 3, 2, n_tokens(demonstrations))


def test_weights_are_summed_over_the_tokens_of_each_demonstration():
    demonstrations = make_demonstrations(4)
    weights = torch.randn(2, 3, n_tokens(demonstrations), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = by_demonstration(weights, demonstrations)
    assert found.shape == (2, 3, 4)
    start = 0
    for number, demonstration in enumerate(demonstrations):
        expected = torch.zeros(2, 3, dtype=torch.float64)
        for token in range(start, start + len(demonstration.tokens) - 1):
            expected += weights[..., token]
        assert relative_error(found[..., number], expected) < 1e-12
        start += len(demonstration.tokens) - 1


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heaviest(row: Tensor, k: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda token: -float(row[token]))[:k])


def test_agreement_is_scipys_on_every_row():
    icl, implied = rows(2, 3, 20), rows(2, 3, 20, seed=1)
    implied[0] += icl[0]
    found = agreement(icl, implied, top_k=4)
    for index in ((a, b) for a in range(2) for b in range(3)):
        x, y = icl[index], implied[index]
        assert float(found.kendall[index]) == pytest.approx(stats.kendalltau(x, y).statistic, rel=1e-10)
        assert float(found.spearman[index]) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-10)
        assert float(found.cosine[index]) == pytest.approx(cosine(x, y), rel=1e-10)
        assert float(found.top_k_recall[index]) == pytest.approx(len(heaviest(x, 4) & heaviest(y, 4)) / 4)


@pytest.mark.parametrize(("n", "k"), [(2, 1), (4, 1), (12, 2), (17, 3), (32, 5), (61, 10)])
def test_a_sixth_of_the_tokens_is_looked_for_unless_told(n, k):
    icl, implied = rows(40, n), rows(40, n, seed=1)
    found = agreement(icl, implied)
    assert torch.equal(found.top_k_recall, agreement(icl, implied, top_k=k).top_k_recall)
    expected = [len(heaviest(x, k) & heaviest(y, k)) / k for x, y in zip(icl, implied, strict=True)]
    assert found.top_k_recall.tolist() == pytest.approx(expected)


def test_agreement_with_itself_is_whole_and_undefined_where_a_weighting_is_constant_or_hidden():
    weights = rows(3, 12)
    whole = agreement(weights, 2.0 * weights)
    for name in ("kendall", "spearman", "cosine", "top_k_recall"):
        assert torch.allclose(getattr(whole, name), torch.ones(3, dtype=torch.float64)), name
    other = rows(3, 12, seed=1)
    other[0], other[1, 3] = 0.5, math.nan
    found = agreement(weights, other)
    for name in ("kendall", "spearman"):
        assert getattr(found, name).isnan().tolist() == [True, True, False], name
    assert found.cosine.isnan().tolist() == [False, True, False]


def test_agreement_of_a_model_holds_one_number_a_head():
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries(LENGTHS)
    icl = icl_attention(capture(model, queries, context=demonstrations, keep=["context_scores"]), demonstrations)
    implied = implied_attention(attributed(model, demonstrations), demonstrations)
    for a, b in ((icl, implied), (by_demonstration(icl, demonstrations), by_demonstration(implied, demonstrations))):
        found = agreement(a, b)
        assert all(x.shape == (3, 3, 2) for x in (found.kendall, found.spearman, found.cosine, found.top_k_recall))


def wrong_demonstrations() -> dict[str, list[Demonstration]]:
    made = make_demonstrations(4)
    lengths = [len(d.tokens) for d in made]
    assert lengths != lengths[::-1]
    retold = replace(made[0], tokens=made[0].tokens.flip(0).roll(1))
    return {"fewer": made[:3], "more": make_demonstrations(5), "reordered": made[::-1], "retold": [retold, *made[1:]]}


@pytest.mark.parametrize("which", wrong_demonstrations())
def test_demonstrations_that_the_update_was_not_made_on_are_refused(which):
    model, others = make_model("one_layer"), wrong_demonstrations()[which]
    update = lcgd(model, make_demonstrations(4), lr=LR)
    zsl = capture(model, make_queries(LENGTHS), keep=ATTENTION)
    with pytest.raises(ValueError, match="the update was not made on these demonstrations"):
        implied_attention(update.attribution(zsl), others)


def test_the_proxy_refuses_runs_of_another_model_or_under_an_update():
    model, demonstrations = make_model("one_layer"), make_demonstrations()
    trained, queries = demonstration_queries(model, demonstrations), make_queries(LENGTHS)
    with pytest.raises(ValueError, match="the run is of another model"):
        proxy_attention(make_model("one_layer", seed=1), capture(model, queries, keep=["own_inputs"]), trained)
    run = capture(model, queries, update=lcgd(model, demonstrations, lr=LR), keep=["own_inputs"])
    with pytest.raises(ValueError, match="zsl is a run under an update"):
        proxy_attention(model, run, trained)
    with pytest.raises(ValueError, match="no demonstrations"):
        demonstration_queries(model, [])


def test_without_ends_leaves_out_each_demonstrations_last_token():
    demonstrations = make_demonstrations(4)
    weights = rows(2, n_tokens(demonstrations))
    found, start, expected = without_ends(weights, demonstrations), 0, []
    for demonstration in demonstrations:
        length = len(demonstration.tokens) - 1
        expected += weights[:, start : start + length - 1].T.tolist()
        start += length
    assert found.T.tolist() == expected


def test_other_demonstrations_give_their_weights_token_by_token_from_the_end():
    demonstrations = make_demonstrations(5)
    lengths = [len(demonstration.tokens) - 1 for demonstration in demonstrations]
    assert len(set(lengths)) > 2
    # A weight tells the demonstration (tens) and the distance from its end (units).
    weights = torch.cat([10.0 * number + torch.arange(n - 1, -1, -1) for number, n in enumerate(lengths)])
    for seed in range(5):
        found = other_demonstrations(weights, demonstrations, seed).split(lengths)
        sources = [int(part[-1]) // 10 for part in found]
        assert sorted(sources) == list(range(5)) != sources
        for part, source in zip(found, sources, strict=True):
            distance = [min(d, lengths[source] - 1) for d in range(len(part) - 1, -1, -1)]
            assert part.tolist() == [10 * source + d for d in distance]
    with pytest.raises(ValueError, match="two or more"):
        other_demonstrations(weights[: lengths[0]], demonstrations[:1])


def test_demonstrations_that_the_run_did_not_have_are_refused():
    model, context = make_model("one_layer"), make_demonstrations()
    run = capture(model, make_queries(LENGTHS), context=context, keep=["context_scores"])
    for others in (
        context[:2],
        context[::-1],
        make_demonstrations(seed=1),
        [replace(d, separator=d.separator[:0]) for d in context],
    ):
        with pytest.raises(ValueError, match="the run had other demonstrations, or in another order, in its context"):
            icl_attention(run, others)


@pytest.mark.unchecked_shapes
def test_readings_lengths_and_numbers_that_do_not_fit_are_refused():
    demonstrations = make_demonstrations()
    attribution, n = attributed(make_model("one_layer"), demonstrations), n_tokens(demonstrations)
    with pytest.raises(ValueError, match="reading must be one of 'contribution', 'coefficient'; got 'proxy'"):
        implied_attention(attribution, demonstrations, "proxy")
    with pytest.raises(ValueError, match=f"there are {n + 1} weights for {n} tokens behind BOS"):
        by_demonstration(torch.ones(2, n + 1), demonstrations)
    with pytest.raises(ValueError, match="got 6 and 5"):
        agreement(torch.ones(2, 6), torch.ones(2, 5))
    for k in (0, 7):
        with pytest.raises(ValueError, match="k must be between 1 and the number of tokens, 6"):
            agreement(rows(6), rows(6, seed=1), top_k=k)


def test_what_was_not_kept_is_named():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries(LENGTHS)
    with pytest.raises(AttributeError, match="context_scores was not kept"):
        icl_attention(capture(model, queries, context=demonstrations, keep=["attn_out"]), demonstrations)
    with pytest.raises(ValueError, match="the run had no demonstrations in its context"):
        icl_attention(capture(model, queries, keep=["attn_out"]), demonstrations)
    with pytest.raises(AttributeError, match="own_inputs was not kept"):
        proxy_attention(model, capture(model, queries, keep=["attn_out"]), demonstration_queries(model, demonstrations))


def test_demonstrations_may_be_generators():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries()
    icl = capture(model, queries, context=demonstrations, keep=["context_scores"])
    zsl = capture(model, queries, keep=[*ATTENTION])
    attribution = gd(model, demonstrations, lr=0.1).attribution(zsl)
    weights = icl_attention(icl, demonstrations)
    assert torch.equal(icl_attention(icl, iter(demonstrations)), weights)
    assert torch.equal(implied_attention(attribution, iter(demonstrations)), implied_attention(attribution, demonstrations))
    assert torch.equal(demonstration_queries(model, iter(demonstrations)), demonstration_queries(model, demonstrations))
    for each in (without_ends, by_demonstration, other_demonstrations):
        assert torch.equal(each(weights, iter(demonstrations)), each(weights, demonstrations))


@pytest.mark.unchecked_shapes
def test_proxy_queries_of_another_shape_or_not_finite_are_refused():
    model, demonstrations = make_model("one_layer"), make_demonstrations()
    zsl = capture(model, make_queries(), keep=["own_inputs"])
    trained = demonstration_queries(model, demonstrations)
    for wrong in (trained[:0], trained[:, :, :1], trained[..., :4], trained[0]):
        with pytest.raises(ValueError, match="trained must be"):
            proxy_attention(model, zsl, wrong)
    with pytest.raises(ValueError, match=r"trained has .* not finite"):
        proxy_attention(model, zsl, torch.full_like(trained, torch.nan))
    with pytest.raises(ValueError, match="seed must be a whole number"):
        other_demonstrations(torch.rand(4), demonstrations, seed=None)
