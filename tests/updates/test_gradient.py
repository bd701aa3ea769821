"""GD and LCGD against `torch.optim.SGD` on real weights, and the properties that hold exactly."""

from __future__ import annotations

import copy
import math
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import BOS, D_VOCAB, FOLDED, N_CTX, ZOO, in_float64, label_tokens, make_demonstrations, make_model
from tests.reference import PARAMETERS, Trained, parameter, reference_update, relative_error

LR = 0.02
METHODS = {"gd": gd, "lcgd": lcgd}
OBJECTIVES = {
    "demonstration": {},
    "label": {"loss_on": "label"},
    "label_space": {"loss_on": "label", "readout": "labels", "label_tokens": label_tokens()},
}
TENSORS = ("inputs", "key_errors", "value_errors", "gradient_norms", "losses")

both_methods = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def assert_equals_training(update: ParameterUpdate, trained: Trained, before, names=PARAMETERS, tolerance: float = 1e-5) -> None:
    """Every ΔW and Δb, relative to the largest change of its projection: without rotary positions b_K's gradient is zero."""
    for layer in range(before.cfg.n_layers):
        for kind in ("K", "V"):
            expected = {
                name: (parameter(trained.model, layer, name) - parameter(before, layer, name)).detach()
                for name in (f"W_{kind}", f"b_{kind}")
            }
            largest = max(float(change.abs().max()) for change in expected.values())
            assert largest > 0 or not {f"W_{kind}", f"b_{kind}"} & set(names)
            for name, change in expected.items():
                found = update.delta(name, layer)
                assert found.shape == change.shape
                assert float((found - change).abs().max()) <= tolerance * largest, (name, layer)
    assert (update.gradient_norms / trained.gradient_norms - 1).abs().max() < tolerance
    assert (update.losses / trained.losses - 1).abs().max() < tolerance


def assert_identical(a: ParameterUpdate, b: ParameterUpdate, layers: int | None = None) -> None:
    """Bitwise, in the first `layers` layers."""
    assert torch.equal(a.inputs[:layers], b.inputs[:layers])
    assert torch.equal(a.key_errors[:layers], b.key_errors[:layers])
    assert torch.equal(a.value_errors[:layers], b.value_errors[:layers])
    assert torch.equal(a.gradient_norms[:layers], b.gradient_norms[:layers])


@both_methods
@pytest.mark.parametrize(("objective", "schedule"), [("demonstration", "online"), ("label", "online"), ("label_space", "batch")])
@pytest.mark.parametrize("shape", ZOO)
def test_update_equals_sgd_on_the_real_weights(shape, objective, schedule, method):
    model, demonstrations = make_model(shape, dtype=torch.float64), make_demonstrations(2)
    options = {"lr": LR, "schedule": schedule, "epochs": 2, **OBJECTIVES[objective]}
    update = METHODS[method](model, demonstrations, **options)
    assert_equals_training(update, reference_update(model, demonstrations, method=method, **options), model, tolerance=1e-9)


@both_methods
@pytest.mark.parametrize("schedule", ["online", "batch"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("shape", "k"), [("three_layers", 3), ("rotary_rms_grouped_gated", 1)])
def test_update_equals_sgd_in_single_precision(shape, k, objective, schedule, method):
    model, demonstrations = make_model(shape, seed=3), make_demonstrations(k, seed=4)
    options = {"lr": LR, "schedule": schedule, **OBJECTIVES[objective]}
    update = METHODS[method](model, demonstrations, **options)
    wide = in_float64(model)
    assert_equals_training(update, reference_update(wide, demonstrations, method=method, **options), wide)


@both_methods
@pytest.mark.parametrize(
    "names", [("W_K",), ("b_K",), ("W_V",), ("b_V",), ("W_K", "b_V"), ("b_K", "W_V"), ("b_V", "W_V")], ids="+".join
)
def test_only_the_named_parameters_are_trained(names, method):
    model, demonstrations = make_model("rotary", dtype=torch.float64), make_demonstrations()
    update = METHODS[method](model, demonstrations, lr=LR, parameters=names)
    trained = reference_update(model, demonstrations, method=method, lr=LR, parameters=names)
    assert_equals_training(update, trained, model, names, tolerance=1e-9)
    for name in set(PARAMETERS) - set(names):
        assert not update.delta(name, 0).any()


@both_methods
def test_half_precision_update_is_the_update_up_to_half_precision(method):
    model, demonstrations = make_model("rms", dtype=torch.bfloat16), make_demonstrations(1)
    update = METHODS[method](model, demonstrations, lr=LR)
    expected = reference_update(in_float64(model), demonstrations, method=method, lr=LR)
    for layer in range(model.cfg.n_layers):
        change = (parameter(expected.model, layer, "W_V") - parameter(model, layer, "W_V").double()).detach()
        assert float((update.delta("W_V", layer) - change).norm() / change.norm()) < 0.05


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", ["one_layer", "three_layers", "no_norm", "rotary_rms_grouped_gated", "soft_caps", "post_norm"])
def test_first_lcgd_step_of_the_last_layer_equals_gd(shape, objective):
    model, demonstrations = make_model(shape), make_demonstrations(1)
    updates = [method(model, demonstrations, lr=LR, **OBJECTIVES[objective]) for method in (gd, lcgd)]
    for name in ("W_K", "W_V", "b_V"):
        assert relative_error(updates[1].delta(name, -1), updates[0].delta(name, -1)) < 3e-6
    assert relative_error(updates[1].gradient_norms[-1], updates[0].gradient_norms[-1]) < 1e-6
    if model.cfg.n_layers > 1:
        assert relative_error(updates[1].delta("W_V", 0), updates[0].delta("W_V", 0)) > 0.1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_lcgd_update_ignores_layers_above_and_gd_does_not(layer):
    model, demonstrations = make_model("four_layers_four_heads"), make_demonstrations()
    other = copy.deepcopy(model)
    for block in other.blocks[layer + 1 :]:
        for weight in block.parameters():
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    options = {"lr": LR, "epochs": 2}
    n_kept = layer + 1
    before, after = (lcgd(m, demonstrations, **options) for m in (model, other))
    assert_identical(before, after, n_kept)
    assert not torch.equal(before.inputs[n_kept:], after.inputs[n_kept:]) or n_kept == model.cfg.n_layers - 1
    assert not torch.equal(before.value_errors[n_kept:], after.value_errors[n_kept:])
    before, after = (gd(m, demonstrations, **options) for m in (model, other))
    for below in range(n_kept):
        assert relative_error(after.delta("W_V", below), before.delta("W_V", below)) > 1e-3


def test_lcgd_update_ignores_every_single_weight_above():
    model, demonstrations = make_model("rotary_rms_grouped_gated"), make_demonstrations(2)
    expected = lcgd(model, demonstrations, lr=LR)
    for weight in model.blocks[-1].parameters():
        kept = weight.data.clone()
        weight.data.mul_(1.5)
        assert_identical(lcgd(model, demonstrations, lr=LR), expected, model.cfg.n_layers - 1)
        weight.data.copy_(kept)


@both_methods
def test_one_step_is_proportional_to_the_learning_rate(method):
    model, demonstrations = make_model(), make_demonstrations(1)
    once, twice = (METHODS[method](model, demonstrations, lr=lr) for lr in (0.25, 0.5))
    for name in PARAMETERS:
        assert torch.equal(2 * once.delta(name, 0), twice.delta(name, 0))


@both_methods
def test_learning_rate_zero_changes_nothing_yet_measures_gradients(method):
    update = METHODS[method](make_model(), make_demonstrations(), lr=0, epochs=2)
    assert not any(update.delta(name, layer).any() for name in PARAMETERS for layer in range(3))
    assert (update.gradient_norms > 0).all()
    assert torch.equal(*update.gradient_norms.chunk(2, dim=1))


@both_methods
def test_schedules_agree_on_a_single_demonstration(method):
    model, demonstrations = make_model(), make_demonstrations(1)
    updates = [METHODS[method](model, demonstrations, lr=LR, epochs=2, schedule=schedule) for schedule in ("online", "batch")]
    assert_identical(*updates)


@both_methods
def test_schedules_agree_to_first_order_as_the_learning_rate_vanishes(method):
    model, demonstrations = make_model("rms"), make_demonstrations()

    def disagreement(lr: float) -> float:
        online, batch = (METHODS[method](model, demonstrations, lr=lr, schedule=schedule) for schedule in ("online", "batch"))
        return relative_error(online.delta("W_V", 1), batch.delta("W_V", 1))

    assert disagreement(1e-3) / disagreement(1e-2) == pytest.approx(0.1, rel=0.1)


@both_methods
def test_order_matters_online_and_not_in_a_batch(method):
    model, demonstrations = make_model(), make_demonstrations()
    for schedule, alike in (("batch", True), ("online", False)):
        forwards, backwards = (METHODS[method](model, d, lr=LR, schedule=schedule) for d in (demonstrations, demonstrations[::-1]))
        assert (relative_error(backwards.delta("W_V", 0), forwards.delta("W_V", 0)) < 1e-6) == alike


@both_methods
def test_a_batch_step_is_the_sum_of_its_demonstrations_parts(method):
    model, demonstrations = make_model("rotary"), make_demonstrations()
    whole = METHODS[method](model, demonstrations, lr=LR, schedule="batch")
    for number, demonstration in enumerate(demonstrations):
        alone = METHODS[method](model, [demonstration], lr=LR)
        of_this = whole.demonstration == number
        for name in TENSORS[:3]:
            assert torch.equal(getattr(whole, name)[:, of_this], getattr(alone, name))
        assert torch.equal(whole.gradient_norms[:, number], alone.gradient_norms[:, 0])


@both_methods
def test_every_token_knows_its_demonstration_and_position(method):
    demonstrations = make_demonstrations(4)
    update = METHODS[method](make_model(), demonstrations, lr=LR, epochs=2)
    expected = [(j, i) for _ in range(2) for j, d in enumerate(demonstrations) for i in range(len(d.tokens))]
    assert list(zip(update.demonstration.tolist(), update.position.tolist(), strict=True)) == expected
    assert update.inputs.shape[1] == len(expected)
    assert update.gradient_norms.shape == (3, 8)
    assert update.losses.shape == (8,)


@both_methods
def test_separators_are_not_trained_on(method):
    model, demonstrations = make_model(), make_demonstrations()
    bare = [replace(demonstration, separator=torch.tensor([], dtype=torch.long)) for demonstration in demonstrations]
    assert_identical(METHODS[method](model, demonstrations, lr=LR), METHODS[method](model, bare, lr=LR))


@both_methods
@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.set_grad_enabled(False)], ids=["no_grad", "set_grad_enabled"])
def test_update_does_not_depend_on_the_callers_autograd_mode(mode, method):
    model, demonstrations = make_model(), make_demonstrations()
    expected = METHODS[method](model, demonstrations, lr=LR)
    with mode():
        assert_identical(METHODS[method](model, demonstrations, lr=LR), expected)
    assert_identical(METHODS[method](model.requires_grad_(False), demonstrations, lr=LR), expected)


@both_methods
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_update_can_be_made_in_inference_mode(objective, method):
    model = make_model()
    expected = METHODS[method](model, make_demonstrations(), lr=LR, **OBJECTIVES[objective])
    with torch.inference_mode():
        found = METHODS[method](model, make_demonstrations(), lr=LR, **OBJECTIVES[objective])
    assert_identical(found, expected)


@both_methods
def test_model_is_left_as_it_was(method):
    model = make_model()
    model.W_E.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    update = METHODS[method](model, make_demonstrations(), lr=LR, epochs=2)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.list_hooks()
    assert not any(getattr(update, name).requires_grad for name in TENSORS)


@both_methods
def test_an_exception_on_the_way_leaves_no_hooks(method):
    model = make_model()

    def interrupt(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("blocks.2.hook_attn_out", interrupt)]):
        METHODS[method](model, make_demonstrations(), lr=LR)
    assert not model.list_hooks()


def scale_head(value, hook):
    return torch.cat([0.3 * value[:, :, :1], value[:, :, 1:]], dim=2)


def shift(value, hook):
    return value + torch.linspace(-0.4, 0.4, value.shape[-1], dtype=value.dtype)


def ablate(value, hook):
    return torch.zeros_like(value)


def overwrite(value, hook):
    return torch.arange(value.numel(), dtype=value.dtype).view_as(value).sin()


@both_methods
@pytest.mark.parametrize(
    "hooks",
    [
        pytest.param([("blocks.1.attn.hook_z", scale_head)], id="z"),
        pytest.param([("blocks.0.hook_resid_pre", shift), ("blocks.1.hook_mlp_out", shift)], id="stream"),
        pytest.param([("blocks.1.ln1.hook_normalized", shift)], id="attention_input"),
        pytest.param([("blocks.2.hook_resid_post", scale_head)], id="last_stream"),
        pytest.param([("blocks.1.attn.hook_z", ablate)], id="ablated_attention"),
        pytest.param([("blocks.1.attn.hook_k", ablate)], id="ablated_keys"),
        pytest.param([("blocks.1.hook_resid_post", overwrite)], id="overwritten_stream"),
        pytest.param([("blocks.1.attn.hook_v", scale_head)], id="values"),
    ],
)
def test_update_is_of_the_model_with_the_users_hooks_on_it(hooks, method):
    model, demonstrations = make_model("three_layers"), make_demonstrations()
    for name, function in hooks:
        model.add_hook(name, function)
    update = METHODS[method](model, demonstrations, lr=LR)
    assert set(model.list_hooks()) == {name for name, _ in hooks}
    wide = in_float64(model)
    trained = reference_update(wide, demonstrations, method=method, lr=LR)
    for layer in range(3):
        for name in ("W_K", "W_V"):
            change = (parameter(trained.model, layer, name) - parameter(wide, layer, name)).detach()
            assert (update.delta(name, layer) - change).abs().max() <= 1e-5 * change.abs().max()


@both_methods
def test_a_loss_that_depends_on_no_weight_trains_none(method):
    model = make_model()
    model.add_hook("blocks.2.hook_resid_post", ablate)
    update = METHODS[method](model, make_demonstrations(), lr=LR)
    assert not update.gradient_norms[2].any()
    assert update.gradient_norms[:2].any() == (method == "lcgd")


@both_methods
def test_update_under_an_attached_update_is_of_the_updated_model(method):
    model, demonstrations = make_model("rotary"), make_demonstrations()
    first = gd(model, demonstrations, lr=LR)
    with first.attached(model):
        second = METHODS[method](model, demonstrations, lr=LR)
    edited = reference_update(in_float64(model), demonstrations, method="gd", lr=LR).model
    assert_equals_training(second, reference_update(edited, demonstrations, method=method, lr=LR), edited)


@pytest.mark.parametrize("shape", FOLDED)
@both_methods
def test_folded_weights_are_warned_about(shape, method):
    model = make_model(shape)
    with pytest.warns(UserWarning, match="weights are processed: its layer norms are folded"):
        METHODS[method](model, make_demonstrations(1), lr=LR)


@pytest.mark.skipif("CHECK_SHAPES" in os.environ, reason="the checks stand between a caller and what is called")
@both_methods
def test_the_warning_points_at_the_callers_line(method):
    model = make_model("folded")
    with pytest.warns(UserWarning, match="weights are processed: its layer norms are folded") as caught:
        METHODS[method](model, make_demonstrations(1), lr=LR)
    assert [warning.filename for warning in caught] == [__file__]


@both_methods
def test_unfolded_weights_are_not_warned_about(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS[method](make_model(), make_demonstrations(1), lr=LR)


@both_methods
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_on": "query"}, "loss_on must be one of 'demonstration', 'label'"),
        ({"readout": "logits"}, "readout must be one of 'vocab', 'labels'"),
        ({"schedule": "random"}, "schedule must be one of 'online', 'batch'"),
        ({"parameters": ("W_Q",)}, "parameters must be some of"),
        ({"parameters": ()}, "parameters must be some of"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": -0.1}, "lr must be a number, finite and not negative"),
        ({"lr": math.nan}, "lr must be a number, finite"),
        ({"lr": math.inf}, "lr must be a number, finite"),
        ({"readout": "labels", "label_tokens": label_tokens()}, "needs loss_on='label'"),
        ({"readout": "labels", "loss_on": "label"}, "needs label_tokens"),
        ({"readout": "labels", "loss_on": "label", "label_tokens": label_tokens()[:1]}, "label of demonstration 1 is not among"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_refused(options, message, method):
    model = make_model("one_layer")
    with pytest.raises(ValueError, match=message):
        METHODS[method](model, make_demonstrations(), **{"lr": LR, **options})


@both_methods
def test_no_demonstrations_are_refused(method):
    with pytest.raises(ValueError, match="no demonstrations"):
        METHODS[method](make_model("one_layer"), [], lr=LR)


@both_methods
def test_demonstrations_fill_the_context_window_and_no_more(method):
    model = make_model("one_layer")
    short = make_demonstrations(1)[0]
    fitting, too_long = (replace(short, tokens=torch.tensor([BOS] + [20] * (length - 2) + [5])) for length in (N_CTX, N_CTX + 1))
    METHODS[method](model, [fitting], lr=LR)
    with pytest.raises(ValueError, match="demonstration 1 has 65 tokens, more than the model's context window of 64"):
        METHODS[method](model, [short, too_long], lr=LR)


@both_methods
@pytest.mark.parametrize("schedule", ["online", "batch"])
def test_an_update_that_becomes_non_finite_names_demonstration_and_layer(schedule, method):
    model = make_model()
    with pytest.raises(ValueError, match=r"non-finite at demonstration \d of 3 .*layer \d"):
        METHODS[method](model, make_demonstrations(), lr=1e30, schedule=schedule, epochs=2)
    assert not model.list_hooks()


@both_methods
def test_only_hooked_models_are_taken(method):
    with pytest.raises(TypeError, match="a HookedTransformer or a TransformerBridge, got Linear"):
        METHODS[method](torch.nn.Linear(2, 2), make_demonstrations(), lr=LR)


@both_methods
def test_split_attention_inputs_are_refused_with_the_way_out(method):
    model = make_model("one_layer")
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match=r"set_use_split_qkv_input\(False\)"):
        METHODS[method](model, make_demonstrations(), lr=LR)


@both_methods
@pytest.mark.parametrize("schedule", ["online", "batch"])
def test_a_learning_rate_too_large_to_run_with_is_refused_at_the_first_demonstration(schedule, method):
    with pytest.raises(ValueError, match=r"lr=1e\+30 made the (gd|lcgd) update non-finite at demonstration 0 of 1 .*layer 0"):
        METHODS[method](make_model(), make_demonstrations(1), lr=1e30, schedule=schedule)


@both_methods
def test_errors_of_a_half_precision_model_do_not_underflow(method):
    model, demonstrations = make_model(dtype=torch.float16), make_demonstrations(1)
    small, large = (METHODS[method](model, demonstrations, lr=lr) for lr in (1e-6, 1e-1))
    torch.testing.assert_close(small.delta("W_V", 0) * 1e5, large.delta("W_V", 0), rtol=1e-4, atol=0)


@both_methods
def test_numbers_of_numpy_are_numbers(tmp_path, method):
    update = METHODS[method](make_model(), make_demonstrations(1), lr=np.float32(0.5), epochs=np.int64(1))
    update.save(tmp_path / "update.safetensors")


@both_methods
@pytest.mark.parametrize("token", [-1, D_VOCAB, 1000])
def test_tokens_of_another_models_vocabulary_are_refused(method, token):
    foreign, make = torch.tensor([0, token]), METHODS[method]
    with pytest.raises(ValueError, match=f"token {token} is not in the model's vocabulary"):
        make(make_model(), [Demonstration(foreign, 1)], lr=LR)
    with pytest.raises(ValueError, match=f"token {token} is not in the model's vocabulary"):
        make(make_model(), make_demonstrations(), lr=LR, loss_on="label", readout="labels", label_tokens=[*label_tokens(), foreign])
