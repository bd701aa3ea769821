"""What a projection multiplies by is read by what it does: adapters, int8 weights, norms and gates in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iclgd_lens.kernels.implied import demonstration_queries, proxy_attention
from iclgd_lens.kernels.smoother import decompose
from iclgd_lens.models.hooked import make_bridge
from iclgd_lens.models.linear_maps import linear_map
from iclgd_lens.models.loading import load_model
from iclgd_lens.runs.capture import ATTENTION, capture
from iclgd_lens.updates.gradient import gd
from tests.hf_zoo import _GROUPED, draw, make_hf_model
from tests.models_zoo import make_demonstrations, make_queries
from tests.reference import relative_error

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Lora(nn.Module):
    """An adapter in the layout of peft: a base layer whose `weight` is shown as the adapter's own."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base_layer = base
        generator = torch.Generator().manual_seed(seed)
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)
        with torch.no_grad():
            for part in (self.lora_A, self.lora_B):
                part.weight.copy_(torch.randn(part.weight.shape, generator=generator) * 0.5)

    in_features = property(lambda self: self.base_layer.in_features)
    out_features = property(lambda self: self.base_layer.out_features)
    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def plain(self) -> nn.Linear:
        merged = copy.deepcopy(self.base_layer)
        with torch.no_grad():
            merged.weight += self.lora_B.weight @ self.lora_A.weight
        return merged


class Int8(nn.Linear):
    """A linear layer whose weight is kept in int8, with a scale for each row."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        weight = base.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def plain(self) -> nn.Linear:
        merged = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        with torch.no_grad():
            merged.weight.copy_(self.weight.float() * self.scale)
        return merged


def with_and_without(kind: type) -> tuple[Any, Any]:
    """A model with modules of a kind in the place of its projections, and one with plain layers that do the same."""
    model = make_hf_model("llama")
    for layer, block in enumerate(model.model.layers):
        for number, name in enumerate(PROJECTIONS):
            setattr(block.self_attn, name, kind(getattr(block.self_attn, name), 10 * layer + number))
    plain = copy.deepcopy(model)
    for block in plain.model.layers:
        for name in PROJECTIONS:
            setattr(block.self_attn, name, getattr(block.self_attn, name).plain())
    return make_bridge(model), make_bridge(plain)


@pytest.mark.parametrize("kind", [Lora, Int8])
def test_attribution_decomposition_and_proxy_are_those_of_plain_layers_that_do_the_same(kind):
    pair, demonstrations, queries = with_and_without(kind), make_demonstrations(), make_queries()
    zsl = [capture(model, queries, keep=[*ATTENTION, "head_out"]) for model in pair]
    icl = [
        capture(model, queries, context=demonstrations, keep=["head_out", "demonstration_out", "demonstration_attention"])
        for model in pair
    ]
    found, expected = (gd(model, demonstrations, lr=0.1).attribution(run) for model, run in zip(pair, zsl, strict=True))
    for name in ("coefficients", "through_values", "through_keys", "norms", "change"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-3, name
    split, wanted = (decompose(*runs).smoothing.share for runs in zip(icl, zsl, strict=True))
    assert relative_error(split, wanted) < 1e-3
    proxies = [
        proxy_attention(model, run, demonstration_queries(model, demonstrations)) for model, run in zip(pair, zsl, strict=True)
    ]
    assert relative_error(*proxies) < 1e-3


def test_a_norm_between_heads_and_the_output_projection_is_refused_with_the_reason():
    with torch.random.fork_rng(devices=[]):
        model = hf.BitNetForCausalLM(hf.BitNetConfig(**_GROUPED))
    draw(model)
    bridge = make_bridge(model.eval())
    demonstrations, queries = make_demonstrations(), make_queries()
    with pytest.raises(ValueError, match=r"a norm or a gate after the heads.*without demonstration_out"):
        capture(bridge, queries, context=demonstrations, keep=["head_out", "demonstration_out", "demonstration_attention"])
    with pytest.raises(ValueError, match=r"a norm or a gate after the heads.*without score_gradients"):
        capture(bridge, queries, keep=[*ATTENTION])
    capture(bridge, queries, context=demonstrations)


def test_plain_layers_give_their_own_weight():
    linear, conv = nn.Linear(3, 5), Conv1D(5, 3)
    for layer, weight in ((linear, linear.weight.T), (conv, conv.weight)):
        found, bias = linear_map(layer, 3, torch.float32, "a layer")
        assert found.data_ptr() == weight.data_ptr()
        assert torch.equal(bias, layer.bias)


def test_a_torch_hook_on_a_layer_is_part_of_what_it_does():
    layer = nn.Linear(3, 5)
    layer.register_forward_hook(lambda module, args, out: 3 * out)
    found, bias = linear_map(layer, 3, torch.float32, "a layer")
    torch.testing.assert_close(found, 3 * layer.weight.T)
    torch.testing.assert_close(bias, 3 * layer.bias)


def test_what_is_not_linear_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the output projection of layer 1 \(Sequential\) is not a linear map"):
        linear_map(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), 3, torch.float32, "the output projection of layer 1")


def test_a_parametrised_projection_is_what_it_comes_to():
    model = make_hf_model("llama")
    plain = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(model.model.layers[0].self_attn.k_proj)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.parametrizations.weight.original0 *= 1.5
        plain.model.layers[0].self_attn.k_proj.weight.copy_(model.model.layers[0].self_attn.k_proj.weight)
    found, expected = (gd(load_model(hf_model=each), make_demonstrations(), lr=0.1) for each in (model, plain))
    for layer in range(2):
        assert relative_error(found.delta("W_K", layer), expected.delta("W_K", layer)) < 1e-4
