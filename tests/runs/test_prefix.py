"""The shared beginning of prompts runs once, and behind it everything is as in full prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_lens.data.prompts import context_tokens
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.touched import same_at_every_position
from iclgd_lens.runs.capture import capture
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.updates.gradient import gd
from tests.models_zoo import BOS, make_demonstrations, make_model, make_queries
from tests.reference import full_prompt, reference_capture, relative_error


def shapes_seen(model, run) -> list[tuple[int, int]]:
    """The [batch, pos] of every forward pass that `run` makes."""
    seen = []
    see = same_at_every_position(lambda value, hook: seen.append(tuple(value.shape[:2])))
    with model.hooks(fwd_hooks=[("hook_embed", see)]):
        run()
    return seen


@pytest.mark.parametrize("with_update", [False, True])
def test_prefix_runs_once_and_queries_run_without_it(with_update):
    model, demonstrations, queries = make_model(), make_demonstrations(4), make_queries((5, 2, 7, 5, 1))
    update = gd(model, demonstrations, lr=0.05) if with_update else None
    seen = shapes_seen(
        model, lambda: capture(model, queries, context=demonstrations, update=update, keep=["attn_out"], batch_size=2)
    )
    assert seen == [(1, len(context_tokens(demonstrations))), (2, 2), (2, 5), (1, 7)]


def test_zero_shot_prefix_is_bos_alone():
    model = make_model()
    assert shapes_seen(model, lambda: capture(model, make_queries((3, 3)), keep=["query_scores"])) == [(1, 1), (2, 3)]


def test_label_words_of_one_token_cost_no_further_pass():
    model, queries = make_model(), make_queries((3, 3))
    seen = shapes_seen(model, lambda: capture(model, queries, context=make_demonstrations(), keep=["label_log_probs"]))
    assert sorted(seen[1:]) == [(2, 3), (2, 4), (2, 5)]


def test_batches_are_of_equal_length_where_attention_counts_array_positions():
    model = make_model("local")
    seen = shapes_seen(model, lambda: capture(model, make_queries((5, 2, 7, 5, 2)), keep=["attn_out"]))
    assert sorted(seen) == [(1, 1), (1, 7), (2, 2), (2, 5)]


@pytest.mark.parametrize("shape", ["three_layers", "rotary", "rotary_rms_grouped_gated"])
def test_residual_stream_behind_a_prefix_equals_that_of_full_prompts(shape):
    model, demonstrations, queries = make_model(shape), make_demonstrations(), make_queries((5, 2, 7))
    name, seen = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", []
    with torch.no_grad():
        prefix = Prefix.run(sites_of(model), context_tokens(demonstrations))
        prefix.continue_with(
            [query.tokens[1:] for query in queries], [(name, lambda residual, hook: seen.append(residual.clone()))]
        )
        for row, query in enumerate(queries):
            _, cache = model.run_with_cache(full_prompt(query, demonstrations)[None])
            own = len(query.tokens) - 1
            assert relative_error(seen[0][row, -own:], cache[name][0, -own:]) < 1e-5
    assert not model.list_hooks()


def test_prefix_can_be_continued_again_and_again():
    model, seen = make_model(), []
    bodies = [query.tokens[1:] for query in make_queries((4, 2))]
    keep = [("blocks.1.hook_attn_out", lambda value, hook: seen.append(value.clone()))]
    with torch.no_grad():
        prefix = Prefix.run(sites_of(model), context_tokens(make_demonstrations()))
        for batch in (bodies, bodies[:1], bodies):
            prefix.continue_with(batch, keep)
    assert torch.equal(seen[0], seen[2])
    assert prefix.length == len(context_tokens(make_demonstrations()))


def test_a_token_that_looks_like_padding_is_read_as_any_other():
    model, queries = make_model(), make_queries((4, 6))
    for query in queries:
        query.tokens[1:3] = torch.tensor([0, BOS])
    context = make_demonstrations()
    context[0].tokens[1] = 0
    found = capture(model, queries, context=context)
    assert relative_error(found.attn_out, reference_capture(model, queries, context)["attn_out"]) < 1e-5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(["one_layer", "no_norm", "rotary", "local", "multi_query"]),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    k=st.integers(0, 4),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 100),
)
def test_any_lengths_batches_and_contexts_equal_full_prompts(shape, lengths, k, batch_size, seed):
    model, queries = make_model(shape, seed=seed), make_queries(tuple(lengths), seed=seed)
    context = make_demonstrations(k, seed=seed) if k else None
    found = capture(model, queries, context=context, batch_size=batch_size)
    expected = reference_capture(model, queries, context)
    for name in ("attn_out", "label_log_probs", "lens_logits", *(["context_scores"] if k else [])):
        assert relative_error(getattr(found, name), expected[name]) < 1e-5
    for row, scores in enumerate(expected["query_scores"]):
        own = scores.shape[-1]
        assert (found.query_scores[row, :, :, -own:] - scores).abs().max() <= 1e-5 * found.query_scores.abs().max()
