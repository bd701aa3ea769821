"""The tangent kernel against inner products of Jacobians by autograd on the real weights, and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.kernels.tangent import TangentKernel, tangent_kernel
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.gradient import lcgd
from tests.models_zoo import BOS, LABEL_WORDS, ZOO, in_float64, label_tokens, make_demonstrations, make_model, make_queries
from tests.reference import PARAMETERS, parameter, readout_logits, reference_update, relative_error

FIRSTS = [word[0] for word in LABEL_WORDS]
FIELDS = ("between", "to_queries", "demonstration_logits", "query_logits", "targets")
LENGTHS = (5, 2, 1)

Jacobian = dict[str, Tensor]
"""By parameter, `[label weight]`."""


def jacobians(model: HookedTransformer, tokens: Tensor) -> tuple[Tensor, list[Jacobian]]:
    """Of one prompt, run by itself block by block: logit-lens logits `[layer label]`, and their Jacobian at every layer."""
    residual = model.input_to_embed(tokens[None])[0]
    logits, found = [], []
    for layer, block in enumerate(model.blocks):
        weights = {name: parameter(model, layer, name).requires_grad_() for name in PARAMETERS}
        residual = block(residual.detach())
        logits.append(readout_logits(model, residual[0, -1])[FIRSTS])
        rows = [torch.autograd.grad(f, weights.values(), retain_graph=True, materialize_grads=True) for f in logits[-1]]
        found.append({name: torch.stack([row[n].flatten() for row in rows]) for n, name in enumerate(weights)})
    return torch.stack(logits).detach(), found


def naive_theta(ours: list[list[Jacobian]], others: list[list[Jacobian]], names: Sequence[str]) -> Tensor:
    """`[layer prompt other label label]`, from one Jacobian a prompt and layer."""
    layers = range(len(ours[0]))
    return torch.stack(
        [
            torch.stack([torch.stack([sum(a[layer][n] @ b[layer][n].T for n in names) for b in others]) for a in ours])
            for layer in layers
        ]
    )


def unlabelled(demonstrations: Sequence[Demonstration]) -> list[Tensor]:
    return [d.tokens[: len(d.tokens) - d.n_label_tokens] for d in demonstrations]


def assert_equals_jacobians(
    model: HookedTransformer,
    demonstrations: Sequence[Demonstration],
    queries: Sequence[Query],
    tolerance: float,
    subsets: Sequence[Sequence[str]] = (PARAMETERS,),
    reference: HookedTransformer | None = None,
) -> None:
    reference = in_float64(model) if reference is None else reference
    d_logits, d_jacobians = zip(*(jacobians(reference, tokens) for tokens in unlabelled(demonstrations)), strict=True)
    q_logits, q_jacobians = zip(*(jacobians(reference, query.tokens) for query in queries), strict=True)
    for names in subsets:
        found = tangent_kernel(model, demonstrations, queries, parameters=names)
        between, to_queries = (naive_theta(ours, d_jacobians, names) for ours in (d_jacobians, q_jacobians))
        assert relative_error(found.demonstration_logits, torch.stack(d_logits, dim=1)) < tolerance
        assert relative_error(found.query_logits, torch.stack(q_logits, dim=1)) < tolerance
        for layer in range(model.cfg.n_layers):
            assert relative_error(found.between[layer], between[layer]) < tolerance, (names, layer)
            assert relative_error(found.to_queries[layer], to_queries[layer]) < tolerance, (names, layer)


def make_kernel(shape: str = "three_layers", n: int = 4, **options) -> TangentKernel:
    return tangent_kernel(in_float64(make_model(shape)), make_demonstrations(n), make_queries(LENGTHS), **options)


def assert_same(found: TangentKernel, expected: TangentKernel, tolerance: float = 1e-12) -> None:
    for name in FIELDS:
        assert relative_error(getattr(found, name), getattr(expected, name)) <= tolerance, name


@pytest.mark.parametrize("shape", ZOO)
def test_kernel_is_the_inner_product_of_jacobians_of_the_real_weights(shape):
    subsets = [PARAMETERS, ("W_V",), ("b_K", "W_K"), ("W_K", "b_V")]
    assert_equals_jacobians(in_float64(make_model(shape)), make_demonstrations(), make_queries(LENGTHS), 1e-8, subsets)


@pytest.mark.parametrize("name", PARAMETERS)
def test_kernel_of_one_parameter_is_that_parameters(name):
    # Rotary and with norms on keys, b_K has a gradient of its own.
    model = in_float64(make_model("qk_norm"))
    assert_equals_jacobians(model, make_demonstrations(), make_queries(LENGTHS), 1e-8, [(name,)])
    found, alone = (tangent_kernel(model, make_demonstrations(), make_queries(), parameters=p) for p in ([name], name))
    assert_same(alone, found, 0.0)


@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated"])
def test_kernel_in_single_precision(shape):
    assert_equals_jacobians(make_model(shape), make_demonstrations(4), make_queries(), 1e-5)


def test_half_precision_is_summed_in_float32():
    demonstrations, queries = make_demonstrations(), make_queries(LENGTHS)
    found = tangent_kernel(make_model(dtype=torch.bfloat16), demonstrations, queries)
    assert {getattr(found, name).dtype for name in FIELDS} == {torch.float32}
    assert relative_error(found.to_queries, tangent_kernel(make_model(), demonstrations, queries).to_queries) < 0.1


@pytest.mark.parametrize("shape", ["three_layers", "soft_caps", "rotary_rms_grouped_gated", "local"])
@pytest.mark.parametrize("parameters", [PARAMETERS, ("b_V",)], ids=["all", "b_V"])
def test_kernel_between_demonstrations_is_symmetric_and_positive_semidefinite(shape, parameters):
    found = make_kernel(shape, parameters=parameters).between
    n_layers, n, _, n_labels, _ = found.shape
    for kernel in found:
        matrix = torch.zeros(n * n_labels, n * n_labels, dtype=kernel.dtype)
        for a in range(n):
            for b in range(n):
                matrix[a * n_labels : (a + 1) * n_labels, b * n_labels : (b + 1) * n_labels] = kernel[a, b]
        assert relative_error(matrix, matrix.T) < 1e-12
        values = torch.linalg.eigvalsh(matrix)
        assert values[0] > -1e-12 * values[-1]
    assert n_layers > 1
    assert relative_error(found.mT, found) > 1e-3


def test_a_demonstration_asked_as_a_query_has_the_demonstrations_row():
    model, demonstrations = in_float64(make_model("rotary")), make_demonstrations(4)
    queries = [Query(tokens, label_tokens()) for tokens in unlabelled(demonstrations)]
    found = tangent_kernel(model, demonstrations, queries)
    assert relative_error(found.to_queries, found.between) < 1e-12
    assert relative_error(found.query_logits, found.demonstration_logits) < 1e-12


def test_logits_are_the_zero_shot_runs_and_targets_the_labels():
    model, demonstrations, queries = make_model("norms_before_and_after"), make_demonstrations(4, seed=1), make_queries()
    found = tangent_kernel(model, demonstrations, queries)
    expected = capture(model, queries, keep=["lens_logits"]).lens_logits.transpose(0, 1)
    assert relative_error(found.query_logits, expected) < 1e-5
    assert found.targets.tolist() == [[float(d.label == label) for label in range(3)] for d in demonstrations]
    assert len({d.label for d in demonstrations}) == 3


def test_residuals_prediction_and_the_kernel_per_label_follow_their_formulas():
    found, lr = make_kernel(), 0.3
    n_layers, n_queries, n, n_labels, _ = found.to_queries.shape
    for layer in range(n_layers):
        residuals = []
        for d in range(n):
            weights = [float(f.exp()) for f in found.demonstration_logits[layer, d]]
            residuals.append([w / sum(weights) - float(y) for w, y in zip(weights, found.targets[d], strict=True)])
        assert relative_error(found.residuals[layer], torch.tensor(residuals, dtype=torch.float64)) < 1e-12
        for q in range(n_queries):
            theta = found.to_queries[layer, q].tolist()
            per_label = [sum(theta[d][c][c] for c in range(n_labels)) / n_labels for d in range(n)]
            moved = [
                -lr * sum(theta[d][c][e] * residuals[d][e] for d in range(n) for e in range(n_labels)) for c in range(n_labels)
            ]
            assert found.per_label[layer, q].tolist() == pytest.approx(per_label, rel=1e-10)
            assert found.prediction(lr)[layer, q].tolist() == pytest.approx(moved, rel=1e-10, abs=1e-14)


@pytest.mark.parametrize("shape", ["three_layers", "rotary_rms_grouped_gated", "local", "attention_sinks"])
def test_batches_and_the_company_that_prompts_keep_change_nothing(shape):
    model, demonstrations, queries = in_float64(make_model(shape)), make_demonstrations(5), make_queries((5, 2, 7, 5, 1))
    assert len({len(tokens) for tokens in unlabelled(demonstrations)}) > 2
    expected = tangent_kernel(model, demonstrations, queries, batch_size=1)
    for batch_size in (2, 32):
        assert_same(tangent_kernel(model, demonstrations, queries, batch_size=batch_size), expected)
    some = tangent_kernel(model, [demonstrations[3], demonstrations[1]], queries[1:2])
    assert relative_error(some.between, expected.between[:, [3, 1]][:, :, [3, 1]]) < 1e-12
    assert relative_error(some.to_queries, expected.to_queries[:, 1:2, [3, 1]]) < 1e-12


def test_taking_prompts_a_few_at_a_time_changes_nothing(monkeypatch):
    expected = make_kernel("rotary_rms_grouped_gated")
    monkeypatch.setattr("iclgd_lens.kernels.tangent.LARGEST", 1)
    assert_same(make_kernel("rotary_rms_grouped_gated"), expected)


def test_of_a_label_of_several_tokens_the_first_alone_counts():
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries(LENGTHS)
    words = tuple(word[:1] for word in label_tokens())
    cut = [
        replace(d, tokens=torch.cat([p, words[d.label]]), n_label_tokens=1)
        for d, p in zip(demonstrations, unlabelled(demonstrations), strict=True)
    ]
    assert {d.n_label_tokens for d in demonstrations} == {1, 2, 3}
    expected = tangent_kernel(model, demonstrations, queries)
    assert_same(tangent_kernel(model, cut, [replace(query, label_tokens=words) for query in queries]), expected, 0.0)


def test_separators_and_gold_labels_of_queries_do_not_matter():
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries(LENGTHS)
    bare = [replace(d, separator=torch.tensor([], dtype=torch.long)) for d in demonstrations]
    found = tangent_kernel(model, bare, [replace(query, label=None) for query in queries])
    assert_same(found, tangent_kernel(model, demonstrations, queries), 0.0)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_kernel_does_not_depend_on_the_callers_mode_and_leaves_the_model_alone(mode):
    model, demonstrations, queries = make_model(), make_demonstrations(), make_queries()
    model.W_E.requires_grad_(False)
    flags = [weight.requires_grad for weight in model.parameters()]
    before = [weight.clone() for weight in model.parameters()]
    expected = tangent_kernel(make_model(), demonstrations, queries)
    with mode():
        enabled = torch.is_grad_enabled()
        found = tangent_kernel(model, demonstrations, queries)
        assert torch.is_grad_enabled() == enabled
    assert_same(found, expected, 0.0)
    assert not any(getattr(found, name).requires_grad for name in FIELDS)
    assert not model.list_hooks()
    assert all(weight.grad is None for weight in model.parameters())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(map(torch.equal, before, model.parameters()))


def test_frozen_weights_have_a_kernel_too():
    expected = tangent_kernel(make_model(), make_demonstrations(), make_queries())
    assert_same(tangent_kernel(make_model().requires_grad_(False), make_demonstrations(), make_queries()), expected, 0.0)


def ablate_head(value, hook):
    return torch.cat([torch.zeros_like(value[:, :, :1]), value[:, :, 1:]], dim=2)


def shift(value, hook):
    return value + torch.linspace(-0.4, 0.4, value.shape[-1], dtype=value.dtype)


def scale(value, hook):
    return 0.3 * value


@pytest.mark.parametrize(
    ("place", "function"),
    [
        ("attn.hook_z", ablate_head),
        ("hook_resid_pre", shift),
        ("hook_resid_post", shift),
        ("ln1.hook_normalized", shift),
        ("attn.hook_attn_scores", scale),
        ("attn.hook_k", scale),
        ("attn.hook_v", ablate_head),
    ],
)
def test_kernel_is_of_the_model_with_the_users_hooks_on_it(place, function):
    model = in_float64(make_model())
    reference, plain = in_float64(model), tangent_kernel(model, make_demonstrations(), make_queries(LENGTHS))
    for hooked in (model, reference):
        hooked.add_hook(f"blocks.1.{place}", function)
    assert_equals_jacobians(model, make_demonstrations(), make_queries(LENGTHS), 1e-8, reference=reference)
    assert set(model.list_hooks()) == {f"blocks.1.{place}"}
    changed = tangent_kernel(model, make_demonstrations(), make_queries(LENGTHS))
    assert relative_error(changed.between[0], plain.between[0]) < 1e-12
    assert relative_error(changed.between[1], plain.between[1]) > 1e-2


def test_kernel_under_an_attached_update_is_of_the_updated_model():
    model, demonstrations, queries = in_float64(make_model("rotary")), make_demonstrations(), make_queries(LENGTHS)
    trained = reference_update(model, demonstrations, method="lcgd", lr=0.05).model
    with lcgd(model, demonstrations, lr=0.05).attached(model):
        assert_equals_jacobians(model, demonstrations, queries, 1e-8, reference=trained)


def test_a_layer_that_attends_to_nothing_has_no_kernel():
    model = make_model()
    model.add_hook("blocks.1.hook_attn_out", lambda value, hook: torch.zeros_like(value))
    found = tangent_kernel(model, make_demonstrations(), make_queries(LENGTHS))
    assert not found.between[1].any()
    assert not found.to_queries[1].any()
    assert found.between[[0, 2]].any()


def test_an_exception_on_the_way_leaves_no_hooks():
    model = make_model()

    def interrupt(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("blocks.2.hook_attn_out", interrupt)]):
        tangent_kernel(model, make_demonstrations(), make_queries())
    assert not model.list_hooks()
    assert torch.is_grad_enabled()


def with_words(*words: tuple[int, ...]) -> list[Query]:
    return [replace(query, label_tokens=tuple(map(torch.tensor, words)), label=None) for query in make_queries(LENGTHS)]


BEYOND = torch.tensor([1, 1000, 5])


@pytest.mark.parametrize(
    ("demonstrations", "queries", "options", "message"),
    [
        (make_demonstrations(), with_words((5, 6), (7,), (5,)), {}, r"share their first token \(first tokens: \[5, 7, 5\]\)"),
        (make_demonstrations(), make_queries(with_labels=False), {}, "needs queries with label words"),
        (make_demonstrations(), [], {}, "needs queries with label words"),
        ([replace(d, label=None) for d in make_demonstrations()], make_queries(), {}, "demonstration 0 has the label index None"),
        (make_demonstrations(), with_words((5,), (6,)), {}, "demonstration 2 has the label index 2; need one of 0 to 1"),
        ([], make_queries(), {}, "no demonstrations"),
        (make_demonstrations(), make_queries(), {"parameters": ("W_V", "W_Q")}, r"parameters must be some of .*'W_Q'"),
        (make_demonstrations(), make_queries(), {"parameters": ()}, "parameters must be some of"),
        ([Demonstration(BEYOND, 1, label=0)], make_queries(), {}, "token 1000 is not in the model's vocabulary of 40"),
        (make_demonstrations(), [Query(BEYOND, label_tokens())], {}, "token 1000 is not in the model's vocabulary of 40"),
    ],
)
def test_what_has_no_kernel_is_refused(demonstrations, queries, options, message):
    with pytest.raises(ValueError, match=message):
        tangent_kernel(make_model("one_layer"), demonstrations, queries, **options)


def test_what_does_not_fit_or_belong_together_is_refused():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries()
    for batch_size in (-1, 0, 1.5, True):
        with pytest.raises(ValueError, match="batch_size must be at least 1"):
            tangent_kernel(model, demonstrations, queries, batch_size=batch_size)
    with pytest.raises(ValueError, match="query 1 makes a prompt of 66 tokens, longer than the context window of 64"):
        tangent_kernel(model, demonstrations, [queries[0], *make_queries((65,))])
    long = replace(demonstrations[0], tokens=torch.cat([torch.full((64,), BOS), demonstrations[0].tokens]))
    with pytest.raises(ValueError, match=r"demonstration 1 makes a prompt of .* longer than the context window of 64"):
        tangent_kernel(model, [demonstrations[0], long], queries)
    other = replace(queries[1], label_tokens=queries[1].label_tokens[::-1])
    with pytest.raises(ValueError, match="query 1 has other label words than query 0"):
        tangent_kernel(model, demonstrations, [queries[0], other])


def test_sequences_may_be_generators():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries()
    expected = tangent_kernel(model, demonstrations, queries, parameters=("W_K", "b_V"))
    found = tangent_kernel(model, iter(demonstrations), iter(queries), parameters=iter(("W_K", "b_V")))
    assert torch.equal(found.to_queries, expected.to_queries)
    assert torch.equal(found.shuffled(iter((2, 0, 1))).to_queries, expected.to_queries[:, :, [2, 0, 1]])


def test_kernels_are_dealt_out_and_stepped_with_what_there_is():
    kernel = tangent_kernel(make_model("one_layer"), make_demonstrations(), make_queries())
    for order in ([0, 1], [0, 1, 1], [0, 1, 3], [-1, 0, 1]):
        with pytest.raises(ValueError, match="order must name each of the 3 demonstrations once"):
            kernel.shuffled(order)
    for lr in (math.nan, -1.0, "0.1"):
        with pytest.raises(ValueError, match="lr must be a number"):
            kernel.prediction(lr)


def test_autocast_does_not_round_a_kernel():
    model, demonstrations, queries = make_model("one_layer"), make_demonstrations(), make_queries()
    expected = tangent_kernel(model, demonstrations, queries).to_queries
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tangent_kernel(model, demonstrations, queries).to_queries, expected)
