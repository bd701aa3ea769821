"""From runs to rows: every metric of one run against the others, as rows of a tidy frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from iclgd_lens.metrics.agreement import (
    correct,
    js_divergence,
    label_distribution,
    label_loss,
    lens_gold_probability,
    rec2ftp,
    same_prediction,
)
from iclgd_lens.metrics.similarity import alpha, sim_am, sim_am_delta, sim_aou, sim_aou_norm
from iclgd_lens.runs.activations import Activations
from iclgd_lens.updates.dual import ParameterUpdate

Subset = Literal["all", "false_to_true"]
"""Which queries a mean is over: all, or those that ZSL gets wrong and ICL and FT get right (Dai et al. 2023)."""

Row = dict[str, Any]

CHUNK = 256
"""How many queries a similarity is computed for at once."""


def run_rows(run: Activations, label_tokens: Sequence[Int[Tensor, "_label_pos"]]) -> Iterator[Row]:
    """How well one run does the task; after every layer, too, where label words differ in the first token."""
    yield from metric_rows("accuracy", correct(run))
    yield from metric_rows("label_loss", label_loss(run))
    if len({int(tokens[0]) for tokens in label_tokens}) == len(label_tokens):
        yield from metric_rows("lens_gold_probability", lens_gold_probability(run))


def output_rows(icl: Activations, other: Activations) -> Iterator[Row]:
    """How alike the outputs of ICL and of another run are (Shen et al. 2024)."""
    yield from metric_rows("same_prediction", same_prediction(icl, other))
    yield from metric_rows("js_divergence", js_divergence(icl, other))


def similarities(
    icl: Activations, ft: Activations, zsl: Activations, unchanged: Float[Tensor, "query layer head"]
) -> dict[str, Float[Tensor, "query layer *head"]]:
    """How alike what demonstrations did to attention is to what an update did, by metric.

    Args:
        icl: The queries in-context.
        ft: The same under an update.
        zsl: The same zero-shot.
        unchanged: The reference of SimAM, `sim_am(icl, zsl)`.
    """
    return {
        "sim_aou": by_chunks(sim_aou, icl, ft, zsl),
        "sim_aou_norm": by_chunks(sim_aou_norm, icl, ft, zsl),
        "sim_am": by_chunks(sim_am, icl, ft),
        "sim_am_zsl": unchanged,
        "sim_am_delta": by_chunks(sim_am_delta, icl, ft, zsl),
    }


def similarity_rows(found: Mapping[str, Float[Tensor, "query layer *head"]], changed: Bool[Tensor, "query"]) -> Iterator[Row]:
    """Similarities over all queries, and over those that are `false_to_true`."""
    for metric, values in found.items():
        yield from metric_rows(metric, values)
        yield from metric_rows(metric, values[changed], subset="false_to_true")


def alpha_rows(lcgd: Activations, gd: Activations, zsl: Activations) -> Iterator[Row]:
    """How alike LCGD's and GD's updates are (Deutch et al. 2024, Figure 2)."""
    yield from metric_rows("alpha_aou", by_chunks(partial(alpha, of="attn_out"), lcgd, gd, zsl))
    yield from metric_rows("alpha_am", by_chunks(partial(alpha, of="query_scores"), lcgd, gd, zsl))


def by_chunks(similarity: Callable[..., Tensor], *runs: Activations) -> Tensor:
    """A similarity of runs, some queries at a time: its temporaries are several times what it reads."""
    starts = range(0, len(runs[0].labels), CHUNK)
    return torch.cat([similarity(*(run.of(slice(start, start + CHUNK)) for run in runs)) for start in starts])


def rec2ftp_rows(icl: Activations, ft: Activations, zsl: Activations) -> Iterator[Row]:
    """Recall to finetuning predictions (Dai et al. 2023)."""
    yield from metric_rows("rec2ftp", rec2ftp(icl, ft, zsl))


def query_rows(run: Activations, label_words: tuple[str, ...]) -> Iterator[Row]:
    """One row per query and label word: its probability among the label words."""
    distribution = label_distribution(run).double().cpu()
    for query, probabilities in enumerate(distribution.tolist()):
        gold = int(run.labels[query])
        for index, (word, probability) in enumerate(zip(label_words, probabilities, strict=True)):
            yield {"query": query, "label": word, "is_gold": index == gold, "probability": probability}


def per_query_rows(metric: str, values: Float[Tensor, "query *layer_head"], digests: Sequence[str]) -> Iterator[Row]:
    """One row per query: the mean of a metric over layers and heads, where it is defined."""
    means = values.cpu().double().flatten(1).nanmean(dim=1) if values.ndim > 1 else values.cpu().double()
    for query, (digest, value) in enumerate(zip(digests, means.tolist(), strict=True)):
        yield {"query": query, "query_digest": digest, "metric": metric, "value": value}


def gradient_rows(update: ParameterUpdate) -> Iterator[Row]:
    """One row per layer and step: the ℓ2 norm of the gradient (Deutch et al. 2024, Figure 4)."""
    for layer, norms in enumerate(update.gradient_norms.double().cpu().tolist()):
        for step, norm in enumerate(norms):
            yield {"layer": layer, "step": step, "gradient_norm": norm}


def metric_rows(metric: str, values: Tensor, subset: Subset = "all") -> Iterator[Row]:
    """One row per layer, `values` being `[query layer ...]`, or one row for `[query]` values of the whole model."""
    layers = [(None, values)] if values.ndim == 1 else list(enumerate(values.unbind(dim=1)))
    for layer, per_query in layers:
        defined = per_query[~per_query.isnan()]
        yield {
            "subset": subset,
            "layer": layer,
            "metric": metric,
            "value": defined.cpu().double().mean().item() if len(defined) else torch.nan,
            "n": len(defined),
            "undefined": per_query.numel() - len(defined),
        }


def per_head_rows(metric: str, values: Float[Tensor, "query layer head"]) -> Iterator[Row]:
    """One row per layer and head, for the frame of heads."""
    n = (~values.isnan()).sum(dim=0).cpu()
    means = values.cpu().double().nanmean(dim=0)
    for layer, (of_layer, counts) in enumerate(zip(means.tolist(), n.tolist(), strict=True)):
        for head, (mean, count) in enumerate(zip(of_layer, counts, strict=True)):
            yield {"layer": layer, "head": head, "metric": metric, "value": mean, "n": count, "undefined": len(values) - count}


def over_queries(row: Row, n_queries: int) -> Row:
    """A row of one value over so many queries, all of them defined or none."""
    return row | {"n": n_queries * row["n"], "undefined": n_queries * row["undefined"]}
