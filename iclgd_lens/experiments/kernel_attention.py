"""The kernel views of attention, as rows: smoothing and drift, and the attention that updates imply.

Queries stream through the model a few at a time, with and without demonstrations in step, so no more is held than one such batch of
what attribution reads, and per query, layer and head one number per metric and demonstration.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import Demonstration
from iclgd_lens.experiments.measure import Row, metric_rows, per_head_rows
from iclgd_lens.kernels.implied import (
    Agreement,
    Reading,
    agreement,
    by_demonstration,
    demonstration_queries,
    icl_attention,
    implied_attention,
    other_demonstrations,
    proxy_attention,
    without_ends,
)
from iclgd_lens.kernels.smoother import Decomposition, decompose
from iclgd_lens.metrics.ranking import shuffled_weights
from iclgd_lens.metrics.similarity import OUTPUT_ROUNDING, cosine, difference
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.runs.activations import Activations
from iclgd_lens.runs.capture import ATTENTION, capture_batches
from iclgd_lens.updates.attribution import Attribution
from iclgd_lens.updates.dual import ParameterUpdate

BATCH = 8
"""How many queries stream at a time; a batch holds, per layer, the query's length times `3 d_model + heads` numbers each."""

STATISTICS = ("kendall", "spearman", "cosine", "top_k_recall")
"""The statistics of `Agreement`."""

OF_HEADS = ("demonstration_mass", "contribution_inner_kendall")
"""The metrics that the frame of heads has, too, beside the smoothing share, which is each head's own there."""

Values = dict[tuple[str, str, str], list[Float[Tensor, "batch layer *head"]]]
"""Values of a metric, batch by batch, under (method, control, metric)."""


@dataclass(frozen=True, eq=False)
class AttentionViews:
    """What streaming the queries found.

    Attributes:
        rows: Rows of the tidy frame and, with a `head`, of the frame of heads, under (method, control).
        demonstration_attention: `[query layer head demonstration]`: in-context attention to each demonstration.
        label_attention: `[query layer head demonstration]`: in-context attention to each demonstration's label.
    """

    rows: dict[tuple[str, str], list[Row]]
    demonstration_attention: Float[Tensor, "query layer head demonstration"]
    label_attention: Float[Tensor, "query layer head demonstration"]


def attention_views(
    model: HookedModel,
    episode: Episode,
    updates: Mapping[str, ParameterUpdate],
    runs: Mapping[str, Activations],
) -> AttentionViews:
    """Stream the queries and view attention over the demonstrations as a kernel smoother and as what updates imply.

    Args:
        model: The model.
        episode: The demonstrations and queries.
        updates: The updates made on them, by method.
        runs: The queries zero-shot, under `"zsl"`, and under every update, by method, with `attn_out`.

    Raises:
        ValueError: As `capture`, where the model's heads cannot be told apart.
    """
    demonstrations = episode.demonstrations
    zero_shot = capture_batches(model, episode.queries, keep=["head_out", *ATTENTION], batch_size=BATCH)
    in_context = capture_batches(
        model,
        episode.queries,
        context=demonstrations,
        keep=["head_out", "demonstration_out", "demonstration_attention", "label_attention", "context_scores"],
        batch_size=BATCH,
    )
    trained = demonstration_queries(model, demonstrations)
    values: Values = defaultdict(list)
    order: list[Int[Tensor, "batch"]] = []
    kept: dict[str, list[Tensor]] = defaultdict(list)
    head_shares: list[Float[Tensor, "batch layer head"]] = []
    for number, ((rows, zsl), (_, icl)) in enumerate(zip(zero_shot, in_context, strict=True)):
        order.append(rows)
        for name in ("demonstration_attention", "label_attention"):
            kept[name].append(icl.kept[name])
        parts = decompose(icl, zsl)
        for metric, value in _smoothing(parts):
            values["icl", "none", metric].append(value)
        head_shares.append(parts.head_smoothing.share)
        attention = icl_attention(icl, demonstrations)
        readings = {("icl", "proxy"): proxy_attention(model, zsl, trained)}
        for method, update in updates.items():
            attribution = update.attribution(zsl)
            actual = difference(runs[method].attn_out[rows], runs["zsl"].attn_out[rows], OUTPUT_ROUNDING)
            for metric, value in _first_order(attribution, actual):
                values[method, "none", metric].append(value)
            for reading in get_args(Reading):
                readings[method, reading] = implied_attention(attribution, demonstrations, reading)
        seed = len(episode.queries) * episode.seed + number
        for (method, reading), implied in readings.items():
            for level, control, found in _implied(attention, implied, demonstrations, seed):
                for statistic in STATISTICS:
                    values[method, control, f"{reading}_{level}_{statistic}"].append(getattr(found, statistic))
    back = torch.cat(order).argsort().to(model.cfg.device)
    table: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for (method, control, metric), batches in values.items():
        whole = torch.cat(batches)
        table[method, control] += metric_rows(metric, whole)
        if metric in OF_HEADS and control == "none":
            table[method, control] += per_head_rows(metric, whole)
    table["icl", "none"] += per_head_rows("smoothing_share", torch.cat(head_shares))
    return AttentionViews(rows=table, **{name: torch.cat(batches)[back] for name, batches in kept.items()})


def _smoothing(found: Decomposition) -> Iterator[tuple[str, Float[Tensor, "batch layer *head"]]]:
    yield "demonstration_mass", found.mass
    yield "attention_change", found.delta_norm
    for name, term in (("smoothing", found.smoothing), ("drift", found.drift)):
        yield f"{name}_norm", term.norm
        yield f"{name}_cosine", term.cosine
        yield f"{name}_share", term.share


def _first_order(
    attribution: Attribution, actual: Float[Tensor, "batch layer d_model"]
) -> Iterator[tuple[str, Float[Tensor, "batch layer"]]]:
    """How much of what an update does is a layer's own first-order change, and how much of that goes through keys."""
    yield "first_order_cosine", cosine(attribution.change, actual)
    through_keys = attribution.through_keys.sum(dim=(-2, -1))
    length = attribution.change.norm(dim=-1)
    yield "keys_share", through_keys / length.masked_fill(length == 0, torch.nan)


def _implied(
    icl: Float[Tensor, "batch layer head token"],
    implied: Float[Tensor, "batch layer head token"],
    demonstrations: Sequence[Demonstration],
    seed: int,
) -> Iterator[tuple[str, str, Agreement]]:
    """Agreement of implied with in-context attention by token, by token but each demonstration's last, and by demonstration, under
    each control. Weights dealt out to tokens anew, and then summed by demonstration, still favour long demonstrations, as any
    weighting of tokens does; those of other demonstrations still favour the places that are favoured in all.
    """
    controls = {
        "none": implied,
        "random": shuffled_weights(implied, seed),
        "other_demonstrations": other_demonstrations(implied, demonstrations, seed),
    }
    levels: dict[str, Callable[..., Tensor]] = {"token": lambda weights, _: weights, "demonstration": by_demonstration}
    if sum(len(each.tokens) - 2 for each in demonstrations) > 1:
        levels["inner"] = without_ends
    for level, at in levels.items():
        for control, weights in controls.items():
            yield level, control, agreement(at(icl, demonstrations), at(weights, demonstrations))
