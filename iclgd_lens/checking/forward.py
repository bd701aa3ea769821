"""What a run computes: outputs, captures, attention, and what heads add."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, repeat
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checking.plain import first
from iclgd_lens.checking.prompts import LABEL_WORDS
from iclgd_lens.checking.whole import Subject, largest_error, log_probs, prompt_of, worst
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.models.hooked import is_bridge
from iclgd_lens.models.precision import wide
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import capture

READ = 16
"""At how many tokens at the end of a long prompt outputs are compared."""


def short_outputs(subject: Subject) -> float:
    """Log-probabilities at every token of short prompts: read out by the package, and of the plain model."""
    return worst([_output_error(subject, subject.prompts.draw(length, seed=length)) for length in subject.prompts.short])


def long_outputs(subject: Subject) -> float:
    """Log-probabilities at the last tokens of a prompt that is longer than every length at which something changes."""
    return _output_error(subject, subject.prompts.draw(subject.prompts.long, seed=1))


def _output_error(subject: Subject, tokens: Int[Tensor, "pos"]) -> float:
    last = min(READ, len(tokens))
    ((residual,),) = subject.read(tokens, subject.sites.residual_out[-1:])
    theirs = log_probs(subject.plain_logits(tokens, last))
    return largest_error(subject.read_out(residual[-last:]), theirs)


def cached_captures(subject: Subject) -> float:
    """Captures one query at a time, after BOS and after demonstrations that ran once, against whole prompts."""
    return worst([_capture_error(subject, *setting, batch_size=1) for setting in settings(subject)])


def batched_captures(subject: Subject) -> float:
    """Captures of all queries at once, padded to the longest, against whole prompts."""
    return worst([_capture_error(subject, *setting, batch_size=len(setting[0])) for setting in settings(subject)])


def settings(subject: Subject) -> list[tuple[list[Query], list[Demonstration] | None]]:
    """Queries of unequal lengths, without demonstrations and after them; and so that some prompts end before a length at which
    something changes and some after.
    """
    prompts = subject.prompts
    room = prompts.n_ctx - max(LABEL_WORDS)
    own = [length for length in (5, 2, 9, 3) if length <= room]
    found: list[tuple[list[Query], list[Demonstration] | None]] = [(prompts.queries(own, seed=10), None)]
    contexts = {min(24, room - max(own)), *(length - 4 for length in {*prompts.changes[:1], *prompts.changes[-1:]})}
    for length in sorted(contexts):
        if 3 <= length <= room - max(own):
            found.append((prompts.queries(own, seed=20), prompts.demonstrations(length, seed=30)))
    for length in prompts.changes[:1]:
        crossing = [max(2, length - 2), 2, length + 3]
        if max(crossing) <= room:
            found.append((prompts.queries(crossing, seed=40), None))
    return found


def _capture_error(subject: Subject, queries: list[Query], context: list[Demonstration] | None, *, batch_size: int) -> float:
    keep = ["attn_out", "query_scores", "label_log_probs", *([] if context is None else ["context_scores"])]
    before = 1 if context is None else len(context_tokens(context))
    subject.count(*(query.tokens for query in queries))
    subject.longest = max(subject.longest, before + max(len(query.tokens) for query in queries))
    subject.tokens += before
    found = capture(subject.model, queries, context=context, keep=keep, batch_size=batch_size)  # type: ignore[arg-type]
    return worst([_row_error(subject, found, row, query, context, before) for row, query in enumerate(queries)])


def _row_error(
    subject: Subject, found: Activations, row: int, query: Query, context: Sequence[Demonstration] | None, before: int
) -> float:
    """How far one query's capture is from its whole prompt on the hooked model, under the hooks that are on it."""
    sites, prompt = subject.sites, prompt_of(query, context)
    added, scores, residual = subject.read(prompt, sites.attention_out, subject.score_places, sites.residual_out[-1:])
    errors = [largest_error(found.attn_out[row, layer], out[-1]) for layer, out in enumerate(added)]
    patterns = [] if scores else _plain_patterns(subject, prompt)
    n_own = len(query.tokens) - 1
    for layer in range(sites.n_layers):
        ours = [found.query_scores[row, layer, :, -n_own:]]
        if context is not None:
            ours.insert(0, found.context_scores[row, layer])
        mine = torch.cat(ours, dim=-1)
        if scores:
            seen = visible(scores[layer][:, -1])[:, 1:]
            errors.append(largest_error(mine.masked_fill(mine.isinf() | seen.isinf(), 0.0), seen.masked_fill(seen.isinf(), 0.0)))
        elif patterns:
            seen = wide(patterns[layer][:, -1, 1:])
            errors.append(largest_error(_softmax(mine, seen > 0), seen / seen.sum(dim=-1, keepdim=True)))
    reference = [_word_log_prob(subject, prompt, word, residual[0][-1]) for word in query.label_tokens]
    errors.append(largest_error(found.label_log_probs[row], torch.stack(reference)))
    return worst(errors)


def _word_log_prob(
    subject: Subject, prompt: Int[Tensor, "pos"], word: Int[Tensor, "label_pos"], last: Float[Tensor, "d_model"]
) -> Float[Tensor, ""]:
    """Mean log-likelihood per token of a label word after a whole prompt."""
    rows = last[None]
    if len(word) > 1:
        ((residual,),) = subject.read(torch.cat([prompt, word[:-1]]), subject.sites.residual_out[-1:])
        rows = residual[-len(word) :]
    return subject.read_out(rows).gather(-1, word[:, None].to(rows.device)).mean()


def visible(scores: Float[Tensor, "*batch key_pos"]) -> Float[Tensor, "*batch key_pos"]:
    """Scores with −inf where they are masked: Hugging Face masks by the least finite number."""
    return wide(scores).masked_fill(scores <= torch.finfo(scores.dtype).min / 2, -torch.inf)


def _softmax(
    scores: Float[Tensor, "head key_pos"], seen: Float[Tensor, "head key_pos"] | Tensor
) -> Float[Tensor, "head key_pos"]:
    """Attention among the tokens that are seen. Where no token of a head is, all zeros."""
    return wide(scores).masked_fill(~seen, -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def _plain_patterns(subject: Subject, tokens: Int[Tensor, "pos"]) -> list[Float[Tensor, "head query_pos key_pos"]]:
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
    """Scores, pattern and heads' outputs at every token: `softmax(scores) = pattern`, 0 at later tokens, rows that sum to 1 (at most
    1 with attention sinks), `pattern · values = heads' outputs`; the plain model's attention weights, and those that `capture` reads.
    """
    sites, tokens = subject.sites, subject.prompts.draw(min(subject.prompts.long, MOST_FOR_PATTERNS), seed=2)
    scores, patterns, values, heads = subject.read(tokens, subject.score_places, sites.pattern, sites.values, sites.head_out)
    theirs = _plain_patterns(subject, tokens)
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
        errors.append(largest_error(_softmax(found.query_scores[0, layer], own > 0), share, torch.ones(1)))
    return errors


def _has_sinks(subject: Subject) -> bool:
    if not is_bridge(subject.model):
        return bool(subject.model.cfg.use_attention_sinks)
    return any(name.rsplit(".", 1)[-1] in ("sinks", "sink") for name, _ in subject.model.named_parameters())


def heads_through_output(subject: Subject) -> float:
    """`Σ_h head_out[h] · W_O[h] + b_O` against what each attention module puts out, at the last token of a prompt."""
    model, tokens = subject.model, subject.prompts.draw(min(subject.prompts.long, 24), seed=3)
    subject.count(tokens)
    found = capture(model, [Query(tokens)], keep=["head_out"])
    blocks = model.blocks  # type: ignore[attr-defined]
    seen: list[Tensor] = []
    handles = [block.attn.register_forward_hook(lambda module, given, out: seen.append(first(out))) for block in blocks]
    try:
        subject.run(tokens, [])
    finally:
        for handle in handles:
            handle.remove()
    errors = []
    for layer, block in enumerate(blocks):
        made = einsum(wide(found.head_out[0, layer]), wide(found.W_O[layer]), "head d_head, head d_head d_model -> d_model")
        errors.append(largest_error(made + _output_bias(subject, block.attn), seen[layer][0, -1]))
    return worst(errors)


def _output_bias(subject: Subject, attention: torch.nn.Module) -> Float[Tensor, "d_model"] | float:
    if not is_bridge(subject.model):
        return wide(attention.b_O.detach())  # type: ignore[arg-type]
    bias = attention.b_O
    return 0.0 if bias is None else wide(bias.detach())  # type: ignore[operator]
