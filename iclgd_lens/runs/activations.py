"""What was read from a run: the state of every attention layer at the token that predicts the label.

`Activations` are what `capture` (`runs/capture.py`) returns. They know which model, queries and label words they come from, so that
runs of different ones are not put together by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query, demonstrations_digest
from iclgd_lens.digests import digest_of

AttentionPart = Literal["own_pattern", "own_inputs", "own_values", "score_gradients"]
"""What `update.attribution` reads: attention over a zero-shot prompt's own tokens, and what it is made of."""

Kept = Literal[
    "attn_out",
    "query_scores",
    "context_scores",
    "label_log_probs",
    "lens_logits",
    "residual",
    "head_out",
    "demonstration_out",
    "demonstration_attention",
    "label_attention",
    AttentionPart,
]


@dataclass(frozen=True, eq=False)
class Activations:
    """What `capture` kept, one row per query, in the order of the queries.

    Only what was asked for is there; reading anything else raises an `AttributeError` that says so.

    Attributes:
        kept: The tensors by name; read them through the properties below.
        query_mask: `[query query_pos]`: which score positions are tokens of the query. Queries are right-aligned, BOS left out.
        labels: `[query]`: gold class index, -1 where unknown.
        query_ids: `[query]`: `query_id` of each query; equal for equal queries.
        model: The fingerprint of the model that ran, without any update that was attached.
        label_words: `label_words_digest` of the queries' label words; empty where they have none.
        context: The digest of the demonstrations in front; empty for zero-shot.
        updated: Whether an update was attached.
        output_weights: Every layer's output projection `[head d_head d_model]`, the model's own, in runs that keep one of
            `OF_HEADS`; read the projections through `W_O`.
    """

    kept: dict[str, Tensor]
    query_mask: Bool[Tensor, "query query_pos"]
    labels: Int[Tensor, "query"]
    query_ids: Int[Tensor, "query"]
    model: str
    label_words: str = ""
    context: str = ""
    updated: bool = False
    output_weights: tuple[Float[Tensor, "head d_head d_model"], ...] | None = None

    @property
    def W_O(self) -> tuple[Float[Tensor, "head d_head d_model"], ...]:  # noqa: N802
        """Every layer's output projection; `head_out` times it is what the head adds. Runs that keep one of `OF_HEADS` only."""
        if self.output_weights is None:
            raise AttributeError(
                f"W_O was not kept; capture(..., keep=[..., {OF_HEADS[0]!r}]) keeps it, as do {_listed(OF_HEADS[1:])}"
            )
        return self.output_weights

    @property
    def attn_out(self) -> Float[Tensor, "query layer d_model"]:
        """The attention block's output after the output projection, as it is added to the residual stream: `h` in the paper."""
        return self._get("attn_out")

    @property
    def query_scores(self) -> Float[Tensor, "query layer head query_pos"]:
        """Attention scores before softmax, scaled, from the last token to the query's own tokens: `m` in the paper. Right-aligned;
        0 where `query_mask` is False and where a local window hides a token.
        """
        return self._get("query_scores")

    @property
    def context_scores(self) -> Float[Tensor, "query layer head context_pos"]:
        """Attention scores before softmax, scaled, from the last token to the tokens of the demonstrations and their
        separators, BOS left out; -inf where a local window hides a token. Runs with a context only.
        """
        return self._get("context_scores")

    @property
    def label_log_probs(self) -> Float[Tensor, "query label"]:
        """Mean log-likelihood per token of each label word behind the query, in nats; not normalised over labels."""
        return self._get("label_log_probs")

    @property
    def lens_logits(self) -> Float[Tensor, "query layer label"]:
        """Logit-lens logits of each label word's first token, from the residual stream after every block."""
        return self._get("lens_logits")

    @property
    def residual(self) -> Float[Tensor, "query layer d_model"]:
        """The residual stream after every block."""
        return self._get("residual")

    @property
    def head_out(self) -> Float[Tensor, "query layer head d_head"]:
        """Each head's attended values, before the output projection: `Σⱼ A(q, j) vⱼ` over the whole prompt."""
        return self._get("head_out")

    @property
    def demonstration_out(self) -> Float[Tensor, "query layer head d_head"]:
        """The part of `head_out` that comes from demonstrations and their separators: `λ · o_demo`. Runs with a context only."""
        return self._get("demonstration_out")

    @property
    def demonstration_attention(self) -> Float[Tensor, "query layer head demonstration"]:
        """Attention to each demonstration, summed over its tokens and its separator's; over all demonstrations it sums to λ. Runs
        with a context only.
        """
        return self._get("demonstration_attention")

    @property
    def label_attention(self) -> Float[Tensor, "query layer head demonstration"]:
        """Attention to each demonstration's label tokens. Runs with a context only."""
        return self._get("label_attention")

    @property
    def own_pattern(self) -> Float[Tensor, "query layer head own_pos"]:
        """Attention to the prompt's own tokens, BOS and the query's, right-aligned and 0 before BOS. Zero-shot runs only."""
        return self._get("own_pattern")

    @property
    def own_inputs(self) -> Float[Tensor, "query layer own_pos d_model"]:
        """What the key and value projections multiply at the prompt's own tokens; 0 before BOS. Zero-shot runs only."""
        return self._get("own_inputs")

    @property
    def own_values(self) -> Float[Tensor, "query layer own_pos kv_head d_head"]:
        """The values at the prompt's own tokens; 0 before BOS. Zero-shot runs only."""
        return self._get("own_values")

    @property
    def score_gradients(self) -> Float[Tensor, "query layer own_pos head d_head"]:
        """The gradient of each own token's score with respect to its key, as the key projection puts it out (before any rotation or
        norm); 0 before BOS. Zero-shot runs only; `capture` refuses to keep it where a hook of yours edits values, the pattern or
        heads' output, as contributions could not be told then.
        """
        return self._get("score_gradients")

    @property
    def predictions(self) -> Int[Tensor, "query"]:
        """The class of highest `label_log_probs`."""
        return self.label_log_probs.argmax(dim=-1)

    def with_kept(self, **tensors: Tensor) -> Activations:
        """The same activations with some tensors put in the place of those kept."""
        return replace(self, kept=self.kept | tensors)

    def of(self, rows: slice) -> Activations:
        """The same activations of some of the queries, without a copy."""
        kept = {name: tensor[rows] for name, tensor in self.kept.items()}
        mask, labels, ids = (each[rows] for each in (self.query_mask, self.labels, self.query_ids))
        return replace(self, kept=kept, query_mask=mask, labels=labels, query_ids=ids)

    def _get(self, name: Kept) -> Tensor:
        if name not in self.kept:
            raise AttributeError(
                f"{name} was not kept; capture(..., keep=[..., {name!r}]) keeps it"
                + (" in a run with a context" if name in OF_CONTEXT else "")
            )
        return self.kept[name]


OF_CONTEXT: tuple[Kept, ...] = ("context_scores", "demonstration_out", "demonstration_attention", "label_attention")
"""What only a run with a context has."""

OF_HEADS: tuple[Kept, ...] = ("head_out", "demonstration_out", "own_pattern", "own_values", "score_gradients")
"""What is read head by head, before the output projection; it is of use together with `W_O`."""


def query_id(query: Query) -> int:
    """Tell queries apart by their tokens and gold label: 63 bits of a SHA-256, the same in every process."""
    label = None if query.label is None else int(query.label)
    return int(digest_of([query.tokens.tolist(), label]), 16) >> 1


def label_words_digest(label_tokens: Sequence[Int[Tensor, "_label_pos"]]) -> str:
    """Tell label words apart, in 16 hex digits: equal for equal tokens in equal order; empty where there are none."""
    return digest_of([tokens.tolist() for tokens in label_tokens]) if len(label_tokens) else ""


def require_same_queries(*runs: Activations) -> None:
    """Check that runs are of the same queries, in the same order.

    Raises:
        ValueError: If they are not.
    """
    first = runs[0].query_ids
    for run in runs[1:]:
        if len(run.query_ids) != len(first):
            raise ValueError(f"the runs are not of the same queries: one has {len(first)} of them, another {len(run.query_ids)}")
        if not torch.equal(run.query_ids.to(first.device), first):
            number = int((run.query_ids.to(first.device) != first).nonzero()[0, 0])
            raise ValueError(f"the runs are not of the same queries: they differ from query {number} on (counted from 0)")


def require_same_labels(*runs: Activations) -> None:
    """Check that runs are of the same queries, scored on the same label words in the same order.

    Raises:
        ValueError: If they are not.
    """
    require_same_queries(*runs)
    if any(run.label_words != runs[0].label_words for run in runs[1:]):
        raise ValueError(
            "the runs have other label words, or the same in another order, so class 0 of one is not class 0 of another; capture "
            "them with queries of the same label_tokens"
        )


def require_zero_shot(**runs: Activations) -> None:
    """Check that runs are zero-shot runs of the model as it is.

    Raises:
        ValueError: If one had demonstrations in its context, or an update was attached.
    """
    for name, run in runs.items():
        if run.context:
            raise ValueError(
                f"{name} is a run with demonstrations in its context, and must be zero-shot: capture it without context="
            )
    require_not_updated(**runs)


def require_not_updated(**runs: Activations) -> None:
    """Check that runs are of the model as it is.

    Raises:
        ValueError: If an update was attached in one.
    """
    for name, run in runs.items():
        if run.updated:
            raise ValueError(f"{name} is a run under an update; this is about the model as it is: capture it without update=")


def require_context(run: Activations, demonstrations: Sequence[Demonstration]) -> None:
    """Check that a run had these demonstrations in front.

    Raises:
        ValueError: If it had others, or none.
    """
    if run.context != demonstrations_digest(demonstrations):
        had = "no demonstrations" if not run.context else "other demonstrations, or in another order,"
        raise ValueError(f"the run had {had} in its context; pass the demonstrations that it ran with")


def require_same_runs(*runs: Activations) -> None:
    """Check that runs are of the same queries on the same model.

    Raises:
        ValueError: If they are not.
    """
    require_same_queries(*runs)
    if models := {run.model for run in runs[1:]} - {runs[0].model}:
        raise ValueError(f"the runs are not of the same model: one has the fingerprint {runs[0].model}, another {models.pop()}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))
