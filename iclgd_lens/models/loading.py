"""Loading models by name or from a folder, with the defaults that comparing with gradient descent needs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast, get_args

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.supported_models import MODEL_ALIASES, OFFICIAL_MODEL_NAMES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from iclgd_lens import hub
from iclgd_lens.models.bundled.learner import load_bundled
from iclgd_lens.models.hooked import HookedModel, HookedTransformer, NoHookedTransformerError, is_bridge, make_bridge
from iclgd_lens.models.readout import LogitLens
from iclgd_lens.models.sites import sites_of

Backend = Literal["auto", "hooked", "bridge"]
"""Which of TransformerLens's classes a model is loaded as."""

PICKLED_BY_TRANSFORMER_LENS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")
"""Whose models TransformerLens keeps as pickles on the hub, and unpickles without a check."""

_SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""How Hugging Face models are read: weights are never unpickled, and code beside them never run, nor anybody asked whether to."""

SAME_OUTPUTS = {64: 1e-5, 32: 1e-4, 16: 0.05}
"""How much log-probabilities may differ between a model and its conversion, relative to the largest, by the bits of its dtype."""


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

    Weights are read from safetensors files alone, and code that a folder or a repository brings along is not run.

    Args:
        name: `"bundled"` for the small in-context learner that ships with the package, which is the default; the path of a folder
            that holds a Hugging Face model and its tokenizer; or a model name that TransformerLens or the hub knows.
        hf_model: Instead of a name, a Hugging Face model in memory. A bridge goes around it, not around a copy: from then on it
            runs through the bridge, in evaluation mode and with eager attention.
        tokenizer: Its tokenizer; only with `hf_model`.
        backend: `"hooked"` for a `HookedTransformer`, `"bridge"` for a `TransformerBridge`, or `"auto"`: a `HookedTransformer`
            where TransformerLens has one for the model, otherwise a bridge; around a model in memory always a bridge.
        device: A torch device; by default CUDA where there is one, else the CPU. A model in memory stays where it is.
        dtype: The dtype of the weights, float32 by default. A model in memory keeps its own.
        process_weights: Fold and centre the weights, as `HookedTransformer.from_pretrained` does by default and a bridge's
            `enable_compatibility_mode` does.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If arguments do not go together, torch has no such device here, TransformerLens knows no such model or has no
            such backend for it, the folder holds none that it can convert, or weights are a pickle.
        OSError: If the hub cannot be reached and its cache does not hold the model.
        NoHookedTransformerError: If `backend` is `"hooked"`, and TransformerLens has no such class.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    if backend == "hooked" and HookedTransformer is None:
        raise NoHookedTransformerError("backend='hooked'")
    if hf_model is not None:
        if name is not None or device is not None or dtype is not None:
            raise ValueError("a model in memory (hf_model=) keeps its name, device and dtype; give it alone, with its tokenizer")
        return _processed(_around(hf_model, tokenizer, backend), process_weights)
    if tokenizer is not None:
        raise ValueError("tokenizer= goes with hf_model=; models by name bring their own")
    place, dtype = parse_device(device), torch.float32 if dtype is None else dtype
    name = "bundled" if name is None else name
    if name == "bundled":
        return _processed(load_bundled(device=place, dtype=dtype, bridge=not _wants_hooked(backend)), process_weights)
    if Path(name).is_dir():
        return _load_folder(Path(name), backend, place, dtype, process_weights)
    return _load_named(str(name), backend, place, dtype, process_weights)


def _wants_hooked(backend: Backend) -> bool:
    return backend == "hooked" or (backend == "auto" and HookedTransformer is not None)


def _processed(model: Any, process_weights: bool) -> HookedModel:
    """The model, its weights processed if they are to be."""
    if process_weights:
        model.enable_compatibility_mode() if is_bridge(model) else model.process_weights_()
    return cast(HookedModel, model)


def _around(hf_model: Any, tokenizer: Any, backend: Backend) -> HookedModel:
    """A model around one in memory."""
    kind = type(hf_model).__name__
    if not isinstance(hf_model, PreTrainedModel):
        raise ValueError(f"hf_model must be a Hugging Face model, a transformers.PreTrainedModel; got {kind}")
    name = Path(str(hf_model.name_or_path)).name or kind
    if backend == "hooked":
        config = _with_context_window({**hf_model.config.to_dict(), "architectures": [kind]})
        model = _as_hooked_transformer(config, hf_model, tokenizer, f"this {kind}", str(hf_model.device), hf_model.dtype)
        model.cfg.model_name = name
        return model
    hf_model.eval()
    hf_model.set_attn_implementation("eager")
    return _bridged(hf_model, tokenizer, name, f"this {kind}")


def _bridged(hf_model: Any, tokenizer: Any, name: str, what: str) -> HookedModel:
    """A bridge around a Hugging Face model, if there is one for it, and it and its readout compute what the model does."""
    config = hf_model.config.get_text_config()
    window = getattr(config, "max_position_embeddings", None) or 64
    tokens = torch.arange(min(64, window, config.vocab_size), device=hf_model.device)[None]
    expected: Any = None
    # Before it is wrapped. What cannot be run so is refused by name, below.
    with suppress(Exception), torch.no_grad():
        expected = hf_model(tokens).logits.float().log_softmax(dim=-1)
    try:
        bridge = make_bridge(hf_model, tokenizer=tokenizer, name=name)
    except Exception as error:  # whatever an adapter for another shape of model stumbles over
        raise ValueError(f"TransformerLens has no bridge for {what} ({type(hf_model).__name__}): {error}") from error
    sites = sites_of(bridge)
    seen: list[torch.Tensor] = []
    try:
        with torch.no_grad(), sites.attach([(sites.residual_out[-1], lambda residual, hook: seen.append(residual))]):
            logits = bridge(tokens)
            read_out = LogitLens.of(bridge)(seen[0])
    except Exception as error:  # of a bridge that does not know this version of the model
        raise ValueError(f"TransformerLens's bridge for {what} ({type(hf_model).__name__}) does not run: {error}") from error
    for found in (logits, read_out):
        _require_same(found.float().log_softmax(dim=-1), expected, bridge, what)
    return bridge


def hub_name(name: str) -> str:
    """What the hub calls a model that TransformerLens has a name for; other names are their own."""
    return _aliases().get(name.lower(), name)


def shown_name(name: str) -> str:
    """What a model is called in results: its name, or its folder's, without the path."""
    return Path(name).name if Path(name).is_dir() else name


def require_model(name: str) -> None:
    """Check that a name may be a model's, without fetching it.

    Raises:
        ValueError: If it is neither `"bundled"`, a folder, a name that TransformerLens knows nor one that the hub might know; or if
            its weights are a pickle.
    """
    aliases = _aliases()
    if not Path(name).is_dir() and hub_name(name).startswith(PICKLED_BY_TRANSFORMER_LENS):
        raise ValueError(
            f"the weights of {name!r} ({hub_name(name)} on the hub) are a pickle, and reading one runs whatever code it holds. "
            f"Where you trust it, load it yourself, HookedTransformer.from_pretrained_no_processing({name!r}), and use that model"
        )
    if name == "bundled" or "/" in name or Path(name).is_dir() or name.lower() in aliases:
        return
    close = difflib.get_close_matches(name, ["bundled", *aliases], n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise ValueError(
        f"unknown model {name!r}{hint} It may be 'bundled', a folder with a Hugging Face model, or a name that TransformerLens "
        "knows"
    )


def _load_named(name: str, backend: Backend, device: str, dtype: torch.dtype, process_weights: bool) -> HookedModel:
    """Fetch a model by its name."""
    require_model(name)
    instead = "give the path of a folder that holds the model, or use 'bundled'."
    known, runs_code = name.lower() in _aliases(), _runs_remote_code(name)
    if _wants_hooked(backend) and known and not runs_code:
        load = HookedTransformer.from_pretrained if process_weights else HookedTransformer.from_pretrained_no_processing
        with hub.asked(f"the model {name!r}", instead):
            return load(name, device=device, dtype=dtype, **_SAFE).eval()
    if backend == "hooked":
        if known:
            raise ValueError(
                f"TransformerLens runs code from the hub to make a HookedTransformer of {name!r}; load it with backend='bridge' or "
                "'auto', which run none"
            )
        raise ValueError(f"TransformerLens has no HookedTransformer for {name!r}; load it with backend='bridge' or 'auto'")
    with hub.asked(f"the model {name!r}", instead):
        hf_model: Any = AutoModelForCausalLM.from_pretrained(hub_name(name), dtype=dtype, attn_implementation="eager", **_SAFE)
        bridge = TransformerBridge.boot_transformers(hub_name(name), hf_model=hf_model.to(device), device=device, dtype=dtype)
    bridge.original_model.eval()
    return _processed(bridge, process_weights)


def _runs_remote_code(name: str) -> bool:
    """Whether TransformerLens, asked for a `HookedTransformer`, would run code from a model's repository, whatever it is told."""
    if HookedTransformer is None:
        return False
    from transformer_lens.loading_from_pretrained import NEED_REMOTE_CODE_MODELS

    return hub_name(name).startswith(NEED_REMOTE_CODE_MODELS)


def _aliases() -> dict[str, str]:
    """The hub's names of models by the names that TransformerLens knows them by."""
    named = {name.lower(): name for name in OFFICIAL_MODEL_NAMES}
    return named | {alias.lower(): name for name, found in MODEL_ALIASES.items() for alias in found}


def _load_folder(folder: Path, backend: Backend, device: str, dtype: torch.dtype, process_weights: bool) -> HookedModel:
    """Load a Hugging Face model from a folder, convert it or put a bridge around it, and check what came out."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"the folder {folder} holds no Hugging Face model: there is no config.json")
    _refuse_pickles(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with _no_progress_bar():
            read: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, local_files_only=True, output_loading_info=True, attn_implementation="eager", **_SAFE
            )
        hf_model, loaded = read
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of any of the libraries that read the files
        raise ValueError(f"the folder {folder} does not hold a whole model and tokenizer: {error}") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"the weights in {folder} lack {len(missing)} tensors, {missing[0]} among them")
    if not tokenizer.encode("Label", add_special_tokens=False):
        raise ValueError(f"the folder {folder} holds no tokenizer that knows words; save the model's tokenizer there")
    what, hf_model = f"the model in {folder}", hf_model.eval()
    refused = ""
    if _wants_hooked(backend):
        try:
            model: Any = _as_hooked_transformer(
                _with_context_window(config), hf_model, tokenizer, what, device, dtype, process_weights
            )
            model.cfg.model_name, model.cfg.tokenizer_name = folder.name, str(folder)
            return cast(HookedModel, model)
        except ValueError as error:
            if backend == "hooked":
                raise
            refused = f"{error}; and "
    try:
        bridge = _bridged(hf_model.to(device), tokenizer, folder.name, what)
    except ValueError as error:
        raise ValueError(f"{refused}{error}") from error
    return _processed(bridge, process_weights)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for suffix in ("bin", "pt", "pth") for file in folder.glob(f"*.{suffix}"))
    # Training leaves pickles of its arguments beside weights that are none.
    if pickles and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"the weights in {folder} are a pickle ({pickles[0]}), and reading one may run whatever code it holds. Where you trust "
            "it, write them as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )


def _with_context_window(config: dict[str, Any]) -> dict[str, Any]:
    # TransformerLens reads GPT-2's window under an older name, which newer files leave out.
    return {"n_ctx": config["n_positions"], **config} if "n_positions" in config else config


def _as_hooked_transformer(
    config: dict[str, Any],
    hf_model: Any,
    tokenizer: Any,
    what: str,
    device: str,
    dtype: torch.dtype,
    process_weights: bool = False,
) -> HookedTransformer:
    """A `HookedTransformer` with the weights of a Hugging Face model, if it computes the same."""
    try:
        model = _convert(config, hf_model, tokenizer, device, dtype, process_weights)
    except Exception as error:  # whatever a converter for another shape of model stumbles over
        architecture = ", ".join(config.get("architectures") or ["none named"])
        raise ValueError(f"TransformerLens cannot convert {what} (architecture {architecture}): {error}") from error
    tokens = torch.arange(min(64, model.cfg.n_ctx, model.cfg.d_vocab), device=model.cfg.device)[None]
    with torch.no_grad():
        ours = model(tokens).float().log_softmax(dim=-1)
        theirs = hf_model(tokens.to(hf_model.device)).logits.float().log_softmax(dim=-1)
    _require_same(ours, theirs, model, what)
    return model.eval()


def _convert(
    config: dict[str, Any], hf_model: Any, tokenizer: Any, device: str, dtype: torch.dtype, process_weights: bool
) -> HookedTransformer:
    from transformer_lens import loading_from_pretrained

    # TransformerLens takes the architecture from a name before it looks at the configuration; this folder's name says nothing.
    with TemporaryDirectory() as neutral:
        (Path(neutral) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cfg = loading_from_pretrained.get_pretrained_model_config(
            neutral, hf_cfg=hf_model.config.to_dict(), fold_ln=process_weights, device=device, dtype=dtype
        )
        state = loading_from_pretrained.get_pretrained_state_dict(neutral, cfg, hf_model, dtype=dtype)
    # Without a tokenizer, it would look for one there.
    cfg.tokenizer_name = None
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    model.load_and_process_state_dict(
        state, **dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), process_weights)
    )
    model.move_model_modules_to_device()
    return model


def _require_same(ours: torch.Tensor, theirs: torch.Tensor, model: HookedModel, what: str) -> None:
    """A configuration may say something that is not read, such as another base of rotary positions or a scale of logits."""
    difference = float((ours.cpu() - theirs.cpu()).abs().max() / theirs.abs().max())
    if not difference < SAME_OUTPUTS[torch.finfo(model.cfg.dtype).bits]:
        raise ValueError(
            f"{what} comes out as another model, with log-probabilities that are {difference:.1e} off: TransformerLens does not "
            "read all of its configuration"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


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
