"""The similarities against their formulas, at their edges, and where their value is known in closed form."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from iclgd_lens import Activations, alpha, random_update, sim_am, sim_am_delta, sim_aou, sim_aou_norm

LAYERS, HEADS, WIDTH, LENGTH = 3, 2, 16, 5


def activations(attn_out: Tensor, query_scores: Tensor | None = None, lengths: list[int] | None = None) -> Activations:
    n = len(attn_out)
    if query_scores is None:
        query_scores = torch.zeros(n, attn_out.shape[1], HEADS, LENGTH)
    mask = torch.arange(query_scores.shape[-1]) >= query_scores.shape[-1] - torch.tensor(lengths or [LENGTH] * n)[:, None]
    kept = {"attn_out": attn_out, "query_scores": query_scores * mask[:, None, None]}
    shape = f"{attn_out.shape[1:]} {query_scores.shape[1:3]}"
    return Activations(kept, mask, torch.zeros(n, dtype=torch.long), mask.sum(-1), shape)


def random_run(seed: int, n: int = 4) -> Activations:
    torch.manual_seed(seed)
    lengths = [LENGTH - i % 3 for i in range(n)]
    return activations(torch.randn(n, LAYERS, WIDTH), torch.randn(n, LAYERS, HEADS, LENGTH), lengths)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double(), b.double()) / (a.double().norm() * b.double().norm()))


def unit(a: Tensor) -> Tensor:
    return a.double() / a.double().norm()


def test_similarities_equal_their_formulas_entry_by_entry():
    icl, ft, zsl = random_run(0), random_run(1), random_run(2)
    aou, aou_norm = sim_aou(icl, ft, zsl), sim_aou_norm(icl, ft, zsl)
    am, am_delta = sim_am(icl, ft), sim_am_delta(icl, ft, zsl)
    assert aou.shape == aou_norm.shape == (4, LAYERS)
    assert am.shape == am_delta.shape == (4, LAYERS, HEADS)
    for query in range(4):
        real = zsl.query_mask[query]
        for layer in range(LAYERS):
            h_icl, h_ft, h_zsl = (run.attn_out[query, layer] for run in (icl, ft, zsl))
            assert aou[query, layer] == pytest.approx(cosine(h_icl - h_zsl, h_ft - h_zsl), abs=1e-6)
            expected = cosine(unit(h_icl) - unit(h_zsl), unit(h_ft) - unit(h_zsl))
            assert aou_norm[query, layer] == pytest.approx(expected, abs=1e-6)
            for head in range(HEADS):
                m_icl, m_ft, m_zsl = (run.query_scores[query, layer, head][real] for run in (icl, ft, zsl))
                assert am[query, layer, head] == pytest.approx(cosine(m_icl, m_ft), abs=1e-6)
                assert am_delta[query, layer, head] == pytest.approx(cosine(m_icl - m_zsl, m_ft - m_zsl), abs=1e-6)


def test_alpha_compares_lcgd_with_gd_and_is_one_for_the_same_update():
    lcgd, gd, zsl = random_run(0), random_run(1), random_run(2)
    assert torch.equal(alpha(lcgd, gd, zsl), sim_aou(gd, lcgd, zsl))
    assert torch.equal(alpha(lcgd, gd, zsl, of="query_scores"), sim_am_delta(gd, lcgd, zsl))
    torch.testing.assert_close(alpha(gd, gd, zsl), torch.ones(4, LAYERS))
    with pytest.raises(ValueError, match="'attn_out' or 'query_scores'"):
        alpha(lcgd, gd, zsl, of="values")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_sim_aou_ignores_the_size_of_the_changes(scale: float):
    icl, ft, zsl = random_run(0), random_run(1), random_run(2)
    longer = ft.with_kept(attn_out=zsl.attn_out + scale * (ft.attn_out - zsl.attn_out))
    torch.testing.assert_close(sim_aou(icl, longer, zsl), sim_aou(icl, ft, zsl), atol=1e-3, rtol=0)


@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_sim_aou_norm_of_changes_that_share_nothing_is_the_closed_form(ratio: float):
    """z, and two states z + noise of equal length: SimAOU → 0, SimAOU_norm → (1 − ‖z‖/‖h‖)/2."""
    torch.manual_seed(0)
    n, width = 64, 20_000
    z = torch.randn(n, 1, width)
    noise = math.sqrt(ratio**2 - 1)
    icl, ft = (activations(z + noise * torch.randn(n, 1, width)) for _ in range(2))
    assert float(sim_aou(icl, ft, activations(z)).mean()) == pytest.approx(0, abs=3e-3)
    assert float(sim_aou_norm(icl, ft, activations(z)).mean()) == pytest.approx((1 - 1 / ratio) / 2, abs=3e-3)


def test_a_run_without_change_is_undefined_not_zero():
    icl, zsl = random_run(0), random_run(2)
    assert sim_aou(icl, zsl, zsl).isnan().all()
    assert sim_aou_norm(icl, zsl, zsl).isnan().all()
    assert sim_am_delta(icl, zsl, zsl).isnan().all()
    silent = icl.with_kept(query_scores=torch.zeros_like(icl.query_scores))
    assert sim_am(silent, zsl).isnan().all()


def test_a_change_of_rounding_size_counts_as_none():
    icl, zsl = random_run(0), random_run(2)
    rounded = zsl.with_kept(attn_out=zsl.attn_out * (1 + torch.finfo(torch.float32).eps))
    assert sim_aou(icl, rounded, zsl).isnan().all()
    small = zsl.with_kept(attn_out=zsl.attn_out * (1 + 1e-4))
    assert not sim_aou(icl, small, zsl).isnan().any()


def test_half_precision_activations_are_compared_in_float32():
    icl, ft, zsl = random_run(0), random_run(1), random_run(2)
    halves = [run.with_kept(attn_out=run.attn_out.to(torch.bfloat16)) for run in (icl, ft, zsl)]
    similarity = sim_aou(*halves)
    assert similarity.dtype == torch.float32
    torch.testing.assert_close(similarity, sim_aou(icl, ft, zsl), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_changes_above_the_rounding_of_storage_are_kept_and_those_below_are_not(dtype: torch.dtype):
    zsl = random_run(2)
    eps = torch.finfo(dtype).eps
    for size, kept in ((4 * eps, True), (eps / 8, False)):
        change = (
            size * torch.nn.functional.normalize(torch.randn(4, LAYERS, WIDTH), dim=-1) * zsl.attn_out.norm(dim=-1, keepdim=True)
        )
        icl = zsl.with_kept(attn_out=(zsl.attn_out + change).to(dtype))
        stored = zsl.with_kept(attn_out=zsl.attn_out.to(dtype))
        for metric in (sim_aou, sim_aou_norm):
            assert metric(icl, icl, stored).isnan().any().item() is not kept


def test_vectors_too_long_or_too_short_to_square_have_a_direction():
    icl, ft, zsl = random_run(0), random_run(1), random_run(2)
    for scale in (1e25, 1e-25):
        scaled = [run.with_kept(attn_out=scale * run.attn_out, query_scores=scale * run.query_scores) for run in (icl, ft, zsl)]
        torch.testing.assert_close(sim_am(*scaled[:2]), sim_am(icl, ft))
        torch.testing.assert_close(sim_aou_norm(*scaled), sim_aou_norm(icl, ft, zsl), atol=1e-5, rtol=0)


def test_scores_that_are_not_finite_are_undefined():
    icl, zsl = random_run(0), random_run(2)
    icl.query_scores[0, 0, 0, -1] = float("nan")
    icl.query_scores[0, 1, 0, -1] = float("inf")
    undefined = sim_am(icl, zsl).isnan()
    assert undefined[0, :2, 0].all()
    assert undefined.sum() == 2


def test_runs_of_other_queries_or_models_are_refused():
    icl, zsl = random_run(0), random_run(2)
    with pytest.raises(ValueError, match="same queries"):
        sim_aou(icl, random_run(1, n=3), zsl)
    with pytest.raises(ValueError, match="same model"):
        sim_aou(icl, replace(random_run(1), model="another"), zsl)


def test_random_update_has_the_updates_size_a_direction_of_its_own_and_stays_within_the_query():
    ft, zsl = random_run(1), random_run(2)
    random = random_update(ft, zsl, seed=3)
    for name in ("attn_out", "query_scores"):
        real, drawn = (run.kept[name] - zsl.kept[name] for run in (ft, random))
        torch.testing.assert_close(drawn.norm(dim=-1), real.norm(dim=-1))
    assert not random.query_scores[~ft.query_mask[:, None, None].expand_as(ft.query_scores)].any()
    assert torch.equal(random_update(ft, zsl, seed=3).attn_out, random.attn_out)
    assert not torch.equal(random_update(ft, zsl, seed=4).attn_out, random.attn_out)


def test_random_update_has_similarity_near_zero_and_none_where_the_update_did_nothing():
    torch.manual_seed(0)
    wide = [activations(torch.randn(200, 1, 400)) for _ in range(3)]
    similarity = sim_aou(wide[0], random_update(wide[1], wide[2], seed=1), wide[2])
    assert abs(float(similarity.mean())) < 3 / math.sqrt(200 * 400)
    assert sim_aou(wide[0], random_update(wide[2], wide[2], seed=1), wide[2]).isnan().all()


@pytest.mark.parametrize("change", [{"context": "0123"}, {"updated": True}], ids=["context", "update"])
@pytest.mark.parametrize("measure", [sim_aou, sim_aou_norm, sim_am_delta, alpha, lambda icl, ft, zsl: random_update(ft, zsl)])
def test_a_zero_shot_run_with_a_context_or_an_update_is_refused(measure, change):
    icl, ft, zsl = random_run(0), random_run(1), random_run(2)
    with pytest.raises(ValueError, match="zsl is a run"):
        measure(icl, ft, replace(zsl, **change))


def test_random_update_of_runs_of_other_queries_or_models_is_refused():
    ft, zsl = random_run(1), random_run(2)
    with pytest.raises(ValueError, match="same queries"):
        random_update(ft, random_run(2, n=3))
    with pytest.raises(ValueError, match="same model"):
        random_update(ft, replace(zsl, model="another"))
    with pytest.raises(AttributeError, match="attn_out was not kept"):
        random_update(ft, replace(zsl, kept={}))
    with pytest.raises(ValueError, match="seed must be a whole number"):
        random_update(ft, zsl, seed=1.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_seed_draws_the_same_under_every_default_of_torch_s(dtype, monkeypatch):
    ft, zsl = random_run(1), random_run(2)
    expected = random_update(ft, zsl, seed=3)
    torch.set_default_dtype(dtype)
    try:
        found = random_update(ft, zsl, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"), torch.autocast("cpu"):
        elsewhere = random_update(ft, zsl, seed=3)
    for name in ("attn_out", "query_scores"):
        assert torch.equal(found.kept[name], expected.kept[name])
        assert torch.equal(elsewhere.kept[name], expected.kept[name])


def test_autocast_does_not_round_similarities():
    runs = [random_run(seed) for seed in range(3)]
    expected = sim_aou(*runs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sim_aou(*runs), expected)
