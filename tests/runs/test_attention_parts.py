"""What `capture` keeps of attention, part by part, against full prompts run one at a time and finite differences."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from iclgd_lens.data.prompts import ContextLayout, Demonstration, Query, context_tokens
from iclgd_lens.models.hooked import HookedTransformer
from iclgd_lens.runs.activations import OF_CONTEXT, Activations, require_same_runs
from iclgd_lens.runs.capture import ATTENTION, DEFAULT, capture, capture_batches
from iclgd_lens.updates.gradient import lcgd
from tests.models_zoo import BOS, ZOO, in_float64, make_demonstrations, make_model, make_queries
from tests.reference import full_prompt, reference_update, relative_error

LENGTHS = (5, 2, 7, 1, 5)
SEPARATE_HEADS = tuple(shape for shape in ZOO if shape != "post_norm")
IN_CONTEXT = ("residual", "head_out", "demonstration_out", "demonstration_attention", "label_attention")
ZERO_SHOT = ("residual", "head_out", "own_pattern", "own_inputs", "own_values")
OWN_AXIS = {"own_pattern": 3, "own_inputs": 2, "own_values": 2, "score_gradients": 2}
STEP = 1e-4


def naive(model: HookedTransformer, query: Query, context: Sequence[Demonstration] | None) -> dict[str, Tensor]:
    """Every part of one query's attention, from its full prompt, by loops over heads and tokens; own tokens are not padded."""
    prompt, inputs = full_prompt(query, context), []
    listeners = [
        block.attn.register_forward_pre_hook(lambda module, args, given: inputs.append(given["key_input"][0]), with_kwargs=True)
        for block in model.blocks
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(prompt[None])
    for listener in listeners:
        listener.remove()

    def at(place: str) -> Tensor:
        return torch.stack([cache[f"blocks.{layer}.{place}"][0] for layer in range(model.cfg.n_layers)])

    pattern, values, group = at("attn.hook_pattern")[:, :, -1], at("attn.hook_v"), query_group(model)
    found = {
        "residual": at("hook_resid_post")[:, -1],
        "head_out": at("attn.hook_z")[:, -1],
        "own_pattern": pattern,
        "own_inputs": torch.stack(inputs),
        "own_values": values,
    }
    if context is None:
        return found
    n_layers, n_heads = pattern.shape[:2]
    found["demonstration_attention"] = torch.zeros(n_layers, n_heads, len(context), dtype=pattern.dtype)
    found["label_attention"] = torch.zeros_like(found["demonstration_attention"])
    found["demonstration_out"] = torch.zeros_like(found["head_out"])
    position = 1
    for number, demonstration in enumerate(context):
        first_label = position + len(demonstration.tokens) - 1 - demonstration.n_label_tokens
        end = position + len(demonstration.tokens) - 1 + len(demonstration.separator)
        for token in range(position, end):
            found["demonstration_attention"][:, :, number] += pattern[:, :, token]
            if first_label <= token < first_label + demonstration.n_label_tokens:
                found["label_attention"][:, :, number] += pattern[:, :, token]
            for head in range(n_heads):
                found["demonstration_out"][:, head] += pattern[:, head, token, None] * values[:, token, head // group]
        position = end
    return found


def query_group(model: HookedTransformer) -> int:
    """How many heads share a key-value head."""
    return model.cfg.n_heads // (model.cfg.n_key_value_heads or model.cfg.n_heads)


def padded(rows: list[Tensor], axis: int) -> Tensor:
    """Stack, right-aligned along one axis of the stack, with zeros in front."""
    rows = [row.movedim(axis - 1, 0) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left").movedim(1, axis)


def stacked(found: list[dict[str, Tensor]], name: str) -> Tensor:
    rows = [each[name] for each in found]
    return padded(rows, OWN_AXIS[name]) if name in OWN_AXIS else torch.stack(rows)


@pytest.mark.parametrize("shape", ZOO)
@pytest.mark.parametrize("in_context", [False, True], ids=["zero_shot", "in_context"])
def test_parts_equal_those_of_full_prompts_one_at_a_time(shape, in_context):
    model, queries = make_model(shape), make_queries(LENGTHS)
    context = make_demonstrations(4) if in_context else None
    names = IN_CONTEXT if in_context else ZERO_SHOT[: -1 if shape == "post_norm" else None]
    reference = in_float64(model)
    expected = [naive(reference, query, context) for query in queries]
    for batch_size in (1, 2, 32):
        found = capture(model, queries, context=context, keep=names, batch_size=batch_size)
        for name in names:
            assert relative_error(getattr(found, name), stacked(expected, name)) < 1e-5, name


@pytest.mark.parametrize("in_context", [False, True], ids=["zero_shot", "in_context"])
@pytest.mark.parametrize("place", ["attn.hook_v", "attn.hook_pattern"])
def test_parts_are_of_the_model_with_the_update_and_the_users_hooks_on_it(place, in_context):
    model, queries, context = make_model("rotary_rms_grouped_gated"), make_queries((5, 2)), make_demonstrations()
    model.add_hook(f"blocks.1.{place}", lambda value, hook: 0.5 * value)
    names = IN_CONTEXT if in_context else ZERO_SHOT
    found = capture(model, queries, context=context if in_context else None, update=lcgd(model, context, lr=0.05), keep=names)
    trained = reference_update(in_float64(model), context, method="lcgd", lr=0.05).model
    expected = [naive(trained, query, context if in_context else None) for query in queries]
    for name in names:
        assert relative_error(getattr(found, name), stacked(expected, name)) < 1e-5, name
    assert len(model.list_hooks()) == 1


@pytest.mark.parametrize("shape", SEPARATE_HEADS)
def test_score_gradients_equal_finite_differences_at_the_key_projection(shape):
    model, queries = make_model(shape), make_queries((5, 2, 7))
    reference, group = in_float64(model), query_group(model)
    expected = []
    for query in queries:
        n_pos, by_layer = len(query.tokens), []
        for layer in range(model.cfg.n_layers):
            jacobian = score_jacobian(reference, query.tokens, layer)
            gradients = torch.zeros(n_pos, model.cfg.n_heads, model.cfg.d_head, dtype=torch.float64)
            for head in range(model.cfg.n_heads):
                gradients[:, head] = jacobian[:, head // group, :, head]
            # A head's score depends on the keys of its own key-value head alone.
            assert relative_error(gradients.abs().sum(), jacobian.abs().sum()) < 1e-6
            by_layer.append(gradients)
        expected.append(torch.stack(by_layer))
    for batch_size in (1, 2, 32):
        found = capture(model, queries, keep=["score_gradients"], batch_size=batch_size)
        assert relative_error(found.score_gradients, padded(expected, 2)) < 1e-5


def score_jacobian(model: HookedTransformer, tokens: Tensor, layer: int) -> Tensor:
    """∂(score of token j)/∂(key of token j), `[pos kv_head d_head head]`, by moving one number of one key at a time."""
    n_pos, kv_heads, d_head = len(tokens), model.cfg.n_heads // query_group(model), model.cfg.d_head
    moves = torch.eye(n_pos * kv_heads * d_head, dtype=torch.float64).view(-1, n_pos, kv_heads, d_head)
    places = torch.arange(n_pos).repeat_interleave(kv_heads * d_head)
    seen = []
    for step in (STEP, -STEP):

        def move(keys: Tensor, hook, step: float = step) -> Tensor:
            return keys + step * moves

        def keep(scores: Tensor, hook) -> None:
            own = scores[torch.arange(len(moves)), :, -1, places]
            seen.append(own.masked_fill(own.isinf(), 0.0))

        hooks = [(f"blocks.{layer}.attn.hook_k", move), (f"blocks.{layer}.attn.hook_attn_scores", keep)]
        with torch.no_grad():
            model.run_with_hooks(tokens.expand(len(moves), -1), fwd_hooks=hooks)
    return ((seen[0] - seen[1]) / (2 * STEP)).view(n_pos, kv_heads, d_head, -1)


@pytest.mark.parametrize("shape", ZOO)
def test_attention_is_a_mixture_of_two_smoothers_weighted_by_the_mass_on_demonstrations(shape):
    model, queries, context = in_float64(make_model(shape)), make_queries((5, 1)), make_demonstrations()
    found = capture(model, queries, context=context, keep=["head_out", "demonstration_out", "demonstration_attention"])
    mass, n_context = found.demonstration_attention.sum(-1, keepdim=True), len(context_tokens(context))
    model.requires_grad_(False)
    of_demonstrations, of_query = (torch.zeros_like(found.head_out) for _ in range(2))
    for row, query in enumerate(queries):
        _, cache = model.run_with_cache(full_prompt(query, context)[None])
        for layer in range(model.cfg.n_layers):
            for head in range(model.cfg.n_heads):
                kernel = cache[f"blocks.{layer}.attn.hook_attn_scores"][0, head, -1].exp()
                values = cache[f"blocks.{layer}.attn.hook_v"][0, :, head // query_group(model)]
                # A sink counts as a token of the query's own, of value zero.
                sink = model.blocks[layer].attn.sinks[head].exp() if model.cfg.use_attention_sinks else 0.0
                demonstrations, own = slice(1, n_context), [0, *range(n_context, len(kernel))]
                total = kernel[demonstrations].sum()
                of_query[row, layer, head] = kernel[own] @ values[own] / (kernel[own].sum() + sink)
                of_demonstrations[row, layer, head] = kernel[demonstrations] @ values[demonstrations] / (total or 1.0)
                assert mass[row, layer, head] == pytest.approx(float(total / (kernel.sum() + sink)), rel=1e-9)
    assert relative_error(found.demonstration_out, mass * of_demonstrations) < 1e-9
    assert relative_error(found.head_out, (1 - mass) * of_query + mass * of_demonstrations) < 1e-9


def test_own_parts_are_exactly_zero_before_bos_and_nowhere_else():
    found = capture(make_model(), make_queries(LENGTHS), keep=ATTENTION, batch_size=2)
    for name, axis in OWN_AXIS.items():
        for row, length in enumerate(LENGTHS):
            own = getattr(found, name)[row].movedim(axis - 1, 0)
            assert len(own) == max(LENGTHS) + 1
            assert not own[: -length - 1].any(), name
            assert own[-length - 1 :].any(dim=-1).all(), name


@pytest.mark.parametrize("shape", ["three_layers", "local", "rotary_rms_grouped_gated"])
def test_prompts_that_run_whole_read_the_same(shape):
    model, queries = make_model(shape), make_queries(LENGTHS)
    names = [name for name in (*DEFAULT, "head_out") if name != "context_scores"]
    expected = capture(model, queries, keep=names)
    found = capture(model, queries, keep=[*names, *ATTENTION], batch_size=2)
    assert torch.equal(found.query_mask, expected.query_mask)
    for name in names:
        assert relative_error(found.kept[name], expected.kept[name]) < 1e-5


@pytest.mark.parametrize("shape", ["three_layers", "local", "rotary_rms_grouped_gated"])
def test_batches_are_rows_of_the_whole_and_go_in_step_with_and_without_context(shape):
    model, queries, context = make_model(shape), make_queries((3, 8, 1, 3, 5, 5, 2)), make_demonstrations()
    zero_shot = capture(model, queries, keep=[*ZERO_SHOT, "score_gradients"])
    in_context = capture(model, queries, context=context, keep=[*IN_CONTEXT, "context_scores"])
    seen = []
    for (rows, zsl), (rows_icl, icl) in zip(
        capture_batches(model, queries, keep=[*ZERO_SHOT, "score_gradients"], batch_size=2),
        capture_batches(model, queries, context=context, keep=[*IN_CONTEXT, "context_scores"], batch_size=2),
        strict=True,
    ):
        assert torch.is_grad_enabled()
        assert torch.equal(rows, rows_icl)
        assert len(rows) <= 2
        require_same_runs(zsl, icl)
        for batch, whole in ((zsl, zero_shot), (icl, in_context)):
            assert torch.equal(batch.query_ids, whole.query_ids[rows])
            assert torch.equal(batch.labels, whole.labels[rows])
            assert torch.equal(batch.query_mask, whole.query_mask[rows][:, -batch.query_mask.shape[1] :])
            for name, tensor in batch.kept.items():
                expected = whole.kept[name][rows]
                if name in OWN_AXIS:
                    width = tensor.shape[OWN_AXIS[name]]
                    expected = expected.narrow(OWN_AXIS[name], expected.shape[OWN_AXIS[name]] - width, width)
                assert relative_error(tensor, expected) < 1e-5, name
        seen += rows.tolist()
    assert sorted(seen) == [*range(len(queries))]


def test_rows_of_a_run_are_that_run_of_some_of_its_queries():
    model, queries = make_model(), make_queries((4, 4, 4))
    run = capture(model, queries, keep=ATTENTION)
    some = run.of(slice(1, 3))
    require_same_runs(some, capture(model, queries[1:], keep=ATTENTION))
    assert torch.equal(some.labels, run.labels[1:])
    assert torch.equal(some.query_mask, run.query_mask[1:])
    assert all(torch.equal(getattr(some, name), getattr(run, name)[1:]) for name in ATTENTION)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradients_are_taken_whatever_mode_the_caller_is_in_and_leave_the_model_alone(mode):
    model, queries = make_model(), make_queries()
    expected = capture(model, queries, keep=ATTENTION)
    before = [parameter.clone() for parameter in model.parameters()]
    with mode():
        enabled = torch.is_grad_enabled()
        found = capture(model, queries, keep=ATTENTION)
        batches = dict(enumerate(capture_batches(model, queries, keep=ATTENTION)))
        assert torch.is_grad_enabled() == enabled
    assert all(torch.equal(found.kept[name], expected.kept[name]) for name in ATTENTION)
    assert len(batches) == 1
    assert not any(tensor.requires_grad for tensor in found.kept.values())
    assert not model.list_hooks()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("inside", [False, True], ids=["on_the_model", "added_in_a_block"])
def test_score_gradients_are_refused_where_a_hook_edits_the_pattern(inside):
    def linear(pattern: Tensor, hook) -> Tensor:
        counts = torch.ones_like(pattern).tril()
        return counts / counts.sum(-1, keepdim=True)

    model, queries, edit = make_model(), make_queries(), ("blocks.1.attn.hook_pattern", linear)
    if not inside:
        model.add_hook(*edit)
    with model.hooks(fwd_hooks=[edit] if inside else []):
        with pytest.raises(
            ValueError, match=r"attention in layer 1 does not hand.*the softmax.*hook edits.*without score_gradients"
        ):
            capture(model, queries, keep=["attn_out", *ATTENTION])
        # The rest is read as it is.
        found = capture(model, make_queries((4, 4)), keep=["own_pattern"])
        assert torch.allclose(found.own_pattern[:, 1], torch.tensor(0.2))
    assert torch.is_grad_enabled()
    model.reset_hooks()
    assert not model.list_hooks()
    assert all(parameter.grad is None for parameter in model.parameters())
    capture(model, queries, keep=["score_gradients"])


@pytest.mark.parametrize("shape", ["three_layers", "multi_query", "attention_sinks"])
@pytest.mark.parametrize(
    "edit",
    [
        ("hook_v", lambda values, hook: 0.5 * values),
        ("hook_v", lambda values, hook: torch.zeros_like(values)),
        ("hook_pattern", lambda pattern, hook: 0.5 * pattern),
        ("hook_z", lambda out, hook: 0.5 * out),
        ("hook_z", lambda out, hook: torch.zeros_like(out)),
    ],
    ids=["values_scaled", "values_ablated", "pattern_scaled", "output_scaled", "output_ablated"],
)
def test_score_gradients_are_refused_where_a_hook_comes_between_the_projections_and_the_output(shape, edit):
    place, hook = edit
    model = make_model(shape)
    with model.hooks(fwd_hooks=[(f"blocks.1.attn.{place}", hook)]), pytest.raises(ValueError, match="layer 1"):
        capture(model, make_queries(), keep=ATTENTION)
    assert not model.list_hooks()


def test_ablated_attention_of_a_head_is_followed_since_it_contributes_nothing():
    def ablated(pattern: Tensor, hook) -> Tensor:
        return pattern * torch.tensor([1.0, 0.0])[:, None, None]

    model = make_model()
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", ablated)]):
        found = capture(model, make_queries(), keep=ATTENTION)
    assert not found.own_pattern[:, 1, 1].any()
    assert found.own_pattern[:, 1, 0].any()


def test_score_gradients_see_the_users_edits_of_scores():
    model, queries = make_model(), make_queries()
    plain = capture(model, queries, keep=["score_gradients"]).score_gradients
    with model.hooks(fwd_hooks=[("blocks.2.attn.hook_attn_scores", lambda scores, hook: 0.5 * scores)]):
        edited = capture(model, queries, keep=["score_gradients"]).score_gradients
    assert relative_error(edited[:, :2], plain[:, :2]) < 1e-6
    assert relative_error(edited[:, 2], 0.5 * plain[:, 2]) < 1e-5


def test_sums_of_half_precision_models_are_kept_in_float32():
    model, queries = make_model(dtype=torch.bfloat16), make_queries()
    narrow, single = ("residual", "own_inputs", "own_values"), ("head_out", "own_pattern", "score_gradients")
    zero_shot = capture(model, queries, keep=[*narrow, *single])
    in_context = capture(model, queries, context=make_demonstrations(), keep=IN_CONTEXT)
    assert {zero_shot.kept[name].dtype for name in narrow} == {torch.bfloat16}
    assert {zero_shot.kept[name].dtype for name in single} == {torch.float32}
    assert {in_context.kept[name].dtype for name in IN_CONTEXT[1:]} == {torch.float32}


@pytest.mark.parametrize("name", [*OF_CONTEXT, *ATTENTION])
def test_what_the_run_does_not_have_is_refused(name):
    context, reason = (None, "there is no context") if name in OF_CONTEXT else (make_demonstrations(), "without a context")
    with pytest.raises(ValueError, match=f"'{name}', but .*{reason}"):
        capture(make_model("one_layer"), make_queries(), context=context, keep=[name])
    with pytest.raises(ValueError, match=f"'{name}', but .*{reason}"):
        next(capture_batches(make_model("one_layer"), make_queries(), context=context, keep=[name]))
    with pytest.raises(AttributeError, match=f"{name} was not kept"):
        getattr(capture(make_model("one_layer"), make_queries(), keep=["attn_out"]), name)


@pytest.mark.parametrize("name", ["own_values", "score_gradients"])
def test_models_without_separate_heads_are_refused_what_is_attributed_to_heads(name):
    with pytest.raises(ValueError, match="normalises the keys of all heads together"):
        capture(make_model("post_norm"), make_queries(), keep=[name])


def test_layout_says_which_demonstration_position_and_label_each_token_is():
    def demonstration(text: list[int], n_label: int, separator: list[int]) -> Demonstration:
        return Demonstration(torch.tensor([BOS, *text]), n_label, torch.tensor(separator, dtype=torch.long))

    context = [demonstration([20, 21, 5], 1, [30, 31]), demonstration([22, 8, 5, 9], 3, []), demonstration([6, 7], 2, [30])]
    layout = ContextLayout.of(context)
    table = [  # token, demonstration, position, is_label
        *((20, 0, 1, False), (21, 0, 2, False), (5, 0, 3, True), (30, 0, -1, False), (31, 0, -1, False)),
        *((22, 1, 1, False), (8, 1, 2, True), (5, 1, 3, True), (9, 1, 4, True)),
        *((6, 2, 1, True), (7, 2, 2, True), (30, 2, -1, False)),
    ]
    columns = (context_tokens(context)[1:], layout.demonstration, layout.position, layout.is_label)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == table


def run_of(model: HookedTransformer, queries: Sequence[Query]) -> Activations:
    return capture(model, queries, keep=["attn_out"])


def test_runs_of_other_queries_or_models_are_told_apart():
    model, queries = make_model("one_layer"), make_queries((4, 4, 4))
    run = run_of(model, queries)
    require_same_runs(run, run_of(make_model("one_layer"), make_queries((4, 4, 4))), run)
    relabelled = [*queries[:2], Query(queries[2].tokens, queries[2].label_tokens, 0)]
    for other, message in (
        (queries[:2], "one has 3 of them, another 2"),
        ([queries[0], queries[2], queries[1]], "differ from query 1 on"),
        (make_queries((4, 4, 4), seed=1), "differ from query 0 on"),
        (relabelled, "differ from query 2 on"),
    ):
        with pytest.raises(ValueError, match=f"not of the same queries: .*{message}"):
            require_same_runs(run, run_of(model, other))
    with pytest.raises(ValueError, match="not of the same model"):
        require_same_runs(run, run, run_of(make_model("one_layer", seed=1), queries))
