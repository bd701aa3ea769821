"""What benchmarks run on: models in the shapes of real ones with random weights, and episodes of random tokens.

Cost depends on shapes, not on what was learned, so nothing is fetched. Weights are drawn as those of untrained twins are.

>>> model = build_model("bundled")
>>> episode = random_episode(model, Sizes(k=4, demonstration=8, queries=3, query=6))
>>> len(episode.demonstrations), len(episode.queries)
(4, 3)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from iclgd_lens.data.episodes import Episode, require_fit
from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedTransformer, make_hooked_transformer
from iclgd_lens.models.loading import load_model, parse_device
from iclgd_lens.models.untrained import draw_weights

_GPT2: dict[str, Any] = {
    "d_head": 64,
    "n_ctx": 1024,
    "d_vocab": 50257,
    "act_fn": "gelu_new",
    "normalization_type": "LN",
    "eps": 1e-5,
}

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2-small": {**_GPT2, "n_layers": 12, "d_model": 768, "n_heads": 12},
    "gpt2-medium": {**_GPT2, "n_layers": 24, "d_model": 1024, "n_heads": 16},
    "gpt2-xl": {**_GPT2, "n_layers": 48, "d_model": 1600, "n_heads": 25},
    "llama-7b": {
        "n_layers": 32,
        "d_model": 4096,
        "n_heads": 32,
        "d_head": 128,
        "d_mlp": 11008,
        "n_ctx": 2048,
        "d_vocab": 32000,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "eps": 1e-5,
        "positional_embedding_type": "rotary",
        "rotary_dim": 128,
        "rotary_adjacent_pairs": False,
        "gated_mlp": True,
        "final_rms": True,
    },
}
"""Configurations by name; `"bundled"` is known beside them. An MLP is four times as wide as the model unless said otherwise."""

NEEDS_GPU = ("gpt2-xl", "llama-7b")
"""Shapes that are too large for processors to run in reasonable time."""

BOS, LABELS, FIRST_TEXT = 1, (2, 3), 4
"""The tokens of random episodes: BOS, the two label words, and the first of those that text and separators are drawn from."""


@dataclass(frozen=True)
class Sizes:
    """How large an episode is; lengths are means, and single ones differ from them by up to an eighth.

    Attributes:
        k: How many demonstrations there are.
        demonstration: How many tokens each has, with BOS and its label of one token; a separator of one token follows.
        queries: How many queries there are.
        query: How many tokens each has, with BOS.
    """

    k: int = 32
    demonstration: int = 28
    queries: int = 64
    query: int = 24


def build_model(
    shape: str, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> HookedTransformer:
    """Make a model of a shape, with random weights and without a tokenizer; `"bundled"` is the learner that ships with the package.

    Raises:
        ValueError: If there is no such shape or device.
    """
    if shape != "bundled" and shape not in SHAPES:
        raise ValueError(f"model must be one of bundled, {', '.join(SHAPES)}; got {shape!r}")
    if shape == "bundled":
        return cast(HookedTransformer, load_model("bundled", backend="hooked", device=device, dtype=dtype))
    return make_model(SHAPES[shape], device=device, dtype=dtype, seed=seed)


def make_model(
    shape: dict[str, Any], *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> HookedTransformer:
    """Make a model of a configuration, with random weights and without a tokenizer.

    Raises:
        ValueError: If there is no such device.
    """
    with torch.random.fork_rng(devices=[]):
        settings = {**shape, "init_weights": False, "device": parse_device(device), "dtype": dtype}
        model = make_hooked_transformer(settings, what="a benchmark's model")
    draw_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def random_episode(model: HookedTransformer, sizes: Sizes, seed: int = 0) -> Episode:
    """Draw an episode of random tokens, with two label words of one token each.

    Raises:
        ValueError: If the demonstrations and a query do not fit the model's context window.
    """
    generator = torch.Generator().manual_seed(seed)
    label_tokens = tuple(torch.tensor([token]) for token in LABELS)
    bos = torch.tensor([BOS])

    def text(mean: int, beside: int) -> Int[Tensor, "pos"]:
        """Random tokens, so many that with those beside them there are about `mean`."""
        spread = mean // 8
        length = int(torch.randint(mean - spread, mean + spread + 1, (), generator=generator)) - beside
        return torch.randint(FIRST_TEXT, model.cfg.d_vocab, (length,), generator=generator)

    demonstrations = tuple(
        Demonstration(
            torch.cat([bos, text(sizes.demonstration, beside=2), label_tokens[number % 2]]),
            n_label_tokens=1,
            separator=torch.tensor([FIRST_TEXT]),
            label=number % 2,
        )
        for number in range(sizes.k)
    )
    queries = tuple(
        Query(torch.cat([bos, text(sizes.query, beside=1)]), label_tokens, number % 2) for number in range(sizes.queries)
    )
    require_fit(demonstrations, queries, model.cfg.n_ctx)
    return Episode("random tokens", seed, demonstrations, queries, ("first", "second"), label_tokens)
