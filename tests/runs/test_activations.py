"""`capture` against full prompts run one at a time, and what it keeps, masks and refuses."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from iclgd_lens.metrics.agreement import false_to_true, js_divergence, rec2ftp, same_prediction
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.touched import same_at_every_position
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import capture
from iclgd_lens.runs.passes import fitting_batch_size
from iclgd_lens.updates.gradient import gd, lcgd
from tests.models_zoo import BOS, D_VOCAB, ZOO, in_float64, make_demonstrations, make_model, make_queries
from tests.reference import reference_capture, reference_update, relative_error
from tests.waiting import waits

LR = 0.05
FIELDS = ("attn_out", "query_scores", "context_scores", "label_log_probs", "lens_logits")
METHODS = {"gd": gd, "lcgd": lcgd}
pytestmark = pytest.mark.filterwarnings("ignore:this model's weights are processed:UserWarning")


def assert_equals_reference(found: Activations, expected: dict, tolerance: float = 1e-5) -> None:
    for name in found.kept:
        if name == "query_scores":
            width = found.query_scores.shape[-1]
            assert width == max(rows.shape[-1] for rows in expected[name])
            padded = [torch.nn.functional.pad(rows, (width - rows.shape[-1], 0)) for rows in expected[name]]
            assert relative_error(found.query_scores, torch.stack(padded)) < tolerance
        else:
            assert relative_error(getattr(found, name), expected[name]) < tolerance, name


@pytest.mark.parametrize(
    ("k", "lengths"),
    [(None, (5, 2, 7, 1)), (1, (4, 4)), (4, (5, 2, 7, 1))],
    ids=["zero_shot_ragged", "one_shot_equal", "few_shot_ragged"],
)
@pytest.mark.parametrize("shape", ZOO)
def test_capture_equals_full_prompts_one_at_a_time(shape, k, lengths):
    model, queries = make_model(shape), make_queries(lengths)
    context = None if k is None else make_demonstrations(k)
    found = capture(model, queries, context=context, batch_size=2)
    assert_equals_reference(found, reference_capture(in_float64(model), queries, context))


@pytest.mark.parametrize("with_context", [False, True], ids=["finetuned", "finetuned_in_context"])
@pytest.mark.parametrize("shape", ZOO)
def test_capture_under_an_update_equals_trained_weights(shape, with_context):
    model, queries, demonstrations = make_model(shape), make_queries((5, 2, 7)), make_demonstrations(2)
    method = "lcgd" if with_context else "gd"
    context = demonstrations if with_context else None
    found = capture(model, queries, context=context, update=METHODS[method](model, demonstrations, lr=LR))
    trained = reference_update(in_float64(model), demonstrations, method=method, lr=LR).model
    expected = reference_capture(trained, queries, context)
    assert_equals_reference(found, expected)
    assert relative_error(capture(model, queries, context=context).attn_out, expected["attn_out"]) > 1e-2


def test_float64_models_are_captured_in_float64():
    model, queries, context = make_model(dtype=torch.float64), make_queries(), make_demonstrations()
    found = capture(model, queries, context=context)
    assert {tensor.dtype for tensor in found.kept.values()} == {torch.float64}
    expected = reference_capture(model, queries, context)
    assert_equals_reference(found, expected, tolerance=1e-12)


def test_label_log_probabilities_of_half_precision_models_are_kept_in_float32():
    found = capture(make_model(dtype=torch.bfloat16), make_queries())
    assert {name: tensor.dtype for name, tensor in found.kept.items()} == {
        "attn_out": torch.bfloat16,
        "query_scores": torch.bfloat16,
        "label_log_probs": torch.float32,
        "lens_logits": torch.bfloat16,
    }


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("shape", ["three_layers", "local", "rotary"])
def test_batch_size_changes_nothing(shape, with_context):
    model, queries = make_model(shape), make_queries((3, 8, 1, 3, 5, 5, 2))
    context = make_demonstrations() if with_context else None
    expected = capture(model, queries, context=context, batch_size=1)
    for batch_size in (2, 3, 32):
        found = capture(model, queries, context=context, batch_size=batch_size)
        assert torch.equal(found.query_mask, expected.query_mask)
        for name in expected.kept:
            assert relative_error(found.kept[name], expected.kept[name]) < 1e-5


def test_batches_of_automatic_size_fit_the_memory_that_they_may_take(monkeypatch):
    model, queries, context = make_model(), make_queries((3, 8, 1, 3, 5, 5, 2)), make_demonstrations()
    sites, ran = sites_of(model), []
    count = ("hook_embed", same_at_every_position(lambda embedded, hook: ran.append(len(embedded))))
    with model.hooks(fwd_hooks=[count]):
        expected = capture(model, queries, context=context, keep=["attn_out", "query_scores"])
        assert ran == [1, 7]
        alone, behind = fitting_batch_size(sites, 9, 1), fitting_batch_size(sites, 9, 100)
        assert 1 < behind < alone / 2
        ran.clear()
        monkeypatch.setattr("iclgd_lens.runs.passes.WORKING_BYTES_ON_CPU", 1)
        found = capture(model, queries, context=context, keep=["attn_out", "query_scores"])
        assert ran == [1] * 8
    for name in expected.kept:
        assert relative_error(found.kept[name], expected.kept[name]) < 1e-5


@pytest.mark.parametrize("shape", ["three_layers", "local", "rotary"])
def test_query_order_changes_nothing_but_the_order(shape):
    model, queries, context = make_model(shape), make_queries((3, 8, 1, 3, 5)), make_demonstrations()
    order = [3, 0, 4, 1, 2]
    expected = capture(model, queries, context=context, batch_size=2)
    found = capture(model, [queries[row] for row in order], context=context, batch_size=2)
    assert torch.equal(found.query_mask, expected.query_mask[order])
    assert torch.equal(found.labels, expected.labels[order])
    for name in expected.kept:
        assert relative_error(found.kept[name], expected.kept[name][order]) < 1e-5


def test_other_queries_in_the_batch_change_nothing():
    model, queries, context = make_model(), make_queries((3, 9)), make_demonstrations()
    together = capture(model, queries, context=context)
    alone = capture(model, queries[:1], context=context)
    assert relative_error(together.attn_out[:1], alone.attn_out) < 1e-5
    assert relative_error(together.query_scores[:1, :, :, -3:], alone.query_scores) < 1e-5
    assert relative_error(together.context_scores[:1], alone.context_scores) < 1e-5


def test_scores_are_zero_exactly_where_the_mask_says_so():
    lengths = (5, 2, 7, 1)
    found = capture(make_model(), make_queries(lengths), context=make_demonstrations(), batch_size=2)
    assert found.query_mask.tolist() == [[position >= 7 - length for position in range(7)] for length in lengths]
    scores = found.query_scores.permute(0, 3, 1, 2)
    assert not scores[~found.query_mask].any()
    assert scores[found.query_mask].all()


def test_shapes_are_the_documented_ones():
    model, queries, context = make_model("rotary_rms_grouped_gated"), make_queries((4, 6)), make_demonstrations()
    n_context = sum(len(d.tokens) - 1 + len(d.separator) for d in context)
    found = capture(model, queries, context=context)
    shapes = {name: tuple(getattr(found, name).shape) for name in FIELDS}
    assert shapes == {
        "attn_out": (2, 2, 16),
        "query_scores": (2, 2, 4, 6),
        "context_scores": (2, 2, 4, n_context),
        "label_log_probs": (2, 3),
        "lens_logits": (2, 2, 3),
    }


def test_scores_hidden_by_a_local_window_are_zero_in_the_query_and_minus_infinity_in_the_context():
    model, context = make_model("local"), make_demonstrations()
    found = capture(model, make_queries((6, 3)), context=context)
    window = model.cfg.window_size
    assert not found.query_scores[0, 0, :, :-window].any()
    assert found.query_scores[0, 1, :, :-window].all()
    n_seen = window - 3
    assert (found.context_scores[1, 0, :, :-n_seen] == -torch.inf).all()
    assert found.context_scores[1, 0, :, -n_seen:].isfinite().all()
    assert found.context_scores[:, 1].isfinite().all()


@pytest.mark.parametrize("name", FIELDS)
def test_only_what_is_asked_for_is_kept(name):
    model, queries, context = make_model(), make_queries(), make_demonstrations()
    found = capture(model, queries, context=context, keep=[name])
    assert torch.equal(getattr(found, name), getattr(capture(model, queries, context=context), name))
    for other in set(FIELDS) - {name}:
        with pytest.raises(AttributeError, match=f"{other} was not kept"):
            getattr(found, other)


def test_without_context_or_labels_what_needs_them_is_not_kept():
    model = make_model()
    zero_shot = capture(model, make_queries())
    with pytest.raises(AttributeError, match=r"context_scores was not kept.*in a run with a context"):
        _ = zero_shot.context_scores
    unlabelled = capture(model, make_queries(with_labels=False), context=make_demonstrations())
    assert unlabelled.labels.tolist() == [-1] * 5
    assert unlabelled.kept.keys() == {"attn_out", "query_scores", "context_scores"}
    with pytest.raises(AttributeError, match="label_log_probs was not kept"):
        _ = unlabelled.predictions


def test_predictions_are_the_likeliest_labels():
    model, queries = make_model(), make_queries()
    found = capture(model, queries)
    expected = reference_capture(model, queries)["label_log_probs"]
    assert found.predictions.tolist() == [max(range(3), key=row.__getitem__) for row in expected.tolist()]
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    swapped = found.with_kept(label_log_probs=-found.label_log_probs)
    assert swapped.predictions.tolist() == [min(range(3), key=row.__getitem__) for row in expected.tolist()]
    assert torch.equal(swapped.attn_out, found.attn_out)


def test_last_lens_logits_are_the_models_output():
    model, queries = make_model("soft_caps"), make_queries((4,))
    found = capture(model, queries, context=make_demonstrations())
    expected = reference_capture(model, queries, make_demonstrations())
    assert relative_error(found.lens_logits[:, -1], expected["lens_logits"][:, -1]) < 1e-5


def test_model_is_left_as_it_was():
    model, demonstrations = make_model(), make_demonstrations()
    update = gd(model, demonstrations, lr=LR)
    before = copy.deepcopy(model.state_dict())
    with torch.enable_grad():
        found = capture(model, make_queries(), context=demonstrations, update=update)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert not any(tensor.requires_grad for tensor in found.kept.values())
    assert not model.list_hooks()


def test_an_exception_on_the_way_leaves_no_hooks():
    model = make_model()
    update = gd(model, make_demonstrations(), lr=LR)

    def interrupt(value, hook):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), model.hooks(fwd_hooks=[("blocks.2.hook_attn_out", interrupt)]):
        capture(model, make_queries(), update=update)
    assert not model.list_hooks()


@pytest.mark.parametrize("with_update", [False, True])
@pytest.mark.parametrize("place", ["attn.hook_v", "attn.hook_attn_scores", "hook_resid_pre", "hook_attn_out", "hook_resid_post"])
def test_capture_is_of_the_model_with_the_users_hooks_on_it(place, with_update):
    model, queries, demonstrations = make_model(), make_queries(), make_demonstrations()
    model.add_hook(f"blocks.1.{place}", lambda value, hook: 0.5 * value)
    update = lcgd(model, demonstrations, lr=LR) if with_update else None
    found = capture(model, queries, context=demonstrations, update=update)
    assert set(model.list_hooks()) == {f"blocks.1.{place}"}
    wide = in_float64(model)
    if with_update:
        wide = reference_update(wide, demonstrations, method="lcgd", lr=LR).model
    assert_equals_reference(found, reference_capture(wide, queries, demonstrations))


def test_capture_inside_an_attached_update_is_capture_of_that_update():
    model, queries = make_model(), make_queries()
    update = gd(model, make_demonstrations(), lr=LR)
    with update.attached(model):
        inside = capture(model, queries)
    assert torch.equal(inside.attn_out, capture(model, queries, update=update).attn_out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["resid"]}, "keep may name attn_out, .*got 'resid'"),
        ({"keep": ["context_scores"]}, "there is no context"),
        ({"context": []}, "no demonstrations"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_options_that_do_not_exist_or_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        capture(make_model("one_layer"), make_queries(), **options)


def test_queries_that_cannot_be_run_together_are_refused():
    model, queries = make_model("one_layer"), make_queries()
    with pytest.raises(ValueError, match="no queries"):
        capture(model, [])
    with pytest.raises(ValueError, match="query 5 has other label words"):
        capture(model, [*queries, *make_queries(with_labels=False)])
    with pytest.raises(ValueError, match="the queries have no label words"):
        capture(model, make_queries(with_labels=False), keep=["lens_logits"])


def test_prompts_of_different_bos_tokens_are_refused():
    model, queries, context = make_model("one_layer"), make_queries(), make_demonstrations()
    odd_query = copy.deepcopy(queries[1])
    odd_query.tokens[0] = 2
    odd_demonstration = copy.deepcopy(context[1])
    odd_demonstration.tokens[0] = 2
    with pytest.raises(ValueError, match="same BOS token"):
        capture(model, [queries[0], odd_query])
    with pytest.raises(ValueError, match="same BOS token"):
        capture(model, [odd_query], context=context)
    with pytest.raises(ValueError, match="same BOS token"):
        capture(model, queries, context=[*context, odd_demonstration])


def test_prompts_longer_than_the_context_window_are_refused_saying_how_many_demonstrations_fit():
    model, queries, context = make_model("one_layer"), make_queries((9, 3)), make_demonstrations(12)
    with pytest.raises(ValueError, match=r"12 demonstrations .* (\d+) would fit: pass k=\1") as refused:
        capture(model, queries, context=context)
    fitting = int(str(refused.value).split("k=")[1].split(",")[0])
    capture(model, queries, context=context[:fitting])
    with pytest.raises(ValueError, match=f"{fitting} would fit|context window"):
        capture(model, queries, context=context[: fitting + 1])
    with pytest.raises(ValueError, match="not even one demonstration would fit"):
        capture(model, make_queries((61,)), context=context)


def test_a_query_longer_than_the_context_window_is_refused_without_a_word_of_demonstrations():
    model = make_model("one_layer")
    capture(model, make_queries((61,)))
    with pytest.raises(ValueError, match="context window of 64") as refused:
        capture(model, make_queries((62,)))
    assert "demonstration" not in str(refused.value)


def test_only_hooked_models_without_split_inputs_are_taken():
    with pytest.raises(TypeError, match="a HookedTransformer or a TransformerBridge, got Linear"):
        capture(torch.nn.Linear(2, 2), make_queries())
    model = make_model("one_layer")
    model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match=r"set_use_split_qkv_input\(False\)"):
        capture(model, make_queries())


def test_alibi_models_are_refused_since_their_scores_depend_on_what_ran_before():
    model, tokens = make_model("one_layer", positional_embedding_type="alibi"), torch.arange(6)[None]
    scores = [model.run_with_cache(t)[1]["blocks.0.attn.hook_attn_scores"] for t in (tokens, tokens.repeat(1, 3), tokens)]
    assert not torch.allclose(scores[0], scores[2])
    with pytest.raises(ValueError, match="ALiBi models are not supported"):
        capture(model, make_queries())


@pytest.mark.parametrize("keep", [None, ["attn_out", "context_scores", "label_log_probs"], ["own_values", "score_gradients"]])
def test_no_layer_waits_for_a_gpu(keep):
    """What batches ask is the same however many layers there are."""
    queries = make_queries()
    context = make_demonstrations() if keep != ["own_values", "score_gradients"] else None
    models = [make_model("three_layers", n_layers=n) for n in (2, 6)]
    few, many = (waits(partial(capture, model, queries, context=context, keep=keep, batch_size=2)) for model in models)
    assert few == many


@pytest.mark.parametrize("token", [-1, D_VOCAB])
def test_tokens_of_another_model_s_vocabulary_are_refused_wherever_they_stand(token):
    foreign, (query,), context = torch.tensor([BOS, token]), make_queries((3,)), make_demonstrations(1)
    for queries, demonstrations in (
        ([replace(query, tokens=foreign)], None),
        ([replace(query, label_tokens=(foreign,))], None),
        ([query], [replace(context[0], tokens=torch.cat([foreign, foreign[:1]]), n_label_tokens=1)]),
        ([query], [replace(context[0], separator=foreign)]),
    ):
        with pytest.raises(ValueError, match=f"token {token} is not in the model's vocabulary of {D_VOCAB}"):
            capture(make_model(), queries, context=demonstrations)


def test_query_ids_are_the_same_in_every_process_and_tell_queries_and_labels_apart():
    model, (query, *_) = make_model("one_layer"), make_queries()
    queries = [query, replace(query, label=None), replace(query, label=1), replace(query, tokens=query.tokens.flip(0).roll(1))]
    found = capture(model, [each for each in queries if each.tokens[0] == BOS], keep=["residual"]).query_ids.tolist()
    digests = [
        int(hashlib.sha256(json.dumps([each.tokens.tolist(), each.label]).encode()).hexdigest()[:16], 16) >> 1
        for each in queries
        if each.tokens[0] == BOS
    ]
    assert found == digests
    assert len(set(found)) == len(found)


def test_runs_know_the_label_words_and_their_order():
    model, queries = make_model("one_layer"), make_queries()
    reversed_words = [replace(each, label_tokens=each.label_tokens[::-1]) for each in queries]
    a, again, b = (capture(model, each) for each in (queries, make_queries(), reversed_words))
    assert a.label_words == again.label_words != b.label_words
    assert capture(model, make_queries(with_labels=False)).label_words == ""
    for metric in (same_prediction, js_divergence):
        metric(a, again)
        with pytest.raises(ValueError, match="other label words, or the same in another order"):
            metric(a, b)
    for metric in (rec2ftp, false_to_true):
        metric(a, a, again)
        for runs in ((b, a, a), (a, b, a), (a, a, b)):
            with pytest.raises(ValueError, match="other label words, or the same in another order"):
                metric(*runs)
        with pytest.raises(ValueError, match="zsl is a run with demonstrations in its context"):
            metric(a, a, capture(model, queries, context=make_demonstrations()))


@pytest.mark.parametrize("name", ["head_out", "own_pattern", "own_values", "score_gradients", "demonstration_out"])
def test_output_projections_are_there_where_heads_are_kept_and_only_there(name):
    model = make_model("one_layer")
    context = make_demonstrations() if name == "demonstration_out" else None
    found = capture(model, make_queries(), context=context, keep=[name])
    assert torch.equal(found.W_O[0], model.blocks[0].attn.W_O)
    with pytest.raises(AttributeError, match=r"W_O was not kept; capture\(\.\.\., keep=\[\.\.\., 'head_out'\]\) keeps it"):
        _ = capture(model, make_queries(), keep=["attn_out", "residual"]).W_O
