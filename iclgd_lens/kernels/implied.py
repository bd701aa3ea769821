"""The attention that a gradient step implies: do GD and LCGD look at the tokens that in-context learning looks at?

In-context learning pays attention to demonstration tokens; an update in dual form is a sum over the same tokens, so it pays them an
attention too (Dai et al. 2023, sections 3 and 4.2; Irie et al. 2022, section 3). Three readings of it are offered:

- `"contribution"`: the length of what the token contributes to attention's output, to first order, through keys and values and
  carried through `W_O`. It is exact, and accounts for the size of the token's error.
- `"coefficient"`: the linear attention `Σⱼ A(q, j) (⟨xᵢ, xⱼ⟩ + 1)` that multiplies the token's error at the values. It may be
  negative.
- the *proxy* of Dai et al. 2023 (section 4.2, the authors' code): the softmax over training tokens of the inner product of their
  attention queries with that of the query's last token. It knows nothing of errors or of the update.

Compared are the tokens that both have: those of the demonstrations behind BOS, without separators. A token that nothing in the loss
attends to, such as a label's last one, has no error, so gradient steps pay it no attention, whatever in-context learning does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer

from iclgd_lens.data.prompts import ContextLayout, Demonstration
from iclgd_lens.metrics.ranking import kendall_tau, spearman_rho, top_k_recall, weight_cosine
from iclgd_lens.models.precision import wide
from iclgd_lens.models.sites import HookSites
from iclgd_lens.runs.activations import Activations
from iclgd_lens.updates.attribution import Attribution
from iclgd_lens.updates.dual import ParameterUpdate

Reading = Literal["contribution", "coefficient"]


@dataclass(frozen=True, eq=False)
class Agreement:
    """How alike two weightings of the same tokens, or demonstrations, are. NaN where a weighting is constant or not finite.

    Attributes:
        kendall: Kendall's τ-b.
        spearman: Spearman's ρ.
        cosine: Their cosine. Weights that are not negative have a high one for free.
        top_k_recall: The share of the k heaviest of the first that are among the k heaviest of the second; k/n by chance.
    """

    kendall: Float[Tensor, "*batch"]
    spearman: Float[Tensor, "*batch"]
    cosine: Float[Tensor, "*batch"]
    top_k_recall: Float[Tensor, "*batch"]


def agreement(icl: Float[Tensor, "*batch token"], implied: Float[Tensor, "*batch token"], top_k: int | None = None) -> Agreement:
    """Say how well implied attention agrees with in-context attention (Dai et al. 2023, section 4.2).

    Args:
        icl: In-context attention.
        implied: Implied attention to the same tokens, or demonstrations. Its random baseline is the same with
            `shuffled_weights(implied)` in its place.
        top_k: How many of the heaviest are looked for; by default a sixth of them, at least one, which is 5 of 32 demonstrations
            as in Dai et al.

    Raises:
        ValueError: If the two are not of the same tokens, or `top_k` is not between one and their number.
    """
    k = max(1, round(icl.shape[-1] / 6)) if top_k is None else top_k
    return Agreement(
        kendall_tau(icl, implied), spearman_rho(icl, implied), weight_cosine(icl, implied), top_k_recall(icl, implied, k)
    )


def icl_attention(icl: Activations, demonstrations: Sequence[Demonstration]) -> Float[Tensor, "query layer head token"]:
    """In-context attention over the demonstrations' tokens behind BOS, separators left out: softmax over the context.

    Args:
        icl: The queries in-context, captured with `keep=["context_scores"]`.
        demonstrations: The context.

    Raises:
        ValueError: If the run has another context.
    """
    layout = ContextLayout.of(demonstrations)
    if icl.context_scores.shape[-1] != len(layout.position):
        raise ValueError(
            f"the run has a context of {icl.context_scores.shape[-1]} tokens behind BOS, and these demonstrations make "
            f"{len(layout.position)}; pass the demonstrations that it ran with"
        )
    return wide(icl.context_scores).softmax(dim=-1)[..., (layout.position > 0).to(icl.labels.device)]


def implied_attention(
    attribution: Attribution, demonstrations: Sequence[Demonstration], reading: Reading = "contribution"
) -> Float[Tensor, "query layer head token"]:
    """The attention that an update pays to the demonstrations' tokens behind BOS, summed over epochs.

    Args:
        attribution: `update.attribution(zsl)`.
        demonstrations: What the update was made on.
        reading: Which of the module's readings.

    Raises:
        ValueError: If `reading` is unknown, or the update was made on other demonstrations.
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading must be one of {', '.join(map(repr, get_args(Reading)))}; got {reading!r}")
    weights = attribution.norms if reading == "contribution" else attribution.coefficients
    places = _places(attribution, demonstrations)
    behind_bos = places >= 0
    n_tokens = sum(len(demonstration.tokens) - 1 for demonstration in demonstrations)
    summed = weights.new_zeros(*weights.shape[:-1], n_tokens)
    return summed.index_add_(-1, places[behind_bos], weights[..., behind_bos])


@torch.no_grad()
def proxy_attention(
    model: HookedTransformer, update: ParameterUpdate, zsl: Activations, demonstrations: Sequence[Demonstration]
) -> Float[Tensor, "query layer head token"]:
    """The proxy of Dai et al. 2023 for the attention of a finetuned model to its training tokens (module docstring).

    Attention queries are `x W_Q + b_Q`, before any rotation, with the inputs x that the tokens had in the first epoch. Held at a
    time, beside what is returned, are `(query + token) × head × d_head` numbers.

    Args:
        model: The model.
        update: Its update, which knows the training tokens' inputs.
        zsl: The queries zero-shot, captured with `keep=["own_inputs"]`.
        demonstrations: What the update was made on.

    Raises:
        ValueError: If the update was made on other demonstrations.
    """
    sites = HookSites.of(model)
    places = _places(update, demonstrations)[: sum(len(demonstration.tokens) for demonstration in demonstrations)]
    layers = []
    for layer in range(sites.n_layers):
        trained = wide(sites.project_queries(layer, update.inputs[layer, : len(places)][places >= 0]))
        asking = wide(sites.project_queries(layer, zsl.own_inputs[:, layer, -1]))
        layers.append(einsum(asking, trained, "query head d_head, token head d_head -> query head token").softmax(dim=-1))
    return torch.stack(layers, dim=1)


def by_demonstration(
    weights: Float[Tensor, "*batch token"], demonstrations: Sequence[Demonstration]
) -> Float[Tensor, "*batch demonstration"]:
    """Sum weights of the demonstrations' tokens behind BOS over each demonstration.

    Raises:
        ValueError: If there are not as many weights as tokens.
    """
    lengths = [len(demonstration.tokens) - 1 for demonstration in demonstrations]
    if weights.shape[-1] != sum(lengths):
        raise ValueError(f"there are {weights.shape[-1]} weights for {sum(lengths)} tokens behind BOS")
    return torch.stack([part.sum(dim=-1) for part in weights.split(lengths, dim=-1)], dim=-1)


def _places(trained: Attribution | ParameterUpdate, demonstrations: Sequence[Demonstration]) -> Int[Tensor, "trained"]:
    """Where each token of an update stands among the demonstrations' tokens behind BOS; -1 for BOS."""
    lengths = torch.tensor([len(demonstration.tokens) for demonstration in demonstrations])
    order = torch.arange(len(lengths)).repeat_interleave(lengths)
    found = trained.demonstration.cpu()
    if len(found) % len(order) or not torch.equal(found, order.repeat(len(found) // len(order))):
        raise ValueError(
            f"the update was not made on these {len(lengths)} demonstrations of {len(order)} tokens: it has {len(found)} tokens of "
            f"{int(found.max()) + 1}"
        )
    before = (lengths - 1).cumsum(0) - (lengths - 1)
    position = trained.position.cpu()
    return torch.where(position > 0, before[found] + position - 1, -1).to(trained.position.device)
