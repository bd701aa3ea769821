"""`ParameterUpdate.attribution` against models in which one token's keys or values are moved, and against the update itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from iclgd_lens.data.prompts import Query
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import ATTENTION, capture
from iclgd_lens.updates.attribution import Attribution, contributions
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import lcgd
from iclgd_lens.updates.random_weights import random_weights
from tests.models_zoo import ZOO, in_float64, make_demonstrations, make_model, make_queries
from tests.reference import PARAMETERS, relative_error

LR = 0.05
STEP = 1e-4
PER_TOKEN = ("coefficients", "through_values", "through_keys", "norms")
SEPARATE_HEADS = tuple(shape for shape in ZOO if shape != "post_norm")
pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def attributed(
    model: HookedTransformer, lengths: tuple[int, ...] = (4, 1, 6), **options
) -> tuple[ParameterUpdate, Activations, list[Query]]:
    update, queries = lcgd(model, make_demonstrations(), lr=LR, **options), make_queries(lengths)
    return update, capture(model, queries, keep=ATTENTION), queries


def moved_token_by_token(
    model: HookedTransformer, update: ParameterUpdate, query: Query, layer: int, kind: str
) -> tuple[Tensor, Tensor]:
    """What every training token does by itself to the output of heads, `[head token d_head]`, and its linear attention.

    A batch holds the prompt once per training token i, and its row i has the keys or values moved by what token i adds to them.
    """
    weights, biases = f"W_{kind}" in update.settings.parameters, f"b_{kind}" in update.settings.parameters
    errors = (update.key_errors if kind == "K" else update.value_errors)[layer]
    inputs: list[Tensor] = []
    listener = model.blocks[layer].attn.register_forward_pre_hook(
        lambda module, args, given: inputs.append(given["key_input"][0]), with_kwargs=True
    )
    with torch.no_grad():
        _, cache = model.run_with_cache(query.tokens[None])
    listener.remove()
    moves = torch.zeros(len(errors), len(query.tokens), *errors.shape[1:], dtype=torch.float64)
    linear = torch.zeros(model.cfg.n_heads, len(errors), dtype=torch.float64)
    for token, (x, error) in enumerate(zip(update.inputs[layer], errors, strict=True)):
        for position, own in enumerate(inputs[0]):
            kernel = weights * (x @ own) + biases * 1.0
            moves[token, position] = kernel * error
            linear[:, token] += cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1, position] * kernel
    seen: list[Tensor] = []
    for step in (STEP, -STEP):
        hooks = [
            (f"blocks.{layer}.attn.hook_{kind.lower()}", lambda projected, hook, step=step: projected + step * moves),
            (f"blocks.{layer}.attn.hook_z", lambda out, hook: seen.append(out[:, -1])),
        ]
        with torch.no_grad():
            model.run_with_hooks(query.tokens.expand(len(errors), -1), fwd_hooks=hooks)
    return ((seen[0] - seen[1]) / (2 * STEP)).transpose(0, 1), linear


def naive(model: HookedTransformer, update: ParameterUpdate, query: Query, layer: int, along: Tensor | None) -> dict[str, Tensor]:
    """One query's attribution at one layer, head by head and token by token, carried through `W_O` and then measured."""
    (by_values, linear), (by_keys, _) = (moved_token_by_token(model, update, query, layer, kind) for kind in "VK")
    W_O = model.blocks[layer].attn.W_O.detach()
    values, keys = (torch.stack([by_head[head] @ W_O[head] for head in range(len(W_O))]) for by_head in (by_values, by_keys))
    change = (values + keys).sum(dim=(0, 1))
    along = change if along is None else along
    along = along / along.norm()
    return {
        "coefficients": linear,
        "through_values": values @ along,
        "through_keys": keys @ along,
        "norms": (values + keys).norm(dim=-1),
        "change": change,
        "along": along,
        "value_vectors": by_values,
        "key_vectors": by_keys,
    }


def assert_equals_naive(
    found: Attribution, model: HookedTransformer, update: ParameterUpdate, zsl: Activations, queries: Sequence[Query], along=None
) -> None:
    for layer in range(model.cfg.n_layers):
        by_query = [naive(model, update, q, layer, None if along is None else along[n, layer]) for n, q in enumerate(queries)]
        expected = {name: torch.stack([each[name] for each in by_query]) for name in by_query[0]}
        for name in (*PER_TOKEN, "change", "along"):
            assert relative_error(getattr(found, name)[:, layer], expected[name]) < 1e-6, name
        _, coefficients, values, keys = next(contributions(update, zsl, layer))
        for tensor, name in ((coefficients, "coefficients"), (values, "value_vectors"), (keys, "key_vectors")):
            assert relative_error(tensor, expected[name]) < 1e-6, name


@pytest.mark.parametrize("shape", SEPARATE_HEADS)
def test_every_token_contributes_what_it_moves_by_itself(shape):
    model = in_float64(make_model(shape))
    update, zsl, queries = attributed(model)
    along = torch.randn(3, model.cfg.n_layers, model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = update.attribution(zsl, along)
    assert_equals_naive(found, model, update, zsl, queries, along)
    assert torch.equal(found.demonstration, update.demonstration)
    assert torch.equal(found.position, update.position)


@pytest.mark.parametrize(
    "options",
    [*({"parameters": [name]} for name in PARAMETERS), {"parameters": ["W_K", "b_V"]}, {"epochs": 2}],
    ids=[*PARAMETERS, "W_K_and_b_V", "two_epochs"],
)
def test_only_what_was_trained_contributes_in_every_epoch(options):
    model = in_float64(make_model("rotary_rms_grouped_gated"))
    update, zsl, queries = attributed(model, **options)
    found = update.attribution(zsl)
    assert found.norms.shape[-1] == len(update.position)
    assert_equals_naive(found, model, update, zsl, queries)


@pytest.mark.parametrize("shape", SEPARATE_HEADS)
def test_contributions_sum_to_the_first_order_change_of_what_is_captured_under_the_update(shape):
    model = in_float64(make_model(shape))
    update, zsl, queries = attributed(model)
    found = update.attribution(zsl)
    for layer in range(model.cfg.n_layers):
        plus, minus = (capture(model, queries, update=scaled(update, sign * STEP, layer), keep=["head_out"]) for sign in (1, -1))
        slope = (plus.head_out[:, layer] - minus.head_out[:, layer]) / (2 * STEP)
        ((_, _, values, keys),) = contributions(update, zsl, layer)
        assert relative_error((values + keys).sum(dim=2), slope) < 1e-6
        expected = sum(slope[:, head] @ model.blocks[layer].attn.W_O[head] for head in range(model.cfg.n_heads))
        assert relative_error(found.change[:, layer], expected) < 1e-6
    assert relative_error((found.through_values + found.through_keys).sum(dim=(2, 3)), found.change.norm(dim=-1)) < 1e-12


@pytest.mark.parametrize("place", ["attn.hook_k", "attn.hook_q", "attn.hook_attn_scores", "hook_resid_pre"])
@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated", "attention_sinks"])
def test_hooks_of_the_users_are_followed(shape, place):
    model = in_float64(make_model(shape))
    with model.hooks(fwd_hooks=[(f"blocks.1.{place}", lambda tensor, hook: 0.5 * tensor)]):
        update, zsl, queries = attributed(model)
        ends = [capture(model, queries, update=scaled(update, factor, layer=1), keep=["head_out"]) for factor in (STEP, -STEP)]
    slope = (ends[0].head_out - ends[1].head_out)[:, 1] / (2 * STEP)
    expected = torch.einsum("qhd,hdm->qm", slope, zsl.W_O[1])
    assert relative_error(update.attribution(zsl).change[:, 1], expected) < 1e-7


def scaled(update: ParameterUpdate, factor: float, layer: int | None = None) -> ParameterUpdate:
    """The update times a number, of one layer alone if one is given."""
    factors = torch.full((len(update.inputs), 1, 1, 1), factor, dtype=update.inputs.dtype)
    if layer is not None:
        factors = factors * (torch.arange(len(factors)) == layer).view_as(factors)
    return replace(update, key_errors=update.key_errors * factors, value_errors=update.value_errors * factors)


def test_a_direction_is_scaled_to_unit_length_and_none_where_it_is_zero():
    model = make_model()
    update, zsl, _ = attributed(model)
    along = torch.randn(zsl.query_ids.shape[0], 3, 16, generator=torch.Generator().manual_seed(2))
    along[1, 2] = 0.0
    found, longer = update.attribution(zsl, along), update.attribution(zsl, 7.0 * along)
    for name in (*PER_TOKEN, "change", "along"):
        assert relative_error(getattr(longer, name), getattr(found, name)) < 1e-5
    lengths = torch.ones(3, 3)
    lengths[1, 2] = 0.0
    assert torch.allclose(found.along.norm(dim=-1), lengths)
    assert not found.through_values[1, 2].any()
    assert not found.through_keys[1, 2].any()
    component = (found.change * found.along).sum(dim=-1)
    assert relative_error((found.through_values + found.through_keys).sum(dim=(2, 3)), component) < 1e-5


def test_an_update_of_nothing_contributes_nothing():
    update, zsl, _ = attributed(make_model())
    found = scaled(update, 0.0).attribution(zsl)
    assert not any(getattr(found, name).any() for name in (*PER_TOKEN[1:], "change", "along"))
    assert found.coefficients.all()


def test_all_but_the_linear_attention_is_linear_in_the_update():
    update, zsl, _ = attributed(make_model("attention_sinks"))
    found, threefold = update.attribution(zsl), scaled(update, -3.0).attribution(zsl)
    assert torch.equal(threefold.coefficients, found.coefficients)
    assert relative_error(threefold.change, -3.0 * found.change) < 1e-5
    assert relative_error(threefold.along, -found.along) < 1e-5
    for name in PER_TOKEN[1:]:
        assert relative_error(getattr(threefold, name), 3.0 * getattr(found, name)) < 1e-5


@pytest.mark.parametrize("with_along", [False, True], ids=["default", "along"])
def test_taking_queries_a_few_at_a_time_changes_nothing(with_along, monkeypatch):
    update, zsl, _ = attributed(make_model("rotary_rms_grouped_gated"), (4, 1, 6, 2))
    along = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(2)) if with_along else None
    expected = update.attribution(zsl, along)
    monkeypatch.setattr("iclgd_lens.updates.attribution.LARGEST", 1)
    assert [rows for rows, *_ in contributions(update, zsl, 0)] == [slice(n, n + 1) for n in range(4)]
    found = update.attribution(zsl, along)
    for name in (*PER_TOKEN, "change", "along"):
        assert relative_error(getattr(found, name), getattr(expected, name)) < 1e-5


def test_half_precision_is_attributed_in_float32():
    model = make_model(dtype=torch.bfloat16)
    update, zsl, _ = attributed(model)
    found = update.attribution(zsl)
    assert {getattr(found, name).dtype for name in (*PER_TOKEN, "change", "along")} == {torch.float32}
    total = (found.through_values + found.through_keys).sum(dim=(2, 3))
    assert relative_error(total, found.change.norm(dim=-1)) < 1e-5


def test_activations_of_another_model_and_updates_without_tokens_are_refused():
    model = make_model("one_layer")
    update, zsl, queries = attributed(model)
    other = capture(make_model("one_layer", seed=1), queries, keep=ATTENTION)
    with pytest.raises(ValueError, match="another model than the update"):
        update.attribution(other)
    with pytest.raises(ValueError, match="no dual form over demonstration tokens"):
        random_weights(update).attribution(zsl)


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("shape", [(3, 16), (3, 1, 8), (2, 1, 16), (1, 1, 16), (3, 2, 16)])
def test_directions_of_another_shape_are_refused(shape):
    update, zsl, _ = attributed(make_model("one_layer"))
    with pytest.raises(ValueError, match=r"along must have the shape \[query, layer, d_model\] = \[3, 1, 16\], got"):
        update.attribution(zsl, torch.ones(shape))


@pytest.mark.parametrize("name", ATTENTION)
def test_what_was_not_kept_is_named(name):
    update, zsl, _ = attributed(make_model("one_layer"))
    with pytest.raises(AttributeError, match=f"{name} was not kept"):
        update.attribution(replace(zsl, kept={other: tensor for other, tensor in zsl.kept.items() if other != name}))
