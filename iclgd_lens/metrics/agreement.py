"""How well runs do the task, and whether on the same queries. Values are per query, NaN where there is nothing to say."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iclgd_lens.runs.activations import Activations


def correct(run: Activations) -> Float[Tensor, "query"]:
    """Say for each query whether the most likely label word is the gold one: 1 or 0.

    NaN where the gold label is unknown or a label word's score is not finite. Label words are scored by mean log-likelihood per
    token (Deutch et al. 2024, the authors' code).
    """
    return (run.predictions == run.labels).float().masked_fill(~_scored(run), torch.nan)


def accuracy(run: Activations) -> Float[Tensor, ""]:
    """The share of queries for which `correct` is 1, of those for which it is defined; NaN if for none."""
    return correct(run).nanmean()


def rec2ftp(icl: Activations, ft: Activations, zsl: Activations) -> Float[Tensor, "query"]:
    """Recall to finetuning predictions: among queries that ZSL gets wrong and FT gets right, whether ICL gets them right: 1 or 0
    (Dai et al. 2023, section 4.2). NaN for all other queries; the metric is the mean over the rest.

    Raises:
        ValueError: If the runs are not of the same queries.
    """
    if not (torch.equal(icl.labels, ft.labels) and torch.equal(icl.labels, zsl.labels)):
        raise ValueError("the runs are not of the same queries: their gold labels differ")
    corrected = (correct(zsl) == 0) & (correct(ft) == 1)
    return correct(icl).masked_fill(~corrected, torch.nan)


def _scored(run: Activations) -> Bool[Tensor, "query"]:
    return (run.labels >= 0) & run.label_log_probs.isfinite().all(dim=-1)
