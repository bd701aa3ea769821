"""Running under an update is running with edited weights, beside a user's own hooks, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch

from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import BOS, D_VOCAB, ZOO, make_demonstrations, make_model
from tests.reference import PARAMETERS, parameter, relative_error

LR = 0.05
pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def make_tokens(batch: int = 3, length: int = 12) -> torch.Tensor:
    text = torch.randint(10, D_VOCAB, (batch, length - 1), generator=torch.Generator().manual_seed(7))
    return torch.cat([torch.full((batch, 1), BOS), text], dim=1)


def edited(model: HookedTransformer, *updates: ParameterUpdate) -> HookedTransformer:
    """A deep copy whose weights are W + ΔW."""
    model = copy.deepcopy(model)
    for update in updates:
        for layer in range(model.cfg.n_layers):
            for name in PARAMETERS:
                parameter(model, layer, name).data += update.delta(name, layer).to(model.cfg.dtype)
    return model


def double_a_head(value, hook):
    return torch.cat([2 * value[:, :, :1], value[:, :, 1:]], dim=2)


def shift(value, hook):
    return value + torch.linspace(-0.5, 0.5, value.shape[-1])


@pytest.mark.parametrize("shape", ZOO)
def test_hooked_run_equals_a_run_with_edited_weights(shape):
    model, tokens = make_model(shape), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    with torch.no_grad():
        plain, expected = model(tokens), edited(model, update)(tokens)
        found = model.run_with_hooks(tokens, fwd_hooks=update.fwd_hooks(model))
    assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize("names", [("W_K",), ("b_K",), ("W_V",), ("b_V",), ("b_V", "W_K")], ids="+".join)
def test_update_of_some_parameters_equals_their_edit(names):
    model, tokens = make_model("rotary_rms_grouped_gated"), make_tokens()
    update = gd(model, make_demonstrations(), lr=LR, parameters=names)
    with torch.no_grad():
        found, expected = model.run_with_hooks(tokens, fwd_hooks=update.fwd_hooks(model)), edited(model, update)(tokens)
        assert relative_error(found, expected) < 1e-5
        assert relative_error(model(tokens), expected) > 1e-4


def test_half_precision_run_equals_edited_weights_up_to_half_precision():
    model, tokens = make_model("rms", dtype=torch.bfloat16), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    with torch.no_grad():
        found, expected = model.run_with_hooks(tokens, fwd_hooks=update.fwd_hooks(model)), edited(model, update)(tokens)
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) < 0.05 < relative_error(model(tokens), expected)


def test_update_of_learning_rate_zero_changes_no_bit():
    model, tokens = make_model(), make_tokens()
    update = gd(model, make_demonstrations(), lr=0)
    with update.attached(model):
        found = model(tokens)
    assert torch.equal(found, model(tokens))


@pytest.mark.parametrize("shape", ["three_layers", "no_norm", "rotary_rms_grouped_gated", "post_norm"])
def test_cache_under_an_attached_update_is_the_cache_of_edited_weights(shape):
    model, tokens = make_model(shape), make_tokens()
    update = gd(model, make_demonstrations(), lr=LR)
    with torch.no_grad():
        with update.attached(model) as same:
            assert same is model
            logits, cache = model.run_with_cache(tokens)
        expected_logits, expected = edited(model, update).run_with_cache(tokens)
    assert relative_error(logits, expected_logits) < 1e-5
    assert cache.keys() == expected.keys()
    for name in expected:
        assert relative_error(cache[name], expected[name]) < 1e-5, name


def test_gradients_flow_through_an_attached_update_as_through_edited_weights():
    model, tokens = make_model("rotary"), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    other = edited(model, update)
    with update.attached(model):
        model(tokens, return_type="loss").backward()
    other(tokens, return_type="loss").backward()
    for (name, weight), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        if not name.endswith("b_K"):
            assert relative_error(weight.grad, expected.grad) < 1e-5, name


@pytest.mark.parametrize(
    "mine",
    [
        [("blocks.1.attn.hook_z", double_a_head)],
        [("blocks.0.hook_resid_pre", shift), ("blocks.2.hook_mlp_out", shift)],
        [("blocks.1.attn.hook_pattern", double_a_head)],
        [("blocks.1.attn.hook_k", double_a_head), ("blocks.2.attn.hook_v", shift)],
    ],
    ids=["z", "stream", "pattern", "keys_and_values"],
)
def test_hooks_behind_those_of_the_update_act_as_on_edited_weights(mine):
    model, tokens = make_model("three_layers"), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    with torch.no_grad():
        expected = edited(model, update).run_with_hooks(tokens, fwd_hooks=mine)
        found = model.run_with_hooks(tokens, fwd_hooks=update.fwd_hooks(model) + mine)
        with update.attached(model):
            attached = model.run_with_hooks(tokens, fwd_hooks=mine)
        plain = model.run_with_hooks(tokens, fwd_hooks=update.fwd_hooks(model))
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(attached, found)
    assert relative_error(plain, expected) > 1e-2


@pytest.mark.parametrize("shape", ["three_layers", "no_norm"])
def test_hooks_on_an_attention_input_before_those_of_the_update_act_as_on_edited_weights(shape):
    model, tokens = make_model(shape), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    place = "blocks.1.hook_resid_pre" if model.cfg.normalization_type is None else "blocks.1.ln1.hook_normalized"
    mine = [(place, shift)]
    with torch.no_grad():
        expected = edited(model, update).run_with_hooks(tokens, fwd_hooks=mine)
        found = model.run_with_hooks(tokens, fwd_hooks=mine + update.fwd_hooks(model))
        with model.hooks(fwd_hooks=mine), update.attached(model):
            attached = model(tokens)
    assert relative_error(found, expected) < 1e-5
    assert torch.equal(attached, found)


@pytest.mark.parametrize("shape", ["three_layers", "parallel_mlp", "no_norm", "post_norm"])
def test_hooks_on_the_residual_stream_act_under_an_attached_update(shape):
    model, tokens = make_model(shape), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    mine = [("blocks.1.hook_resid_pre", shift)]
    with torch.no_grad():
        expected = edited(model, update).run_with_hooks(tokens, fwd_hooks=mine)
        with update.attached(model):
            found = model.run_with_hooks(tokens, fwd_hooks=mine)
    assert relative_error(found, expected) < 1e-5


def test_hooks_on_keys_and_values_act_when_an_update_is_attached_over_them():
    model, tokens = make_model("three_layers"), make_tokens()
    update = lcgd(model, make_demonstrations(), lr=LR)
    mine = [("blocks.1.attn.hook_v", double_a_head)]
    with torch.no_grad():
        expected = edited(model, update).run_with_hooks(tokens, fwd_hooks=mine)
        with model.hooks(fwd_hooks=mine), update.attached(model):
            found = model(tokens)
    assert relative_error(found, expected) < 1e-5


def test_attached_updates_add_up():
    model, tokens = make_model(), make_tokens()
    first, second = (method(model, make_demonstrations(), lr=LR) for method in (gd, lcgd))
    with torch.no_grad():
        with first.attached(model):
            with second.attached(model):
                both = model(tokens)
            one = model(tokens)
        assert relative_error(both, edited(model, first, second)(tokens)) < 1e-5
        assert relative_error(one, edited(model, first)(tokens)) < 1e-5


def test_outputs_are_bitwise_as_before_once_detached_also_after_an_exception():
    model, tokens = make_model("rotary"), make_tokens()
    weights = copy.deepcopy(model.state_dict())
    before = model(tokens)
    update = gd(model, make_demonstrations(), lr=LR)
    with update.attached(model):
        assert not torch.equal(model(tokens), before)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(tokens), before)
    with pytest.raises(KeyboardInterrupt), update.attached(model):
        raise KeyboardInterrupt
    assert torch.equal(model(tokens), before)
    assert not model.list_hooks()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_users_hooks_stay_when_an_update_is_detached():
    model, tokens = make_model(), make_tokens()
    model.add_hook("blocks.1.hook_mlp_out", shift)
    model.add_perma_hook("blocks.0.hook_attn_out", shift)
    before, hooks = model(tokens), set(model.list_hooks())
    with gd(model, make_demonstrations(), lr=LR).attached(model):
        model(tokens)
    assert set(model.list_hooks()) == hooks
    assert torch.equal(model(tokens), before)


def test_making_hooks_attaches_nothing():
    model = make_model()
    assert gd(model, make_demonstrations(), lr=LR).fwd_hooks(model)
    assert not model.list_hooks()
