"""Hooks that a user put on see every prompt whole and by itself: what `run_with_hooks` on that prompt shows them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from iclgd_lens import same_at_every_position
from iclgd_lens.data.prompts import Query
from iclgd_lens.kernels.linearity import label_step, own_layer_change
from iclgd_lens.kernels.tangent import tangent_kernel
from iclgd_lens.models.hooked import make_bridge
from iclgd_lens.models.touched import what_a_user_put_on
from iclgd_lens.runs.capture import ATTENTION, capture, capture_batches
from iclgd_lens.updates.gradient import lcgd
from tests.hf_zoo import make_hf_model
from tests.models_zoo import make_demonstrations, make_model, make_queries
from tests.reference import full_prompt, relative_error

LENGTHS = (5, 2, 7, 5, 1)
ONE_TOKEN = (torch.tensor([5]), torch.tensor([6]))


def one_token_queries() -> list[Query]:
    return [Query(query.tokens, ONE_TOKEN, number % 2) for number, query in enumerate(make_queries(LENGTHS))]


def write_last(value: Tensor, hook: object) -> Tensor:
    """Overwrite the last position, as patching does."""
    value[:, -1] = torch.linspace(-1, 1, value.shape[-1])
    return value


def model_of(kind: str):
    return make_model() if kind == "hooked" else make_bridge(make_hf_model("llama"))


def point(model, layer: int) -> str:
    name = f"blocks.{layer}.hook_attn_out"
    return name if name in model.hook_dict else f"blocks.{layer}.attn.hook_out"


def last_of_whole_prompts(model, queries, context, hooks) -> tuple[Tensor, Tensor]:
    """Label log-probabilities and the last layer's attention output, by `run_with_hooks` on whole prompts, one by one."""
    top, log_probs, attended = model.cfg.n_layers - 1, [], []
    for query in queries:
        seen: list[Tensor] = []
        keep = (point(model, top), lambda out, hook, seen=seen: seen.append(out[0, -1].clone()))
        with torch.no_grad():
            logits = model.run_with_hooks(full_prompt(query, context)[None], fwd_hooks=[*hooks, keep])
        log_probs.append(logits[0, -1].log_softmax(-1)[torch.cat(query.label_tokens)])
        attended.append(seen[0])
    return torch.stack(log_probs), torch.stack(attended)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
@pytest.mark.parametrize("in_context", [False, True])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_hook_that_writes_the_last_position_writes_that_of_every_prompt_and_no_other(kind, in_context, batch_size):
    model, queries, context = model_of(kind), one_token_queries(), make_demonstrations() if in_context else None
    mine = [(point(model, 0), write_last)]
    expected, attended = last_of_whole_prompts(model, queries, context, mine)
    with model.hooks(fwd_hooks=mine):
        found = capture(model, queries, context=context, batch_size=batch_size)
    assert relative_error(found.label_log_probs, expected) < 1e-5
    assert relative_error(found.attn_out[:, -1], attended) < 1e-5
    without, _ = last_of_whole_prompts(model, queries, context, [])
    assert relative_error(without, expected) > 1e-3


def test_a_hook_that_counts_prompts_meets_them_in_the_order_given():
    model, queries = make_model(), one_token_queries()
    patches = torch.randn(len(queries), model.cfg.d_model, generator=torch.Generator().manual_seed(0))

    def patch_in_turn():
        turn = iter(patches)

        def patch(value: Tensor, hook: object) -> Tensor:
            value[:, -1] = next(turn)
            return value

        return [("blocks.1.hook_resid_pre", patch)]

    expected, _ = last_of_whole_prompts(model, queries, None, patch_in_turn())
    with model.hooks(fwd_hooks=patch_in_turn()):
        found = capture(model, queries, keep=["label_log_probs"])
    assert relative_error(found.label_log_probs, expected) < 1e-5
    with model.hooks(fwd_hooks=patch_in_turn()):
        batches = [
            (rows, run.label_log_probs) for rows, run in capture_batches(model, queries, keep=["label_log_probs"], batch_size=2)
        ]
    assert [row for rows, _ in batches for row in rows.tolist()] == list(range(len(queries)))
    assert relative_error(torch.cat([values for _, values in batches]), expected) < 1e-5


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_torch_hooks_count_as_hooks(kind):
    model, queries, context = model_of(kind), one_token_queries(), make_demonstrations()

    def write(module: nn.Module, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, -1] = 0.5
        return out

    handle = model.blocks[1].mlp.register_forward_hook(write)
    expected, attended = last_of_whole_prompts(model, queries, context, [])
    found = capture(model, queries, context=context)
    handle.remove()
    assert relative_error(found.label_log_probs, expected) < 1e-5
    assert relative_error(found.attn_out[:, -1], attended) < 1e-5


def test_label_words_of_several_tokens_are_scored_in_whole_runs_of_prompt_and_word():
    model, queries = make_model(), make_queries(LENGTHS)
    mine = [("blocks.0.hook_attn_out", write_last)]
    with model.hooks(fwd_hooks=mine):
        found = capture(model, queries, keep=["label_log_probs"]).label_log_probs
    for row, query in enumerate(queries):
        for label, word in enumerate(query.label_tokens):
            total = 0.0
            for number, token in enumerate(word.tolist()):
                # The first token is read from the prompt, later ones from the prompt and all but the last of the word.
                tokens = torch.cat([query.tokens, word[:-1] if number else word[:0]])
                with torch.no_grad():
                    logits = model.run_with_hooks(tokens[None], fwd_hooks=mine)[0]
                total += float(logits[len(query.tokens) - 1 + number].log_softmax(-1)[token])
            assert abs(float(found[row, label]) - total / len(word)) < 1e-4


@pytest.mark.parametrize("keep", [ATTENTION, ("head_out", "demonstration_attention", "label_attention")])
def test_what_is_kept_of_whole_runs_is_that_of_shared_ones(keep):
    """A hook that reads alone changes how prompts run, and nothing else."""
    model, queries = make_model("rotary_rms_grouped_gated"), make_queries(LENGTHS)
    context = make_demonstrations() if "demonstration_attention" in keep else None
    expected = capture(model, queries, context=context, keep=keep)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: None)]):
        found = capture(model, queries, context=context, keep=keep)
    for name in keep:
        assert relative_error(found.kept[name], expected.kept[name]) < 1e-5


def test_what_demonstrations_add_is_read_in_whole_runs_too():
    model, queries, context = make_model("rotary_rms_grouped_gated"), make_queries(LENGTHS), make_demonstrations()
    expected = capture(model, queries, context=context, keep=["demonstration_out"])
    seen = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: seen.append(value.shape[:2]))]):
        found = capture(model, queries, context=context, keep=["demonstration_out"])
    assert relative_error(found.demonstration_out, expected.demonstration_out) < 1e-5
    # No run but those of the prompts.
    assert [tuple(shape) for shape in seen] == [(1, len(full_prompt(query, context))) for query in queries]


def test_kernels_of_labels_are_those_of_prompts_one_by_one():
    model, queries, demonstrations = make_model(), one_token_queries(), make_demonstrations()
    demonstrations = [each for each in demonstrations if each.label is not None and each.label < 2]
    mine = [("blocks.1.hook_attn_out", write_last)]
    update = label_step(model, demonstrations, queries, lr=0.1)
    with model.hooks(fwd_hooks=mine):
        together = tangent_kernel(model, demonstrations, queries)
        alone = [tangent_kernel(model, demonstrations, [query]) for query in queries]
        changes = own_layer_change(model, update, queries)
        changes_alone = [own_layer_change(model, update, [query]) for query in queries]
    assert relative_error(together.to_queries, torch.cat([each.to_queries for each in alone], dim=1)) < 1e-5
    assert relative_error(changes, torch.cat(changes_alone, dim=1)) < 1e-4


def test_hooks_of_an_update_and_marked_hooks_leave_prompts_together():
    model, queries = make_model(), make_queries((3, 3))
    update = lcgd(model, make_demonstrations(), lr=0.1)
    ran: list[int] = []
    count = same_at_every_position(lambda value, hook: ran.append(len(value)))
    with model.hooks(fwd_hooks=[*update.fwd_hooks(model), ("blocks.0.hook_resid_pre", count)]):
        given = capture(model, queries, keep=["attn_out"])
    assert ran == [1, 2]
    attached = capture(model, queries, update=update, keep=["attn_out"])
    assert relative_error(given.attn_out, attached.attn_out) < 1e-5


def test_what_was_put_on_is_named():
    model = make_model()
    assert what_a_user_put_on(model) == ""
    with lcgd(model, make_demonstrations(), lr=0.1).attached(model):
        assert what_a_user_put_on(model) == ""
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", write_last)]):
        assert what_a_user_put_on(model) == "a hook at blocks.1.hook_attn_out"
    handle = model.blocks[0].mlp.register_forward_pre_hook(lambda module, args: None)
    assert what_a_user_put_on(model) == "a torch hook on blocks.0.mlp"
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    assert what_a_user_put_on(model) == "a torch hook on all modules"
    handle.remove()

    class Mine(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.mlp = mlp

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x)

    mlp = model.blocks[0].mlp
    model.blocks[0].mlp = Mine(mlp)
    assert what_a_user_put_on(model) == "a Mine in blocks.0.mlp"
    same_at_every_position(model.blocks[0].mlp)
    assert what_a_user_put_on(model) == ""
    model.blocks[0].mlp = mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: plain(mlp, x)
    assert what_a_user_put_on(model) == "a forward method put on blocks.0.mlp"
    del mlp.forward
    assert what_a_user_put_on(model) == ""


def test_torch_hooks_on_the_hugging_face_model_around_the_blocks_are_seen():
    bridge = make_bridge(make_hf_model("llama"))
    assert what_a_user_put_on(bridge) == ""
    for module, name in ((bridge.original_model, "original_model"), (bridge.original_model.model, "original_model.model")):
        handle = module.register_forward_pre_hook(lambda module, args: None)
        assert what_a_user_put_on(bridge) == f"a torch hook on {name}"
        handle.remove()


def test_what_takes_no_mark_is_refused():
    with pytest.raises(TypeError, match="cannot be marked; write it as a function"):
        same_at_every_position([].append)
    assert same_at_every_position(functools.partial(print)) is not None


def test_a_torch_hook_after_the_last_hook_point_is_refused_by_name():
    model = make_model()
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match=r"torch hook on blocks\.1 .*put it at blocks\.1\.hook_resid_post"):
        capture(model, make_queries())
    handle.remove()
    bridge = make_bridge(make_hf_model("llama"))
    handle = bridge.blocks[0].attn.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match=r"torch hook on blocks\.0\.attn"):
        capture(bridge, make_queries())
    handle.remove()
