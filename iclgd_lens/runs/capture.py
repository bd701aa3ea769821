"""Running queries and reading every attention layer at the token that predicts the label.

One function serves the three runs of the paper (Deutch et al. 2024, section 3.1): zero-shot (no context, no update),
in-context (`context=`) and finetuned (`update=`). All are read at the last token of the query.

>>> from iclgd_lens.data.registry import load_task
>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> episode = load_task("bundled/remapped").episode(model, k=12, n_queries=8, seed=0)
>>> icl = capture(model, episode.queries, context=episode.demonstrations)
>>> list(icl.attn_out.shape)
[8, 4, 64]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from iclgd_lens.checks import require_count
from iclgd_lens.data.episodes import require_fit, require_known_tokens, window_note
from iclgd_lens.data.prompts import ContextLayout, Demonstration, Query, context_tokens, demonstrations_digest
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.sites import HookSites, sites_of
from iclgd_lens.models.surroundings import ordinary_modes
from iclgd_lens.runs.activations import (
    OF_CONTEXT,
    OF_HEADS,
    Activations,
    AttentionPart,
    Kept,
    label_words_digest,
    query_id,
)
from iclgd_lens.runs.passes import passes
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.runs.reader import Reader

ATTENTION: tuple[Kept, ...] = get_args(AttentionPart)
"""What `update.attribution` reads, for `capture(..., keep=[..., *ATTENTION])` in a zero-shot run."""

DEFAULT: tuple[Kept, ...] = ("attn_out", "query_scores", "context_scores", "label_log_probs", "lens_logits")
"""What `capture` keeps if it is not told, as far as the run has it."""

_OF_LABELS: tuple[Kept, ...] = ("label_log_probs", "lens_logits")


class Attachable(Protocol):
    """Anything that can be put on a model by hooks for the time of a run, as a `ParameterUpdate` can."""

    def attached(self, model: HookedModel) -> Any:
        """Return a context manager under which the model runs with the hooks on."""


def capture(
    model: HookedModel,
    queries: Sequence[Query],
    *,
    context: Sequence[Demonstration] | None = None,
    update: Attachable | None = None,
    keep: Sequence[Kept] | None = None,
    batch_size: int | None = None,
) -> Activations:
    """Run queries and read every attention layer at each query's last token.

    The results are those of every prompt run whole and by itself. Where nobody can tell, the context, or BOS alone, runs once, and
    the queries run after its cached keys and values, in batches of similar length (`runs/passes.py`). Hooks that are already on the
    model act, and see every prompt whole, one by one, in the order of `queries`; a label word of several tokens takes a further
    pass over the prompt and the word. Label words are read out from the residual stream (`models/readout.py`), so hooks on the
    final norm and the unembedding are not seen.

    Kept are, for every query and layer: `d_model` numbers each for `attn_out`, `residual`, `head_out` and `demonstration_out`;
    `heads` times the query's length, the context's length or the number of demonstrations for scores and attention to these; and
    for the parts of `ATTENTION` together the query's length times `3 d_model + heads` (`capture_batches` bounds that). While a
    batch runs, attention itself holds `batch × heads × query length × prompt length` for one layer, and `heads × context length²`
    while the context runs.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`, with or without hooks of your own on it.
        queries: What to run; all with the same label words, or none.
        context: Demonstrations to put in front of every query; None for zero-shot.
        update: A `ParameterUpdate` to attach while running, to the context's tokens too.
        keep: Which fields of `Activations` to fill. By default those of `DEFAULT` that the run has: `context_scores` needs a
            context, `label_log_probs` and `lens_logits` need label words.
        batch_size: How many queries run at once at most; by default so many that a layer holds about `WORKING_BYTES` for them. It
            changes memory and time, not the result.

    Raises:
        TypeError: If the model is neither a `HookedTransformer` nor a `TransformerBridge`.
        ValueError: If there are no queries, their label words differ or are missing though asked for, the context is empty,
            begins with another BOS than the queries, or makes a prompt longer than the context window; if a token is not in the
            model's vocabulary; if `keep` names an unknown field or one that the run does not have; if `score_gradients` is to be
            kept and a hook edits something between the value projection and heads' output; or if the update belongs to another
            model.
        RuntimeError: If another thread is capturing this model, or has an update attached to it.
    """
    request = _Request.of(model, queries, context, keep, batch_size)
    with request.running(update):
        prefix = request.prefix()
        reader = request.reader(prefix, range(len(request.queries)))
        request.fill(reader, prefix)
    return request.activations(reader, slice(None), updated=update is not None)


def capture_batches(
    model: HookedModel,
    queries: Sequence[Query],
    *,
    context: Sequence[Demonstration] | None = None,
    keep: Sequence[Kept] | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[Int[Tensor, "batch"], Activations]]:
    """Capture queries batch by batch, so that no more is held than one batch of what is kept.

    Batches depend on the queries and their number alone, so captures of the same queries with and without a context go in step and
    can be zipped. The context runs once. Arguments and errors are those of `capture`.

    Yields:
        The rows of a batch, as indices into `queries`, and its activations.
    """
    request = _Request.of(model, queries, context, keep, batch_size)
    with request.running():
        prefix = request.prefix()
    lengths = [len(query.tokens) for query in request.queries]
    # In the order given where a user's hooks are on, and by length otherwise, so that few batches split into several passes.
    order = list(range(len(lengths)))
    if not request.sites.what_tells_prompts_apart():
        order.sort(key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        rows = torch.tensor(order[start : start + batch_size])
        with request.running():
            reader = request.reader(prefix, rows.tolist())
            request.fill(reader, prefix)
        yield rows, request.activations(reader, rows)


@dataclass(frozen=True, eq=False)
class _Request:
    """A checked request to capture something."""

    sites: HookSites
    queries: Sequence[Query]
    context: Sequence[Demonstration] | None
    wanted: tuple[Kept, ...]
    batch_size: int | None

    @classmethod
    def of(
        cls,
        model: HookedModel,
        queries: Sequence[Query],
        context: Sequence[Demonstration] | None,
        keep: Sequence[Kept] | None,
        batch_size: int | None,
    ) -> _Request:
        queries, context = tuple(queries), None if context is None else tuple(context)
        sites = sites_of(model)
        label_tokens = _common_label_tokens(queries)
        if batch_size is not None:
            require_count("batch_size", batch_size)
        bos = queries[0].tokens[0] if context is None else context_tokens(context)[0]
        if any(query.tokens[0] != bos for query in queries):
            raise ValueError("queries and demonstrations must all begin with the same BOS token")
        require_known_tokens([*(context or ()), *queries], model.cfg.d_vocab)
        require_fit(context or (), queries, model.cfg.n_ctx, window_note(model))
        wanted = _wanted(keep, has_context=context is not None, has_labels=bool(label_tokens))
        if set(wanted) & {"own_values", "score_gradients"}:
            sites.require_separate_heads()
        if "score_gradients" in wanted:
            sites.require_trainable()
        return cls(sites, queries, context, wanted, batch_size)

    @contextmanager
    def running(self, update: Attachable | None = None) -> Iterator[None]:
        """Run within: without gradients but for those that are wanted, and with the update attached."""
        with ordinary_modes(), nullcontext() if update is None else update.attached(self.sites.model):
            yield

    @property
    def runs_whole(self) -> bool:
        """Whether prompts run whole, as what is kept of their own tokens includes BOS."""
        return bool(set(self.wanted) & set(ATTENTION))

    def prefix(self) -> Prefix:
        """Run what all prompts begin with."""
        if self.runs_whole:
            return Prefix.empty(self.sites)
        tokens = self.queries[0].tokens[:1] if self.context is None else context_tokens(self.context)
        return (Prefix.unrun if self.sites.what_tells_prompts_apart() else Prefix.run)(self.sites, tokens)

    def fill(self, reader: Reader, prefix: Prefix) -> None:
        """Run the prompts of a reader, in as many passes as they need."""
        n_after = max((len(tokens) - 1 for tokens in reader.label_tokens), default=0) if "label_log_probs" in self.wanted else 0
        for found in passes(
            self.sites,
            [len(body) for body in reader.bodies],
            prefix.length,
            cached=prefix.cache is not None,
            n_after=n_after,
            batch_size=self.batch_size,
        ):
            reader.read(found.rows, prefix.whole() if found.whole else prefix)

    def reader(self, prefix: Prefix, rows: Sequence[int]) -> Reader:
        """Make buffers for some of the queries."""
        bodies = [self.queries[row].tokens[min(prefix.length, 1) :] for row in rows]
        layout = None if self.context is None else ContextLayout.of(self.context)
        return Reader(self.sites, prefix, self.wanted, bodies, self.queries[0].label_tokens, layout)

    def activations(self, reader: Reader, rows: Int[Tensor, "batch"] | slice, updated: bool = False) -> Activations:
        """What a reader of these rows has read."""
        device = self.sites.model.cfg.device
        labels = torch.tensor([-1 if query.label is None else query.label for query in self.queries])
        ids = torch.tensor([query_id(query) for query in self.queries])
        return Activations(
            kept=reader.kept,
            query_mask=reader.query_mask,
            labels=labels[rows].to(device),
            query_ids=ids[rows].to(device),
            model=fingerprint(self.sites.model),
            label_words=label_words_digest(self.queries[0].label_tokens),
            context="" if self.context is None else demonstrations_digest(self.context),
            updated=updated,
            output_weights=self.sites.output_weights if set(self.wanted) & set(OF_HEADS) else None,
        )


def _wanted(keep: Iterable[Kept] | None, *, has_context: bool, has_labels: bool) -> tuple[Kept, ...]:
    impossible: dict[Kept, str] = {}
    if not has_context:
        impossible |= dict.fromkeys(OF_CONTEXT, "there is no context")
    else:
        impossible |= dict.fromkeys(ATTENTION, "it is read in runs without a context")
    if not has_labels:
        impossible |= dict.fromkeys(_OF_LABELS, "the queries have no label words")
    if keep is None:
        return tuple(name for name in DEFAULT if name not in impossible)
    names: tuple[Kept, ...] = tuple(keep)
    known = [*get_args(Kept)]
    for name in names:
        if name not in known:
            raise ValueError(f"keep may name {', '.join(known)}; got {name!r}")
        if name in impossible:
            raise ValueError(f"keep names {name!r}, but {impossible[name]}")
    return names


def _common_label_tokens(queries: Sequence[Query]) -> tuple[Int[Tensor, "_label_pos"], ...]:
    if not queries:
        raise ValueError("no queries: capture needs at least one")
    first = [tokens.tolist() for tokens in queries[0].label_tokens]
    for number, query in enumerate(queries):
        if query.label_tokens is not queries[0].label_tokens and [t.tolist() for t in query.label_tokens] != first:
            raise ValueError(f"query {number} has other label words than query 0; capture them apart")
    return queries[0].label_tokens
