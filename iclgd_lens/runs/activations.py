"""What is read from a run: the state of every attention layer at the token that predicts the label.

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

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.data.episodes import require_fit, require_known_tokens
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.models.precision import wide, wide_dtype
from iclgd_lens.models.readout import read_out
from iclgd_lens.models.sites import HookSites, NamedHook
from iclgd_lens.runs.prefix import Prefix

Kept = Literal["attn_out", "query_scores", "context_scores", "label_log_probs", "lens_logits"]


class Attachable(Protocol):
    """Anything that can be put on a model by hooks for the time of a run, as a `ParameterUpdate` can."""

    def attached(self, model: HookedTransformer) -> Any:
        """Return a context manager under which the model runs with the hooks on."""


@dataclass(frozen=True, eq=False)
class Activations:
    """What `capture` kept, one row per query, in the order of the queries.

    Only what was asked for is there; reading anything else raises an `AttributeError` that says so.

    Attributes:
        kept: The tensors by name; read them through the properties below.
        query_mask: `[query query_pos]`: which score positions are tokens of the query. Queries are right-aligned, BOS left out.
        labels: `[query]`: gold class index, -1 where unknown.
    """

    kept: dict[str, Tensor]
    query_mask: Bool[Tensor, "query query_pos"]
    labels: Int[Tensor, "query"]

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
    def predictions(self) -> Int[Tensor, "query"]:
        """The class of highest `label_log_probs`."""
        return self.label_log_probs.argmax(dim=-1)

    def with_kept(self, **tensors: Tensor) -> Activations:
        """The same activations with some tensors put in the place of those kept."""
        return replace(self, kept=self.kept | tensors)

    def of(self, rows: slice) -> Activations:
        """The same activations of some of the queries, without a copy."""
        kept = {name: tensor[rows] for name, tensor in self.kept.items()}
        return Activations(kept, self.query_mask[rows], self.labels[rows])

    def _get(self, name: Kept) -> Tensor:
        if name not in self.kept:
            raise AttributeError(
                f"{name} was not kept; capture(..., keep=[..., {name!r}]) keeps it"
                + (" in a run with a context" if name == "context_scores" else "")
            )
        return self.kept[name]


def capture(
    model: HookedTransformer,
    queries: Sequence[Query],
    *,
    context: Sequence[Demonstration] | None = None,
    update: Attachable | None = None,
    keep: Sequence[Kept] | None = None,
    batch_size: int = 32,
) -> Activations:
    """Run queries and read every attention layer at each query's last token.

    The context, or BOS alone, runs once; the queries run behind its cached keys and values, in batches of similar length, padded
    on the left. Hooks that are already on the model act in every run; but label words are read out from the residual stream
    (`models/readout.py`), so hooks on the final norm and the unembedding are not seen. Kept are `queries × layers × d_model`
    numbers for `attn_out`, `queries × layers × heads × query length` for `query_scores` and `queries × layers × heads × context
    length` for `context_scores`. While a batch runs, attention itself holds `batch × heads × query length × prompt length` for
    one layer, and `heads × context length²` while the context runs.

    Args:
        model: A `HookedTransformer`, with or without hooks of your own on it.
        queries: What to run; all with the same label words, or none.
        context: Demonstrations to put in front of every query; None for zero-shot.
        update: A `ParameterUpdate` to attach while running, to the context's tokens too.
        keep: Which fields of `Activations` to fill. By default all that the run has: `context_scores` needs a context,
            `label_log_probs` and `lens_logits` need label words.
        batch_size: How many queries run at once. It changes memory and time, not the result.

    Raises:
        ValueError: If there are no queries, their label words differ or are missing though asked for, the context is empty,
            begins with another BOS than the queries, or makes a prompt longer than the context window; if a token is not in the
            model's vocabulary; if `keep` names an
            unknown field; or if the update belongs to another model.
    """
    sites = HookSites.of(model)
    label_tokens = _common_label_tokens(queries)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    prefix_tokens = queries[0].tokens[:1] if context is None else context_tokens(context)
    if any(query.tokens[0] != prefix_tokens[0] for query in queries):
        raise ValueError("queries and demonstrations must all begin with the same BOS token")
    require_known_tokens([*(context or ()), *queries], model.cfg.d_vocab)
    require_fit(context or (), queries, model.cfg.n_ctx)
    wanted = _wanted(keep, has_context=context is not None, has_labels=bool(label_tokens))

    with torch.no_grad(), nullcontext() if update is None else update.attached(model):
        prefix = Prefix.run(model, prefix_tokens)
        bodies = [query.tokens[1:] for query in queries]
        reader = _Reader(sites, prefix, wanted, bodies, label_tokens)
        for rows in _batches(bodies, batch_size, sites.exchangeable_padding):
            reader.read(rows)
    return Activations(
        reader.kept,
        reader.query_mask,
        torch.tensor([-1 if query.label is None else query.label for query in queries], device=model.cfg.device),
    )


class _Reader:
    """The buffers that a capture fills, batch by batch."""

    def __init__(
        self,
        sites: HookSites,
        prefix: Prefix,
        wanted: Sequence[Kept],
        bodies: list[Int[Tensor, "pos"]],
        label_tokens: tuple[Int[Tensor, "label_pos"], ...],
    ) -> None:
        cfg, n, longest = sites.model.cfg, len(bodies), max(map(len, bodies))
        self.sites, self.prefix, self.bodies = sites, prefix, bodies
        self.label_tokens = tuple(tokens.to(cfg.device) for tokens in label_tokens)
        shapes = {
            "attn_out": (n, sites.n_layers, cfg.d_model),
            "query_scores": (n, sites.n_layers, cfg.n_heads, longest),
            "context_scores": (n, sites.n_layers, cfg.n_heads, prefix.length - 1),
            "label_log_probs": (n, len(label_tokens)),
            "lens_logits": (n, sites.n_layers, len(label_tokens)),
        }
        # Sums of log-likelihoods are kept as they were made; the rest in the model's dtype.
        dtypes = {"label_log_probs": wide_dtype(cfg.dtype)}
        self.kept: dict[str, Tensor] = {
            name: torch.zeros(shapes[name], dtype=dtypes.get(name, cfg.dtype), device=cfg.device) for name in wanted
        }
        lengths = torch.tensor([len(body) for body in bodies], device=cfg.device)
        self.query_mask = torch.arange(longest, device=cfg.device) >= longest - lengths[:, None]

    def read(self, rows: Int[Tensor, "batch"]) -> None:
        """Run one batch of queries and keep what is wanted of it."""
        bodies = [self.bodies[row] for row in rows.tolist()]
        width = max(map(len, bodies))
        final: list[Float[Tensor, "batch d_model"]] = []
        hooks: list[NamedHook] = []
        for layer in range(self.sites.n_layers):
            if "attn_out" in self.kept:
                hooks.append((self.sites.attention_out[layer], self._keep_attention_out(rows, layer)))
            if self.kept.keys() & {"query_scores", "context_scores"}:
                hooks.append((self.sites.scores[layer], self._keep_scores(rows, layer, width)))
            if "lens_logits" in self.kept:
                hooks.append((self.sites.residual_out[layer], self._keep_lens_logits(rows, layer)))
        if "label_log_probs" in self.kept:
            hooks.append((self.sites.residual_out[-1], lambda residual, hook: final.append(residual[:, -1])))
        self.prefix.continue_with(bodies, hooks)
        if final:
            self.kept["label_log_probs"][rows] = self._score_labels(bodies, final[0])

    def _keep_attention_out(self, rows: Int[Tensor, "batch"], layer: int) -> Callable[..., None]:
        def keep(attention_out: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            self.kept["attn_out"][rows, layer] = attention_out[:, -1]

        return keep

    def _keep_scores(self, rows: Int[Tensor, "batch"], layer: int, width: int) -> Callable[..., None]:
        def keep(scores: Float[Tensor, "batch head query_pos key_pos"], hook: Any) -> None:
            last = scores[:, :, -1]
            if "query_scores" in self.kept:
                own = last[:, :, -width:]
                self.kept["query_scores"][rows, layer, :, -width:] = own.masked_fill(own == -torch.inf, 0.0)
            if "context_scores" in self.kept:
                self.kept["context_scores"][rows, layer] = last[:, :, 1 : self.prefix.length]

        return keep

    def _keep_lens_logits(self, rows: Int[Tensor, "batch"], layer: int) -> Callable[..., None]:
        first = torch.stack([tokens[0] for tokens in self.label_tokens])

        def keep(residual: Float[Tensor, "batch pos d_model"], hook: Any) -> None:
            self.kept["lens_logits"][rows, layer] = read_out(self.sites.model, residual[:, -1], first)

        return keep

    def _score_labels(
        self, bodies: list[Int[Tensor, "pos"]], final: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch label"]:
        """Mean log-likelihood of every label word's tokens; a word's later tokens are read behind its earlier ones."""
        first = self._log_probs(final)
        return torch.stack(
            [
                (first[:, tokens[0]] + self._rest_log_prob(bodies, tokens)) / len(tokens)
                if len(tokens) > 1
                else first[:, tokens[0]]
                for tokens in self.label_tokens
            ],
            dim=-1,
        )

    def _rest_log_prob(self, bodies: list[Int[Tensor, "pos"]], tokens: Int[Tensor, "label_pos"]) -> Float[Tensor, "batch"]:
        """Summed log-likelihood of a label word's tokens after the first."""
        seen: list[Float[Tensor, "batch label_pos d_model"]] = []
        n_rest = len(tokens) - 1
        keep_last = (self.sites.residual_out[-1], lambda residual, hook: seen.append(residual[:, -n_rest:]))
        self.prefix.continue_with([torch.cat([body, tokens[:-1].to(body.device)]) for body in bodies], [keep_last])
        log_probs = self._log_probs(seen[0])
        targets = tokens[1:].expand(len(bodies), -1)
        return log_probs.gather(-1, targets[..., None]).squeeze(-1).sum(-1)

    def _log_probs(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        return wide(read_out(self.sites.model, residual)).log_softmax(dim=-1)


def _wanted(keep: Sequence[Kept] | None, *, has_context: bool, has_labels: bool) -> tuple[Kept, ...]:
    impossible = {
        "context_scores": None if has_context else "there is no context",
        "label_log_probs": None if has_labels else "the queries have no label words",
        "lens_logits": None if has_labels else "the queries have no label words",
    }
    if keep is None:
        return tuple(name for name in get_args(Kept) if impossible.get(name) is None)
    for name in keep:
        if name not in get_args(Kept):
            raise ValueError(f"keep may name {', '.join(get_args(Kept))}; got {name!r}")
        if impossible.get(name) is not None:
            raise ValueError(f"keep names {name!r}, but {impossible[name]}")
    return tuple(keep)


def _common_label_tokens(queries: Sequence[Query]) -> tuple[Int[Tensor, "label_pos"], ...]:
    if not queries:
        raise ValueError("no queries: capture needs at least one")
    first = [tokens.tolist() for tokens in queries[0].label_tokens]
    for number, query in enumerate(queries):
        if query.label_tokens is not queries[0].label_tokens and [t.tolist() for t in query.label_tokens] != first:
            raise ValueError(f"query {number} has other label words than query 0; capture them apart")
    return queries[0].label_tokens


def _batches(bodies: list[Int[Tensor, "pos"]], batch_size: int, exchangeable_padding: bool) -> Iterator[Int[Tensor, "batch"]]:
    """Split rows into batches of similar length, or of equal length where padding would change attention."""
    order = sorted(range(len(bodies)), key=lambda row: len(bodies[row]))
    groups = [order] if exchangeable_padding else [list(g) for _, g in groupby(order, key=lambda row: len(bodies[row]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield torch.tensor(group[start : start + batch_size])
