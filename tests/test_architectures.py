"""Bridges around plain Hugging Face models of many architectures, against training and full prompts without any bridge."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import iclgd_lens.runs.prefix
from iclgd_lens import capture, gd, lcgd, load_model, sim_am_delta, sim_aou, untrained_twin
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import ATTENTION
from iclgd_lens.updates.dual import ParameterUpdate
from tests import reference
from tests.hf_reference import PARAMETERS, Trained, blocks, full_prompt, reference_capture, reference_update
from tests.hf_zoo import ARCHITECTURES, make_hf_model
from tests.models_zoo import label_tokens, make_demonstrations, make_queries, require_hooked_transformer
from tests.reference import relative_error

LR = 0.1
METHODS = {"gd": gd, "lcgd": lcgd}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "demonstration": {},
    "label": {"loss_on": "label", "schedule": "batch", "parameters": ("W_K", "W_V")},
    "label_space": {"loss_on": "label", "readout": "labels", "label_tokens": label_tokens(), "epochs": 2},
}
# Longer than the windows of the zoo, of equal and of different lengths, and as short as a query can be.
QUERIES = make_queries((7, 1, 7, 3))
DEMONSTRATIONS = make_demonstrations(3)
TOKENS = torch.arange(10, 30)[None]
ALWAYS = ("attn_out", "query_scores", "label_log_probs", "lens_logits", "residual", "head_out")
IN_CONTEXT = (*ALWAYS, "context_scores", "demonstration_attention", "label_attention", "demonstration_out")

both_methods = pytest.mark.parametrize("method", METHODS)
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
pytestmark = every_architecture


class Case(NamedTuple):
    """A model behind a bridge, and the same model by itself."""

    model: Any
    plain: Any


@cache
def case(name: str) -> Case:
    return Case(bridged(name), make_hf_model(name))


def bridged(name: str, **options: Any) -> Any:
    return load_model(hf_model=make_hf_model(name), **options)


@cache
def trained(name: str, method: str, objective: str = "demonstration") -> Trained:
    return reference_update(case(name).plain, DEMONSTRATIONS, method=method, lr=LR, **OBJECTIVES[objective])


@cache
def expected(name: str, method: str = "", with_context: bool = False) -> dict[str, Any]:
    """The reference's capture of the plain model, or of the one trained by a method."""
    model = trained(name, method).model if method else case(name).plain
    return reference_capture(model, QUERIES, DEMONSTRATIONS if with_context else None)


@cache
def made(name: str, method: str, objective: str = "demonstration") -> ParameterUpdate:
    return METHODS[method](case(name).model, DEMONSTRATIONS, lr=LR, **OBJECTIVES[objective])


@cache
def captured(name: str, method: str = "", with_context: bool = False) -> Activations:
    """What the package captures of the model, or of it with an update of a method."""
    context, keep = (DEMONSTRATIONS, IN_CONTEXT) if with_context else (None, ALWAYS)
    update = made(name, method) if method else None
    return capture(case(name).model, QUERIES, context=context, update=update, keep=keep)


def assert_captured(found: Activations, expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Every kept tensor that the reference has, relative to its largest entry."""
    for field in found.kept.keys() & expected.keys() - {"query_scores"}:
        assert relative_error(found.kept[field], expected[field]) < tolerance, field
    for row, scores in enumerate(expected["query_scores"]):
        assert relative_error(found.query_scores[row][..., found.query_mask[row]], scores) < tolerance, row
        assert found.query_scores[row][..., ~found.query_mask[row]].eq(0).all()


def assert_same(found: Activations, expected: Activations, tolerance: float = 1e-5) -> None:
    assert found.kept.keys() == expected.kept.keys()
    assert torch.equal(found.query_mask, expected.query_mask)
    for field, tensor in expected.kept.items():
        assert relative_error(found.kept[field], tensor) < tolerance, field


def assert_deltas(update: ParameterUpdate, deltas: dict[str, Sequence[Tensor]], tolerance: float = 1e-4) -> None:
    """Relative to the largest change of a layer's projection: without rotary positions b_K's gradient is zero."""
    for layer in range(len(update.inputs)):
        for kind in ("K", "V"):
            names = (f"W_{kind}", f"b_{kind}")
            largest = max(float(deltas[name][layer].abs().max()) for name in names)
            assert largest > 0
            for name in names:
                found = update.delta(name, layer)
                assert found.shape == deltas[name][layer].shape
                assert float((found - deltas[name][layer]).abs().max()) < tolerance * largest, (name, layer)


def assert_same_update(found: ParameterUpdate, expected: ParameterUpdate, tolerance: float = 1e-5) -> None:
    layers = range(len(expected.inputs))
    assert_deltas(found, {name: [expected.delta(name, layer) for layer in layers] for name in PARAMETERS}, tolerance)
    assert relative_error(found.losses, expected.losses) < tolerance


def hooks_on(model: Any) -> dict[str, tuple[int, ...]]:
    """How many hooks there are on every module, hook points among them."""
    return {
        name: tuple(len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"))
        for root in (model, model.original_model)
        for name, module in root.named_modules()
    } | {f"point {name}": (len(point.fwd_hooks), len(point.bwd_hooks)) for name, point in model.hook_dict.items()}


def outputs(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        return getattr(model, "original_model", model)(tokens, use_cache=False).logits


@pytest.mark.parametrize("with_context", [False, True], ids=["zero_shot", "in_context"])
def test_captures_are_what_full_prompts_of_the_plain_model_show(name, with_context):
    assert_captured(captured(name, with_context=with_context), expected(name, with_context=with_context))


def test_windows_hide_tokens_and_soft_caps_bend_scores_where_architectures_have_them(name):
    """The reference would not notice otherwise."""
    scores, config = expected(name, with_context=True)["context_scores"], case(name).plain.config
    windowed = name in ("gpt_neo", "mistral", "gemma2")
    hidden = scores.eq(-math.inf).all(dim=-1).all(dim=-1)
    assert hidden[0].any() == windowed
    assert hidden[0].all() == (name == "mistral")
    assert (getattr(config, "attn_logit_softcapping", None) is None) == (name != "gemma2")


@both_methods
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_updates_are_what_sgd_does_to_the_plain_model(name, method, objective):
    update, real = made(name, method, objective), trained(name, method, objective)
    assert_deltas(update, real.deltas)
    if OBJECTIVES[objective].get("schedule") != "batch":
        assert relative_error(update.losses, real.losses) < 1e-4
    norms = update.gradient_norms
    assert norms.shape == (len(blocks(case(name).plain)), len(real.losses))
    assert norms.gt(0).all()


@both_methods
@pytest.mark.parametrize("with_context", [False, True], ids=["zero_shot", "in_context"])
def test_an_injected_update_is_the_trained_model(name, method, with_context):
    found = captured(name, method, with_context)
    assert_captured(found, expected(name, method, with_context))
    # What the update does is far more than what is let pass.
    assert relative_error(found.attn_out, expected(name, with_context=with_context)["attn_out"]) > 1e-2


@both_methods
def test_similarities_are_those_of_the_reference(name, method):
    model = case(name).model
    icl, ft, zsl = captured(name, with_context=True), captured(name, method), captured(name)
    runs = expected(name, with_context=True), expected(name, method), expected(name)
    aou, am = sim_aou(icl, ft, zsl), sim_am_delta(icl, ft, zsl)
    for row in range(len(QUERIES)):
        for layer in range(model.cfg.n_layers):
            states = [run["attn_out"][row, layer] for run in runs]
            if _tell_apart(*states):
                assert float(aou[row, layer]) == pytest.approx(reference.sim_aou(*states), abs=1e-3)
            for head in range(model.cfg.n_heads):
                scores = [run["query_scores"][row][layer, head] for run in runs]
                if _tell_apart(*scores):
                    assert float(am[row, layer, head]) == pytest.approx(reference.sim_am_delta(*scores), abs=1e-3)


def _tell_apart(icl: Tensor, ft: Tensor, zsl: Tensor) -> bool:
    """Whether both changes are more than rounding: without rotary positions the first layer's scores move little, or not at all."""
    return all(float((run - zsl).abs().max()) > 1e-3 * float(zsl.abs().max()) for run in (icl, ft))


def test_batch_size_and_order_of_queries_change_nothing(name):
    model, order = case(name).model, [3, 0, 2, 1]
    for options in ({"context": DEMONSTRATIONS, "keep": IN_CONTEXT}, {"keep": (*ALWAYS, *ATTENTION)}):
        whole = capture(model, QUERIES, **options)
        assert_same(capture(model, QUERIES, batch_size=1, **options), whole)
        shuffled = capture(model, [QUERIES[row] for row in order], batch_size=2, **options)
        assert torch.equal(shuffled.query_ids, whole.query_ids[order])
        for field, tensor in whole.kept.items():
            assert relative_error(shuffled.kept[field], tensor[order]) < 1e-5, field


@pytest.mark.parametrize("with_update", [False, True], ids=["as_it_is", "updated"])
def test_a_prefix_that_is_cached_and_prompts_that_run_whole_show_the_same(name, with_update, monkeypatch):
    method = "gd" if with_update else ""
    cached = [captured(name, method, with_context) for with_context in (False, True)]
    monkeypatch.setattr(iclgd_lens.runs.prefix, "run_into_cache", lambda sites, tokens: None)
    whole = [captured.__wrapped__(name, method, with_context) for with_context in (False, True)]
    for one, other in zip(whole, cached, strict=True):
        assert_same(one, other)


def test_a_prefix_is_cached_without_a_warning(name, caplog):
    with caplog.at_level(logging.WARNING):
        capture(case(name).model, QUERIES, context=DEMONSTRATIONS)
    assert not caplog.records


def test_a_model_that_keeps_no_cache_is_run_whole_and_one_warning_says_so(name, caplog, monkeypatch):
    monkeypatch.setattr(DynamicCache, "update", lambda cache, keys, values, *args, **kwargs: (keys, values))
    with caplog.at_level(logging.WARNING):
        found = capture(case(name).model, QUERIES, context=DEMONSTRATIONS, batch_size=2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "keeps no keys and values to go on behind: demonstrations run again with every query" in caplog.text
    assert_captured(found, expected(name, with_context=True))


def test_afterwards_outputs_are_bitwise_as_before_and_no_hook_is_left(name):
    model = bridged(name)
    before, weights, hooks = outputs(model), _weights(model), hooks_on(model)
    assert relative_error(before, outputs(case(name).plain)) < 1e-5
    for method in METHODS.values():
        update = method(model, DEMONSTRATIONS, lr=LR)
        capture(model, QUERIES, context=DEMONSTRATIONS, update=update)
        with update.attached(model):
            assert relative_error(outputs(model), before) > 1e-2
    untrained_twin(model)
    assert hooks_on(model) == hooks
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(weight, weights[key]) for key, weight in _weights(model).items())
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.original_model.parameters())


@pytest.mark.parametrize("place", ["blocks.0.attn.k.hook_out", "blocks.1.hook_out"])
def test_an_exception_in_a_hook_of_the_user_s_leaves_nothing_behind(name, place):
    model, update = case(name).model, made(name, "lcgd")
    before, hooks = outputs(model), hooks_on(model)

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("a hook of the user's")

    for run in (
        lambda: capture(model, QUERIES),
        lambda: capture(model, QUERIES, context=DEMONSTRATIONS, update=update),
        lambda: gd(model, DEMONSTRATIONS, lr=LR),
        lambda: lcgd(model, DEMONSTRATIONS, lr=LR),
    ):
        with pytest.raises(RuntimeError, match="a hook of the user's"), model.hooks(fwd_hooks=[(place, fail)]):
            run()
        assert hooks_on(model) == hooks
        assert torch.equal(outputs(model), before)
    with pytest.raises(RuntimeError, match="a hook of the user's"), update.attached(model):
        model.run_with_hooks(TOKENS, fwd_hooks=[(place, fail)])
    assert hooks_on(model) == hooks
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("compatible", [False, True], ids=["as_it_is", "compatibility_mode"])
def test_an_update_s_hooks_act_alike_through_run_with_hooks_and_attached(name, compatible):
    model = in_compatibility_mode(name) if compatible else case(name).model
    update = made(name, "lcgd") if not compatible else lcgd(model, DEMONSTRATIONS, lr=LR)
    prompt = full_prompt(QUERIES[0], DEMONSTRATIONS)[None]
    hooks = hooks_on(model)
    with torch.no_grad():
        by_hooks = model.run_with_hooks(prompt, fwd_hooks=update.fwd_hooks(model))
        with update.attached(model):
            attached = model(prompt)
        weights_edited = trained(name, "lcgd").model(prompt, use_cache=False).logits
    assert torch.equal(by_hooks, attached)
    assert relative_error(by_hooks, weights_edited) < 1e-4
    assert hooks_on(model) == hooks


def test_a_hook_of_the_user_s_on_keys_acts_on_what_an_updated_projection_puts_out(name):
    double = [("blocks.1.attn.k.hook_out", lambda keys, hook: 2 * keys)]
    model, update = case(name).model, made(name, "gd")
    edited = load_model(hf_model=deepcopy(trained(name, "gd").model).float())
    with model.hooks(fwd_hooks=double):
        found = capture(model, QUERIES[:2], update=update)
    with edited.hooks(fwd_hooks=double):
        assert_same(found, capture(edited, QUERIES[:2]), 1e-4)


@cache
def in_compatibility_mode(name: str) -> Any:
    model = bridged(name)
    model.enable_compatibility_mode(no_processing=True)
    return model


def test_compatibility_mode_without_processing_changes_nothing(name):
    model = in_compatibility_mode(name)
    assert_captured(capture(model, QUERIES), expected(name))
    for method in METHODS:
        update = METHODS[method](model, DEMONSTRATIONS, lr=LR)
        assert_deltas(update, trained(name, method).deltas)
        assert_captured(capture(model, QUERIES, context=DEMONSTRATIONS, update=update), expected(name, method, with_context=True))


@both_methods
def test_processed_weights_are_warned_of(name, method):
    model = bridged(name, process_weights=True)
    with pytest.warns(UserWarning, match="weights are processed"):
        METHODS[method](model, DEMONSTRATIONS[:1], lr=LR)


@pytest.fixture
def hooked(name: str) -> Any:
    require_hooked_transformer()
    if reason := ARCHITECTURES[name].not_hooked:
        pytest.skip(reason)
    return _hooked(name)


@cache
def _hooked(name: str) -> Any:
    return bridged(name, backend="hooked")


def test_both_classes_capture_the_same(name, hooked):
    assert_same(capture(hooked, QUERIES, keep=ALWAYS), captured(name), 1e-4)
    in_context = capture(hooked, QUERIES, context=DEMONSTRATIONS, keep=IN_CONTEXT)
    assert_same(in_context, captured(name, with_context=True), 1e-4)


@both_methods
def test_both_classes_learn_the_same(name, hooked, method):
    for objective in ("demonstration", "label"):
        update = METHODS[method](hooked, DEMONSTRATIONS, lr=LR, **OBJECTIVES[objective])
        assert_same_update(update, made(name, method, objective), 1e-4)


@pytest.mark.parametrize("keep", [("embed", "pos_embed", "ln", "unembed"), ("ln",), ("unembed",)], ids=", ".join)
def test_an_untrained_twin_keeps_what_is_named_bitwise_and_draws_the_rest(name, keep):
    model = case(name).model
    learned, drawn = _weights(model), _weights(untrained_twin(model, keep=keep))
    assert {key: weight.shape for key, weight in drawn.items()} == {key: weight.shape for key, weight in learned.items()}
    tied = model.original_model.config.tie_word_embeddings
    for key, weight in drawn.items():
        parts = {"embed", "unembed"} if tied and _part(key) in ("embed", "unembed") else {_part(key)}
        assert torch.equal(weight, learned[key]) is bool(parts & {*keep}), key


def test_the_same_seed_draws_the_same_twin_and_torch_s_random_state_is_left_alone(name):
    model = case(name).model
    torch.manual_seed(5)
    state, learned = torch.get_rng_state(), _weights(model)
    first, again, other = (untrained_twin(model, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    third = untrained_twin(model, seed=3)
    same = [_weights(twin) for twin in (first, again, third)]
    assert all(torch.equal(weight, each[key]) for each in same for key, weight in same[0].items())
    assert any(not torch.equal(weight, same[0][key]) for key, weight in _weights(other).items())
    assert all(torch.equal(weight, learned[key]) for key, weight in _weights(model).items())


def test_an_untrained_twin_is_measured_as_its_plain_model_is(name):
    twin = untrained_twin(case(name).model)
    plain = make_hf_model(name)
    plain.load_state_dict({_plain(key): tensor for key, tensor in twin.original_model.state_dict().items()}, strict=False)
    plain.tie_weights()
    assert relative_error(outputs(twin), outputs(plain)) < 1e-5
    assert_captured(capture(twin, QUERIES, context=DEMONSTRATIONS), reference_capture(plain, QUERIES, DEMONSTRATIONS))
    assert_deltas(lcgd(twin, DEMONSTRATIONS, lr=LR), reference_update(plain, DEMONSTRATIONS, method="lcgd", lr=LR).deltas)


def _plain(name: str) -> str:
    return name.replace("._original_component", "")


def _weights(model: Any) -> dict[str, Tensor]:
    """Parameters by their Hugging Face names. An unembedding without a bias has got one of zeros from TransformerLens."""
    named = {_plain(name): parameter.detach().clone() for name, parameter in model.original_model.named_parameters()}
    return {name: weight for name, weight in named.items() if name != "lm_head.bias" or model.cfg.architecture == "PhiForCausalLM"}


def _part(name: str) -> str | None:
    """The part of `keep` that a parameter belongs to, written down apart from the package."""
    *_, module, _ = name.split(".")
    if module in ("wte", "embed_tokens", "embed_in"):
        return "embed"
    if module in ("wpe", "embed_positions"):
        return "pos_embed"
    if module in ("lm_head", "embed_out"):
        return "unembed"
    return "ln" if "norm" in module or module.startswith("ln_") else None


def test_the_last_layer_s_first_lcgd_step_is_gd_s(name):
    model, last = case(name).model, case(name).model.cfg.n_layers - 1
    for options in (OBJECTIVES["demonstration"], OBJECTIVES["label_space"]):
        ours, theirs = (method(model, DEMONSTRATIONS[:1], lr=LR, **{**options, "epochs": 1}) for method in (lcgd, gd))
        for parameter in ("W_K", "W_V"):
            assert relative_error(ours.delta(parameter, last), theirs.delta(parameter, last)) < 1e-5
            assert relative_error(ours.delta(parameter, 0), theirs.delta(parameter, 0)) > 1e-3


def test_lcgd_is_blind_to_weights_above_and_gd_is_not(name):
    changed = make_hf_model(name)
    with torch.no_grad():
        for parameter in blocks(changed)[1].parameters():
            parameter.mul_(1.5)
    other = load_model(hf_model=changed)
    layer_causal, vanilla = lcgd(other, DEMONSTRATIONS, lr=LR), gd(other, DEMONSTRATIONS, lr=LR)
    assert torch.equal(layer_causal.key_errors[0], made(name, "lcgd").key_errors[0])
    assert torch.equal(layer_causal.value_errors[0], made(name, "lcgd").value_errors[0])
    assert relative_error(vanilla.value_errors[0], made(name, "gd").value_errors[0]) > 1e-3
