"""The attention that a gradient step implies: do GD and LCGD look at the tokens that in-context learning looks at?

In-context learning pays attention to demonstration tokens; an update in dual form is a sum over the same tokens, so it pays them an
attention too (Dai et al. 2023, sections 3 and 4.2; Irie et al. 2022, section 3). Three readings of it are offered:

- `"contribution"`: the length of what the token contributes to attention's output, to first order, through keys and values and
  carried through `W_O`. It is exact, and accounts for the size of the token's error.
- `"coefficient"`: the linear attention `Σⱼ A(q, j) (⟨xᵢ, xⱼ⟩ + 1)` that multiplies the token's error at the values. It may be
  negative.
- the *proxy* of Dai et al. 2023 (section 4.2, the authors' code): the softmax over training tokens of the inner product of their
  attention queries with that of the query's last token, both on the model as it is. It knows nothing of any update.

Compared are the tokens that both have: those of the demonstrations behind BOS, without separators. A token that nothing in the loss
attends to, such as a label's last one, has no error, so gradient steps pay it no attention, whatever in-context learning does;
`without_ends` leaves these tokens out. Much of what two weightings share comes of where tokens stand: `other_demonstrations` is the
baseline that keeps it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_finite, require_one_of, require_seed
from iclgd_lens.data.prompts import ContextLayout, Demonstration, Query, demonstrations_digest
from iclgd_lens.draws import reordered
from iclgd_lens.metrics.ranking import kendall_tau, spearman_rho, top_k_recall, weight_cosine
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedModel
from iclgd_lens.models.precision import wide
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.activations import Activations, require_context, require_zero_shot
from iclgd_lens.runs.capture import capture
from iclgd_lens.updates.attribution import Attribution

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
        ValueError: If the run has other demonstrations, or these in another order.
    """
    demonstrations = tuple(demonstrations)
    require_context(icl, demonstrations)
    layout = ContextLayout.of(demonstrations)
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
    require_one_of("reading", reading, get_args(Reading))
    demonstrations = tuple(demonstrations)
    weights = attribution.norms if reading == "contribution" else attribution.coefficients
    places = _places(attribution, demonstrations)
    behind_bos = places >= 0
    n_tokens = sum(len(demonstration.tokens) - 1 for demonstration in demonstrations)
    summed = weights.new_zeros(*weights.shape[:-1], n_tokens)
    return summed.index_add_(-1, places[behind_bos], weights[..., behind_bos])


def demonstration_queries(model: HookedModel, demonstrations: Sequence[Demonstration]) -> Float[Tensor, "layer token head d_head"]:
    """The attention queries of the demonstrations' tokens behind BOS, each demonstration being run on its own: what
    `proxy_attention` compares with. They are `x W_Q + b_Q`, before any rotation.

    Held are, beside what is returned, `token × layer × d_model` numbers.

    Raises:
        ValueError: If there are no demonstrations, or as `capture`.
    """
    demonstrations = tuple(demonstrations)
    if not demonstrations:
        raise ValueError("no demonstrations: the proxy needs at least one")
    run = capture(model, [Query(each.tokens) for each in demonstrations], keep=["own_inputs"])
    lengths = torch.tensor([len(each.tokens) - 1 for each in demonstrations], device=run.labels.device)
    # Prompts are right-aligned, so that BOS and padding are in front.
    from_end = torch.arange(run.own_inputs.shape[2], 0, -1, device=lengths.device)
    inputs = rearrange(run.own_inputs, "demonstration layer pos d_model -> demonstration pos layer d_model")[
        from_end <= lengths[:, None]
    ]
    sites = sites_of(model)
    with torch.no_grad():
        return torch.stack([wide(sites.project_queries(layer, inputs[:, layer])) for layer in range(sites.n_layers)])


@torch.no_grad()
@without_autocast()
def proxy_attention(
    model: HookedModel, zsl: Activations, trained: Float[Tensor, "layer token head d_head"]
) -> Float[Tensor, "query layer head token"]:
    """The proxy of Dai et al. 2023 for the attention of a finetuned model to its training tokens (module docstring).

    Args:
        model: The model.
        zsl: The queries zero-shot, captured with `keep=["own_inputs"]`.
        trained: `demonstration_queries(model, demonstrations)`.

    Raises:
        ValueError: If the run is of another model, has a context or was made under an update, or `trained` does not fit the model
            or is not finite.
    """
    require_zero_shot(zsl=zsl)
    if zsl.model != (found := fingerprint(model)):
        raise ValueError(f"the run is of another model: its fingerprint is {zsl.model}, and this one's is {found}")
    sites, cfg = sites_of(model), model.cfg
    expected = (sites.n_layers, cfg.n_heads, cfg.d_head)
    if trained.ndim != 4 or (trained.shape[0], *trained.shape[2:]) != expected:
        raise ValueError(
            f"trained must be [layer token head d_head], of this model's {expected} layers, heads and d_head; got the shape "
            f"{list(trained.shape)}"
        )
    require_finite("trained", trained)
    layers = []
    for layer in range(sites.n_layers):
        asking = wide(sites.project_queries(layer, zsl.own_inputs[:, layer, -1]))
        layers.append(einsum(asking, trained[layer], "query head d_head, token head d_head -> query head token").softmax(dim=-1))
    return torch.stack(layers, dim=1)


def without_ends(weights: Float[Tensor, "*batch token"], demonstrations: Sequence[Demonstration]) -> Float[Tensor, "*batch inner"]:
    """Leave out each demonstration's last token, which a gradient step pays nothing.

    Raises:
        ValueError: If there are not as many weights as tokens.
    """
    lengths = _lengths(weights, demonstrations)
    inner = torch.ones(sum(lengths), dtype=torch.bool, device=weights.device)
    inner[torch.tensor(lengths).cumsum(0).to(weights.device) - 1] = False
    return weights[..., inner]


def other_demonstrations(
    weights: Float[Tensor, "*batch token"], demonstrations: Sequence[Demonstration], seed: int = 0
) -> Float[Tensor, "*batch token"]:
    """Give every demonstration the weights of another, token by token from the end: the baseline that keeps what comes of where in
    a demonstration a token stands. Where the other is shorter, its first token's weight is repeated.

    Args:
        weights: Weights of the demonstrations' tokens behind BOS.
        demonstrations: The demonstrations.
        seed: Seeds whose weights each gets; the same for all rows.

    Raises:
        ValueError: If there are not as many weights as tokens, there is only one demonstration, or the seed is no whole number.
    """
    seed = require_seed(seed)
    lengths = _lengths(weights, demonstrations)
    if len(lengths) < 2:
        raise ValueError("one demonstration cannot have another's weights; give two or more")
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    order = reordered(random.Random(f"other demonstrations/{seed}"), range(len(lengths)))
    index = [
        ends[other] - min(from_end, lengths[other])
        for length, other in zip(lengths, order, strict=True)
        for from_end in range(length, 0, -1)
    ]
    return weights[..., torch.tensor(index, device=weights.device)]


def by_demonstration(
    weights: Float[Tensor, "*batch token"], demonstrations: Sequence[Demonstration]
) -> Float[Tensor, "*batch demonstration"]:
    """Sum weights of the demonstrations' tokens behind BOS over each demonstration.

    Raises:
        ValueError: If there are not as many weights as tokens.
    """
    lengths = _lengths(weights, demonstrations)
    return torch.stack([part.sum(dim=-1) for part in weights.split(lengths, dim=-1)], dim=-1)


def _lengths(weights: Float[Tensor, "*batch token"], demonstrations: Sequence[Demonstration]) -> list[int]:
    """How many tokens behind BOS each demonstration has, the weights being theirs."""
    lengths = [len(demonstration.tokens) - 1 for demonstration in demonstrations]
    if weights.shape[-1] != sum(lengths):
        raise ValueError(f"there are {weights.shape[-1]} weights for {sum(lengths)} tokens behind BOS")
    return lengths


def _places(attribution: Attribution, demonstrations: Sequence[Demonstration]) -> Int[Tensor, "trained"]:
    """Where each token of an update stands among the demonstrations' tokens behind BOS; -1 for BOS."""
    if attribution.examples != demonstrations_digest(demonstrations):
        raise ValueError("the update was not made on these demonstrations, or on them in another order; pass those it was made on")
    lengths = torch.tensor([len(demonstration.tokens) for demonstration in demonstrations], device=attribution.position.device)
    before = (lengths - 1).cumsum(0) - (lengths - 1)
    position = attribution.position
    return torch.where(position > 0, before[attribution.demonstration] + position - 1, -1)
