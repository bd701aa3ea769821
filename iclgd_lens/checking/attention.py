"""Attention: scores, pattern and heads, against each other and against what the plain model's attention returns."""

from __future__ import annotations

from typing import Any

import torch
from einops import einsum, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iclgd_lens.checking.plain import first
from iclgd_lens.checking.whole import Subject, largest_error, worst
from iclgd_lens.data.prompts import Query
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.precision import wide
from iclgd_lens.runs.capture import capture


def visible(scores: Float[Tensor, "*batch key_pos"]) -> Float[Tensor, "*batch key_pos"]:
    """Scores with −inf where they are masked: Hugging Face masks by the least finite number."""
    return wide(scores).masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)


def softmax_among(scores: Float[Tensor, "head key_pos"], seen: Bool[Tensor, "head key_pos"]) -> Float[Tensor, "head key_pos"]:
    """Attention among the tokens that are seen. Where no token of a head is, all zeros."""
    return wide(scores).masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def plain_patterns(subject: Subject, tokens: Int[Tensor, "pos"]) -> list[Float[Tensor, "head query_pos key_pos"]]:
    """The attention weights that the plain model's attention modules return; empty where they return none."""
    hooked, plain = subject.model, subject.plain
    if not is_bridge(hooked):
        return []
    modules = [plain.view(block.attn) for block in hooked.blocks]  # type: ignore[attr-defined]
    with plain.watched(modules) as seen:
        subject.plain_logits(tokens, 1)
    found = [each for out in seen for each in out[1:] if isinstance(out, tuple) and isinstance(each, Tensor) and each.ndim == 4]
    return [each[0].detach() for each in found] if len(found) == len(modules) else []


def attention_parts(subject: Subject) -> float:
    """Scores, pattern and heads' outputs at every token: `softmax(scores) = pattern`, 0 at later tokens, rows that sum to 1 (at
    most 1 with attention sinks), `pattern · values = heads' outputs`; against the plain model's attention weights, and against
    what `capture` reads.
    """
    sites, tokens = subject.sites, subject.prompts.draw(min(subject.prompts.long, MOST_FOR_PATTERNS), seed=2)
    scores, patterns, values, heads = subject.read(tokens, subject.score_places, sites.pattern, sites.values, sites.head_out)
    theirs = plain_patterns(subject, tokens)
    used = theirs or patterns
    errors = [largest_error(ours, real, torch.ones(1)) for ours, real in zip(patterns, theirs, strict=False)]
    later = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=used[0].device).triu(1)
    sinks = _has_sinks(subject)
    for layer, pattern in enumerate(map(wide, used)):
        errors.append(float(pattern.masked_fill(~later, 0.0).abs().max()))
        total = pattern.sum(dim=-1, keepdim=True)
        errors.append(float((total - 1).clamp_min(0.0).max() if sinks else (total - 1).abs().max()))
        if scores:
            errors.append(largest_error(visible(scores[layer]).softmax(dim=-1), pattern / total, torch.ones(1)))
        errors.append(_heads_error(pattern, values[layer], heads[layer]))
    return worst([*errors, *_last_token_errors(subject, tokens, [wide(pattern[:, -1]) for pattern in used])])


MOST_FOR_PATTERNS = 640
"""How many tokens a prompt has at most whose whole patterns are held."""


def _heads_error(
    pattern: Float[Tensor, "head query_pos key_pos"],
    values: Float[Tensor, "pos kv_head d_head"],
    heads: Float[Tensor, "pos head d_head"],
) -> float:
    shared = repeat(wide(values), "pos kv_head d_head -> pos (kv_head group) d_head", group=heads.shape[1] // values.shape[1])
    made = einsum(pattern, shared, "head query key, key head d_head -> query head d_head")
    return largest_error(heads, made)


def _last_token_errors(subject: Subject, tokens: Int[Tensor, "pos"], last: list[Float[Tensor, "head key_pos"]]) -> list[float]:
    """How far scores and pattern that `capture` reads at the last token are from the attention that was used."""
    subject.count(tokens)
    found = capture(subject.model, [Query(tokens)], keep=["query_scores", "own_pattern"])
    errors = []
    for layer, used in enumerate(last):
        errors.append(largest_error(found.own_pattern[0, layer], used, torch.ones(1)))
        own = used[:, 1:]
        share = own / own.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        errors.append(largest_error(softmax_among(found.query_scores[0, layer], own > 0), share, torch.ones(1)))
    return errors


def _has_sinks(subject: Subject) -> bool:
    if not is_bridge(subject.model):
        return bool(subject.model.cfg.use_attention_sinks)
    return any(name.rsplit(".", 1)[-1] in ("sinks", "sink") for name, _ in subject.model.named_parameters())


def heads_through_output(subject: Subject) -> float:
    """`Σ_h head_out[h] · W_O[h] + b_O` against what each attention module puts out, at every token of a prompt."""
    model: Any = subject.model
    tokens = subject.prompts.draw(min(subject.prompts.long, 24), seed=3)
    subject.count(tokens)
    weights = capture(model, [Query(tokens)], keep=["head_out"]).W_O
    seen: list[Tensor] = []
    handles = [block.attn.register_forward_hook(lambda module, given, out: seen.append(first(out))) for block in model.blocks]
    try:
        (heads,) = subject.read(tokens, subject.sites.head_out)
    finally:
        for handle in handles:
            handle.remove()
    errors = []
    for layer, block in enumerate(model.blocks):
        made = einsum(wide(heads[layer]), wide(weights[layer]), "pos head d_head, head d_head d_model -> pos d_model")
        errors.append(largest_error(made + _output_bias(block.attn), seen[layer][0]))
    return worst(errors)


def _output_bias(attention: Any) -> Float[Tensor, "d_model"] | float:
    bias = attention.b_O
    return 0.0 if bias is None else wide(bias.detach())
