"""Gradients where something of torch's is on the model: hooks, parametrisations and modules in the place of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from iclgd_lens.models.hooked import make_bridge
from iclgd_lens.models.sites import sites_of
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.gradient import gd, lcgd
from tests.hf_zoo import make_hf_model
from tests.models_zoo import make_demonstrations, make_model, make_queries
from tests.reference import parameter, reference_update, relative_error

METHODS = {"gd": gd, "lcgd": lcgd}
LAST = 2


class Adapter(nn.Module):
    """A low-rank adapter around a module."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        generator = torch.Generator().manual_seed(0)
        self.down, self.up = (nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((width, 2), (2, width)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x @ self.down @ self.up


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


def around(part: str) -> Callable[[Any], None]:
    def put_on(model: Any) -> None:
        setattr(model.blocks[LAST], part, Adapter(getattr(model.blocks[LAST], part), model.cfg.d_model))

    return put_on


EDITS: dict[str, Callable[[Any], object]] = {
    "ln1": lambda model: model.blocks[LAST].ln1.register_forward_hook(double),
    "ln1_below": lambda model: model.blocks[0].ln1.register_forward_hook(double),
    "attn": lambda model: model.blocks[LAST].attn.register_forward_hook(double),
    "ln2": lambda model: model.blocks[LAST].ln2.register_forward_hook(double),
    "mlp": lambda model: model.blocks[LAST].mlp.register_forward_hook(double),
    "mlp_input": lambda model: model.blocks[LAST].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "adapter_around_mlp": around("mlp"),
    "adapter_around_ln1": around("ln1"),
    "parametrised_w_in": lambda model: parametrize.register_parametrization(model.blocks[LAST].mlp, "W_in", Half(), unsafe=True),
    "hook_mlp_out": lambda model: model.add_hook(f"blocks.{LAST}.hook_mlp_out", lambda value, hook: 2 * value),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loss_on", ["label", "demonstration"])
@pytest.mark.parametrize("edit", EDITS)
def test_gradients_equal_autograd_on_the_weights(edit, loss_on, method):
    model, demonstrations = make_model("three_layers"), make_demonstrations()
    EDITS[edit](model)
    found = METHODS[method](model, demonstrations, lr=0.05, loss_on=loss_on)
    expected = reference_update(model, demonstrations, method=method, lr=0.05, loss_on=loss_on)
    for layer in range(model.cfg.n_layers):
        for name in ("W_K", "W_V"):
            change = parameter(expected.model, layer, name) - parameter(model, layer, name)
            assert relative_error(found.delta(name, layer), change) < 1e-3, (layer, name)


@pytest.mark.parametrize("edit", ["ln1", "adapter_around_ln1", "attn"])
def test_an_attached_update_equals_edited_weights(edit):
    model, demonstrations, queries = make_model("three_layers"), make_demonstrations(), make_queries()
    EDITS[edit](model)
    update = lcgd(model, demonstrations, lr=0.05)
    trained = reference_update(model, demonstrations, method="lcgd", lr=0.05).model
    found, expected = capture(model, queries, update=update), capture(trained, queries)
    assert relative_error(found.attn_out, expected.attn_out) < 1e-4


def test_hooks_by_name_are_refused_where_they_cannot_read_the_projections_input():
    model = make_model("three_layers")
    update = lcgd(model, make_demonstrations(), lr=0.05)
    update.fwd_hooks(model)
    handle = model.blocks[1].ln1.register_forward_hook(double)
    with pytest.raises(ValueError, match=r"torch hook on blocks\.1\.ln1.*update\.attached\(model\)"):
        update.fwd_hooks(model)
    handle.remove()
    with update.attached(model):
        update.fwd_hooks(model)


def test_the_short_way_back_is_taken_where_nothing_is_in_the_way():
    model = make_model("three_layers")
    sites = sites_of(model)
    with lcgd(model, make_demonstrations(), lr=0.05).attached(model):
        assert all(sites.after_attention(layer) is not None for layer in range(3))
    for put_on in EDITS.values():
        model = make_model("three_layers")
        put_on(model)
        assert sites_of(model).after_attention(LAST) is None or put_on is EDITS["ln1_below"]


def test_a_torch_hook_on_a_projection_is_refused():
    model = make_bridge(make_hf_model("llama"))
    handle = model.blocks[1].attn.v.original_component.register_forward_hook(double)
    with pytest.raises(ValueError, match=r"torch hook on the V projection of layer 1.*blocks\.1\.attn\.v\.hook_out"):
        gd(model, make_demonstrations(), lr=0.1)
    handle.remove()
    gd(model, make_demonstrations(), lr=0.1)


def test_weights_made_under_inference_mode_are_refused_with_the_reason():
    with torch.inference_mode():
        model = make_bridge(make_hf_model("llama"))
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        gd(model, make_demonstrations(), lr=0.1)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_autocast_around_changes_nothing(kind):
    model = make_model() if kind == "hooked" else make_bridge(make_hf_model("llama"))
    demonstrations, queries = make_demonstrations(), make_queries()
    update, run = lcgd(model, demonstrations, lr=0.05), capture(model, queries, context=demonstrations)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, ran = lcgd(model, demonstrations, lr=0.05), capture(model, queries, context=demonstrations)
    assert torch.equal(update.inputs, under.inputs)
    assert torch.equal(update.value_errors, under.value_errors)
    assert all(torch.equal(run.kept[name], ran.kept[name]) for name in run.kept)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_resetting_hooks_leaves_an_attached_update_on(kind):
    model = make_model() if kind == "hooked" else make_bridge(make_hf_model("llama"))
    tokens, update = make_queries()[0].tokens[None], lcgd(model, make_demonstrations(), lr=0.05)
    before = model(tokens)
    with update.attached(model):
        under = model(tokens)
        model.reset_hooks()
        assert torch.equal(model(tokens), under)
    assert not torch.equal(under, before)
    assert torch.equal(model(tokens), before)


def test_an_update_that_was_taken_off_within_is_an_error():
    model = make_model()
    update = lcgd(model, make_demonstrations(), lr=0.05)
    taken_off = pytest.raises(RuntimeError, match=r"hooks of this package were taken off.*including_permanent")
    with taken_off, update.attached(model):
        model.reset_hooks(including_permanent=True)
