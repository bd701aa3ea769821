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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from iclgd_lens.models.bundled.learner import BundledGPT2, gpt2_learner, learner_shapes
from iclgd_lens.models.hooked import HookedModel, HookedTransformer, is_bridge, make_bridge
from iclgd_lens.models.lengths import text_config
from iclgd_lens.models.quantisation import note_quantisation, quantisation_of
from iclgd_lens.models.surroundings import ordinary_tensors

Part = Literal["embed", "pos_embed", "ln", "unembed"]

Model = TypeVar("Model", bound=HookedModel)


def untrained_twin(model: Model, seed: int = 0, keep: Iterable[Part] = ("embed", "pos_embed", "ln", "unembed")) -> Model:
    """Make a model of the same architecture whose weights are drawn anew, but for the parts named in `keep`.

    The twin is a new model on the same device, with the same tokenizer and in the same mode; `model` is only read. Each weight and
    each buffer has the dtype that it has in `model`. What is drawn depends on the seed and the architecture alone: it is drawn in
    float32 on the CPU and then cast, whatever torch's default dtype and device are, and torch's random state is left alone.

    A bridge's twin is initialised as Hugging Face initialises its architecture: by `_init_weights` of its class, which knows of
    OPT's `init_std`, of the smaller residual projections of GPT-2, and of experts. A weight that this leaves as memory happened to
    be is drawn from N(0, `initializer_range`²) of its configuration. A twin has plain weights: it has no adapters, and none of its
    weights is quantised.

    A `HookedTransformer`'s twin, and the bundled learner's, is initialised as TransformerLens does it: all weight matrices from
    N(0, `cfg.initializer_range`²), biases 0, norm scales 1. So it differs from a bridge's twin where Hugging Face's own
    initialisation gives matrices unequal spreads, as that of GPT-2 does. `load_model` takes `cfg.initializer_range` over from a
    model that it converts; models that TransformerLens loads by name have the value that TransformerLens gives them, 0.02 or
    0.8/√d_model.

    Args:
        model: The trained model.
        seed: Seeds the new weights.
        keep: The parts taken from `model`: `"embed"` (token embedding), `"pos_embed"`, `"ln"` (every layer norm) and
            `"unembed"`. The paper's baseline keeps all four (the authors' code); its variant keeps `("ln",)`. Where embedding and
            unembedding are one matrix, keeping either keeps it.

    Raises:
        ValueError: If `keep` names an unknown part, the model is a `HookedTransformer` that TransformerLens initialises in another
            way, or a part to keep has other weights in `model` than in a new model, as one with an adapter or in int8 has.
    """
    parts = tuple(keep)
    unknown = [part for part in parts if part not in get_args(Part)]
    if unknown:
        raise ValueError(f"keep may name {', '.join(get_args(Part))}; got {unknown}")
    if model.cfg.init_mode != "gpt2":
        raise ValueError(
            f"an untrained twin is drawn from a normal distribution (init_mode='gpt2'), but this model has init_mode="
            f"{model.cfg.init_mode!r}; initialise a model of this architecture yourself and use that"
        )
    # A stream of the twin's own: a model that was initialised with the same seed, as the bundled learner was, would otherwise
    # get its initial weights back, and the embeddings that are kept have grown up with those.
    number = int(random.Random(f"untrained twin/{seed}").random() * 2**53)
    # What is initialised on the way, here or by a bridge, draws from torch's own.
    with ordinary_tensors(), torch.random.fork_rng(devices=[]):
        drawn = (_untrained_bridge if is_bridge(model) else _untrained_transformer)(model, number, parts)
    return cast(Model, drawn)


def _untrained_transformer(model: Any, number: int, keep: Sequence[Part]) -> HookedTransformer:
    config = deepcopy(model.cfg)
    # Without the tokenizer's name, which would be looked up on the hub, and without any random draw of TransformerLens's own.
    config.tokenizer_name, config.init_weights = None, False
    twin = HookedTransformer(config)
    twin.cfg.tokenizer_name, twin.cfg.tokenizer_prepends_bos = model.cfg.tokenizer_name, model.cfg.tokenizer_prepends_bos
    twin.tokenizer = model.tokenizer
    draw_weights(twin, torch.Generator("cpu").manual_seed(number))
    trained = dict(model.named_parameters())
    _in_the_dtypes_of(twin, trained, dict(model.named_buffers()), model.cfg.dtype)
    _take_over(twin, trained, [name for name in trained if _part(name) in keep])
    return twin.train(model.training)


def _untrained_bridge(model: Any, number: int, keep: Sequence[Part]) -> HookedModel:
    source, cfg = model.original_model, model.cfg
    if isinstance(source, BundledGPT2):
        # Drawn as the HookedTransformer's are, so that a seed means the same twin.
        state = {name: torch.empty(shape) for name, shape in learner_shapes().items()}
        _draw(state.items(), float(cfg.initializer_range), torch.Generator("cpu").manual_seed(number))
        twin: Any = gpt2_learner(state)
    else:
        twin = _initialised(source, number)
    trained, buffers = (
        {name.replace("._original_component", ""): tensor for name, tensor in named}
        for named in (source.named_parameters(), source.named_buffers())
    )
    names = _names(twin)
    _in_the_dtypes_of(twin, trained, buffers, cfg.dtype)
    _take_over(twin, trained, [name for part in keep for name in sorted(names[part])])
    twin = twin.to(cfg.device).train(source.training)
    made = make_bridge(twin, tokenizer=model.tokenizer, name=cfg.model_name, architecture=cfg.architecture)
    note_quantisation(made, quantisation_of(model))
    return made


def _initialised(source: Any, number: int) -> Any:
    """A new Hugging Face model, as its class initialises it, drawn by torch's own generator on the CPU."""
    torch.default_generator.manual_seed(number)
    with _nan_where_uninitialised():
        twin = type(source)(deepcopy(source.config))
    scale = float(getattr(text_config(source.config), "initializer_range", None) or 0.02)
    with torch.no_grad():
        for parameter in twin.parameters():
            if not parameter.isfinite().all():
                parameter.copy_(scale * torch.randn(parameter.shape, dtype=torch.float32))
    return twin


@contextmanager
def _nan_where_uninitialised() -> Iterator[None]:
    """Memory that nothing is written to would otherwise pass for weights, other ones each time."""
    # torch fills new memory with NaN in this mode, unless `fill_uninitialized_memory` was switched off.
    filling: Any = torch.utils.deterministic
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)
        filling.fill_uninitialized_memory = fills


def _in_the_dtypes_of(
    twin: nn.Module, trained: Mapping[str, Tensor], buffers: Mapping[str, Tensor], otherwise: torch.dtype
) -> None:
    """Cast each parameter and each buffer to the dtype that it has in the model: rotary frequencies stay float32 where they are."""
    for name, parameter in twin.named_parameters():
        like = trained.get(name)
        parameter.data = parameter.data.to(like.dtype if like is not None and like.is_floating_point() else otherwise)
    for prefix, module in twin.named_modules():
        for name, buffer in module._buffers.items():
            wanted = buffers.get(f"{prefix}.{name}".removeprefix("."))
            if buffer is not None and wanted is not None:
                module._buffers[name] = buffer.to(wanted.dtype)


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
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu") * scale)
            else:
                parameter.fill_(1.0 if leaf == "w" else 0.0)


def _take_over(twin: nn.Module, trained: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Copy weights of the model by name.

    Raises:
        ValueError: If the model has no such weight, or one that is no plain number for number.
    """
    new = dict(twin.named_parameters())
    with torch.no_grad():
        for name in names:
            kept = trained.get(name)
            if kept is None or kept.shape != new[name].shape or not kept.is_floating_point():
                raise ValueError(
                    f"keep names a part whose weight {name} a new model of the architecture has and this model has not (it has an "
                    "adapter there, or it is quantised); leave that part out of keep, or merge the adapter into the weight first"
                )
            new[name].copy_(kept)


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
