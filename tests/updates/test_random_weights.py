"""A random update is as long as the real one, parameter by parameter and layer by layer, and points elsewhere."""

from __future__ import annotations

import copy
from itertools import chain, combinations

import pytest
import torch

from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import gd, lcgd
from iclgd_lens.updates.random_weights import random_weights
from tests.models_zoo import BOS, D_VOCAB, make_demonstrations, make_model
from tests.reference import PARAMETERS, parameter, relative_error

LR = 0.05
GROUPED = "rotary_rms_grouped_gated"
SHAPES = ("three_layers", "rotary", GROUPED, "multi_query", "post_norm", "attention_sinks")
SUBSETS = list(chain.from_iterable(combinations(PARAMETERS, size) for size in range(1, 5)))


def flat(update: ParameterUpdate, name: str) -> torch.Tensor:
    return torch.stack([update.delta(name, layer).flatten() for layer in range(len(update.inputs))])


def assert_equally_long(random: ParameterUpdate, update: ParameterUpdate) -> None:
    """To 1e-5, or to a millionth of the weights' change: where keys can be shifted freely, Δb_K is of rounding size."""
    for name in update.settings.parameters:
        found, expected = flat(random, name).norm(dim=1), flat(update, name).norm(dim=1)
        rounding = 1e-6 * flat(update, f"W_{name[-1]}").norm(dim=1)
        assert ((found - expected).abs() <= 1e-5 * expected + rounding).all(), name
        assert (expected > 0).all()


def edited(model: HookedTransformer, update: ParameterUpdate) -> HookedTransformer:
    """A deep copy whose weights are W + ΔW."""
    model = copy.deepcopy(model)
    for layer in range(model.cfg.n_layers):
        for name in PARAMETERS:
            parameter(model, layer, name).data += update.delta(name, layer)
    return model


@pytest.mark.parametrize("method", [gd, lcgd])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_of_every_layer_changes_by_as_much(shape, method):
    update = method(make_model(shape), make_demonstrations(), lr=LR)
    random = random_weights(update)
    assert_equally_long(random, update)
    for name in PARAMETERS:
        assert flat(random, name).shape == flat(update, name).shape
        assert random.delta(name, 0).shape == update.delta(name, 0).shape


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_only_trained_parameters_change_and_those_by_as_much(names):
    update = gd(make_model(GROUPED), make_demonstrations(), lr=LR, parameters=names)
    random = random_weights(update)
    assert random.norms.keys() == set(names)
    assert_equally_long(random, update)
    assert all(not flat(random, name).any() for name in PARAMETERS if name not in names)


@pytest.mark.parametrize("shape", ["rotary", GROUPED])
def test_the_bias_is_the_drawn_one_whatever_the_weights_are(shape):
    """Of the same seed, so that the weights are the only difference; to 1e-5."""
    model = make_model(shape)
    both = random_weights(gd(model, make_demonstrations(1), lr=LR), seed=3)
    alone = random_weights(gd(model, make_demonstrations(1), lr=LR, parameters=("b_K", "b_V")), seed=3)
    for name in ("b_K", "b_V"):
        assert relative_error(flat(both, name), flat(alone, name)) < 1e-5


def test_a_direction_of_its_own_for_every_seed_layer_and_kind_and_none_like_the_update_s():
    """The cosine of two random directions of d coordinates has sd 1/√d."""
    update = lcgd(make_model(), make_demonstrations(), lr=LR)
    first, again, second = (random_weights(update, seed) for seed in (0, 0, 1))
    for name in ("W_K", "W_V"):
        assert torch.equal(flat(first, name), flat(again, name))
        directions = torch.cat([*(flat(each, name) for each in (update, first, second)), flat(first, f"W_{'VK'[name == 'W_V']}")])
        bound = 5 / directions.shape[1] ** 0.5
        cosines = torch.nn.functional.normalize(directions, dim=1) @ torch.nn.functional.normalize(directions, dim=1).T
        n_layers = len(update.inputs)
        assert cosines[n_layers:].tril(n_layers - 1).abs().max() < bound < 0.5


def test_a_random_change_is_gaussian_and_not_confined_to_what_the_demonstrations_span():
    update = gd(make_model(d_model=48, d_head=24), make_demonstrations(1, max_text=2), lr=LR)
    changes = flat(random_weights(update), "W_V")
    standardised = changes / changes.std(dim=1, keepdim=True)
    assert standardised.mean().abs() < 0.1
    assert standardised.pow(4).mean().item() == pytest.approx(3, abs=0.5)
    rank = int(torch.linalg.matrix_rank(update.delta("W_V", 0)[0]))
    assert torch.linalg.matrix_rank(random_weights(update).delta("W_V", 0)[0]) == 24 > rank


@pytest.mark.parametrize("shape", SHAPES)
def test_a_run_under_it_equals_a_run_with_edited_weights(shape):
    model = make_model(shape)
    random = random_weights(lcgd(model, make_demonstrations(), lr=LR), seed=2)
    text = torch.randint(10, D_VOCAB, (3, 11), generator=torch.Generator().manual_seed(7))
    tokens = torch.cat([torch.full((3, 1), BOS), text], dim=1)
    with torch.no_grad():
        plain, expected = model(tokens), edited(model, random)(tokens)
        with random.attached(model):
            found = model(tokens)
    assert relative_error(found, expected) < 1e-5
    assert relative_error(plain, expected) > 1e-3


def test_it_is_read_back_as_it_was_saved_and_belongs_to_no_demonstration(tmp_path):
    update = gd(make_model(GROUPED), make_demonstrations(), lr=LR, parameters=("W_K", "b_V"))
    random = random_weights(update, seed=1)
    random.save(tmp_path / "random")
    read = ParameterUpdate.load(tmp_path / "random")
    for name in PARAMETERS:
        assert torch.equal(flat(read, name), flat(random, name))
    assert read.settings == random.settings == update.settings
    assert read.fingerprint == update.fingerprint
    assert (read.demonstration == -1).all()
    assert read.gradient_norms.isnan().all()
    assert read.gradient_norms.shape == update.gradient_norms.shape
    assert read.losses.isnan().all()


def test_an_update_that_changes_nothing_has_a_random_one_that_changes_nothing():
    update = gd(make_model(), make_demonstrations(), lr=0)
    assert all(not flat(random_weights(update), name).any() for name in ("W_K", "W_V"))
    assert all(flat(random_weights(update), name).isfinite().all() for name in PARAMETERS)


def test_a_half_precision_update_is_matched_in_float32():
    update = gd(make_model("rotary", dtype=torch.bfloat16), make_demonstrations(), lr=LR)
    random = random_weights(update)
    assert random.delta("W_K", 0).dtype == torch.float32
    assert random.inputs.dtype == torch.bfloat16
    assert_equally_long(random, update)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_seed_draws_the_same_under_every_default_of_torch_s(dtype):
    update = gd(make_model(GROUPED), make_demonstrations(), lr=LR)
    expected = random_weights(update, seed=3)
    torch.set_default_dtype(dtype)
    try:
        found = random_weights(update, seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"), torch.autocast("cpu"):
        elsewhere = random_weights(update, seed=3)
    for each in (found, elsewhere):
        for name in ("inputs", "key_errors", "value_errors"):
            assert torch.equal(getattr(each, name), getattr(expected, name))
    with pytest.raises(ValueError, match="seed must be a whole number"):
        random_weights(update, seed="a")


def test_a_random_update_has_no_epochs():
    with pytest.raises(ValueError, match="was not made on demonstrations"):
        random_weights(gd(make_model(GROUPED), make_demonstrations(), lr=LR, epochs=2)).first_epochs(1)
