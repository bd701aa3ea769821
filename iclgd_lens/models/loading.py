"""Loading models by name, from a folder or from a GGUF file, with the defaults that comparing with gradient descent needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import NAME, load_bundled
from iclgd_lens.models.converting import as_hooked_transformer, longer_window
from iclgd_lens.models.folders import SAFE, Found, read_model
from iclgd_lens.models.hooked import HookedModel, HookedTransformer, NoHookedTransformerError, is_bridge
from iclgd_lens.models.identity import hub_name, known_to_transformer_lens, model_path, require_model
from iclgd_lens.models.quantisation import note_quantisation, quantisation_in
from iclgd_lens.models.surroundings import ordinary_tensors
from iclgd_lens.models.wrapping import around, require_usable

Backend = Literal["auto", "hooked", "bridge"]
"""Which of TransformerLens's classes a model is loaded as."""


def load_model(
    name: str | Path | None = None,
    *,
    hf_model: Any = None,
    tokenizer: Any = None,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    process_weights: bool = False,
) -> HookedModel:
    """Load a hooked model, by default with its weights as they were trained.

    Weight processing (folding layer norms, centring) leaves a model's outputs as they are but changes what a gradient step
    does; `gd` and `lcgd` warn of it.

    Weights are read from safetensors and GGUF files alone, and code that a folder or a repository brings along is not run. A model
    of a folder, a file or in memory is run once before it is returned, on a short prompt and on one longer than every window and
    every length at which it changes, and has to compute there what the Hugging Face model does. Neither inference mode, autocast
    nor torch's default dtype or device, as they are set around this call, have a part in what is loaded.

    Args:
        name: `"bundled"` for the small in-context learner that ships with the package, which is the default; the path of a folder
            that holds a Hugging Face model and its tokenizer; the path of a GGUF file, whose weights are dequantised; or a model
            name that TransformerLens or the hub knows. A leading `~` is the user's home.
        hf_model: Instead of a name, a Hugging Face model in memory. A bridge goes around it, not around a copy: from then on it
            runs through the bridge, in evaluation mode and with eager attention.
        tokenizer: Its tokenizer; only with `hf_model`.
        backend: `"hooked"` for a `HookedTransformer`, `"bridge"` for a `TransformerBridge`, or `"auto"`: a `HookedTransformer`
            where TransformerLens has one for the model that computes the same and has its whole context window, otherwise a
            bridge; around a model in memory always a bridge.
        device: A torch device; by default CUDA where there is one, else the CPU. A model in memory stays where it is.
        dtype: The dtype of the weights, float32 by default. A model in memory keeps its own.
        process_weights: Fold and centre the weights, as `HookedTransformer.from_pretrained` does by default and a bridge's
            `enable_compatibility_mode` does.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If arguments do not go together, torch has no such device here, there is no such path, TransformerLens knows no
            such model or has no such backend for it, the folder or file holds none that it can convert, or weights are a pickle; or
            if a model in memory is wrapped, off-loaded, on several devices or of inference tensors.
        ImportError: If a GGUF file is given, and the package `gguf` is not installed.
        OSError: If the hub cannot be reached and its cache does not hold the model.
        NoHookedTransformerError: If `backend` is `"hooked"`, and TransformerLens has no such class.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    if backend == "hooked" and HookedTransformer is None:
        raise NoHookedTransformerError("backend='hooked'")
    with ordinary_tensors():
        if hf_model is not None:
            if name is not None or device is not None or dtype is not None:
                raise ValueError(
                    "a model in memory (hf_model=) keeps its name, device and dtype; give it alone, with its tokenizer"
                )
            return _processed(_in_memory(hf_model, tokenizer, backend), process_weights)
        if tokenizer is not None:
            raise ValueError("tokenizer= goes with hf_model=; models by name bring their own")
        place, dtype = parse_device(device), torch.float32 if dtype is None else dtype
        if name is None or name == NAME:
            return _processed(load_bundled(device=place, dtype=dtype, bridge=not _wants_hooked(backend)), process_weights)
        path = model_path(name)
        require_model(str(name))
        if path is None:
            return _load_named(str(name), backend, place, dtype, process_weights)
        return _load_path(path, backend, place, dtype, process_weights)


def _wants_hooked(backend: Backend) -> bool:
    return backend == "hooked" or (backend == "auto" and HookedTransformer is not None)


def _processed(model: Any, process_weights: bool) -> HookedModel:
    """The model, its weights processed if they are to be."""
    if process_weights:
        model.enable_compatibility_mode() if is_bridge(model) else model.process_weights_()
    return cast(HookedModel, model)


def _in_memory(hf_model: Any, tokenizer: Any, backend: Backend) -> HookedModel:
    """A model of one in memory."""
    require_usable(hf_model)
    kind = type(hf_model).__name__
    name, what = Path(str(hf_model.name_or_path)).name or kind, f"this {kind}"
    if backend != "hooked":
        return around(hf_model, tokenizer, name, what)
    attention, training = hf_model.config._attn_implementation, hf_model.training
    hf_model.set_attn_implementation("eager")
    try:
        found = Found(hf_model.eval(), tokenizer, quantisation_in(hf_model.config), what)
        return _converted(found, name, str(hf_model.device), hf_model.dtype)
    finally:
        hf_model.train(training)
        hf_model.set_attn_implementation(attention)


def _load_path(path: Path, backend: Backend, device: str, dtype: torch.dtype, process_weights: bool) -> HookedModel:
    """Read a Hugging Face model, convert it or put a bridge around it, and check what came out."""
    found = read_model(path, dtype)
    name = path.stem if path.is_file() else path.name
    refused: list[str] = []
    capped: Any = None
    if _wants_hooked(backend):
        try:
            model: Any = _converted(found, name, device, dtype, process_weights)
            model.cfg.tokenizer_name = str(path)
            if backend == "hooked" or longer_window(model) is None:
                return cast(HookedModel, model)
            capped = model
        except ValueError as error:
            if backend == "hooked":
                raise
            refused = [str(error)]
    try:
        bridge = around(found.hf_model.to(device), found.tokenizer, name, found.what)
    except ValueError as error:
        if capped is not None:
            return cast(HookedModel, capped)
        raise ValueError("; and ".join([*refused, str(error)])) from error
    note_quantisation(bridge, found.quantisation)
    return _processed(bridge, process_weights)


def _converted(found: Found, name: str, device: str, dtype: torch.dtype, process_weights: bool = False) -> HookedModel:
    """A `HookedTransformer` of a Hugging Face model."""
    model = as_hooked_transformer(
        found.hf_model,
        found.tokenizer,
        found.what,
        name=name,
        device=device,
        dtype=dtype,
        process_weights=process_weights,
    )
    note_quantisation(model, found.quantisation)
    return model


def _load_named(name: str, backend: Backend, device: str, dtype: torch.dtype, process_weights: bool) -> HookedModel:
    """Fetch a model by its name."""
    instead = "give the path of a folder that holds the model, or use 'bundled'."
    known, runs_code = known_to_transformer_lens(name), _runs_remote_code(name)
    if _wants_hooked(backend) and known and not runs_code:
        load = HookedTransformer.from_pretrained if process_weights else HookedTransformer.from_pretrained_no_processing
        with hub.asked(f"the model {name!r}", instead):
            return load(name, device=device, dtype=dtype, **SAFE).eval()
    if backend == "hooked":
        if known:
            raise ValueError(
                f"TransformerLens runs code from the hub to make a HookedTransformer of {name!r}; load it with backend='bridge' or "
                "'auto', which run none"
            )
        raise ValueError(f"TransformerLens has no HookedTransformer for {name!r}; load it with backend='bridge' or 'auto'")
    with hub.asked(f"the model {name!r}", instead):
        hf_model: Any = AutoModelForCausalLM.from_pretrained(hub_name(name), dtype=dtype, attn_implementation="eager", **SAFE)
        bridge = TransformerBridge.boot_transformers(hub_name(name), hf_model=hf_model.to(device), device=device, dtype=dtype)
    bridge.original_model.eval()
    return _processed(bridge, process_weights)


def _runs_remote_code(name: str) -> bool:
    """Whether TransformerLens, asked for a `HookedTransformer`, would run code from a model's repository, whatever it is told."""
    if HookedTransformer is None:
        return False
    from transformer_lens.loading_from_pretrained import NEED_REMOTE_CODE_MODELS

    return hub_name(name).startswith(NEED_REMOTE_CODE_MODELS)


def parse_device(device: str | torch.device | None) -> str:
    """Turn a device argument into a torch device name, the best one present for None.

    Raises:
        ValueError: If torch has no such device here, naming those it has.
    """
    present = ["cpu"]
    if torch.cuda.is_available():
        present += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        present.append("mps")
    if device is None:
        return "cuda" if "cuda" in present else "cpu"
    # torch's own name for the CPU may carry a number, which means nothing.
    wanted = "cpu" if str(device) == "cpu:0" else str(device)
    if wanted not in present:
        raise ValueError(f"device={str(device)!r} is not available; here there is {', '.join(present)}")
    return wanted
