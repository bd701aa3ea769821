"""The plain model computes what the Hugging Face model did before it was wrapped, with the same weights."""

import copy

import pytest
import torch

from iclgd_lens import load_model
from iclgd_lens.checking.plain import PlainModel
from iclgd_lens.checking.projections import projections_of
from tests.hf_zoo import ARCHITECTURES, make_hf_model

TOKENS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_view_computes_what_was_wrapped(name):
    hf_model = make_hf_model(name)
    alone = copy.deepcopy(hf_model)
    alone.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(PlainModel.of(load_model(hf_model=hf_model)).logits(TOKENS), alone(TOKENS).logits)


def test_the_view_has_the_weights_themselves_and_no_hooks():
    model = load_model(hf_model=make_hf_model("gpt2"))
    view = PlainModel.of(model).module
    weights = {parameter.data_ptr() for parameter in model.original_model.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} <= weights
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in view.modules())
    assert "Bridge" not in " ".join(type(module).__name__ for module in view.modules())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama"])
def test_edits_are_of_the_view_alone(name):
    model = load_model(hf_model=make_hf_model(name))
    before = {key: each.clone() for key, each in model.original_model.state_dict().items()}
    plain = PlainModel.of(model)
    width = (model.cfg.n_key_value_heads or model.cfg.n_heads) * model.cfg.d_head
    shapes = {"W_K": (model.cfg.d_model, width), "W_V": (model.cfg.d_model, width), "b_K": (width,), "b_V": (width,)}
    with torch.no_grad():
        was = plain.logits(TOKENS)
        for projection in projections_of(plain, 0):
            projection.add({key: torch.ones(shape) for key, shape in shapes.items()})
        assert not torch.allclose(plain.logits(TOKENS), was)
        assert torch.equal(PlainModel.of(model).logits(TOKENS), was)
    assert all(torch.equal(each, before[key]) for key, each in model.original_model.state_dict().items())
