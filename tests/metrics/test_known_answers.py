"""A model whose in-context learning *is* a step of gradient descent (von Oswald et al. 2023, Proposition 1): similarity is 1.

One layer of linear self-attention over tokens that hold a pair (x, y) computes Σᵢ yᵢ ⟨xᵢ, x⟩ at a query x with y = 0. One step of
gradient descent on ½ Σᵢ ‖W xᵢ − yᵢ‖² from W = 0 gives W x = lr Σᵢ yᵢ ⟨xᵢ, x⟩. As an update of W_V, in dual form, it has inputs
(xᵢ, 0) and errors yᵢ at the values' output.
"""

from contextlib import contextmanager

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from iclgd_lens import Demonstration, ParameterUpdate, Query, capture, sim_aou
from iclgd_lens.models.fingerprint import fingerprint
from iclgd_lens.updates.dual import UpdateSettings

WIDTH, EXAMPLES, QUERIES = 24, 40, 16
"""The size of x and of y, and the numbers of demonstrations and queries."""


@pytest.fixture(scope="module")
def regression() -> HookedTransformer:
    """Token 0 is BOS, all zero; then come examples (x, y) and queries (x, 0). Scores read x, values y."""
    config = HookedTransformerConfig(
        n_layers=1,
        d_model=2 * WIDTH,
        n_ctx=EXAMPLES + 2,
        d_head=2 * WIDTH,
        n_heads=1,
        d_vocab=1 + EXAMPLES + QUERIES,
        attn_only=True,
        normalization_type=None,
        init_weights=False,
    )
    model = HookedTransformer(config)
    generator = torch.Generator().manual_seed(0)
    of_x, of_y = torch.diag(torch.arange(2 * WIDTH) < WIDTH).float(), torch.diag(torch.arange(2 * WIDTH) >= WIDTH).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[1:] = torch.randn(EXAMPLES + QUERIES, 2 * WIDTH, generator=generator)
        model.embed.W_E[1 + EXAMPLES :, WIDTH:] = 0
        attention = model.blocks[0].attn
        attention.W_Q[0], attention.W_K[0], attention.W_V[0], attention.W_O[0] = of_x, of_x, of_y, torch.eye(2 * WIDTH)
    return model


@contextmanager
def linear_attention(model: HookedTransformer):
    """Put the masked scores in the place of their softmax."""
    seen = {}

    def remember(scores, hook):
        seen["scores"] = scores

    def replace(pattern, hook):
        return seen["scores"].masked_fill(seen["scores"].isinf(), 0)

    with model.hooks([("blocks.0.attn.hook_attn_scores", remember), ("blocks.0.attn.hook_pattern", replace)]):
        yield


def one_step_of_regression(model: HookedTransformer, targets: torch.Tensor, lr: float = 0.01) -> ParameterUpdate:
    pairs = model.W_E[1 : 1 + EXAMPLES].detach()
    inputs, errors = pairs.clone(), torch.zeros_like(pairs)
    inputs[:, WIDTH:] = 0
    errors[:, WIDTH:] = lr * targets
    return ParameterUpdate(
        inputs=inputs[None],
        key_errors=torch.zeros(1, EXAMPLES, 1, 2 * WIDTH),
        value_errors=errors[None, :, None],
        demonstration=torch.arange(EXAMPLES),
        position=torch.ones(EXAMPLES, dtype=torch.long),
        gradient_norms=torch.ones(1, EXAMPLES),
        losses=torch.ones(EXAMPLES),
        settings=UpdateSettings("gd", lr, "demonstration", "vocab", "batch", 1, ("W_V",)),
        fingerprint=fingerprint(model),
    )


def similarity_to_icl(model: HookedTransformer, update: ParameterUpdate) -> torch.Tensor:
    demonstrations = [Demonstration(torch.tensor([0, 1 + i]), 1) for i in range(EXAMPLES)]
    queries = [Query(torch.tensor([0, 1 + EXAMPLES + i])) for i in range(QUERIES)]
    with linear_attention(model):
        zsl = capture(model, queries)
        icl = capture(model, queries, context=demonstrations)
        ft = capture(model, queries, update=update)
    return sim_aou(icl, ft, zsl)


def test_one_step_of_the_same_regression_has_similarity_one(regression: HookedTransformer):
    update = one_step_of_regression(regression, regression.W_E[1 : 1 + EXAMPLES, WIDTH:].detach())
    assert (similarity_to_icl(regression, update) > 0.99999).all()


def test_one_step_of_an_unrelated_regression_has_similarity_near_zero(regression: HookedTransformer):
    other = torch.randn(EXAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))
    similarity = similarity_to_icl(regression, one_step_of_regression(regression, other))
    assert abs(float(similarity.mean())) < 0.2
