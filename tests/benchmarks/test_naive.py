"""The naive path against the independent implementation that all tests trust, on models of many shapes."""

import math

import pytest
import torch

from iclgd_lens.benchmarks.naive import PARAMETERS, naive_capture, naive_compare, naive_update, parameter
from tests import reference
from tests.models_zoo import ZOO, label_tokens, make_demonstrations, make_model, make_queries
from tests.reference import reference_capture, reference_update, relative_error


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("shape", ZOO)
def test_capture_is_the_references(shape, with_context):
    model, queries = make_model(shape), make_queries()
    context = make_demonstrations() if with_context else None
    found, expected = naive_capture(model, queries, context), reference_capture(model, queries, context)
    assert ("context_scores" in found) == with_context
    for name in found.keys() - {"query_scores"}:
        assert relative_error(found[name], expected[name]) < 1e-5, name
    for scores, own in zip(found["query_scores"], expected["query_scores"], strict=True):
        assert relative_error(scores[..., -own.shape[-1] :], own) < 1e-5
        assert not scores[..., : -own.shape[-1]].any()


@pytest.mark.parametrize(("loss_on", "readout"), [("demonstration", "vocab"), ("label", "vocab"), ("label", "labels")])
@pytest.mark.parametrize("method", ["gd", "lcgd"])
@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated", "soft_caps"])
def test_update_is_the_references(shape, method, loss_on, readout):
    model, demonstrations = make_model(shape).double(), make_demonstrations()
    model.cfg.dtype = torch.float64
    options = {"method": method, "lr": 0.1, "loss_on": loss_on, "readout": readout, "label_tokens": label_tokens()}
    before = [each.clone() for each in model.parameters()]
    found, expected = naive_update(model, demonstrations, **options), reference_update(model, demonstrations, **options).model
    for layer in range(model.cfg.n_layers):
        for name in PARAMETERS:
            assert relative_error(parameter(found, layer, name), parameter(expected, layer, name)) < 1e-12
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_similarities_are_means_of_the_references():
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries()
    found = naive_compare({"one": model}, demonstrations, queries, lr=0.1, methods=("lcgd",))
    trained = reference_update(model, demonstrations, method="lcgd", lr=0.1).model
    zsl, icl = reference_capture(model, queries), reference_capture(model, queries, demonstrations)
    ft = reference_capture(trained, queries)
    for layer in range(model.cfg.n_layers):
        outputs = [reference.sim_aou(*(run["attn_out"][query, layer] for run in (icl, ft, zsl))) for query in range(len(queries))]
        scores = [
            reference.sim_am_delta(*(run["query_scores"][query][layer, head] for run in (icl, ft, zsl)))
            for query in range(len(queries))
            for head in range(model.cfg.n_heads)
        ]
        assert math.isclose(found["one", "lcgd", "sim_aou"][layer], sum(outputs) / len(outputs), rel_tol=1e-4)
        assert math.isclose(found["one", "lcgd", "sim_am_delta"][layer], sum(scores) / len(scores), rel_tol=1e-4)
