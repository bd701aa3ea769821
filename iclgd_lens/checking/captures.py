"""Captures, whose prompts share a prefix and are padded, against whole prompts on the hooked model, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checking.attention import plain_patterns, softmax_among, visible
from iclgd_lens.checking.prompts import LABEL_WORDS
from iclgd_lens.checking.whole import Subject, largest_error, prompt_of, worst
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.models.precision import wide
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import capture


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
    own = [length for length in (5, 2, 9) if length <= room]
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
    keep = ["attn_out", "head_out", "query_scores", "label_log_probs", *([] if context is None else ["context_scores"])]
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
    prompt = prompt_of(query, context)
    key = (*prompt.tolist(), *(tuple(word.tolist()) for word in query.label_tokens))
    added, heads, attention, label_log_probs = subject.once(key, lambda: _whole_run(subject, prompt, query))
    errors = [largest_error(found.attn_out[row, layer], out) for layer, out in enumerate(added)]
    errors += [largest_error(found.head_out[row, layer], out) for layer, out in enumerate(heads)]
    n_own = len(query.tokens) - 1
    for layer, used in enumerate(attention):
        ours = [] if context is None else [found.context_scores[row, layer]]
        errors.append(_scores_error(subject, torch.cat([*ours, found.query_scores[row, layer, :, -n_own:]], dim=-1), used[:, 1:]))
    return worst([*errors, largest_error(found.label_log_probs[row], label_log_probs)])


def _whole_run(subject: Subject, prompt: Int[Tensor, "pos"], query: Query) -> tuple[Any, ...]:
    """At the last token of a whole prompt, by layer: attention outputs, heads' outputs, and scores, or where the model shows none
    the plain model's attention weights; and the log-likelihoods of label words.
    """
    sites = subject.sites
    places = (sites.attention_out, sites.head_out, subject.score_places, sites.residual_out[-1:])
    added, heads, scores, (residual,) = subject.read(prompt, *places)
    attention = scores or plain_patterns(subject, prompt)
    labels = [_word_log_prob(subject, prompt, word, residual[-1]) for word in query.label_tokens]
    return [out[-1] for out in added], [out[-1] for out in heads], [each[:, -1] for each in attention], torch.stack(labels)


def _scores_error(subject: Subject, ours: Float[Tensor, "head key_pos"], used: Float[Tensor, "head key_pos"]) -> float:
    """How far scores are from the hooked model's, or where it shows none, their softmax from the plain model's attention."""
    if subject.score_places:
        theirs = visible(used)
        # What is hidden is −inf in a context, and 0 among a query's own tokens.
        return largest_error(ours.masked_fill(theirs.isinf() & ours.isinf(), 0.0), theirs.masked_fill(theirs.isinf(), 0.0))
    share = wide(used) / wide(used).sum(dim=-1, keepdim=True)
    return largest_error(softmax_among(ours, used > 0), share)


def _word_log_prob(
    subject: Subject, prompt: Int[Tensor, "pos"], word: Int[Tensor, "label_pos"], last: Float[Tensor, "d_model"]
) -> Float[Tensor, ""]:
    """Mean log-likelihood per token of a label word after a whole prompt; where rotary frequencies are others for the prompt with
    the word than for the prompt, of the two run as one sequence.
    """
    top, sites = subject.sites.residual_out[-1:], subject.sites
    rows = last[None]
    if sites.frequencies_at(len(prompt)) != sites.frequencies_at(len(prompt) + len(word)):
        ((residual,),) = subject.read(torch.cat([prompt, word]), top)
        rows = residual[-len(word) - 1 : -1]
    elif len(word) > 1:
        ((residual,),) = subject.read(torch.cat([prompt, word[:-1]]), top)
        rows = torch.cat([rows, residual[1 - len(word) :]])
    return subject.read_out(rows).gather(-1, word[:, None].to(rows.device)).mean()
