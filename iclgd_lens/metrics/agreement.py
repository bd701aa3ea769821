"""How well runs do the task, and whether they do it on the same queries."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from iclgd_lens.runs.activations import Activations


def accuracy(run: Activations) -> Float[Tensor, ""]:
    """The share of queries whose most likely label word is the gold one; NaN if no query has a gold label.

    Label words are scored by mean log-likelihood per token. Queries without a gold label, and those whose scores are not finite,
    are left out.
    """
    known = (run.labels >= 0) & run.label_log_probs.isfinite().all(dim=-1)
    return (run.predictions == run.labels)[known].float().mean()


def rec2ftp(icl: Activations, ft: Activations, zsl: Activations) -> Float[Tensor, ""]:
    """Recall to finetuning predictions: among queries that ZSL gets wrong and FT gets right, the share that ICL gets right
    (Dai et al. 2023, section 4.2); NaN if there are none.

    Raises:
        ValueError: If the runs are not of the same queries.
    """
    if not (torch.equal(icl.labels, ft.labels) and torch.equal(icl.labels, zsl.labels)):
        raise ValueError("the runs are not of the same queries: their gold labels differ")
    known = icl.labels >= 0
    corrected = known & (zsl.predictions != zsl.labels) & (ft.predictions == ft.labels)
    return (icl.predictions == icl.labels)[corrected].float().mean()
