"""The first-order prediction against steps that are made, and the change of one layer alone against captured runs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.kernels.linearity import label_step, linearity, own_layer_change
from iclgd_lens.kernels.tangent import tangent_kernel
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.updates.gradient import lcgd
from tests.models_zoo import (
    LABEL_WORDS,
    ZOO,
    in_float64,
    label_tokens,
    make_demonstrations,
    make_model,
    make_queries,
)
from tests.reference import PARAMETERS, cosine, parameter, readout_logits, reference_update, relative_error

LR = 0.05
LENGTHS = (4, 1, 6)
WORDS = ((5,), (6,), (8,))
"""Label words of one token each."""

pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def shortened(demonstrations: list[Demonstration]) -> list[Demonstration]:
    """The same with the first token of each label only."""
    kept = [len(d.tokens) - d.n_label_tokens + 1 for d in demonstrations]
    return [replace(d, tokens=d.tokens[:n], n_label_tokens=1) for d, n in zip(demonstrations, kept, strict=True)]


def prediction_errors(model: HookedTransformer, lr: float, **options) -> Tensor:
    demonstrations, queries = make_demonstrations(), make_queries(LENGTHS)
    chosen = {name: options[name] for name in ("parameters",) if name in options}
    predicted = tangent_kernel(model, demonstrations, queries, **chosen).prediction(lr)
    return linearity(
        predicted, own_layer_change(model, label_step(model, demonstrations, queries, lr=lr, **options), queries)
    ).error


@pytest.mark.parametrize("schedule", ["batch", "online"])
@pytest.mark.parametrize("shape", ZOO)
def test_the_error_of_the_prediction_falls_in_proportion_to_the_learning_rate(shape, schedule):
    model = in_float64(make_model(shape))
    errors = torch.stack([prediction_errors(model, lr, schedule=schedule) for lr in (1e-3, 1e-4, 1e-5)])
    assert errors.shape == (3, model.cfg.n_layers)
    assert (errors[-1] < 1e-2).all()
    ratios = errors[:-1] / errors[1:]
    assert ((ratios > 8) & (ratios < 12.5)).all(), errors


@pytest.mark.parametrize("parameters", [("W_V",), ("b_K", "W_K"), ("b_V",)])
def test_the_prediction_is_that_of_the_parameters_that_are_trained(parameters):
    model = in_float64(make_model("rotary_rms_grouped_gated"))
    larger, smaller = (prediction_errors(model, lr, parameters=parameters) for lr in (1e-4, 1e-5))
    assert (larger < 0.1).all()
    assert (larger / smaller > 8).all()


def test_the_prediction_points_along_small_steps():
    model, demonstrations, queries = in_float64(make_model()), make_demonstrations(), make_queries(LENGTHS)
    actual = own_layer_change(model, label_step(model, demonstrations, queries, lr=1e-5), queries)
    found = linearity(tangent_kernel(model, demonstrations, queries).prediction(1e-5), actual)
    assert (found.cosine > 0.9999).all()
    assert (found.error < 0.01).all()


def of_one_layer(update: ParameterUpdate, layer: int) -> ParameterUpdate:
    mask = (torch.arange(len(update.inputs)) == layer).view(-1, 1, 1, 1)
    return replace(update, key_errors=update.key_errors * mask, value_errors=update.value_errors * mask)


@pytest.mark.parametrize("shape", ZOO)
def test_the_own_change_of_a_layer_is_that_of_a_run_in_which_it_alone_is_updated(shape):
    model, queries = in_float64(make_model(shape)), make_queries((5, 2, 7, 5, 1))
    update = lcgd(model, make_demonstrations(), lr=LR)
    before = capture(model, queries, keep=["lens_logits"]).lens_logits
    runs = [capture(model, queries, update=of_one_layer(update, layer), keep=["lens_logits"]) for layer in range(len(model.blocks))]
    expected = torch.stack([(run.lens_logits - before)[:, layer] for layer, run in enumerate(runs)])
    for batch_size in (1, 2, 8):
        found = own_layer_change(model, update, queries, batch_size=batch_size)
        for layer in range(model.cfg.n_layers):
            assert relative_error(found[layer], expected[layer]) < 1e-10, layer


@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated", "no_norm", "post_norm"])
def test_the_own_change_of_a_layer_is_that_of_its_trained_block_on_the_same_input(shape):
    model, queries, demonstrations = in_float64(make_model(shape)), make_queries(LENGTHS), make_demonstrations()
    words = [torch.tensor(word) for word in WORDS]
    options = {"lr": LR, "loss_on": "label", "readout": "labels", "schedule": "batch", "label_tokens": words}
    trained = reference_update(model, shortened(demonstrations), method="lcgd", **options).model
    found = own_layer_change(model, label_step(model, demonstrations, queries, lr=LR), queries)
    firsts = [word[0] for word in LABEL_WORDS]
    with torch.no_grad():
        for number, query in enumerate(queries):
            residual = model.input_to_embed(query.tokens[None])[0]
            for layer, blocks in enumerate(zip(model.blocks, trained.blocks, strict=True)):
                before, after = (block(residual)[0, -1] for block in blocks)
                expected = (readout_logits(model, after) - readout_logits(model, before))[firsts]
                assert relative_error(found[layer, number], expected) < 1e-9, layer
                residual = blocks[0](residual)


def test_an_update_of_nothing_changes_nothing():
    model, queries = make_model(), make_queries(LENGTHS)
    found = own_layer_change(model, lcgd(model, make_demonstrations(), lr=0), queries)
    assert found.shape == (3, 3, 3)
    assert found.dtype == torch.float32
    assert not found.any()


def one_token_words() -> tuple[list[Demonstration], list[Query]]:
    words = tuple(torch.tensor(word) for word in WORDS)
    return shortened(make_demonstrations(4)), [replace(query, label_tokens=words) for query in make_queries(LENGTHS)]


def assert_identical(found: ParameterUpdate, expected: ParameterUpdate) -> None:
    for name in ("inputs", "key_errors", "value_errors", "demonstration", "position", "gradient_norms", "losses"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.settings == expected.settings


@pytest.mark.parametrize("schedule", ["batch", "online"])
@pytest.mark.parametrize("parameters", [PARAMETERS, ("W_V", "b_K")], ids=["all", "some"])
def test_the_label_step_is_lcgd_on_labels_of_one_token(schedule, parameters):
    model, (demonstrations, queries) = make_model("rotary"), one_token_words()
    options = {"lr": LR, "schedule": schedule, "parameters": parameters}
    words = {"loss_on": "label", "readout": "labels", "label_tokens": queries[0].label_tokens}
    expected = lcgd(model, demonstrations, **options, **words)
    assert_identical(label_step(model, demonstrations, queries, **options), expected)


def test_the_label_step_is_one_batch_of_all_parameters_unless_told():
    settings = label_step(make_model("one_layer"), *one_token_words(), lr=LR).settings
    assert (settings.schedule, settings.epochs, settings.parameters) == ("batch", 1, PARAMETERS)


def test_longer_labels_are_cut_to_their_first_token():
    model, (demonstrations, queries) = make_model("rotary"), one_token_words()
    longer = make_demonstrations(4)
    assert {d.n_label_tokens for d in longer} == {1, 2, 3}
    found = label_step(model, longer, make_queries(LENGTHS), lr=LR)
    assert_identical(found, label_step(model, demonstrations, queries, lr=LR))


@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated"])
def test_the_label_step_trains_the_weights_on_the_label_logits(shape):
    model, demonstrations = in_float64(make_model(shape)), make_demonstrations()
    update = label_step(model, demonstrations, make_queries(LENGTHS), lr=LR)
    # The plainest statement of the loss: cross-entropy among the words' first tokens at the last token of the text.
    for layer in range(model.cfg.n_layers):
        W_V = parameter(model, layer, "W_V").detach()
        weight = W_V.clone().requires_grad_()
        losses = []
        for d in demonstrations:
            prompt = d.tokens[: len(d.tokens) - d.n_label_tokens]
            _, cache = model.run_with_cache(prompt[None])
            name = "W_V" if "W_V" in dict(model.blocks[layer].attn.named_parameters()) else "_W_V"
            out = torch.func.functional_call(
                model.blocks[layer], {f"attn.{name}": weight}, (cache[f"blocks.{layer}.hook_resid_pre"].detach(),)
            )
            logits = readout_logits(model, out[0, -1])[[word[0] for word in LABEL_WORDS]]
            losses.append(-logits.log_softmax(-1)[d.label])
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), weight)
        assert relative_error(update.delta("W_V", layer), -LR * gradient) < 1e-9


def test_linearity_follows_its_formulas():
    generator = torch.Generator().manual_seed(1)
    predicted, actual = torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=generator)
    found = linearity(predicted, actual)
    for layer in range(4):
        p, a = predicted[layer].flatten(), actual[layer].flatten()
        distance = math.sqrt(sum(float(x - y) ** 2 for x, y in zip(a, p, strict=True)))
        length = math.sqrt(sum(float(x) ** 2 for x in a))
        assert float(found.error[layer]) == pytest.approx(distance / length, rel=1e-12)
        assert float(found.cosine[layer]) == pytest.approx(cosine(p, a), rel=1e-12)


def test_linearity_is_undefined_where_nothing_changes():
    predicted, actual = torch.ones(3, 2, 2), torch.ones(3, 2, 2)
    actual[1], predicted[2] = 0.0, 0.0
    found = linearity(predicted, actual)
    assert found.error.isnan().tolist() == [False, True, False]
    assert found.cosine.isnan().tolist() == [False, True, True]
    assert found.error[0] == 0.0
    assert found.cosine[0] == pytest.approx(1.0)
    assert found.error[2] == 1.0


@pytest.mark.unchecked_shapes
def test_changes_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"predicted has the shape \[3, 2, 4\], actual \[3, 4, 2\]"):
        linearity(torch.ones(3, 2, 4), torch.ones(3, 4, 2))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_is_left_as_it_was_whatever_the_callers_mode(mode):
    model, queries = make_model(), make_queries(LENGTHS)
    expected = own_layer_change(make_model(), label_step(make_model(), make_demonstrations(), queries, lr=LR), queries)
    before = [weight.clone() for weight in model.parameters()]
    with mode():
        enabled = torch.is_grad_enabled()
        found = own_layer_change(model, label_step(model, make_demonstrations(), queries, lr=LR), queries)
        assert torch.is_grad_enabled() == enabled
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert not model.list_hooks()
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("run", [1, 2])
def test_an_exception_on_the_way_leaves_the_users_hooks_alone(run):
    model, queries, calls = make_model(), make_queries((4, 4)), []
    update = label_step(model, make_demonstrations(), queries, lr=LR)

    def interrupt(value, hook):
        calls.append(hook.name)
        if len(calls) == run:
            raise KeyboardInterrupt

    model.add_hook("blocks.1.hook_attn_out", interrupt)
    with pytest.raises(KeyboardInterrupt):
        own_layer_change(model, update, queries)
    assert len(calls) == run
    assert set(model.list_hooks()) == {"blocks.1.hook_attn_out"}
    model.reset_hooks()
    assert torch.equal(own_layer_change(model, update, queries), own_layer_change(make_model(), update, queries))


@pytest.mark.parametrize("place", ["attn.hook_z", "attn.hook_v", "attn.hook_k", "hook_resid_post"])
def test_prediction_and_change_are_of_the_model_with_the_users_hooks_on_it(place):
    model = in_float64(make_model())
    model.add_hook(f"blocks.1.{place}", lambda value, hook: torch.cat([0.3 * value[:, :, :1], value[:, :, 1:]], dim=2))
    larger, smaller = (prediction_errors(model, lr) for lr in (1e-4, 1e-5))
    assert (larger < 0.1).all()
    assert (larger / smaller > 8).all()


def test_updates_of_other_models_and_queries_without_label_words_are_refused():
    model, queries, demonstrations = make_model("one_layer"), make_queries(LENGTHS), make_demonstrations()
    update = label_step(model, demonstrations, queries, lr=LR)
    with pytest.raises(ValueError, match="belongs to another model"):
        own_layer_change(make_model("one_layer", seed=1), update, queries)
    bare = make_queries(LENGTHS, with_labels=False)
    alike = [replace(query, label_tokens=(*label_tokens(), torch.tensor([5, 6]))) for query in queries]
    for unfit, message in ((bare, "needs queries with label words"), (alike, "share their first token")):
        with pytest.raises(ValueError, match=message):
            own_layer_change(model, update, unfit)
        with pytest.raises(ValueError, match=message):
            label_step(model, demonstrations, unfit, lr=LR)


def test_errors_of_the_label_step_are_those_of_lcgd():
    model, queries = make_model("one_layer"), make_queries(LENGTHS)
    with pytest.raises(ValueError, match="no demonstrations"):
        label_step(model, [], queries, lr=LR)
    with pytest.raises(ValueError, match="lr must be a number"):
        label_step(model, make_demonstrations(), queries, lr=-1.0)
    with pytest.raises(ValueError, match="label of demonstration 0 is not among label_tokens"):
        label_step(model, [Demonstration(torch.tensor([1, 20, 30]), 1)], queries, lr=LR)


@pytest.mark.unchecked_shapes
def test_what_does_not_fit_is_refused():
    model, queries = make_model("one_layer"), make_queries()
    update = label_step(model, make_demonstrations(), iter(queries), lr=0.1)
    for batch_size in (-1, 0, True):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            own_layer_change(model, update, queries, batch_size=batch_size)
    with pytest.raises(ValueError, match="query 0 makes a prompt of 66 tokens, longer than the context window of 64"):
        own_layer_change(model, update, make_queries((65,)))
    expected = own_layer_change(model, update, queries)
    assert torch.equal(own_layer_change(model, update, iter(queries)), expected)
    with pytest.raises(ValueError, match="must both be"):
        linearity(expected[0], expected[0])
