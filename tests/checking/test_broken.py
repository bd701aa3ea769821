"""Broken on purpose, on one side of each comparison, the check fails in the right row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import PositionEmbeddingsAttentionBridge
from transformer_lens.model_bridge.generalized_components.rotary_embedding import RotaryEmbeddingBridge

import iclgd_lens as lens
from iclgd_lens.checking import check as check_module
from iclgd_lens.models import readout
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites.bridge import BridgeSites
from iclgd_lens.runs import prefix
from iclgd_lens.updates import gradient
from tests.hf_zoo import make_hf_model

SHORT, LONG, CACHED, BATCHED, ATTENTION, HEADS, GD, LCGD, INJECTED, ROTARY, _ = range(11)


def bridge(kind: str = "llama") -> Any:
    return lens.load_model(hf_model=make_hf_model(kind))


def failing(model: Any) -> set[int]:
    return {number for number, row in enumerate(lens.check(model).rows) if row.verdict == "fails"}


@pytest.fixture
def wrap(monkeypatch):
    """Put a function around the `forward` of a class of TransformerLens, which the plain model does not run through."""

    def put(kind: type, change: Callable[..., tuple[Any, Any]]) -> None:
        forward = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, *args, **kwargs: _call(forward, self, *change(*args, **kwargs)))

    return put


def _call(forward: Any, self: Any, args: Any, kwargs: Any) -> Any:
    return forward(self, *args, **kwargs)


def test_a_window_that_is_one_too_long(wrap):
    window = make_hf_model("mistral").config.sliding_window

    def widen(*args, attention_mask=None, **kwargs):
        queries, keys = attention_mask.shape[-2:]
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        return args, {**kwargs, "attention_mask": attention_mask.masked_fill(distance == window, 0.0)}

    model = bridge("mistral")
    wrap(PositionEmbeddingsAttentionBridge, widen)
    found = failing(model)
    assert LONG in found
    assert SHORT not in found


def test_positions_that_are_shifted_after_a_cached_prefix(wrap):
    def shift(hidden, position_ids, *args, **kwargs):
        return (hidden, position_ids + 1 if int(position_ids.min()) > 0 else position_ids), kwargs

    model = bridge()
    wrap(RotaryEmbeddingBridge, shift)
    assert failing(model) & {SHORT, LONG, CACHED, GD, LCGD, INJECTED} == {CACHED}


def test_a_mask_of_padding_that_is_dropped(wrap):
    def drop(*args, attention_mask=None, **kwargs):
        return args, {**kwargs, "attention_mask": attention_mask[-1:].expand_as(attention_mask)}

    model = bridge()
    wrap(PositionEmbeddingsAttentionBridge, drop)
    assert failing(model) == {BATCHED}


def test_the_weight_of_another_norm(monkeypatch):
    model = bridge()
    monkeypatch.setattr(readout, "_final_norm", lambda model, residual: model.blocks[0].ln1.original_component(residual))
    assert {SHORT, LONG} <= failing(model)


def test_a_stale_cache(monkeypatch):
    model, run = bridge(), prefix.run_into_cache

    def stale(sites, tokens, *args, **kwargs):
        return run(sites, tokens.flip(0), *args, **kwargs)

    monkeypatch.setattr(prefix, "run_into_cache", stale)
    assert failing(model) == {CACHED, BATCHED}


def test_a_buffer_in_half_precision():
    model = bridge()
    for module in model.original_model.modules():
        for name, buffer in module._buffers.items():
            if name.endswith("inv_freq"):
                module._buffers[name] = buffer.bfloat16()
    assert failing(model) == {ROTARY}


def test_bos_that_is_seen_otherwise_where_it_runs_alone(wrap):
    def edit(hidden, *args, **kwargs):
        return (1.1 * hidden if hidden.shape[1] == 1 else hidden, *args), kwargs

    model = bridge()
    wrap(BlockBridge, edit)
    assert failing(model) == {CACHED, BATCHED}


def test_heads_that_are_swapped(monkeypatch):
    model, weights = bridge(), BridgeSites.output_weights.fget
    swapped = property(lambda self: tuple(weight.roll(1, dims=0) for weight in weights(self)))
    monkeypatch.setattr(BridgeSites, "output_weights", swapped)
    assert failing(model) == {HEADS}


def test_a_logit_without_its_soft_cap(monkeypatch):
    model = bridge("gemma2")
    monkeypatch.setattr(LogitLens, "_cap", 0.0)
    assert {SHORT, LONG, GD, LCGD} <= failing(model)


def test_scores_without_their_scale(monkeypatch):
    model, made = bridge("opt"), BridgeSites._made_again

    def unscaled(self, layer, keys, do):
        return made(self, layer, keys, lambda scores: do(2 * scores))

    monkeypatch.setattr(BridgeSites, "_made_again", unscaled)
    assert failing(model) == {CACHED, BATCHED, ATTENTION}


def test_a_graph_that_is_detached(monkeypatch):
    model, gradients = bridge(), gradient.output_gradients

    def detached(sites, *args):
        with sites.attach([(sites.residual_in[-1], lambda residual, hook: residual.detach())]):
            return gradients(sites, *args)

    monkeypatch.setattr(gradient, "output_gradients", detached)
    assert failing(model) == {GD}


def test_an_update_that_is_injected_twice(monkeypatch):
    model, hooks = bridge(), lens.ParameterUpdate._hooks
    monkeypatch.setattr(lens.ParameterUpdate, "_hooks", lambda self, model: hooks(self, model) + hooks(self, model))
    assert failing(model) == {INJECTED}


@pytest.mark.parametrize(
    "leave",
    [
        lambda model: torch.rand(1),
        lambda model: model.add_hook("blocks.0.hook_in", lambda tensor, hook: None),
        lambda model: next(model.original_model.parameters()).data.mul_(1.0001),
        lambda model: model.train(),
        lambda model: setattr(next(model.original_model.parameters()), "grad", torch.zeros(40, 32)),
    ],
    ids=["random state", "a hook", "a weight", "training mode", "a gradient"],
)
def test_what_is_left_behind(monkeypatch, leave):
    model = bridge()

    def leaving(subject):
        leave(model)
        return 0.0

    monkeypatch.setattr(check_module, "_PROMISES", (check_module._Promise("leaves something", leaving, "outputs", ""),))
    assert lens.check(model).rows[-1].verdict == "fails"
