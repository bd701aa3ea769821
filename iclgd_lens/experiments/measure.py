"""From runs to rows: every metric of one run against the others, as rows of a tidy frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iclgd_lens.metrics.agreement import (
    correct,
    false_to_true,
    js_divergence,
    label_distribution,
    label_loss,
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


def run_rows(run: Activations) -> Iterator[Row]:
    """How well one run does the task."""
    yield from metric_rows("accuracy", correct(run))
    yield from metric_rows("label_loss", label_loss(run))


def output_rows(icl: Activations, other: Activations) -> Iterator[Row]:
    """How alike the outputs of ICL and of another run are (Shen et al. 2024)."""
    yield from metric_rows("same_prediction", same_prediction(icl, other))
    yield from metric_rows("js_divergence", js_divergence(icl, other))


def similarity_rows(
    icl: Activations,
    ft: Activations,
    zsl: Activations,
    gd: Activations | None,
    unchanged: Float[Tensor, "query layer head"],
) -> Iterator[Row]:
    """How alike what demonstrations did to attention is to what an update did, over all queries and false-to-true ones.

    Args:
        icl: The queries in-context.
        ft: The same under an update.
        zsl: The same zero-shot.
        gd: The same under GD, where `ft` is LCGD and α is wanted.
        unchanged: The reference of SimAM, `sim_am(icl, zsl)`.
    """
    changed = false_to_true(icl, ft, zsl)
    yield from _over_subsets("sim_aou", by_chunks(sim_aou, icl, ft, zsl), changed)
    yield from _over_subsets("sim_aou_norm", by_chunks(sim_aou_norm, icl, ft, zsl), changed)
    yield from _over_subsets("sim_am", by_chunks(sim_am, icl, ft), changed)
    yield from _over_subsets("sim_am_zsl", unchanged, changed)
    yield from _over_subsets("sim_am_delta", by_chunks(sim_am_delta, icl, ft, zsl), changed)
    if gd is not None:
        yield from metric_rows("alpha_aou", by_chunks(partial(alpha, of="attn_out"), ft, gd, zsl))
        yield from metric_rows("alpha_am", by_chunks(partial(alpha, of="query_scores"), ft, gd, zsl))


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


def gradient_rows(update: ParameterUpdate) -> Iterator[Row]:
    """One row per layer and step: the ℓ2 norm of the gradient (Deutch et al. 2024, Figure 4)."""
    for layer, norms in enumerate(update.gradient_norms.double().cpu().tolist()):
        for step, norm in enumerate(norms):
            yield {"layer": layer, "step": step, "gradient_norm": norm}


def _over_subsets(metric: str, values: Float[Tensor, "query layer *head"], changed: Bool[Tensor, "query"]) -> Iterator[Row]:
    yield from metric_rows(metric, values)
    yield from metric_rows(metric, values[changed], subset="false_to_true")


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
