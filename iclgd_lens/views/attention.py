"""Attention to look at: what ICL and updates weigh in the demonstrations, whole patterns, and heads that an update changed most.

Every function returns a CircuitsVis view that shows itself in Jupyter, works offline (`View.save` writes a page), and takes any
text for text. Tokens that make up one character together are shown as one (`pieces`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_count
from iclgd_lens.data.episodes import Episode, require_fit, window_note
from iclgd_lens.data.prompts import Demonstration, Query, context_tokens
from iclgd_lens.files import write_text
from iclgd_lens.kernels.implied import icl_attention, implied_attention, without_ends
from iclgd_lens.metrics.ranking import kendall_tau
from iclgd_lens.metrics.similarity import sim_am_delta
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide
from iclgd_lens.models.sites import sites_of
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import ATTENTION, Attachable, capture
from iclgd_lens.runs.prefix import Prefix
from iclgd_lens.updates.dual import ParameterUpdate
from iclgd_lens.views.circuits import View, drawn_by, element
from iclgd_lens.views.figure_style import COLOURS
from iclgd_lens.views.names import METHOD_NAMES, counted
from iclgd_lens.views.pieces import Piece, pieces, summed_over_pieces

Pattern = Float[Tensor, "head query_pos key_pos"]

OTHER = "#666666"
"""The colour of an update with a name of the user's own."""
FALLS, RISES = "#D55E00", "#0072B2"


@dataclass(frozen=True)
class AttentionExample:
    """What some queries weigh in the demonstrations: in-context attention, and the attention that updates imply.

    Weights are shares: over the tokens of all demonstrations they sum to 1. For updates they are those of the lengths of
    contributions (`implied_attention`). Tokens that make up one character together are one piece, and its weight is the sum of
    theirs. Weights are kept in 255 steps of the largest of their head. Head 0 is the mean over heads, and the model's heads follow.

    Attributes:
        task: The task's name.
        methods: What the columns are called; the first is ICL.
        colours: A colour for each.
        demonstrations: The text of each after BOS, piece by piece.
        labels: Each demonstration's label word.
        queries: Of each query its `text`, the label `predicted` in-context, and the `gold` one, None where it is not known.
        shape: `[method, query, layer, head]`.
        weights: `[method query layer head piece]`: bytes in base64.
        scale: `[method query layer head]`, flattened: the share that 255 stands for.
        tau: `[method query layer head]`, flattened: Kendall's τ with ICL's weights, token by token, without each demonstration's
            last token, which a gradient step pays nothing; None where there is none.
    """

    task: str
    methods: tuple[str, ...]
    colours: tuple[str, ...]
    demonstrations: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    queries: tuple[dict[str, str | None], ...]
    shape: tuple[int, ...]
    weights: str
    scale: tuple[float, ...]
    tau: tuple[float | None, ...]

    def view(self) -> View:
        """Make the view: a row per demonstration, a column per method, and selectors of the query, the layer and the head."""
        return drawn_by("iclgdAttention", asdict(self))

    def _repr_html_(self) -> str:
        return self.view().local_src

    def save(self, path: str | Path) -> None:
        """Write the example as JSON.

        Raises:
            OSError: If the file cannot be written.
        """
        write_text(Path(path), json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str | Path) -> AttentionExample:
        """Read an example that `save` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{name: _as_tuple(value) for name, value in found.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} does not hold an attention example: {error}") from None


def attention_example(
    model: HookedModel, episode: Episode, updates: Mapping[str, ParameterUpdate], rows: Sequence[int] = (0,)
) -> AttentionExample:
    """Weigh the demonstrations' tokens for some queries, in-context and by what updates made on the demonstrations imply.

    Held are, beside the two captures, `method × query × layer × (heads + 1) × token` numbers.

    Args:
        model: The model.
        episode: Its demonstrations and queries.
        updates: By name, `"gd"` and `"lcgd"` or of your own, updates made on these demonstrations.
        rows: Which queries.

    Raises:
        IndexError: If there is no such query.
        ValueError: If there is no query, an update was made on other demonstrations, or as `capture`.
    """
    if wrong := [row for row in rows if not 0 <= row < len(episode.queries)]:
        raise IndexError(f"there is no query {wrong[0]}: the episode has {len(episode.queries)}, counted from 0")
    demonstrations, queries = episode.demonstrations, [episode.queries[row] for row in rows]
    zsl = capture(model, queries, keep=[*ATTENTION])
    icl = capture(model, queries, context=demonstrations, keep=["context_scores", "label_log_probs"])
    weights = [icl_attention(icl, demonstrations)]
    weights += [implied_attention(update.attribution(zsl), demonstrations) for update in updates.values()]
    shares = torch.stack([_shares(each) for each in weights])
    compared = without_ends(shares, demonstrations)
    tau = kendall_tau(compared[:1], compared)
    tau[0] = torch.nan
    texts = [pieces(model.tokenizer, each.tokens[1:]) for each in demonstrations]
    shown = summed_over_pieces(shares, [piece for text in texts for piece in text])
    largest = shown.amax(dim=-1)
    steps = (shown / largest[..., None].masked_fill(largest[..., None] == 0, 1.0) * 255).round().to(torch.uint8)
    return AttentionExample(
        task=episode.task,
        methods=("ICL", *(METHOD_NAMES.get(name, name) for name in updates)),
        colours=tuple(COLOURS.get(name, OTHER) for name in ("icl", *updates)),
        demonstrations=tuple(tuple(piece.text for piece in text) for text in texts),
        labels=tuple("?" if each.label is None else episode.label_words[each.label].strip() for each in demonstrations),
        queries=tuple(_about(model, query, episode.label_words, int(icl.predictions[row])) for row, query in enumerate(queries)),
        shape=tuple(shown.shape[:-1]),
        weights=base64.b64encode(steps.cpu().numpy().tobytes()).decode(),
        scale=tuple(float(f"{scale:.4g}") for scale in largest.flatten().tolist()),
        tau=tuple(None if value != value else round(value, 3) for value in tau.flatten().tolist()),
    )


def queries_within(model: HookedModel, episode: Episode, n_updates: int, size: int = 3_000_000) -> int:
    """How many of an episode's queries an example may have, at least one and at most eight, for its weights to fill no more than
    `size` bytes.
    """
    tokens = sum(len(each.tokens) - 1 for each in episode.demonstrations)
    each = (1 + n_updates) * model.cfg.n_layers * (1 + model.cfg.n_heads) * tokens * 4 // 3
    return max(1, min(8, len(episode.queries), size // each))


def attention_patterns(
    model: HookedModel,
    query: Query,
    layer: int,
    *,
    demonstrations: Sequence[Demonstration] = (),
    update: Attachable | None = None,
) -> View:
    """Show a layer's whole attention patterns for one prompt, head by head: in-context, zero-shot, or under an update.

    Tokens that make up one character together are shown as one: a column is the sum of their columns, and a row is that of the
    last of them, the only one that has seen the character.

    Held are `heads × prompt²` numbers, and a page of about ten bytes for each.

    Args:
        model: The model; hooks that are on it act.
        query: The query.
        layer: Which layer.
        demonstrations: What stands before the query; nothing for zero-shot.
        update: A `ParameterUpdate` to attach while running.

    Raises:
        IndexError: If there is no such layer.
        ValueError: If the prompt is longer than the context window, or the update belongs to another model.
    """
    tokens, pattern = _pattern(model, query, demonstrations, update, [layer])
    names = [f"L{layer}H{head}" for head in range(len(pattern[layer]))]
    where = f"after {counted(len(demonstrations), 'demonstration')}" if demonstrations else "zero-shot"
    caption = f"Attention in layer {layer}, {where}{'' if update is None else ', under an update'}. Rows attend to columns."
    cut = pieces(model.tokenizer, tokens)
    return _heads(caption, cut, _by_piece(pattern[layer], cut), names)


def changed_heads(
    model: HookedModel,
    query: Query,
    demonstrations: Sequence[Demonstration],
    update: Attachable,
    *,
    top: int = 8,
) -> View:
    """Show the heads in which an update changed attention most as demonstrations do: ranked by SimAM_Δ (`rank_heads`), each with
    the change of its pattern within the query, update minus zero-shot, red where attention falls and blue where it rises.

    Tokens that make up one character together are shown as one: a column is the sum of their columns, and a row is that of the
    last of them.

    Args:
        model: The model; hooks that are on it act.
        query: The query.
        demonstrations: What the update is compared with in-context.
        update: The update.
        top: How many heads are shown.

    Raises:
        ValueError: If `top` is below 1, no head has a SimAM_Δ, or as `capture`.
    """
    require_count("top", top)
    zsl, icl = (capture(model, [query], context=context, keep=["query_scores"]) for context in (None, demonstrations))
    ft = capture(model, [query], update=update, keep=["query_scores"])
    ranked = rank_heads(icl, ft, zsl)[:top]
    if not ranked:
        raise ValueError("no head has a SimAM_Δ for this query: nothing in its attention changes")
    layers = sorted({layer for layer, _, _ in ranked})
    (tokens, before), (_, after) = (_pattern(model, query, (), each, layers) for each in (None, update))
    cut = pieces(model.tokenizer, tokens)
    change = _by_piece(torch.stack([after[layer][head] - before[layer][head] for layer, head, _ in ranked]), cut)
    names = [f"L{layer}H{head} {value:+.2f}" for layer, head, value in ranked]
    largest = float(change.abs().max()) or 1.0
    caption = (
        "What an update changes in attention within the query, update minus zero-shot: red where it falls, blue where it rises, "
        f"full colour at {largest:.3g}. Heads by SimAM_Δ, the number after each name: how alike the head's change of scores is to "
        f"what {counted(len(demonstrations), 'demonstration')} in front change."
    )
    colours = {"minValue": -largest, "maxValue": largest, "negativeColor": FALLS, "positiveColor": RISES}
    return _heads(caption, cut, change, names, **colours)


def rank_heads(icl: Activations, ft: Activations, zsl: Activations) -> list[tuple[int, int, float]]:
    """Rank heads by SimAM_Δ, averaged over queries: how alike what an update does to attention scores is to what demonstrations do.

    Returns:
        `(layer, head, SimAM_Δ)`, the highest first; heads for which it is not defined are left out.

    Raises:
        ValueError: As `sim_am_delta`.
    """
    found = sim_am_delta(icl, ft, zsl).nanmean(dim=0)
    ranked = [(layer, head, float(found[layer, head])) for layer, head in (~found.isnan()).nonzero().tolist()]
    return sorted(ranked, key=lambda each: -each[2])


def strings(model: HookedModel, tokens: Int[Tensor, "pos"]) -> list[str]:
    """Write tokens as text, one string for each piece (`pieces`); as numbers if the model has no tokenizer."""
    return [piece.text for piece in pieces(model.tokenizer, tokens)]


def _shares(weights: Float[Tensor, "query layer head token"]) -> Float[Tensor, "query layer head_or_mean token"]:
    total = weights.sum(dim=-1, keepdim=True)
    shares = (weights / total.masked_fill(total == 0, 1.0)).nan_to_num()
    return torch.cat([shares.mean(dim=2, keepdim=True), shares], dim=2)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _about(model: HookedModel, query: Query, words: Sequence[str], predicted: int) -> dict[str, str | None]:
    return {
        "text": "".join(strings(model, query.tokens[1:])),
        "predicted": words[predicted].strip(),
        "gold": None if query.label is None else words[query.label].strip(),
    }


def _pattern(
    model: HookedModel,
    query: Query,
    demonstrations: Sequence[Demonstration],
    update: Attachable | None,
    layers: Sequence[int],
) -> tuple[Int[Tensor, "pos"], dict[int, Pattern]]:
    """Run one prompt, and read some layers' patterns."""
    sites = sites_of(model)
    if wrong := [layer for layer in layers if not 0 <= layer < sites.n_layers]:
        raise IndexError(f"there is no layer {wrong[0]}: the model has {sites.n_layers}, counted from 0")
    require_fit(demonstrations, [query], model.cfg.n_ctx, window_note(model))
    tokens = torch.cat([context_tokens(demonstrations), query.tokens[1:]]) if demonstrations else query.tokens
    found: dict[int, Pattern] = {}

    def keep(layer: int) -> Any:
        return lambda pattern, hook: found.__setitem__(layer, wide(pattern[0]).cpu())

    with torch.no_grad(), nullcontext() if update is None else update.attached(model):
        Prefix.empty(sites).continue_with([tokens], [(sites.pattern[layer], keep(layer)) for layer in layers])
    return tokens, found


def _by_piece(patterns: Pattern, cut: Sequence[Piece]) -> Float[Tensor, "head query_piece key_piece"]:
    """Add up the columns of each piece's tokens, and keep the row of its last token."""
    return summed_over_pieces(patterns, cut)[:, [piece.stop - 1 for piece in cut]]


def _heads(
    caption: str,
    cut: Sequence[Piece],
    patterns: Float[Tensor, "head query_piece key_piece"],
    names: list[str],
    **colours: Any,
) -> View:
    if any(piece.stop - piece.start > 1 for piece in cut):
        caption += (
            " Tokens that make up one character together are shown as one: its column is the sum of theirs, "
            "its row that of the last."
        )
    attention = [[[float(f"{value:.3g}") for value in row] for row in head] for head in patterns.tolist()]
    # On a canvas, so the tokens are text, and not parsed.
    shown = {"attention": attention, "tokens": [piece.text for piece in cut], "attentionHeadNames": names, **colours}
    return element("AttentionHeads", shown, caption)
