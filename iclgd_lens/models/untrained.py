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
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from iclgd_lens.models.bundled.learner import NAME, gpt2_learner, learner_shapes
from iclgd_lens.models.hooked import HookedModel, HookedTransformer, is_bridge, make_bridge

Part = Literal["embed", "pos_embed", "ln", "unembed"]

Model = TypeVar("Model", bound=HookedModel)


def untrained_twin(model: Model, seed: int = 0, keep: Sequence[Part] = ("embed", "pos_embed", "ln", "unembed")) -> Model:
    """Make a model of the same architecture whose weights are drawn anew, but for the parts named in `keep`.

    The twin is a new model on the same device and in the same dtype, with the same tokenizer; `model` is only read. Weight
    matrices are drawn from N(0, `cfg.initializer_range`²), biases are 0 and norms scale nothing, by a generator of its own, so that
    torch's global random state is left alone.

    Args:
        model: The trained model.
        seed: Seeds the new weights.
        keep: The parts taken from `model`: `"embed"` (token embedding), `"pos_embed"`, `"ln"` (every layer norm) and
            `"unembed"`. The paper's baseline keeps all four (the authors' code); its variant keeps `("ln",)`. Where embedding and
            unembedding are one matrix, keeping either keeps it.

    Raises:
        ValueError: If `keep` names an unknown part, the model is one that TransformerLens initialises in another way, or its
            weights are quantized.
    """
    unknown = [part for part in keep if part not in get_args(Part)]
    if unknown:
        raise ValueError(f"keep may name {', '.join(get_args(Part))}; got {unknown}")
    if model.cfg.init_mode != "gpt2":
        raise ValueError(
            f"an untrained twin is drawn from a normal distribution (init_mode='gpt2'), but this model has init_mode="
            f"{model.cfg.init_mode!r}; initialise a model of this architecture yourself and use that"
        )
    # A stream of the twin's own: a model that was initialised with the same seed, as the bundled learner was, would otherwise
    # get its initial weights back, and the embeddings that are kept have grown up with those.
    generator = torch.Generator().manual_seed(int(random.Random(f"untrained twin/{seed}").random() * 2**53))
    # What is initialised on the way, here or by a bridge, draws from torch's own.
    with torch.random.fork_rng(devices=[]):
        drawn = (_untrained_bridge if is_bridge(model) else _untrained_transformer)(model, generator, keep)
    return cast(Model, drawn)


def _untrained_transformer(model: Any, generator: torch.Generator, keep: Sequence[Part]) -> HookedTransformer:
    config = deepcopy(model.cfg)
    # Without the tokenizer's name, which would be looked up on the hub, and without any random draw of TransformerLens's own.
    config.tokenizer_name, config.init_weights = None, False
    twin = HookedTransformer(config)
    twin.cfg.tokenizer_name, twin.cfg.tokenizer_prepends_bos = model.cfg.tokenizer_name, model.cfg.tokenizer_prepends_bos
    twin.tokenizer = model.tokenizer
    draw_weights(twin, generator)
    trained = dict(model.named_parameters())
    _take_over(twin.named_parameters(), trained, [name for name in trained if _part(name) in keep])
    return twin.train(model.training)


def _untrained_bridge(model: Any, generator: torch.Generator, keep: Sequence[Part]) -> HookedModel:
    source, cfg = model.original_model, model.cfg
    if getattr(source, "is_quantized", False):
        raise ValueError("the model's weights are quantized, and no untrained twin of it can be drawn; load it unquantized")
    if cfg.model_name == NAME:
        # Drawn as the HookedTransformer's are, so that a seed means the same twin.
        state = {name: torch.empty(shape) for name, shape in learner_shapes().items()}
        _draw(state.items(), float(cfg.initializer_range), generator)
        twin: Any = gpt2_learner(state)
    else:
        twin = type(source)(deepcopy(source.config))
        _draw_hugging_face(twin, float(cfg.initializer_range), generator)
    twin = twin.to(cfg.device, cfg.dtype)
    trained = {name.replace("._original_component", ""): parameter for name, parameter in source.named_parameters()}
    names = _names(twin)
    _take_over(twin.named_parameters(), trained, {name for part in keep for name in names[part]})
    return make_bridge(twin.train(source.training), tokenizer=model.tokenizer, name=cfg.model_name, architecture=cfg.architecture)


def draw_weights(model: HookedTransformer, generator: torch.Generator) -> None:
    """Fill a model that we made ourselves with fresh weights: matrices from N(0, `cfg.initializer_range`²), biases 0, norm
    scales 1. The draw happens in float32 on the CPU, so a generator's seed means the same weights on every device.
    """
    _draw(model.named_parameters(), float(model.cfg.initializer_range), generator)


def _draw(named: Iterable[tuple[str, Tensor]], scale: float, generator: torch.Generator) -> None:
    """Fill parameters that have TransformerLens's names."""
    with torch.no_grad():
        for name, parameter in named:
            *modules, leaf = (part.lstrip("_") for part in name.split("."))
            # An expert of a mixture of experts is a module named W_in, whose matrix is its `weight`.
            if leaf.startswith("W_") or (leaf == "weight" and modules[-1].startswith("W_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            else:
                parameter.fill_(1.0 if leaf == "w" else 0.0)


def _draw_hugging_face(model: nn.Module, scale: float, generator: torch.Generator) -> None:
    """Fill a new Hugging Face model: matrices are drawn and biases are 0. Norms stay as their classes begin, since some keep a
    scale and others its difference from 1.
    """
    norms = _names(model)["ln"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in norms:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale if parameter.ndim > 1 else torch.tensor(0.0))


def _take_over(into: Iterable[tuple[str, nn.Parameter]], trained: Mapping[str, nn.Parameter], names: Collection[str]) -> None:
    with torch.no_grad():
        for name, parameter in into:
            if name in names:
                parameter.copy_(trained[name])


def _part(parameter_name: str) -> str | None:
    """Say which part of `keep` a parameter of a `HookedTransformer` belongs to; None for the weights of attention and MLP."""
    *modules, _ = parameter_name.split(".")
    if any(name.startswith("ln") or name.endswith("norm") for name in modules):
        return "ln"
    return modules[0] if modules[0] in ("embed", "pos_embed", "unembed") else None


def _names(model: Any) -> dict[str, set[str]]:
    """The names of a Hugging Face model's parameters in each part of `keep`."""
    embed, unembed = model.get_input_embeddings(), model.get_output_embeddings()
    modules: dict[str, list[nn.Module]] = {
        "embed": [embed],
        "unembed": [unembed],
        "pos_embed": [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not embed],
        "ln": [each for each in model.modules() if "norm" in type(each).__name__.lower()],
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {part: {names[id(each)] for module in found for each in module.parameters()} for part, found in modules.items()}
