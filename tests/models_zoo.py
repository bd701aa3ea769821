"""Small random models of many shapes, and random demonstrations and queries for them.

Every parameter is random, norm scales and all biases too, so that an error in the handling of any of them shows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from iclgd_lens.data.prompts import Demonstration, Query
from iclgd_lens.models.hooked import HookedTransformer, NoHookedTransformerError, make_hooked_transformer

BOS = 1
D_VOCAB = 40
N_CTX = 64
LABEL_WORDS = ((5,), (6, 7), (8, 5, 9))
"""Tokens of three label words, of one to three tokens; two words share a token."""

_ROTARY = {"positional_embedding_type": "rotary", "rotary_dim": 6}

SHAPES: dict[str, dict[str, Any]] = {
    "one_layer": {"n_layers": 1},
    "three_layers": {"n_layers": 3},
    "four_layers_four_heads": {"n_layers": 4, "n_heads": 4, "d_head": 4},
    "one_head": {"n_heads": 1, "d_head": 16},
    "attention_only": {"attn_only": True, "n_layers": 3},
    "no_norm": {"normalization_type": None},
    "rms": {"normalization_type": "RMS", "n_layers": 3},
    "final_rms": {"final_rms": True},
    "folded": {"normalization_type": "LNPre"},
    "folded_rms": {"normalization_type": "RMSPre"},
    "rotary": {**_ROTARY, "n_layers": 3},
    "rotary_rms_grouped_gated": {
        **_ROTARY,
        "normalization_type": "RMS",
        "n_heads": 4,
        "n_key_value_heads": 2,
        "gated_mlp": True,
    },
    "multi_query": {"n_heads": 3, "n_key_value_heads": 1},
    "parallel_mlp": {"parallel_attn_mlp": True, **_ROTARY},
    "tied": {"tie_word_embeddings": True},
    "local": {"n_layers": 3, "use_local_attn": True, "window_size": 4, "attn_types": ["local", "global", "local"]},
    "local_rotary": {**_ROTARY, "use_local_attn": True, "window_size": 9, "attn_types": ["local", "local"]},
    "soft_caps": {"attn_scores_soft_cap": 2.0, "output_logits_soft_cap": 3.0},
    "norms_before_and_after": {
        **_ROTARY,
        "normalization_type": "RMS",
        "use_normalization_before_and_after": True,
        "output_logits_soft_cap": 5.0,
    },
    "post_norm": {**_ROTARY, "normalization_type": "RMS", "original_architecture": "Olmo2ForCausalLM"},
    "qk_norm": {**_ROTARY, "normalization_type": "RMS", "use_qk_norm": True, "n_key_value_heads": 1},
    "attention_sinks": {**_ROTARY, "use_attention_sinks": True},
    "attention_scaled_by_layer": {"attn_scale": 2.0, "scale_attn_by_inverse_layer_idx": True, "n_layers": 3},
}
"""What each model of the zoo changes in the default configuration of `make_model`."""

ZOO = tuple(SHAPES)
FOLDED = ("folded", "folded_rms")


def make_model(shape: str = "three_layers", seed: int = 0, **changes: Any) -> HookedTransformer:
    """Build one model of the zoo: 2 layers, 2 heads and LayerNorm, but for what its shape and `changes` say."""
    settings: dict[str, Any] = {
        "n_layers": 2,
        "n_heads": 2,
        "d_head": 8,
        "d_model": 16,
        "d_mlp": 24,
        "n_ctx": N_CTX,
        "d_vocab": D_VOCAB,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "init_weights": False,
        "device": "cpu",
    }
    model = make_hooked_transformer({**settings, **SHAPES[shape], **changes}, what="a model of the zoo")
    _draw(model, torch.Generator().manual_seed(seed))
    if model.cfg.tie_word_embeddings:
        model.unembed.W_U.data = model.embed.W_E.data.T.clone()
    return model.eval()


def require_hooked_transformer() -> None:
    """Skip the test where there is no such class."""
    if HookedTransformer is None:
        raise NoHookedTransformerError("this test")


def in_float64(model: HookedTransformer) -> HookedTransformer:
    """Make a copy with the same weights that computes in float64."""
    wide = copy.deepcopy(model).double()
    wide.cfg.dtype = torch.float64
    return wide


def make_demonstrations(n: int = 3, seed: int = 0, max_text: int = 6) -> list[Demonstration]:
    """Draw demonstrations of 2 to `max_text` text tokens, labels of 1 to 3 tokens and separators of 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(n):
        label = (number + seed) % len(LABEL_WORDS)
        body = _tokens(_integer(2, max_text, generator), generator)
        made.append(
            Demonstration(
                tokens=torch.cat([torch.tensor([BOS]), body, torch.tensor(LABEL_WORDS[label])]),
                n_label_tokens=len(LABEL_WORDS[label]),
                separator=_tokens(number % 3, generator),
                label=label,
            )
        )
    return made


def make_queries(lengths: tuple[int, ...] = (5, 2, 7, 5, 1), seed: int = 0, with_labels: bool = True) -> list[Query]:
    """Draw queries with so many tokens behind BOS."""
    generator = torch.Generator().manual_seed(1000 + seed)
    words = label_tokens() if with_labels else ()
    return [
        Query(torch.cat([torch.tensor([BOS]), _tokens(length, generator)]), words, number % len(words) if words else None)
        for number, length in enumerate(lengths)
    ]


def label_tokens() -> tuple[Tensor, ...]:
    return tuple(torch.tensor(word) for word in LABEL_WORDS)


def _draw(model: HookedTransformer, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + noise if name.endswith(".w") else noise)


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))


def _tokens(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(max(map(max, LABEL_WORDS)) + 1, D_VOCAB, (n,), generator=generator)
