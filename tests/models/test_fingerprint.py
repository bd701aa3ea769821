"""The fingerprint tells models apart: the same for a copy, another after any training step."""

from copy import deepcopy

import pytest
import torch

from iclgd_lens.models.bundled.learner import learner_shapes
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedTransformer, make_hooked_transformer
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import untrained_twin

NAMES = list(learner_shapes())
TOKENS = torch.arange(1, 101).reshape(2, 50)


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    model = load_model("bundled", backend="hooked")
    model(TOKENS, return_type="loss").backward()
    return model


def test_it_is_16_hex_digits(model):
    digits = fingerprint(model)
    assert len(digits) == 16
    assert int(digits, 16) >= 0


def test_a_copy_and_a_second_load_have_the_same(model):
    assert fingerprint(deepcopy(model)) == fingerprint(load_model("bundled")) == fingerprint(model)


def test_running_hooking_and_training_mode_do_not_change_it(model):
    before = fingerprint(model)
    model.train()
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: value * 2)]):
        model(TOKENS, return_type=None)
        assert fingerprint(model) == before
    model.eval()
    assert fingerprint(model) == before


# A key's bias adds the same to all scores, so softmax gives it no gradient but rounding.
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("b_K")])
def test_a_small_step_of_sgd_on_any_one_parameter_changes_it(model, name):
    stepped = deepcopy(model)
    parameter = dict(stepped.named_parameters())[name]
    parameter.grad = dict(model.named_parameters())[name].grad.clone()
    torch.optim.SGD([parameter], lr=1e-3).step()
    assert fingerprint(stepped) != fingerprint(model)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_a_whole_parameter_changes_it(model, name):
    changed = deepcopy(model)
    with torch.no_grad():
        dict(changed.named_parameters())[name].add_(1e-3)
    assert fingerprint(changed) != fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_that_rounds_the_weights_changes_it(model, dtype):
    assert fingerprint(load_model("bundled", dtype=dtype)) != fingerprint(model)


def test_a_twin_and_each_of_its_seeds_have_their_own(model):
    digits = {fingerprint(model), *(fingerprint(untrained_twin(model, seed=seed)) for seed in range(3))}
    assert len(digits) == 4


def test_two_layers_that_swap_their_weights_change_it(model):
    swapped = deepcopy(model)
    swapped.blocks[0], swapped.blocks[1] = swapped.blocks[1], swapped.blocks[0]
    assert fingerprint(swapped) != fingerprint(model)


def test_fingerprint_sees_an_edit_of_any_row_column_or_head():
    sizes = {"n_layers": 1, "d_model": 64, "n_ctx": 8, "d_head": 16, "n_heads": 4, "d_vocab": 20, "act_fn": "relu"}
    model = make_hooked_transformer(sizes, what="this test's model")
    before = fingerprint(model)
    for index in range(16):
        edited = deepcopy(model)
        with torch.no_grad():
            edited.blocks[0].attn.W_Q[:, :, index] += 1
        assert fingerprint(edited) != before
