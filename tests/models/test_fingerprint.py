"""The fingerprint tells models apart: the same for a copy, another after any training step."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from iclgd_lens.models.bundled.learner import learner_shapes
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedTransformer, make_bridge, make_hooked_transformer
from iclgd_lens.models.loading import load_model
from iclgd_lens.models.untrained import untrained_twin
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.gradient import gd
from tests.hf_zoo import make_hf_model
from tests.models_zoo import make_demonstrations, make_model, make_queries

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


EDITS = {
    "activation": lambda model: setattr(model.blocks[0].mlp, "act_fn", torch.nn.functional.relu),
    "activation_in_cfg": lambda model: setattr(model.cfg, "act_fn", "relu"),
    "attention_scale": lambda model: setattr(model.blocks[1].attn, "attn_scale", 3.0),
    "epsilon": lambda model: setattr(model.blocks[0].ln1, "eps", 1e-2),
    "soft_cap_of_outputs": lambda model: setattr(model.cfg, "output_logits_soft_cap", 5.0),
    "soft_cap_of_scores": lambda model: setattr(model.cfg, "attn_scores_soft_cap", 5.0),
    "window": lambda model: setattr(model.cfg, "window_size", 7),
    "kind_of_attention": lambda model: setattr(model.blocks[0].attn, "attn_type", "local"),
    "rotary_base": lambda model: setattr(model.cfg, "rotary_base", 5000),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_that_computes_otherwise_with_the_same_weights_has_another_one(edit):
    model = make_model("rotary")
    before = fingerprint(model)
    EDITS[edit](model)
    assert fingerprint(model) != before


def test_an_update_is_refused_by_a_model_of_the_same_weights_that_computes_otherwise():
    update = gd(make_model("three_layers"), make_demonstrations(), lr=0.05)
    capture(make_model("three_layers"), make_queries(), update=update)
    for other in ({"act_fn": "relu"}, {"eps": 1e-3}, {"attn_scale": 2.0}, {"output_logits_soft_cap": 5.0}):
        with pytest.raises(ValueError, match="another configuration"):
            capture(make_model("three_layers", **other), make_queries(), update=update)


BRIDGE_EDITS = {
    "activation": lambda hf: setattr(hf.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "epsilon": lambda hf: setattr(hf.model.layers[1].input_layernorm, "variance_epsilon", 1e-2),
    "attention_scale": lambda hf: setattr(hf.model.layers[0].self_attn, "scaling", 1.0),
    "rotary_scale": lambda hf: setattr(hf.model.rotary_emb, "attention_scaling", 2.0),
    "rotary_base": lambda hf: hf.config.rope_parameters.update(rope_theta=5000.0),
    "logit_scale": lambda hf: setattr(hf, "logit_scale", 0.5),
}


@pytest.mark.parametrize("edit", BRIDGE_EDITS)
def test_a_bridge_whose_model_computes_otherwise_has_another_one(edit):
    plain, edited = make_hf_model("llama"), make_hf_model("llama")
    BRIDGE_EDITS[edit](edited)
    assert fingerprint(make_bridge(edited)) != fingerprint(make_bridge(plain))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neo", "llama", "gemma2", "mixtral"])
def test_a_bridge_s_is_that_of_its_values_whatever_runs_hangs_on_it_or_is_remembered(name):
    model = load_model(hf_model=make_hf_model(name))
    before = fingerprint(model)
    assert fingerprint(load_model(hf_model=make_hf_model(name).double())) == before
    update = gd(model, make_demonstrations(), lr=0.05)
    with update.attached(model):
        capture(model, make_queries(), context=make_demonstrations())
        assert fingerprint(model) == before
    model.enable_compatibility_mode(no_processing=True)
    assert fingerprint(model) == before


def test_frequencies_that_a_long_prompt_changes_do_not_enter():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    config = LlamaConfig(**make_hf_model("llama").config.to_dict() | {"rope_parameters": rope, "max_position_embeddings": 16})
    hf_model = LlamaForCausalLM(config).eval()
    model, inv_freq = make_bridge(hf_model), hf_model.model.rotary_emb.inv_freq.clone()
    before = fingerprint(model)
    with torch.no_grad():
        hf_model(torch.arange(1, 33)[None])
    assert not torch.equal(hf_model.model.rotary_emb.inv_freq, inv_freq)
    assert fingerprint(model) == before


@pytest.mark.slow
def test_it_is_the_same_in_another_process(model):
    code = (
        "from iclgd_lens.models.fingerprint import fingerprint; from iclgd_lens.models.loading import load_model; "
        "print(fingerprint(load_model('bundled', backend='hooked')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split()[-1] == fingerprint(model)


def test_it_is_the_same_under_other_defaults_of_torch(model):
    expected = fingerprint(model)
    torch.set_default_dtype(torch.float64)
    try:
        found = fingerprint(model)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert fingerprint(model) == found == expected


def test_a_layer_that_is_off_loaded_is_named():
    model = make_model("one_layer")
    model.blocks[0].attn.W_Q = torch.nn.Parameter(model.blocks[0].attn.W_Q.to("meta"))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.W_Q has no values in memory: the model is off-loaded"):
        fingerprint(model)
