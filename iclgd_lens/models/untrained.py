"""Untrained twins: the same architecture with weights that have learned nothing.

The central warning of *In-context Learning and Gradient Descent Revisited* (Deutch et al., NAACL 2024, section 4) is that
models which cannot learn in context reach similarity scores comparable to trained ones. So every similarity wants to stand
beside that of an untrained twin, and this module makes it.

>>> from iclgd_lens.models.loading import load_model
>>> model = load_model("bundled")
>>> twin = untrained_twin(model, seed=0)
>>> bool((twin.W_E == model.W_E).all()), bool((twin.W_K == model.W_K).any())
(True, False)
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Literal, get_args

import torch
from transformer_lens import HookedTransformer

Part = Literal["embed", "pos_embed", "ln", "unembed"]


def untrained_twin(
    model: HookedTransformer, seed: int = 0, keep: Sequence[Part] = ("embed", "pos_embed", "ln", "unembed")
) -> HookedTransformer:
    """Make a model of the same architecture whose weights are drawn anew, but for the parts named in `keep`.

    The twin is a new model on the same device and in the same dtype, with the same tokenizer; `model` is only read. Weight
    matrices are drawn from N(0, `cfg.initializer_range`²), biases are 0 and norm scales 1, by a generator of its own, so
    that torch's global random state is left alone.

    Args:
        model: The trained model.
        seed: Seeds the new weights.
        keep: The parts taken from `model`: `"embed"` (token embedding), `"pos_embed"`, `"ln"` (every layer norm) and
            `"unembed"`. The paper's baseline keeps all four (the authors' code); its variant keeps `("ln",)`.

    Raises:
        ValueError: If `keep` names an unknown part, or the model is one that TransformerLens initialises in another way.
    """
    unknown = [part for part in keep if part not in get_args(Part)]
    if unknown:
        raise ValueError(f"keep may name {', '.join(get_args(Part))}; got {unknown}")
    if model.cfg.init_mode != "gpt2":
        raise ValueError(
            f"an untrained twin is drawn from a normal distribution (init_mode='gpt2'), but this model has init_mode="
            f"{model.cfg.init_mode!r}; initialise a model of this architecture yourself and use that"
        )
    config = deepcopy(model.cfg)
    # Without the tokenizer's name, which would be looked up on the hub, and without any random draw of TransformerLens's own.
    config.tokenizer_name, config.init_weights = None, False
    with torch.random.fork_rng(devices=[]):
        twin = HookedTransformer(config)
    twin.cfg.tokenizer_name, twin.cfg.tokenizer_prepends_bos = model.cfg.tokenizer_name, model.cfg.tokenizer_prepends_bos
    twin.tokenizer = model.tokenizer
    # A stream of the twin's own: a model that was initialised with the same seed, as the bundled learner was, would otherwise
    # get its initial weights back, and the embeddings that are kept have grown up with those.
    draw_weights(twin, torch.Generator().manual_seed(int(random.Random(f"untrained twin/{seed}").random() * 2**53)))
    trained = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if _part(name) in keep:
                parameter.copy_(trained[name])
    return twin.train(model.training)


def draw_weights(model: HookedTransformer, generator: torch.Generator) -> None:
    """Fill a model that we made ourselves with fresh weights: matrices from N(0, `cfg.initializer_range`²), biases 0, norm
    scales 1. The draw happens in float32 on the CPU, so a generator's seed means the same weights on every device.
    """
    scale = float(model.cfg.initializer_range)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            *modules, leaf = (part.lstrip("_") for part in name.split("."))
            # An expert of a mixture of experts is a module named W_in, whose matrix is its `weight`.
            if leaf.startswith("W_") or (leaf == "weight" and modules[-1].startswith("W_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.fill_(1.0 if leaf == "w" else 0.0)


def _part(parameter_name: str) -> str | None:
    """Say which part of `keep` a parameter belongs to; None for the weights of attention and MLP."""
    *modules, _ = parameter_name.split(".")
    if any(name.startswith("ln") or name.endswith("norm") for name in modules):
        return "ln"
    return modules[0] if modules[0] in ("embed", "pos_embed", "unembed") else None
