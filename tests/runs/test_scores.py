"""Captured scores are attention's own: from them, in-context attention is rebuilt exactly."""

import pytest
import torch
from einops import einsum

from iclgd_lens import capture
from iclgd_lens.data.episodes import Episode
from iclgd_lens.data.prompts import context_tokens
from iclgd_lens.models.hooked import HookedTransformer


@pytest.mark.parametrize("layer", range(4))
def test_icl_attention_is_a_mixture_of_query_part_and_demonstration_part(bundled: HookedTransformer, episode: Episode, layer: int):
    """(1−λ) · attention over BOS and query + λ · attention over demonstrations, λ the mass on the latter (He et al. 2022)."""
    icl = capture(bundled, episode.queries, context=episode.demonstrations)
    context = context_tokens(episode.demonstrations)
    for row, query in enumerate(episode.queries[:4]):
        _, cache = bundled.run_with_cache(torch.cat([context, query.tokens[1:]]))
        values = cache["v", layer][0]
        bos = cache["attn_scores", layer][0, :, -1, :1]
        own = icl.query_scores[row, layer][:, icl.query_mask[row]]
        demonstrations = icl.context_scores[row, layer]

        query_scores = torch.cat([bos, own], dim=-1)
        query_values = torch.cat([values[:1], values[len(context) :]])
        mass = torch.stack([query_scores.logsumexp(-1), demonstrations.logsumexp(-1)]).softmax(dim=0)[1]

        def attend(scores: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            return einsum(scores.softmax(-1), values, "head pos, pos head d_head -> head d_head")

        parts = attend(query_scores, query_values), attend(demonstrations, values[1 : len(context)])
        mixed = (1 - mass)[:, None] * parts[0] + mass[:, None] * parts[1]
        output = einsum(mixed, bundled.W_O[layer], "head d_head, head d_head d_model -> d_model") + bundled.b_O[layer]
        torch.testing.assert_close(icl.attn_out[row, layer], output, rtol=1e-5, atol=1e-5)
