"""Models built by hand, of which it is known what they do in context.

Their prompts are BOS, one token a demonstration, and one for the query. A token's embedding holds a pair (x, y), with y = 0 at
BOS and at queries; a single head reads x for its scores and y for its values. Two such heads:

- **One step of gradient descent** (von Oswald et al. 2023, arXiv 2212.07677, Proposition 1). Linear attention adds `Σᵢ yᵢ ⟨xᵢ, x⟩`
  at a query x, up to a factor, and one step on `½ Σᵢ ‖W xᵢ − yᵢ‖²` from W = 0 makes `W x = lr Σᵢ yᵢ ⟨xᵢ, x⟩`. `positive_control`
  says what SimAOU reads where in-context learning *is* gradient descent.
- **A Gaussian kernel smoother** (Tsai et al. 2019, section 2.2). For x of length 1, `exp(x·x' / σ²)` is `exp(−‖x − x'‖² / 2σ²)` up
  to a factor, so softmax attention is the Nadaraya–Watson estimator with a Gaussian kernel of bandwidth σ. `gaussian_smoother`
  makes it.

>>> control = positive_control()
>>> round(control.same, 3), abs(control.unrelated) < 0.2
(1.0, True)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from iclgd_lens.checks import require_count, require_not_negative, require_positive, require_seed
from iclgd_lens.data.prompts import Demonstration, Query, demonstrations_digest
from iclgd_lens.kernels.smoother import nadaraya_watson
from iclgd_lens.metrics.similarity import sim_aou
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.models.hooked import HookedTransformer, make_hooked_transformer
from iclgd_lens.models.sites import sites_of
from iclgd_lens.models.surroundings import without_autocast
from iclgd_lens.runs.capture import capture
from iclgd_lens.tensor_draws import normal, seeded
from iclgd_lens.updates.dual import ParameterUpdate, UpdateSettings

REGRESSION = "linear regression by linear attention"
"""`cfg.model_name` of what `regression_model` makes."""

VANISHED = 80.0
"""A demonstration's score may lie so far below the largest, in nats: attention beyond exp(−87) is lost in float32."""


def regression_model(width: int = 24, examples: int = 40, queries: int = 16, seed: int = 0) -> HookedTransformer:
    """Build the model whose linear attention makes a step of linear regression; run it within `linear_attention`.

    One layer, one head, no norm and no positions, on the CPU. Token 0 is BOS, all zero; then come the examples (x, y) and the
    queries (x, 0), their entries drawn from N(0, 1).

    Args:
        width: The size of x and of y; `d_model` is twice that.
        examples: How many demonstrations there are.
        queries: How many queries there are.
        seed: Seeds the data.

    Raises:
        ValueError: If a size is below 1, or the seed is no whole number.
    """
    for name, size in (("width", width), ("examples", examples), ("queries", queries)):
        require_count(name, size)
    pairs = normal(seeded(seed), examples + queries, 2 * width)
    pairs[examples:, width:] = 0
    return _pair_model(pairs, width, examples, REGRESSION)


@contextmanager
def linear_attention(model: HookedTransformer) -> Iterator[HookedTransformer]:
    """Put the scores, 0 where they are masked, in the place of their softmax, within a `with` block and in every layer.

    Afterwards, also after an exception, the model is as before. Scores keep their factor of 1/√d_head.
    """
    sites = sites_of(model)
    seen: list[Tensor] = []

    def remember(scores: Float[Tensor, "batch head query_pos key_pos"], hook: Any) -> None:
        seen.append(scores.masked_fill(scores.isinf(), 0.0))

    def replace(pattern: Float[Tensor, "batch head query_pos key_pos"], hook: Any) -> Tensor:
        return seen.pop().to(pattern)

    with sites.attach([*((name, remember) for name in sites.scores), *((name, replace) for name in sites.pattern)]):
        yield model


def regression_episode(model: HookedTransformer) -> tuple[tuple[Demonstration, ...], tuple[Query, ...]]:
    """The demonstrations and queries of a model that `regression_model` made, one token each behind BOS.

    Raises:
        ValueError: If it is another model.
    """
    _, examples, queries = _regression_sizes(model)
    return _demonstrations(examples), _queries(examples, queries)


def regression_step(
    model: HookedTransformer, *, targets: Float[Tensor, "demonstration width"] | None = None, lr: float = 0.01
) -> ParameterUpdate:
    """Make the update of one step of gradient descent on `½ Σᵢ ‖W xᵢ − yᵢ‖²` from W = 0, the map from x to y being part of W_V.

    In dual form its inputs are (xᵢ, 0), and its errors lr · yᵢ at the values' output. `losses` are ½ ‖yᵢ‖², not in nats.

    Args:
        model: A model that `regression_model` made.
        targets: The yᵢ to fit; by default those of the model's demonstrations, which it fits in context too.
        lr: The step size; it scales the update and leaves similarities as they are.

    Raises:
        ValueError: If it is another model, or targets do not fit its demonstrations or are not finite.
    """
    width, examples, _ = _regression_sizes(model)
    pairs = model.W_E[1 : 1 + examples].detach()
    x, y = pairs[:, :width], pairs[:, width:] if targets is None else targets
    require_not_negative("lr", lr)
    if y.shape != (examples, width) or not bool(y.isfinite().all()):
        raise ValueError(f"targets must be finite and have the shape {[examples, width]}; got {list(y.shape)}")
    y = y.to(pairs)
    return ParameterUpdate(
        inputs=F.pad(x, (0, width))[None],
        key_errors=pairs.new_zeros(1, examples, 1, 2 * width),
        value_errors=lr * F.pad(y, (width, 0))[None, :, None],
        demonstration=torch.arange(examples, device=pairs.device),
        position=torch.ones(examples, dtype=torch.long, device=pairs.device),
        gradient_norms=(x.norm(dim=-1) * y.norm(dim=-1))[None],
        losses=y.square().sum(dim=-1) / 2,
        settings=UpdateSettings("gd", lr, "demonstration", "vocab", "batch", 1, ("W_V",)),
        fingerprint=fingerprint(model),
        examples=demonstrations_digest(_demonstrations(examples)),
    )


@dataclass(frozen=True)
class PositiveControl:
    """What SimAOU reads where in-context learning is a step of gradient descent.

    Attributes:
        same: The mean similarity with that very step: 1 but for rounding.
        unrelated: That with a step on targets drawn anew: near 0, off it by chance.
        n_queries: How many queries the means are over.
    """

    same: float
    unrelated: float
    n_queries: int


@without_autocast()
def positive_control(seed: int = 0) -> PositiveControl:
    """Measure SimAOU between a regression model's in-context change and a step of gradient descent (von Oswald et al. 2023).

    Args:
        seed: Seeds the regression and the unrelated targets.

    Raises:
        ValueError: If the seed is no whole number.
    """
    model = regression_model(seed=seed)
    demonstrations, queries = regression_episode(model)
    width, examples, n_queries = _regression_sizes(model)
    other = normal(seeded(require_seed(seed) + 1), examples, width)
    with linear_attention(model):
        zsl = capture(model, queries, keep=["attn_out"])
        icl = capture(model, queries, context=demonstrations, keep=["attn_out"])
        same, unrelated = (
            float(sim_aou(icl, capture(model, queries, update=update, keep=["attn_out"]), zsl).mean())
            for update in (regression_step(model), regression_step(model, targets=other))
        )
    return PositiveControl(same, unrelated, n_queries)


@dataclass(frozen=True, eq=False)
class GaussianSmoother:
    """A model that is a kernel smoother, its episode, and what it smooths.

    Attributes:
        model: One layer, one softmax head, no norm and no positions.
        demonstrations: One token each behind BOS, with labels.
        queries: One token each behind BOS, without labels and label words.
        inputs: `[demonstration width]`: each demonstration's x, of length 1, in float64.
        query_inputs: `[query width]`: each query's.
        labels: `[demonstration]`: class indices.
        n_labels: How many classes there are.
        bandwidth: The σ of the kernel.
    """

    model: HookedTransformer
    demonstrations: tuple[Demonstration, ...]
    queries: tuple[Query, ...]
    inputs: Float[Tensor, "demonstration width"]
    query_inputs: Float[Tensor, "query width"]
    labels: Int[Tensor, "demonstration"]
    n_labels: int
    bandwidth: float

    @property
    def closed_form(self) -> Float[Tensor, "query label"]:
        """`Σᵢ κ(x, xᵢ) yᵢ / Σᵢ κ(x, xᵢ)` over the demonstrations, with `κ(x, xᵢ) = exp(−‖x − xᵢ‖² / 2σ²)` and one-hot yᵢ: the
        smoother's estimate, from x alone and in float64.
        """
        apart = rearrange(self.query_inputs, "query width -> query 1 width") - self.inputs
        kernel = (-apart.square().sum(dim=-1) / (2 * self.bandwidth**2)).exp()
        return nadaraya_watson(kernel, F.one_hot(self.labels, self.n_labels))


def gaussian_smoother(
    width: int = 8, examples: int = 32, queries: int = 16, bandwidth: float = 0.5, n_labels: int = 3, seed: int = 0
) -> GaussianSmoother:
    """Build a model whose head weighs demonstrations by a Gaussian kernel.

    BOS and the query's own token get attention too, and add nothing to y. So attention to the demonstrations is λ, the mass on all
    of them, times the kernel's weights; divided by its sum it is the weights. It runs in float32, and estimates from it agree with
    the closed form to about 1e-6.

    Args:
        width: The size of x, which is drawn uniformly from the sphere of radius 1.
        examples: How many demonstrations there are; their labels go round the classes.
        queries: How many queries there are.
        bandwidth: The σ of the kernel.
        n_labels: How many classes there are.
        seed: Seeds the data.

    Raises:
        ValueError: If a size is below 1, the seed is no whole number, or the bandwidth is not finite and above 0, or so small that
            attention to all demonstrations is lost in float32 for some query.
    """
    for name, size in (("width", width), ("examples", examples), ("queries", queries), ("n_labels", n_labels)):
        require_count(name, size)
    require_positive("bandwidth", bandwidth)
    x = F.normalize(normal(seeded(seed), examples + queries, width), dim=-1)
    # Attention to its own token has the largest score of a query, 1 / σ².
    below = (1 - (x[examples:] @ x[:examples].T).amax(dim=-1)) / bandwidth**2
    if bool((below > VANISHED).any()):
        raise ValueError(
            f"bandwidth={bandwidth:g} is too small: the demonstration nearest to query {int(below.argmax())} gets less than "
            f"exp(-{VANISHED:g}) of the attention that the query's own token gets; use a larger one or more demonstrations"
        )
    labels = torch.arange(examples, device="cpu") % n_labels
    y = F.pad(F.one_hot(labels, n_labels), (0, 0, 0, queries))
    return GaussianSmoother(
        model=_pair_model(torch.cat([x, y], dim=-1), width, examples, "Gaussian kernel smoother", 1 / bandwidth**2),
        demonstrations=_demonstrations(examples, labels.tolist()),
        queries=_queries(examples, queries),
        inputs=x[:examples].double(),
        query_inputs=x[examples:].double(),
        labels=labels,
        n_labels=n_labels,
        bandwidth=bandwidth,
    )


def _pair_model(
    pairs: Float[Tensor, "token d_model"], n_x: int, examples: int, name: str, temperature: float | None = None
) -> HookedTransformer:
    """The model whose tokens 1, 2, … hold these pairs, of which the first `n_x` entries are x.

    Scores are x·x' times `temperature`; by default they are as TransformerLens scales them, x·x' / √d_head.
    """
    n_tokens, d_model = pairs.shape
    settings: dict[str, Any] = {
        "model_name": name,
        "n_layers": 1,
        "d_model": d_model,
        "n_ctx": examples + 2,
        "d_head": d_model,
        "n_heads": 1,
        "d_vocab": 1 + n_tokens,
        "attn_only": True,
        "normalization_type": None,
        "init_weights": False,
        "device": "cpu",
    }
    with torch.device("cpu"):
        model = make_hooked_transformer(settings, what="a model of known behaviour")
    of_x = torch.diag((torch.arange(d_model, device="cpu") < n_x).float())
    identity = torch.eye(d_model, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[1:] = pairs
        attention: Any = model.blocks[0].attn
        attention.W_Q[0] = of_x if temperature is None else of_x * temperature * math.sqrt(d_model)
        attention.W_K[0], attention.W_V[0], attention.W_O[0] = of_x, identity - of_x, identity
    return model.eval()


def _regression_sizes(model: HookedTransformer) -> tuple[int, int, int]:
    """The width and the numbers of demonstrations and queries that a regression model was made with."""
    cfg = model.cfg
    if cfg.model_name != REGRESSION:
        raise ValueError(f"need a model that regression_model made, got {cfg.model_name!r}")
    examples = cfg.n_ctx - 2
    return cfg.d_model // 2, examples, cfg.d_vocab - 1 - examples


def _demonstrations(examples: int, labels: list[int] | None = None) -> tuple[Demonstration, ...]:
    return tuple(
        Demonstration(
            torch.tensor([0, 1 + number], device="cpu"), n_label_tokens=1, label=None if labels is None else labels[number]
        )
        for number in range(examples)
    )


def _queries(examples: int, queries: int) -> tuple[Query, ...]:
    return tuple(Query(torch.tensor([0, 1 + examples + number], device="cpu")) for number in range(queries))
