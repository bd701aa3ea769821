"""Prompts beyond a window, or beyond the length at which rotary frequencies change, equal plain Hugging Face on whole prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from iclgd_lens.data.prompts import Query
from iclgd_lens.models.hooked import make_bridge
from iclgd_lens.models.sites import sites_of
from iclgd_lens.runs.capture import ATTENTION, capture, capture_batches
from iclgd_lens.runs.passes import passes
from tests.hf_zoo import _GROUPED, draw
from tests.models_zoo import make_demonstrations, make_queries
from tests.reference import full_prompt

LAYERS = ["sliding_attention", "full_attention"]
WORDS = (torch.tensor([5]), torch.tensor([6]))


def longrope(**changes: Any) -> Any:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 10000.0}
    rope["original_max_position_embeddings"] = 16
    return hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED, original_max_position_embeddings=16, rope_parameters=rope, **changes))


def gemma_that_sees() -> Any:
    sizes = {key: value for key, value in _GROUPED.items() if key != "attn_implementation"}
    text = hf.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=5, layer_types=LAYERS)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager")
    return hf.Gemma3ForConditionalGeneration(config)


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_GROUPED, "max_position_embeddings": 16}, rope_parameters=rope))


def qwen_with_a_window() -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED, use_sliding_window=True, sliding_window=9, max_window_layers=1))


MODELS = {"longrope": longrope, "gemma_that_sees": gemma_that_sees, "qwen_with_a_window": qwen_with_a_window, "dynamic": dynamic}


def make(name: str) -> tuple[Any, Any]:
    """A bridge, and the plain model once more."""
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name]().eval()
    draw(model)
    plain = copy.deepcopy(model)
    bridge = make_bridge(model)
    if name == "dynamic":
        bridge.cfg.n_ctx = 64  # longer prompts than it was trained on are what such scaling is for
    return bridge, plain


def log_probs(plain: Any, query: Query, context: Any) -> Tensor:
    """Label words after a whole prompt, each in a run of the prompt and the word, by a model that has run nothing else."""
    found = []
    for word in query.label_tokens:
        prompt = full_prompt(query, context)
        with torch.no_grad():
            logits = copy.deepcopy(plain)(input_ids=torch.cat([prompt, word])[None], use_cache=False).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(rows.gather(-1, word[:, None]).mean())
    return torch.stack(found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("in_context", [False, True])
def test_captures_equal_plain_hugging_face_on_whole_prompts_whatever_the_batch(name, in_context):
    bridge, plain = make(name)
    # In-context the prompts have 15 tokens and more before them, so that some stay within 16 tokens and some do not.
    queries = [Query(query.tokens, (*WORDS, torch.tensor([6, 7]))) for query in make_queries((1, 2, 7, 9, 14, 20, 7))]
    context = make_demonstrations(2) if in_context else None
    expected = torch.stack([log_probs(plain, query, context) for query in queries])
    for batch_size in (None, 3, 1):
        found = capture(bridge, queries, context=context, batch_size=batch_size)
        assert float((found.label_log_probs - expected).abs().max()) < 1e-4
    rows, runs = zip(*capture_batches(bridge, queries, context=context, batch_size=3), strict=True)
    assert float((torch.cat([run.label_log_probs for run in runs]) - expected[torch.cat(rows)]).abs().max()) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_parts_of_attention_are_those_of_prompts_one_by_one(name):
    bridge, _ = make(name)
    queries = make_queries((3, 12, 7, 20))
    together = capture(bridge, queries, keep=[*ATTENTION, "attn_out"])
    for row, query in enumerate(queries):
        alone = capture(make(name)[0], [query], keep=[*ATTENTION, "attn_out"])
        for kept in ("attn_out", "own_pattern", "own_inputs", "score_gradients"):
            theirs, ours = alone.kept[kept][0], together.kept[kept][row]
            if kept != "attn_out":
                ours = ours[..., -theirs.shape[-1] :] if kept == "own_pattern" else ours[:, -theirs.shape[1] :]
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_prompts_share_what_they_can():
    bridge, _ = make("longrope")
    sites = sites_of(bridge)
    shared = [(found.rows.tolist(), found.whole) for found in passes(sites, [1, 2, 3, 30], 12, cached=True)]
    assert shared == [([0, 1, 2], False), ([3], True)]
    assert [found.whole for found in passes(sites, [1, 9], 20, cached=True)] == [False]
    windowed = sites_of(make("qwen_with_a_window")[0])
    assert [found.rows.tolist() for found in passes(windowed, [2, 3, 5, 5], 5, cached=True)] == [[0, 1], [2, 3]]


def test_rotary_frequencies_are_as_they_were_after_a_capture():
    for name in ("longrope", "dynamic"):
        bridge, _ = make(name)
        rotary = next(module for module in bridge.original_model.modules() if hasattr(module, "max_seq_len_cached"))
        before, cached = rotary.inv_freq.clone(), rotary.max_seq_len_cached
        capture(bridge, make_queries((20, 2)))
        assert torch.equal(rotary.inv_freq, before)
        assert rotary.max_seq_len_cached == cached
