"""How well runs do the task, and whether on the same queries. Values are per query, NaN where there is nothing to say."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from iclgd_lens.models.precision import wide
from iclgd_lens.runs.activations import Activations, require_same_labels, require_zero_shot


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
        ValueError: If the runs are not of the same queries and label words, or `zsl` has a context or was made under an update.
    """
    require_same_labels(icl, ft, zsl)
    require_zero_shot(zsl=zsl)
    corrected = (correct(zsl) == 0) & (correct(ft) == 1)
    return correct(icl).masked_fill(~corrected, torch.nan)


def false_to_true(icl: Activations, ft: Activations, zsl: Activations) -> Bool[Tensor, "query"]:
    """The queries that ZSL gets wrong and both ICL and FT get right, to which Dai et al. 2023 restrict their similarities (the
    authors' code).

    Raises:
        ValueError: If the runs are not of the same queries and label words, or `zsl` has a context or was made under an update.
    """
    require_same_labels(icl, ft, zsl)
    require_zero_shot(zsl=zsl)
    return (correct(zsl) == 0) & (correct(ft) == 1) & (correct(icl) == 1)


def label_distribution(run: Activations) -> Float[Tensor, "query label"]:
    """The probability of each label word among the label words: the softmax of their mean log-likelihoods per token."""
    return run.label_log_probs.softmax(dim=-1)


def label_loss(run: Activations) -> Float[Tensor, "query"]:
    """Cross-entropy of the gold label under `label_distribution`, in nats; NaN where `correct` is."""
    gold = run.labels.clamp(min=0)[:, None]
    loss = -run.label_log_probs.log_softmax(dim=-1).gather(-1, gold).squeeze(-1)
    return loss.masked_fill(~_scored(run), torch.nan)


def lens_gold_probability(run: Activations) -> Float[Tensor, "query layer"]:
    """The probability of the gold label after every layer, by the logit lens: the softmax of `lens_logits` over the label words.

    The lens sees the first token of a label word alone, so label words must differ in it. NaN where the gold label is unknown or a
    logit is not finite.
    """
    logits = wide(run.lens_logits)
    gold = run.labels.clamp(min=0)
    probability = logits.softmax(dim=-1)[torch.arange(len(gold), device=gold.device), :, gold]
    known = (run.labels >= 0)[:, None] & logits.isfinite().all(dim=-1)
    return probability.masked_fill(~known, torch.nan)


def same_prediction(a: Activations, b: Activations) -> Float[Tensor, "query"]:
    """Say for each query whether two runs predict the same label: 1 or 0 (Shen et al. 2024). No gold label is needed.

    NaN where a label word's score is not finite in one of them.

    Raises:
        ValueError: If the runs are not of the same queries and label words.
    """
    require_same_labels(a, b)
    return (a.predictions == b.predictions).float().masked_fill(~(_finite(a) & _finite(b)), torch.nan)


def js_divergence(a: Activations, b: Activations) -> Float[Tensor, "query"]:
    """Jensen-Shannon divergence between the label distributions of two runs, in nats: 0 for equal ones, ln 2 for disjoint ones.

    `½ KL(p ‖ m) + ½ KL(q ‖ m)` with `m = ½ (p + q)` (Lin 1991); for ICL against FT see Shen et al. 2024. NaN where a label word's
    score is not finite.

    Raises:
        ValueError: If the runs are not of the same queries and label words.
    """
    require_same_labels(a, b)
    divergence = distribution_divergence(label_distribution(a), label_distribution(b)).to(a.label_log_probs.dtype)
    return divergence.masked_fill(~(_finite(a) & _finite(b)), torch.nan)


def distribution_divergence(p: Float[Tensor, "*#batch label"], q: Float[Tensor, "*#batch label"]) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence between distributions, in nats and float64: `½ KL(p ‖ m) + ½ KL(q ‖ m)` with `m = ½ (p + q)`
    (Lin 1991). The other axes broadcast; that rows are distributions is not checked.
    """
    p, q = p.double(), q.double()
    m = (p + q) / 2
    # x log(x / m) is 0 at x = 0, also where m is.
    half = [torch.where(x > 0, x * (x / m).log(), 0.0 * x).sum(dim=-1) / 2 for x in (p, q)]
    return (half[0] + half[1]).clamp(min=0.0)


def order_spread(distributions: Float[Tensor, "order query label"]) -> Float[Tensor, "query"]:
    """How much a prediction depends on the order of the demonstrations: the standard deviation of a label's probability over
    orders, averaged over labels (after Shen et al. 2024). Between 0 and ½ for two labels, up to the factor for few orders.

    Raises:
        ValueError: If there are fewer than two orders.
    """
    if len(distributions) < 2:
        raise ValueError(f"the spread over orders needs at least two of them, got {len(distributions)}")
    return distributions.std(dim=0).mean(dim=-1)


def _finite(run: Activations) -> Bool[Tensor, "query"]:
    return run.label_log_probs.isfinite().all(dim=-1)


def _scored(run: Activations) -> Bool[Tensor, "query"]:
    return (run.labels >= 0) & _finite(run)
